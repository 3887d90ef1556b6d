"""Exports trained parameters: adapters in the formats that other software reads, and merged weights.

An adapter has the same numbers in both formats. Diffusers' format has a pair of matrices for each layer,
and rank and alpha in the file's metadata. The kohya format, which ComfyUI and web user interfaces read,
writes the path of a layer with underscores, and has its alpha as a tensor.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from flowgrpo.policy.settings import Full, LoRA
from flowgrpo.policy.weights import ADAPTER, InitialNoise, Trainable

KOHYA_PREFIX = {
    "UNet2DConditionModel": "lora_unet_",
    "FluxTransformer2DModel": "lora_transformer_",
    "QwenImageTransformer2DModel": "lora_unet_",
    "SD3Transformer2DModel": "lora_transformer_",
    "ZImageTransformer2DModel": "lora_unet_",
}
"""Prefix of the keys, by class of denoiser. Diffusers reads all of these formats but SD3's."""
INDEX = "model_index.json"
KOHYA_FILE = "kohya/lora.safetensors"
"""In a folder of its own, because diffusers would not know which of two files to load."""


def export(pipeline: DiffusionPipeline, trainable: Trainable | InitialNoise, folder: Path) -> Path:
    """Write the trained parameters in all formats that exist for them.

    An adapter is written as ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``
    and, for the models of KOHYA_PREFIX, in the kohya format. Full weights are written as a pipeline
    folder for ``from_pretrained(folder)``. The initial noise is written as
    ``initial_noise.safetensors``.

    Args:
        pipeline: The pipeline with its shipped scheduler.
        trainable: The trained parameters.
        folder: Folder to write to; created if missing.

    Returns:
        The folder.
    """
    if isinstance(trainable, InitialNoise):
        return trainable.export(folder)
    if isinstance(trainable.weights, Full):
        return _write_pipeline(pipeline, trainable, folder)
    export_diffusers(pipeline, trainable, folder)
    if all(type(m).__name__ in KOHYA_PREFIX for m in trainable.denoisers.values()):
        export_kohya(trainable, folder)
    return folder


def export_diffusers(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Path:
    """Write an adapter for ``pipe.load_lora_weights(folder)``.

    Raises:
        ValueError: If the trained parameters are not an adapter.
    """
    _lora_of(trainable)
    folder.mkdir(parents=True, exist_ok=True)
    save = getattr(type(pipeline), "save_lora_weights", None)
    accepted = inspect.signature(save).parameters if save is not None else {}
    arguments: dict[str, Any] = {}
    for name, model in trainable.denoisers.items():
        if f"{name}_lora_layers" in accepted:
            arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(
                model, adapter_name=ADAPTER
            )
            arguments[f"{name}_lora_adapter_metadata"] = model.peft_config[ADAPTER].to_dict()
        else:
            # Such as Wan 2.2's second transformer; docs/export.md shows how to load it.
            model.save_lora_adapter(folder / name, adapter_name=ADAPTER)
    if arguments and save is not None:
        save(folder, **{k: v for k, v in arguments.items() if k in accepted})
    return folder


def export_kohya(trainable: Trainable, folder: Path) -> Path:
    """Write an adapter in the kohya format, as ``kohya/lora.safetensors`` below ``folder``.

    Raises:
        ValueError: If the format has no names for the model, or the trained parameters are not an adapter.
    """
    lora = _lora_of(trainable)
    tensors: dict[str, Tensor] = {}
    for model in trainable.denoisers.values():
        tensors |= kohya_tensors(model, lora.alpha)
    file = folder / KOHYA_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.alpha),
    }
    save_file(tensors, file, metadata=metadata)
    return file


def kohya_tensors(model: ModelMixin, alpha: int | float) -> dict[str, Tensor]:
    """The tensors of an adapter under kohya's names.

    ``diffusers.utils.convert_state_dict_to_kohya`` is not used: it supports UNets only, and writes the
    rank in place of alpha, which changes the strength of the adapter.

    Raises:
        ValueError: If the format has no names for the model.
    """
    kind = type(model).__name__
    if kind not in KOHYA_PREFIX:
        raise ValueError(
            f"there is no kohya format for {kind}; there is one for {', '.join(KOHYA_PREFIX)}"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in get_peft_model_state_dict(model, adapter_name=ADAPTER).items():
        path, _, matrix = key.removesuffix(".weight").rpartition(".")
        name = KOHYA_PREFIX[kind] + path.replace(".", "_")
        half = {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]
        tensors[f"{name}.{half}.weight"] = value.detach().cpu().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def export_merged(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Path:
    """Write a pipeline folder with the adapter added to the weights, for ``from_pretrained(folder)``.

    The adapter is removed from the pipeline. The weights are rounded to the precision in which the model
    was loaded.
    """
    if isinstance(trainable.weights, LoRA):
        for model in trainable.denoisers.values():
            model.fuse_lora(adapter_names=[ADAPTER], safe_fusing=True)
            model.unload_lora()
    return _write_pipeline(pipeline, trainable, folder)


def _write_pipeline(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Path:
    """Write a pipeline folder with the trained denoisers, and copies of all other files.

    Saving the other components would change their precision, and some cannot be loaded again after
    diffusers has saved them (PRX's text encoder).
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(pipeline)
    if source is None:
        pipeline.save_pretrained(folder)
        return folder
    parts = [p for p in pipeline.components if (source / p).is_dir()]
    for part in parts:
        if part not in trainable.denoisers:
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    for name, model in trainable.denoisers.items():
        model.save_pretrained(folder / name)
    shutil.copy(source / INDEX, folder / INDEX)
    return folder


def _source(pipeline: DiffusionPipeline) -> Path | None:
    """The folder from which a pipeline was loaded; None if there is none any more."""
    name = pipeline.config.get("_name_or_path") or ""
    if (Path(name) / INDEX).exists():
        return Path(name)
    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    return found if (found / INDEX).exists() else None


def _lora_of(trainable: Trainable) -> LoRA:
    if isinstance(trainable.weights, Full):
        raise ValueError(
            "full weights were trained, so there is no adapter; export them as 'merged'"
        )
    return trainable.weights
