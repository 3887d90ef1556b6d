"""VAEs and text encoders under the names of original checkpoints.

Sources of the names: ``comfy/diffusers_convert.py``, ``comfy/utils.py`` and ``comfy/supported_models.py``
(ComfyUI), which read checkpoints in one file; the modules are those of CompVis' ``AutoencoderKL`` and of
open_clip.
"""

import re
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of CLIP's names in transformers and in open_clip."""
PROJECTION = "text_projection.weight"
QKV = re.compile(r"(.*)self_attn\.q_proj\.(weight|bias)")


def original_vae(vae: ModelMixin) -> dict[str, Tensor]:
    """The weights of an image VAE by their original names.

    The attention's linear layers are convolutions of size 1 in the original.
    """
    levels = len(vae.config["block_out_channels"])
    found = {}
    for key, value in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        up = re.search(r"up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)", name)
        if up is not None:
            rest = "upsample" if up[2] is None else f"block.{up[2]}"
            name = name.replace(up[0], f"up.{levels - 1 - int(up[1])}.{rest}")
        for ours, theirs in VAE_PARTS.items():
            name = name.replace(ours, theirs)
        is_linear = ".mid.attn_1." in name and value.ndim == 2
        found[name] = value[:, :, None, None] if is_linear else value
    return found


def hugging_face_clip(encoder: nn.Module) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder as older versions of transformers name them.

    Newer versions leave out ``text_model.`` in encoders without a projection.
    """
    found = {}
    for key, value in encoder.state_dict().items():
        has_prefix = key.startswith("text_model.") or key == PROJECTION
        found[key if has_prefix else f"text_model.{key}"] = value
    return found


def open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    """The weights of a CLIP text encoder by open_clip's names: one matrix for query, key and value."""
    weights = hugging_face_clip(encoder)
    found = {}
    for key, value in weights.items():
        first = QKV.fullmatch(key)
        name = key.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if first is not None:
            parts = [weights[f"{first[1]}self_attn.{p}_proj.{first[2]}"] for p in "qkv"]
            name = name.replace(f"self_attn.q_proj.{first[2]}", f"attn.in_proj_{first[2]}")
            found[name] = torch.cat(parts)
        elif key == PROJECTION:
            found["text_projection"] = value.T
        elif not re.search(r"self_attn\.[kv]_proj", key):
            found[name] = value
    return found


def original_encoders(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """The text encoders and the VAE of a pipeline by their names in a checkpoint that ComfyUI reads.

    Raises:
        ValueError: If flowgrpo does not know the layout of the pipeline's checkpoints.
    """
    parts = pipeline.components
    one, two, three = (parts.get(f"text_encoder{end}") for end in ("", "_2", "_3"))
    unet = parts.get("unet")
    denoiser = type(unet if unet is not None else parts.get("transformer")).__name__
    groups: dict[str, Mapping[str, Tensor]] = {}
    vae = "first_stage_model."
    if denoiser == "FluxTransformer2DModel":
        vae = "vae."
        groups["text_encoders.clip_l.transformer."] = hugging_face_clip(one)
        groups["text_encoders.t5xxl.transformer."] = t5(two)
    elif denoiser == "SD3Transformer2DModel":
        groups["text_encoders.clip_l.transformer."] = hugging_face_clip(one)
        groups["text_encoders.clip_g.transformer."] = hugging_face_clip(two)
        if three is not None:
            groups["text_encoders.t5xxl.transformer."] = t5(three)
    elif two is not None:
        groups["conditioner.embedders.0.transformer."] = hugging_face_clip(one)
        groups["conditioner.embedders.1.model."] = open_clip(two)
    elif (
        unet is not None
        and one is not None
        and unet.config["cross_attention_dim"] == one.config.hidden_size != 1024
    ):
        groups["cond_stage_model.transformer."] = hugging_face_clip(one)
    else:
        raise ValueError(
            f"flowgrpo does not know the checkpoint layout of {type(pipeline).__name__} with "
            f"{type(one).__name__}; use --format denoiser for the denoiser in one file, or --format merged"
        )
    groups[vae] = original_vae(parts["vae"])
    return {f"{prefix}{k}": v for prefix, group in groups.items() for k, v in group.items()}


def t5(encoder: nn.Module) -> dict[str, Tensor]:
    """The weights of a T5 encoder, its embedding under the one name that the original has."""
    state = encoder.state_dict()
    return {k: v for k, v in state.items() if k != "encoder.embed_tokens.weight"}
