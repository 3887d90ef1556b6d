"""Adapters in the formats of diffusers, ComfyUI and sd-scripts.

Programs disagree on alpha: ComfyUI ignores the metadata in which diffusers keeps it. Every format
therefore has ``alpha / rank`` multiplied into its weights, and alpha equal to the rank: a program that
reads alpha and one that ignores it apply the same adapter. The multiplication is exact if
``alpha / rank`` is a power of two, and otherwise rounds once in fp32.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from flowgrpo.data.files import reached
from flowgrpo.policy.export.layer_names import FAMILIES, Family, Place, place_of
from flowgrpo.policy.weights import ADAPTER, swapped

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FOLDER, KOHYA_FOLDER = "comfyui", "kohya"
"""In folders of their own, because diffusers would not know which of several files to load."""
EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}
"""Names in ComfyUI's workflows of Wan 2.2's experts."""


@dataclass(frozen=True)
class Matrices:
    """The two matrices of an adapted layer, whose product is added to its weight.

    Attributes:
        down: ``(rank, in)``, or ``(rank, in, kh, kw)`` of a convolution.
        up: ``(out, rank)``, or ``(out, rank, 1, 1)``; includes ``alpha / rank``.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Number of rows of the first matrix."""
        return len(self.down)


@contextmanager
def folded(models: Sequence[ModelMixin]) -> Iterator[None]:
    """Inside the context the adapters have alpha equal to their rank and the same effect in a file."""
    configs = [m.peft_config[ADAPTER] for m in models]
    alphas = [c.lora_alpha for c in configs]
    ups, scaled = [], []
    for model, config in zip(models, configs, strict=True):
        found = [p for name, p in model.named_parameters() if f"lora_B.{ADAPTER}." in name]
        ups += found
        scaled += [p.detach() * (config.lora_alpha / config.r) for p in found]
    try:
        for config in configs:
            config.lora_alpha = config.r
        with swapped(ups, scaled):
            yield
    finally:
        for config, alpha in zip(configs, alphas, strict=True):
            config.lora_alpha = alpha


def write_diffusers(
    pipeline: DiffusionPipeline, models: Mapping[str, ModelMixin], folder: Path
) -> list[Path]:
    """Write adapters for ``pipe.load_lora_weights(folder)``.

    The adapter of a denoiser that the pipeline's ``save_lora_weights`` does not know (the second
    transformer of Wan 2.2) is written to a folder of its name; docs/export.md shows how to load it.

    Args:
        pipeline: The pipeline.
        models: The trained denoisers, by their names in it.
        folder: Folder to write to.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save = getattr(type(pipeline), "save_lora_weights", None)
    accepted = inspect.signature(save).parameters if save is not None else {}
    arguments: dict[str, Any] = {}
    files = []
    with folded(list(models.values())):
        for name, model in models.items():
            if f"{name}_lora_layers" in accepted:
                layers = get_peft_model_state_dict(model, adapter_name=ADAPTER)
                arguments[f"{name}_lora_layers"] = layers
                arguments[f"{name}_lora_adapter_metadata"] = model.peft_config[ADAPTER].to_dict()
            else:
                reached("write", folder / name)
                model.save_lora_adapter(folder / name, adapter_name=ADAPTER)
                files.append(folder / name / DIFFUSERS_FILE)
        if arguments and save is not None:
            reached("write", folder / DIFFUSERS_FILE)
            save(folder, **{k: v for k, v in arguments.items() if k in accepted})
            files.insert(0, folder / DIFFUSERS_FILE)
    return files


def write_comfyui(
    pipeline: DiffusionPipeline, models: Mapping[str, ModelMixin], folder: Path
) -> list[Path]:
    """Write adapters for ComfyUI's LoRA loaders: one file for each denoiser.

    Args:
        pipeline: The pipeline.
        models: The trained denoisers, by their names in it.
        folder: Folder to write to; the files are in ``comfyui`` below it.

    Raises:
        ValueError: If ComfyUI has no names for a model or for an adapted layer.
    """
    tensors = {name: comfyui_tensors(model) for name, model in models.items()}
    return _write(pipeline, tensors, folder / COMFYUI_FOLDER, {name: {} for name in models})


