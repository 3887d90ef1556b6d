"""The weights of a distillation's teachers: values of the trained parameters with which the model is a teacher.

A teacher is an earlier adapter of the same model. If the student trains adapters, the teacher's matrices
are the first rows and columns of the student's own ones, and zero elsewhere; if it trains weights, the
teacher's values are the weights with the adapter added. So a teacher takes no second model, and its values
are exchanged with the student's as those of the moving average are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from flowgrpo.losses.teachers import KEY, PIPELINE
from flowgrpo.policy.adapters import INIT, LayerStart, read_layers
from flowgrpo.policy.model_files import check_start, require
from flowgrpo.policy.settings import LoRA, Noise, Weights

Layers = Mapping[str, Mapping[str, LayerStart]]
"""The layers of an adapter, by denoiser and by layer."""
FIRST, SECOND = ".lora_A.default.weight", ".lora_B.default.weight"
"""Ends of the names of a trained layer's two matrices."""


def read_teachers(pipeline: DiffusionPipeline, paths: Sequence[str]) -> dict[str, Layers]:
    """The layers of each teacher's adapter, by its path.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If one does not fit the pipeline.
    """
    found: dict[str, Layers] = {}
    for path in paths:
        if path == PIPELINE:
            found[path] = {}
            continue
        try:
            found[path] = read_layers(pipeline, path, KEY, "use a LoRA as teacher")
        except (FileNotFoundError, ValueError) as error:
            text = str(error)
            if (Path(path).expanduser() / "model_index.json").is_file():
                text += "; it is a whole pipeline: set weights = 'model' for this teacher"
            raise type(error)(text if KEY in text else f"{KEY}: {text}") from error
    return found


def require_found(weights: Weights | Noise | None, teachers: Sequence[str]) -> None:
    """Check, before a model is loaded, that the adapters from which it starts or learns exist.

    Raises:
        FileNotFoundError: If one does not.
    """
    if isinstance(weights, LoRA) and weights.init:
        require(weights.init, INIT, check_start)
    for path in teachers:
        if path != PIPELINE:
            require(path, KEY, check_start)


def teacher_values(
    path: str,
    layers: Layers,
    parameters: Mapping[str, nn.Parameter],
    denoisers: Mapping[str, ModelMixin],
    weights: Weights,
) -> list[Tensor]:
    """The values of the trained parameters with which the model is the teacher, in main memory.

    Args:
        path: The teacher's path, for messages.
        layers: Its adapter.
        parameters: The trained parameters, before training, whole.
        denoisers: The trained denoisers, by their names in the pipeline.
        weights: What is trained.

    Raises:
        ValueError: If the adapter belongs to another model, or changes what the student does not train.
    """
    values = {
        name: torch.zeros_like(p, device="cpu")
        if isinstance(weights, LoRA)
        else p.detach().cpu().clone()
        for name, p in parameters.items()
    }
    for part, own in layers.items():
        if part not in denoisers:
            raise ValueError(
                f"{KEY}: {path} also adapts {part}, which this run does not train; use a teacher without it, or "
                "train it (model.weights.models)"
            )
        for layer, start in own.items():
            _require_layer(path, part, layer, start, denoisers[part])
            if isinstance(weights, LoRA):
                _set_matrices(path, f"{part}.{layer}", start, values, weights)
            else:
                _add_product(path, f"{part}.{layer}", start, values)
    return list(values.values())


def _require_layer(path: str, part: str, layer: str, start: LayerStart, model: ModelMixin) -> None:
    """Raise ValueError if a model has no layer of this name and size."""
    try:
        module: nn.Module = model.get_submodule(layer)
    except AttributeError:
        module = nn.Identity()
    base = getattr(module, "base_layer", module)
    shape = getattr(base, "weight", torch.empty(0)).shape
    wanted = (start.up.shape[0], start.down.shape[1])
    # The weights of a quantised layer have another shape.
    sizes = [getattr(base, n, 0) for n in ("out_features", "in_features")]
    if tuple(shape[:2]) != wanted and tuple(sizes) != wanted:
        raise ValueError(
            f"{KEY}: {path} was made for another model: {part} has no layer {layer!r} of {wanted[1]} inputs and "
            f"{wanted[0]} outputs; a teacher must have the student's architecture"
        )


def _set_matrices(
    path: str, layer: str, start: LayerStart, values: Mapping[str, Tensor], lora: LoRA
) -> None:
    """Set the matrices of the student's adapter to the effect of the teacher's."""
    if layer + FIRST not in values:
        raise ValueError(
            f"{KEY}: {path} adapts {layer}, which is outside of model.weights.targets; the student must train "
            "all layers of its teachers, so add it to the targets"
        )
    rank = len(start.down)
    if rank > lora.rank:
        raise ValueError(
            f"{KEY}: {path} has rank {rank}; set model.weights.rank to at least {rank}, not {lora.rank}"
        )
    down, up = values[layer + FIRST], values[layer + SECOND]
    down[:rank] = start.down.to(down)
    up[:, :rank] = start.up.to(up) * (lora.rank / lora.alpha)


def _add_product(path: str, layer: str, start: LayerStart, values: Mapping[str, Tensor]) -> None:
    """Add the product of an adapter's matrices to a weight."""
    name = f"{layer}.weight"
    if name not in values:
        raise ValueError(
            f"{KEY}: {path} adapts {layer}, which model.weights.parameters leaves out; the student must train all "
            "layers of its teachers"
        )
    up = start.up.flatten(1)
    product = (up @ start.down.flatten(1)).reshape(values[name].shape)
    values[name] += product.to(values[name])


def digest(values: Sequence[Tensor]) -> str:
    """The SHA-256 of a teacher's values."""
    total = hashlib.sha256()
    for value in values:
        total.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
