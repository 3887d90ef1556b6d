"""Weights in one file with the names of the original checkpoint: a denoiser, or all models of a pipeline."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from flowgrpo.data.files import reached
from flowgrpo.policy.export.layer_names import NUMBERED, place_of
from flowgrpo.policy.export.original_parts import original_encoders

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
SD3_NORMS = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
}
NORMS = {
    "FluxTransformer2DModel": FLUX_NORMS,
    "SD3Transformer2DModel": {
        f"transformer_blocks.*.{a}": f"joint_blocks.*.{b}" for a, b in SD3_NORMS.items()
    },
}
"""Names of normalisations in the blocks."""
SCALE = {"FluxTransformer2DModel": "scale"}
"""Name of a normalisation's weight, where it is not ``weight``."""
KINDS = ("UNet2DConditionModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
"""Classes of which every weight has a name here."""


def write_checkpoint(model: ModelMixin, file: Path) -> Path:
    """Write a denoiser's weights as one file, in the precision in which they are.

    Args:
        model: A denoiser without adapters.
        file: File to write; its folder is created if missing.

    Raises:
        ValueError: If flowgrpo does not know the original names of all weights of the model.
    """
    return _save({f"{PREFIX}{k}": v for k, v in original_weights(model).items()}, file)


def write_pipeline(pipeline: DiffusionPipeline, denoiser: ModelMixin, file: Path) -> Path:
    """Write a denoiser, the VAE and the text encoders as one file, each in its own precision.

    Args:
        pipeline: The pipeline, without adapters.
        denoiser: Its only denoiser.
        file: File to write; its folder is created if missing.

    Raises:
        ValueError: If flowgrpo does not know the layout of the pipeline's checkpoints.
    """
    tensors = {f"{PREFIX}{k}": v for k, v in original_weights(denoiser).items()}
    return _save(tensors | original_encoders(pipeline), file)


def _save(tensors: Mapping[str, Tensor], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    ready = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
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
            f"flowgrpo writes single files of Stable Diffusion 1.5, 2, XL, 3 and 3.5, FLUX.1 and "
            f"Kontext, not of {type(model).__name__}; use --format merged for a pipeline folder"
        )


def original_weights(model: ModelMixin) -> dict[str, Tensor]:
    """The weights of a denoiser by their names in the original checkpoint, without prefix.

    Raises:
        ValueError: If flowgrpo does not know the original names of all weights of the model.
    """
    require_known(model)
    weights, cls = model.state_dict(), type(model).__name__
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        path, _, kind = key.rpartition(".")
        block = NUMBERED.fullmatch(path)
        norm = NORMS.get(cls, {}).get(f"{block[1]}.*.{block[3]}") if block else None
        if block and norm is not None:
            found[f"{norm.replace('*', block[2])}.{SCALE.get(cls, kind)}"] = value
            continue
        if key == "pos_embed.pos_embed":
            found["pos_embed"] = value
            continue
        place = place_of(model, path)
        name = f"{place.name}.{kind}"
        if place.joined:
            if path == place.parts[0]:
                found[name] = torch.cat([weights[f"{p}.{kind}"] for p in place.parts])
        else:
            found[name] = torch.cat(value.chunk(2)[::-1]) if place.swapped else value
    return found
