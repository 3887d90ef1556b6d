"""Earlier LoRA adapters: as a frozen part of the model, or as the start of training.

Diffusers reads the files and converts the formats of peft, sd-scripts and ComfyUI. It ignores layers
that have no place in a model, with a warning at most; here they are an error.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import set_weights_and_activate_adapters
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowgrpo.core.text import counted
from flowgrpo.policy.model_files import CONFIG, STATE, check_adapter, checkpoint_name
from flowgrpo.policy.settings import Adapter, LoRA, Noise, Weights

EXPORTED = "pytorch_lora_weights.safetensors"
"""Diffusers' name of an adapter's file."""
MATRICES = re.compile(r"lora_A|lora_down|lora\.down|lora_linear_layer\.down|_lora\.down|lokr_w1")
"""The first matrix of a layer, by which layers are counted; each layer has one."""
SECOND_EXPERT = "transformer_2"
FIRST = ".lora_A.default.weight"
"""End of the name of a layer's first matrix in a checkpoint."""
INIT = "model.weights.init"
"""The key of the adapter from which training starts."""
EARLIER = "earlier"
"""Name of an adapter while it is read or added to the weights."""


@dataclass(frozen=True)
class LayerStart:
    """The two matrices of an earlier adapter's layer; its scale is in the second.

    Attributes:
        down: ``(rank, in)``, or ``(rank, in, kh, kw)`` of a convolution.
        up: ``(out, rank)``, or ``(out, rank, 1, 1)``.
    """

    down: Tensor
    up: Tensor


