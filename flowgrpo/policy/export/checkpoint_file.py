"""Weights of a denoiser in one file with the names of the original checkpoint."""

from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from flowgrpo.data.files import reached
from flowgrpo.policy.export.layer_names import NUMBERED, place_of

PREFIX = "model.diffusion_model."
"""Prefix of the denoiser's weights in original checkpoints."""
FLUX_NORMS = {
    "transformer_blocks.*.attn.norm_q": "double_blocks.*.img_attn.norm.query_norm",
    "transformer_blocks.*.attn.norm_k": "double_blocks.*.img_attn.norm.key_norm",
    "transformer_blocks.*.attn.norm_added_q": "double_blocks.*.txt_attn.norm.query_norm",
    "transformer_blocks.*.attn.norm_added_k": "double_blocks.*.txt_attn.norm.key_norm",
    "single_transformer_blocks.*.attn.norm_q": "single_blocks.*.norm.query_norm",
    "single_transformer_blocks.*.attn.norm_k": "single_blocks.*.norm.key_norm",
}
"""FLUX's normalisations, whose weight is named ``scale`` in the original checkpoint."""
KINDS = ("UNet2DConditionModel", "FluxTransformer2DModel")
"""Classes of which every weight has a name here."""


def write_checkpoint(model: ModelMixin, file: Path) -> Path:
    """Write a denoiser's weights as one file, in the precision in which they are.

    Args:
        model: A denoiser without adapters.
        file: File to write; its folder is created if missing.

    Raises:
        ValueError: If flowgrpo does not know the original names of all weights of the model.
    """
    tensors = original_weights(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    ready = {f"{PREFIX}{k}": v.detach().cpu().contiguous() for k, v in tensors.items()}
    reached("write", file)
    save_file(ready, file, metadata={"format": "pt"})
    return file


def require_known(model: ModelMixin) -> None:
    """Check that every weight of a model has an original name.

    Raises:
        ValueError: If flowgrpo does not know them.
    """
    if type(model).__name__ not in KINDS:
        raise ValueError(
            f"flowgrpo writes single-file checkpoints of Stable Diffusion 1.5, 2 and XL, FLUX.1 and "
            f"Kontext, not of {type(model).__name__}; use --format merged for a pipeline folder"
        )


def original_weights(model: ModelMixin) -> dict[str, Tensor]:
    """The weights of a denoiser by their names in the original checkpoint, without prefix.

    Raises:
        ValueError: If flowgrpo does not know the original names of all weights of the model.
    """
    require_known(model)
    weights = model.state_dict()
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        path, _, kind = key.rpartition(".")
        block = NUMBERED.fullmatch(path)
        norm = FLUX_NORMS.get(f"{block[1]}.*.{block[3]}") if block else None
        if block and norm is not None and type(model).__name__ == "FluxTransformer2DModel":
            found[f"{norm.replace('*', block[2])}.scale"] = value
            continue
        place = place_of(model, path)
        name = f"{place.name}.{kind}"
        if place.joined:
            if path == place.parts[0]:
                found[name] = torch.cat([weights[f"{p}.{kind}"] for p in place.parts])
        else:
            found[name] = torch.cat(value.chunk(2)[::-1]) if place.swapped else value
    return found