def write_kohya(
    pipeline: DiffusionPipeline, models: Mapping[str, ModelMixin], folder: Path
) -> list[Path]:
    """Write adapters for sd-scripts and for the programs that read its files.

    Args:
        pipeline: The pipeline.
        models: The trained denoisers, by their names in it.
        folder: Folder to write to; the files are in ``kohya`` below it.

    Raises:
        ValueError: If sd-scripts has no names for a model or for an adapted layer.
    """
    tensors = {name: kohya_tensors(model) for name, model in models.items()}
    metadata = {name: _kohya_metadata(model) for name, model in models.items()}
    return _write(pipeline, tensors, folder / KOHYA_FOLDER, metadata)


def comfyui_tensors(model: ModelMixin) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that ComfyUI looks for.

    A layer that is one layer in the original checkpoint too has its original name after
    ``diffusion_model.``. ComfyUI finds a part of a joined layer under diffusers' name after
    ``transformer.`` in the families for which it has a map; in the others the parts are joined here.
    UNets have sd-scripts' names, which other programs read too.

    Raises:
        ValueError: If ComfyUI has no names for the model or for an adapted layer.
    """
    family = _family(model, "ComfyUI", list(FAMILIES.values()))
    if not family.names:
        return _unet_tensors(model)
    layers: dict[str, Matrices] = {}
    for name, (place, parts) in _places(model).items():
        if place.joined and family.comfyui_parts:
            layers |= {f"transformer.{path}": pair for path, pair in parts.items()}
        else:
            layers[f"diffusion_model.{name}"] = _joined(model, place, parts)
    return _tensors(layers, down="lora_A", up="lora_B")


def kohya_tensors(model: ModelMixin) -> dict[str, Tensor]:
    """The tensors of an adapter under the names of sd-scripts.

    ``diffusers.utils.convert_state_dict_to_kohya`` is not used: it supports UNets only, gives SDXL's
    layers names that sd-scripts ignores when it trains further, and writes the rank in place of alpha.

    Raises:
        ValueError: If sd-scripts has no names for the model or for an adapted layer.
    """
    family = _family(model, "sd-scripts", [f for f in FAMILIES.values() if f.sd_scripts])
    ignored = [p for p in _matrices(model) if re.fullmatch(family.sd_scripts_ignores, p)]
    if ignored:
        raise ValueError(
            f"sd-scripts loads no adapter of {ignored[0]} and would ignore it; train other layers "
            "(model.weights.targets) or use --format diffusers, comfyui or merged"
        )
    if not family.names:
        return _unet_tensors(model)
    return _kohya_tensors({n: _joined(model, *found) for n, found in _places(model).items()})


def _unet_tensors(model: ModelMixin) -> dict[str, Tensor]:
    """The tensors of a UNet's adapter: names of the original checkpoint for SDXL, else diffusers'."""
    if is_sdxl(model):
        return _kohya_tensors({n: _joined(model, *found) for n, found in _places(model).items()})
    return _kohya_tensors(_matrices(model))


def _kohya_tensors(layers: Mapping[str, Matrices]) -> dict[str, Tensor]:
    flat = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in layers.items()}
    return _tensors(flat, down="lora_down", up="lora_up")


def is_sdxl(model: ModelMixin) -> bool:
    """Whether a UNet is one of SDXL, which sd-scripts names as the original checkpoint does."""
    return model.config.get("addition_embed_type") == "text_time"


def readers(models: Mapping[str, ModelMixin]) -> tuple[str, ...]:
    """The programs that load a file in sd-scripts' format of the models."""
    return FAMILIES[type(next(iter(models.values()))).__name__].readers