def add_adapters(pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
    """Add adapters to the weights of a pipeline, in the precision of the weights.

    Raises:
        FileNotFoundError: If an adapter does not exist.
        ValueError: If an adapter does not fit the pipeline, or does not change it.
    """
    for adapter in adapters:
        _load(pipeline, adapter, EARLIER)
        layers = _layers(pipeline, EARLIER)
        if layers and not any(x.up.any() for part in layers.values() for x in part.values()):
            raise ValueError(
                f"adapter {adapter.path} is all zeros, so it does not change the model: is it the file of "
                "an untrained adapter?"
            )
        for part in pipeline._lora_loadable_modules:
            model = pipeline.components.get(part)
            if EARLIER not in getattr(model, "peft_config", {}):
                continue
            if isinstance(model, ModelMixin):
                model.set_adapters([EARLIER], [adapter.scale])
            else:
                set_weights_and_activate_adapters(model, [EARLIER], [adapter.scale])
            pipeline.fuse_lora(components=[part], adapter_names=[EARLIER], safe_fusing=True)
        _unload(pipeline)


def _unload(pipeline: DiffusionPipeline) -> None:
    """Remove all adapters from a pipeline; what was added to the weights stays."""
    pipeline.unload_lora_weights()
    second = pipeline.components.get(SECOND_EXPERT)
    if isinstance(second, ModelMixin):
        second.unload_lora()


def read_start(
    pipeline: DiffusionPipeline, weights: Weights | Noise, models: Mapping[str, ModelMixin]
) -> dict[str, dict[str, LayerStart]] | None:
    """The layers of an adapter from which training starts, by denoiser and by layer.

    Args:
        pipeline: The pipeline, without adapters; it is the same afterwards.
        weights: The settings, with the adapter.
        models: The denoisers, by their names in the pipeline.

    Returns:
        The layers; None if training starts from the model itself.

    Raises:
        FileNotFoundError: If the adapter does not exist.
        ValueError: If it does not fit the pipeline, or adapts models that are not trained.
    """
    if not isinstance(weights, LoRA) or not weights.init:
        return None
    found = read_layers(pipeline, weights.init, INIT, "give it as model.adapters")
    _refuse_others(weights.init, found, weights, models)
    return found


def read_layers(
    pipeline: DiffusionPipeline, path: str, key: str, instead: str
) -> dict[str, dict[str, LayerStart]]:
    """The layers of an adapter, by component of the pipeline and by layer.

    Args:
        pipeline: The pipeline, without adapters; it is the same afterwards.
        path: A file, folder, hub id, run directory, or checkpoint of a run.
        key: The key of the configuration that names it, for messages.
        instead: What to do with an adapter that is no plain LoRA, for messages.

    Raises:
        FileNotFoundError: If the adapter does not exist.
        ValueError: If it does not fit the pipeline, or is a DoRA.
    """
    if (Path(path).expanduser() / STATE).is_file():
        return _checkpoint_layers(Path(path).expanduser(), key)
    _load(pipeline, Adapter(path), EARLIER)
    try:
        if any(
            getattr(m, "use_dora", {}).get(EARLIER) for p in pipeline.components.values()
            if isinstance(p, nn.Module) for m in p.modules()
        ):  # fmt: skip
            raise ValueError(f"{key}: {path} is a DoRA, which is not supported here; {instead}")
        return _layers(pipeline, EARLIER)
    finally:
        _unload(pipeline)


def _refuse_others(
    path: str,
    found: Mapping[str, Mapping[str, LayerStart]],
    weights: LoRA,
    models: Mapping[str, ModelMixin],
) -> None:
    """Raise ValueError if an adapter has layers in models that are not trained."""
    others = {k: len(v) for k, v in found.items() if k not in (weights.models or models)}
    if others:
        words = " and ".join(f"{counted(n, 'layer')} of {k}" for k, n in others.items())
        raise ValueError(
            f"model.weights.init: {path} also adapts {words}, which this run does not train; give it as "
            "model.adapters, a frozen part of the model"
        )


def _checkpoint_layers(folder: Path, key: str) -> dict[str, dict[str, LayerStart]]:
    """The layers of the adapter in a run's checkpoint: the averaged ones, if there is an average.

    Raises:
        ValueError: If the checkpoint holds whole weights, is damaged, or is outside of its run, whose
            configuration has the rank and alpha.
    """
    run = folder.absolute().parents[1]
    try:
        own = tomllib.loads((run / CONFIG).read_text("utf-8"))["model"]["weights"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{key}: {folder} is a checkpoint, and {run / CONFIG}, which has the rank and alpha of "
            f"its adapter, cannot be read ({error!r}); write it as an adapter with flowgrpo export"
        ) from error
    if own.get("kind", "lora") != "lora":
        raise ValueError(
            f"{key}: {folder} has no adapter, because its run trained weights of the kind "
            f"{own['kind']!r}; write them as a model with: flowgrpo export {run} --checkpoint "
            f"{checkpoint_name(folder)} --out MODEL, and set model.path = MODEL"
        )
    average = folder / "ema.safetensors"
    file = average if average.is_file() else folder / "weights.safetensors"
    if not file.is_file():
        raise ValueError(f"{key}: {file} is missing; give another checkpoint of the run")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}: {file} cannot be read: {error}") from error
    scale = own["alpha"] / own["rank"]
    found: dict[str, dict[str, LayerStart]] = {}
    for name, down in tensors.items():
        denoiser, _, layer = name.partition(".")
        if layer.endswith(FIRST):
            path = layer.removesuffix(FIRST)
            up = tensors[f"{denoiser}.{path}{FIRST.replace('lora_A', 'lora_B')}"]
            found.setdefault(denoiser, {})[path] = LayerStart(down.float(), up.float() * scale)
    return found


