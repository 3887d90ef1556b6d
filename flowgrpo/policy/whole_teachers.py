"""Teachers that are other models of the student's architecture, in place of adapters of it.

Only the denoisers are read; encoders, decoder and scheduler are the student's. The weights are in main
memory, and are exchanged with the student's while the teacher is evaluated. Adapters of the student are
disabled meanwhile.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from flowgrpo.losses.teachers import KEY
from flowgrpo.policy.loading import complete_weights, expanded, pipeline_folder, variant_of
from flowgrpo.policy.settings import ModelSource

Whole = Mapping[str, Tensor]
"""The weights of all denoisers, by ``<denoiser>.<parameter>``."""


def read_whole_teachers(
    paths: Sequence[str], denoisers: Mapping[str, ModelMixin], dtype: torch.dtype
) -> dict[str, Whole]:
    """The weights of whole teachers, by their paths.

    Args:
        paths: Folders or hub ids of pipelines.
        denoisers: The student's denoisers, without trained adapters.
        dtype: Precision in which the weights are kept.

    Raises:
        FileNotFoundError: If one is no pipeline.
        ValueError: If its denoisers are not of the student's architecture.
    """
    return {path: _weights(path, denoisers, dtype) for path in paths}


def _weights(path: str, denoisers: Mapping[str, ModelMixin], dtype: torch.dtype) -> Whole:
    try:
        folder = pipeline_folder(ModelSource(path=expanded(path)))
    except FileNotFoundError as error:
        export = Path(path).expanduser() / "export"
        hint = f"; the weights of this run are in {export}" if export.is_dir() else ""
        raise FileNotFoundError(f"{KEY}: {error}{hint}") from error
    found: dict[str, Tensor] = {}
    for name, student in denoisers.items():
        if not (folder / name / "config.json").is_file():
            raise ValueError(
                f"{KEY}: the pipeline {path} has no {name}, and the student has one; a teacher must have the student's "
                "architecture"
            )
        given = type(student).load_config(str(folder / name))
        kind = given.get("_class_name", type(student).__name__)
        if kind != type(student).__name__:
            raise ValueError(
                f"{KEY}: the {name} of {path} is a {kind}, and the student's a {type(student).__name__}; a teacher must "
                "have the student's architecture"
            )
        with complete_weights(path):
            try:
                model = type(student).from_pretrained(
                    str(folder), subfolder=name, torch_dtype=dtype, variant=variant_of(folder)
                )
            except OSError as error:
                raise ValueError(
                    f"{KEY}: the weights of the {name} of {path} cannot be read; download or export them again "
                    f"({str(error).strip()})"
                ) from error
        own = {k: v.detach() for k, v in model.named_parameters()}
        _require_alike(path, name, own, dict(student.named_parameters()))
        found |= {f"{name}.{k}": v for k, v in own.items()}
    return found


def _require_alike(path: str, name: str, own: Whole, student: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError if two denoisers' parameters differ in names or shapes."""
    shapes = [{k: tuple(v.shape) for k, v in some.items()} for some in (own, student)]
    other = next((k for k in [*own, *student] if shapes[0].get(k) != shapes[1].get(k)), None)
    if other is not None:
        words = [str(list(s[other])) if other in s else "absent" for s in shapes]
        raise ValueError(
            f"{KEY}: {path} has another architecture than the student: {name}.{other} is {words[0]} in the teacher and "
            f"{words[1]} in the student; use a teacher of the same one"
        )


def exchanged_for(
    weights: Whole, denoisers: Mapping[str, ModelMixin]
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The student's parameters that a teacher replaces, and the teacher's values on their device.

    Args:
        weights: The teacher.
        denoisers: The student's denoisers, with adapters, whose own matrices are left out.
    """
    parameters, values = [], []
    for name, model in denoisers.items():
        for key, parameter in model.named_parameters():
            # PEFT puts the adapted layer into one of its own.
            value = weights.get(f"{name}.{key.replace('.base_layer.', '.')}")
            if value is not None:
                parameters.append(parameter)
                values.append(value.to(parameter.device, parameter.dtype))
    return parameters, values