class NoFormatError(ValueError):
    """A program has no format for a model.

    Attributes:
        reason: The reason alone, for exports in all formats that there are, where no format was asked for.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def _family(model: ModelMixin, program: str, loaded: Sequence[Family]) -> Family:
    """The family of a model, if a program loads adapters of it.

    Raises:
        NoFormatError: If it does not.
    """
    family = FAMILIES.get(type(model).__name__)
    if family is None or family not in loaded:
        name = type(model).__name__
        raise NoFormatError(
            f"flowgrpo knows no names for {name} in {program}, for which it can write adapters of "
            f"{', '.join(f.title for f in loaded)}; use --format diffusers or --format merged",
            f"an adapter for {program}, whose names for {name} flowgrpo does not know",
        )
    return family


def _matrices(model: ModelMixin) -> dict[str, Matrices]:
    """The adapter's matrices by the layers' names in diffusers, with alpha / rank in the second."""
    config = model.peft_config[ADAPTER]
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in get_peft_model_state_dict(model, adapter_name=ADAPTER).items():
        path, _, matrix = key.removesuffix(".weight").rpartition(".")
        halves.setdefault(path, {})[matrix] = value.detach()
    scale = config.lora_alpha / config.r
    return {p: Matrices(both["lora_A"], both["lora_B"] * scale) for p, both in halves.items()}


def _places(model: ModelMixin) -> dict[str, tuple[Place, dict[str, Matrices]]]:
    """Original layers with the matrices of their parts, by the layers' original names."""
    found: dict[str, tuple[Place, dict[str, Matrices]]] = {}
    for path, pair in _matrices(model).items():
        place = place_of(model, path)
        found.setdefault(place.name, (place, {}))[1][path] = pair
    return found


def _joined(model: ModelMixin, place: Place, parts: Mapping[str, Matrices]) -> Matrices:
    """The matrices of an original layer, from those of its parts that are adapted.

    The first matrices are stacked, ``(sum of ranks, in)``. The second, ``(rows of all parts, sum of
    ranks)``, has zeros outside of the parts' blocks.
    """
    if not place.joined:
        (pair,) = parts.values()
        if not place.swapped:
            return pair
        return Matrices(pair.down, torch.cat(pair.up.chunk(2)[::-1]))
    adapted = [p for p in place.parts if p in parts]
    rows = {p: model.get_submodule(p).out_features for p in place.parts}
    down = torch.cat([parts[p].down for p in adapted])
    up = down.new_zeros(sum(rows.values()), len(down))
    row = column = 0
    for path in place.parts:
        if path in parts:
            up[row : row + rows[path], column : column + parts[path].rank] = parts[path].up
            column += parts[path].rank
        row += rows[path]
    return Matrices(down, up)


def _tensors(layers: Mapping[str, Matrices], *, down: str, up: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, pair in layers.items():
        tensors[f"{name}.{down}.weight"] = pair.down
        tensors[f"{name}.{up}.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(float(pair.rank))
    return tensors


def _kohya_metadata(model: ModelMixin) -> dict[str, str]:
    """Metadata by which programs list adapters by their base: AUTOMATIC1111 reads the last two."""
    rank = str(model.peft_config[ADAPTER].r)
    metadata = {
        "ss_network_module": FAMILIES[type(model).__name__].sd_scripts,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }
    if type(model).__name__ == "UNet2DConditionModel":
        is_sd2 = not is_sdxl(model) and model.config["cross_attention_dim"] == 1024
        metadata["ss_v2"] = str(is_sd2)
        if is_sdxl(model):
            metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    return metadata


def _write(
    pipeline: DiffusionPipeline,
    tensors: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    metadata: Mapping[str, dict[str, str]],
) -> list[Path]:
    """Write the tensors of each denoiser to a file of its own, named by the denoiser if it has siblings."""
    folder.mkdir(parents=True, exist_ok=True)
    has_experts = isinstance(pipeline.components.get("transformer_2"), ModelMixin)
    files = []
    for name, layers in tensors.items():
        end = f"_{EXPERTS.get(name, name)}" if has_experts else ""
        file = folder / f"lora{end}.safetensors"
        ready = {k: v.detach().cpu().contiguous() for k, v in layers.items()}
        reached("write", file)
        save_file(ready, file, metadata=metadata[name] or None)
        files.append(file)
    return files