def _load(pipeline: DiffusionPipeline, adapter: Adapter, name: str) -> None:
    """Load an adapter into a pipeline.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is none, or has layers without a place in the pipeline.
    """
    cls = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{cls} of diffusers loads no adapters, such as {adapter.path}")
    for place, part in _files(pipeline, adapter):
        options: dict[str, Any] = {"adapter_name": name}
        if place.is_file():
            options["weight_name"] = place.name
            raw = _matrices_in(place)
            source = str(place.parent)
        else:
            raw, source = 0, str(place)
        if part and part != SECOND_EXPERT:
            raise ValueError(
                f"adapter {adapter.path}: model = {part!r} can only be {SECOND_EXPERT!r}, the second expert"
            )
        if part and not isinstance(pipeline.components.get(part), ModelMixin):
            raise ValueError(
                f"adapter {adapter.path} is for {part}, which {cls} does not have here"
            )
        before = _count(pipeline, name)
        try:
            converted = _converted(pipeline, source, options.get("weight_name"))
            if part and not any(k.startswith("transformer.") for k in converted):
                # As flowgrpo exports the adapter of a second expert.
                pipeline.components[part].load_lora_adapter(source, prefix=None, **options)
            else:
                second = {"load_into_transformer_2": True} if part else {}
                pipeline.load_lora_weights(source, **options, **second)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            count = f" ({counted(raw, 'layer')} in the file)" if raw else ""
            raise ValueError(
                f"adapter {adapter.path} does not fit {cls}{count}: {first}"
            ) from error
        wanted, placed = len({_layer(k) for k in converted}), _count(pipeline, name) - before
        if placed < wanted or not placed:
            raise ValueError(
                f"adapter {adapter.path} does not fit {cls}: {placed} of its {counted(wanted or raw, 'layer')} have a "
                "place in it; it was made for another model, or its names are in a format that diffusers "
                "does not know"
            )


def _converted(pipeline: DiffusionPipeline, source: str, file: str | None) -> Mapping[str, Tensor]:
    """The tensors of an adapter under diffusers' names, without those that are no matrices."""
    options = {"weight_name": file} if file else {}
    found = type(pipeline).lora_state_dict(source, **options)
    tensors: Mapping[str, Tensor] = found[0] if isinstance(found, tuple) else found
    return {k: v for k, v in tensors.items() if not k.endswith(("alpha", "dora_scale"))}


def _layer(key: str) -> str:
    """The layer of a tensor's name under diffusers' names."""
    return re.split(r"[._](?:lora|lokr)[._]", key)[0]


def _files(pipeline: DiffusionPipeline, adapter: Adapter) -> list[tuple[Path, str]]:
    """The files of an adapter, each with the name of the denoiser that it is for; empty for the first.

    A name that is no path here is a hub id, and stays as it is.

    Raises:
        FileNotFoundError: If there is no such file, or a folder has none or several.
    """
    path = check_adapter(adapter.path)
    if path is None or path.is_file():
        return [(path or Path(adapter.path), adapter.model)]
    denoisers = [n for n in pipeline.components if n.split("_")[0] in ("transformer", "unet")]
    found = [(path / EXPORTED, adapter.model)] if (path / EXPORTED).is_file() else []
    found += [(path / n / EXPORTED, n) for n in denoisers if (path / n / EXPORTED).is_file()]
    if found:
        return found
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{adapter.path} has {counted(len(files) or 'no', 'adapter file')}"
            f"{': give one of them' if files else ' (.safetensors)'}"
        )
    return [(files[0], adapter.model)]


def _matrices_in(file: Path) -> int:
    """The number of layers in an adapter's file.

    Raises:
        ValueError: If it is not a file in safetensors' format, or no adapter.
    """
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"adapter {file} is not in safetensors' format: {str(error).splitlines()[0]}"
        ) from error
    number = sum(1 for k in keys if MATRICES.search(k))
    if not number:
        raise ValueError(
            f"{file} is not a LoRA adapter: none of its tensors ({len(keys)}) is a part of one"
        )
    return number


def _layers(pipeline: DiffusionPipeline, name: str) -> dict[str, dict[str, LayerStart]]:
    """The layers of a loaded adapter, by component and by layer; components without one are left out."""
    found: dict[str, dict[str, LayerStart]] = {}
    for part, model in pipeline.components.items():
        if not isinstance(model, nn.Module):
            continue
        for path, module in model.named_modules():
            if name in getattr(module, "lora_A", {}):
                down = module.lora_A[name].weight.detach().float().cpu()
                up = module.lora_B[name].weight.detach().float().cpu()
                layer = LayerStart(down, up * module.scaling[name])
                found.setdefault(part, {})[path] = layer
    return found


def _count(pipeline: DiffusionPipeline, name: str) -> int:
    """The number of layers of a loaded adapter, LoKr's included."""
    return sum(
        name in getattr(module, kind, {})
        for model in pipeline.components.values()
        if isinstance(model, nn.Module)
        for module in model.modules()
        for kind in ("lora_A", "lokr_w1", "lokr_w1_a")
    )
