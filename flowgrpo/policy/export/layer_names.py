"""Names that other programs give to the layers of diffusers' denoisers.

ComfyUI and sd-scripts keep the names of a model's original checkpoint. Several layers of diffusers can be
one layer there: ``double_blocks.0.img_attn.qkv`` has the rows of FLUX's ``to_q``, ``to_k`` and ``to_v``,
in this order.

Sources of the names: the module names of ``comfy/ldm`` and the maps in ``comfy/utils.py`` (ComfyUI), and
``networks/lora.py``, ``lora_sd3.py``, ``lora_flux.py`` and ``library/sdxl_original_unet.py`` (sd-scripts).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusers import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous

Names = Mapping[str, str]
"""Names in diffusers and in the original checkpoint; ``*`` stands for the number of the block. Layers
with the same original name are joined there, their rows in the order of the mapping."""
NUMBERED = re.compile(r"(.*?(?:blocks|layers|refiner))\.(\d+)\.(.+)")


def _block(ours: str, theirs: str, layers: Names) -> Names:
    return {f"{ours}.*.{a}": f"{theirs}.*.{b}" for a, b in layers.items()}


_FLUX_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}
_FLUX_BLOCKS = {
    **_block("transformer_blocks", "double_blocks", _FLUX_DOUBLE),
    **_block("single_transformer_blocks", "single_blocks", _FLUX_SINGLE),
}
_FINAL = {"proj_out": "final_layer.linear", "norm_out.linear": "final_layer.adaLN_modulation.1"}
_EMBEDDERS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}
_INPUTS = {"x_embedder": "img_in", "context_embedder": "txt_in"}
_FLUX = {**_FLUX_BLOCKS, **_EMBEDDERS, **_INPUTS, **_FINAL}
_CHROMA = {
    **_FLUX_BLOCKS,
    **_INPUTS,
    "proj_out": "final_layer.linear",
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.layers.*.linear_1": "distilled_guidance_layer.layers.*.in_layer",
    "distilled_guidance_layer.layers.*.linear_2": "distilled_guidance_layer.layers.*.out_layer",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
}
_FLUX2_DOUBLE = {
    **{a: b for a, b in _FLUX_DOUBLE.items() if a.startswith("attn.")},
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_FLUX2 = {
    **_block("transformer_blocks", "double_blocks", _FLUX2_DOUBLE),
    **_block(
        "single_transformer_blocks",
        "single_blocks",
        {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
    ),
    **{
        f"time_guidance_embed.{a.removeprefix('time_text_embed.')}": b
        for a, b in _EMBEDDERS.items()
        if "text_embedder" not in a
    },
    **{
        f"{name}.linear": f"{name}.lin"
        for name in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        )
    },
    **_INPUTS,
    **_FINAL,
}
_HUNYUAN_REFINER = {
    "attn.to_q": "self_attn.qkv",
    "attn.to_k": "self_attn.qkv",
    "attn.to_v": "self_attn.qkv",
    "attn.to_out.0": "self_attn.proj",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
    "norm_out.linear": "adaLN_modulation.1",
}
_HUNYUAN = {
    **_FLUX_BLOCKS,
    **_block(
        "context_embedder.token_refiner.refiner_blocks",
        "txt_in.individual_token_refiner.blocks",
        _HUNYUAN_REFINER,
    ),
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.in_layer",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.out_layer",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.out_layer",
    **_EMBEDDERS,
    **_FINAL,
}
_SD3 = {
    **_block(
        "transformer_blocks",
        "joint_blocks",
        {
            "attn.to_q": "x_block.attn.qkv",
            "attn.to_k": "x_block.attn.qkv",
            "attn.to_v": "x_block.attn.qkv",
            "attn.to_out.0": "x_block.attn.proj",
            "attn2.to_q": "x_block.attn2.qkv",
            "attn2.to_k": "x_block.attn2.qkv",
            "attn2.to_v": "x_block.attn2.qkv",
            "attn2.to_out.0": "x_block.attn2.proj",
            "attn.add_q_proj": "context_block.attn.qkv",
            "attn.add_k_proj": "context_block.attn.qkv",
            "attn.add_v_proj": "context_block.attn.qkv",
            "attn.to_add_out": "context_block.attn.proj",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
        },
    ),
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    **_FINAL,
}
_Z_IMAGE_BLOCK = {
    "attention.to_q": "attention.qkv",
    "attention.to_k": "attention.qkv",
    "attention.to_v": "attention.qkv",
    "attention.to_out.0": "attention.out",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
    "adaLN_modulation.0": "adaLN_modulation.0",
}
_Z_IMAGE = {
    **_block("layers", "layers", _Z_IMAGE_BLOCK),
    **_block("noise_refiner", "noise_refiner", _Z_IMAGE_BLOCK),
    **_block("context_refiner", "context_refiner", _Z_IMAGE_BLOCK),
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "cap_embedder.1": "cap_embedder.1",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
}
_WAN = {
    **_block(
        "blocks",
        "blocks",
        {
            "attn1.to_q": "self_attn.q",
            "attn1.to_k": "self_attn.k",
            "attn1.to_v": "self_attn.v",
            "attn1.to_out.0": "self_attn.o",
            "attn2.to_q": "cross_attn.q",
            "attn2.to_k": "cross_attn.k",
            "attn2.to_v": "cross_attn.v",
            "attn2.to_out.0": "cross_attn.o",
            "attn2.add_k_proj": "cross_attn.k_img",
            "attn2.add_v_proj": "cross_attn.v_img",
            "ffn.net.0.proj": "ffn.0",
            "ffn.net.2": "ffn.2",
        },
    ),
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
_LTX_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LTX_LAYERS = (
    *(f"attn1.{layer}" for layer in _LTX_ATTENTION),
    *(f"attn2.{layer}" for layer in _LTX_ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)
_LTX = {
    **_block("transformer_blocks", "transformer_blocks", {k: k for k in _LTX_LAYERS}),
    "proj_in": "patchify_proj",
    "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
    "time_embed.linear": "adaln_single.linear",
    "caption_projection.linear_1": "caption_projection.linear_1",
    "caption_projection.linear_2": "caption_projection.linear_2",
    "proj_out": "proj_out",
}
_QWEN_LAYERS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2",
    "txt_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2",
)  # fmt: skip
_QWEN = {
    **_block("transformer_blocks", "transformer_blocks", {k: k for k in _QWEN_LAYERS}),
    **{
        k: k
        for k in (
            "img_in", "txt_in", "norm_out.linear", "proj_out",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.timestep_embedder.linear_2",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How other programs name and load the layers of one class of denoiser.

    Attributes:
        title: Models of the class, for messages.
        names: Names in diffusers and in the original checkpoint; empty for UNets, whose names follow
            a rule (:func:`unet_name`).
        comfyui_parts: Whether ComfyUI finds the parts of a joined layer under diffusers' names.
        sd_scripts: sd-scripts' module for the adapters of these models; empty if it has none.
        readers: Programs that load the file in sd-scripts' format.
        sd_scripts_ignores: Pattern of the layers, by their names in diffusers, for which sd-scripts
            makes no adapter, so that it would pass over them without a word.
    """

    title: str
    names: Names = field(default_factory=dict)
    comfyui_parts: bool = False
    sd_scripts: str = ""
    readers: tuple[str, ...] = ()
    sd_scripts_ignores: str = ""


FAMILIES: Mapping[str, Family] = {
    "UNet2DConditionModel": Family(
        "Stable Diffusion 1.5, 2 and XL",
        sd_scripts="networks.lora",
        readers=("sd-scripts", "AUTOMATIC1111"),
        sd_scripts_ignores=r"(conv_in|conv_out|time_embedding|add_embedding)(\..*)?",
    ),
    "SD3Transformer2DModel": Family(
        "SD3 and SD3.5",
        _SD3,
        comfyui_parts=True,
        sd_scripts="networks.lora_sd3",
        readers=("sd-scripts",),
    ),
    "FluxTransformer2DModel": Family(
        "FLUX.1 and Kontext",
        _FLUX,
        comfyui_parts=True,
        sd_scripts="networks.lora_flux",
        readers=("sd-scripts",),
        sd_scripts_ignores=r"proj_out|norm_out\.linear",
    ),
    "ChromaTransformer2DModel": Family(
        "Chroma",
        _CHROMA,
        comfyui_parts=True,
        sd_scripts="networks.lora_flux",
        readers=("sd-scripts",),
        sd_scripts_ignores=r"proj_out|distilled_guidance_layer\..*",
    ),
    "Flux2Transformer2DModel": Family("FLUX.2", _FLUX2, comfyui_parts=True),
    "QwenImageTransformer2DModel": Family("Qwen-Image", _QWEN),
    "ZImageTransformer2DModel": Family("Z-Image", _Z_IMAGE, comfyui_parts=True),
    "WanTransformer3DModel": Family("Wan", _WAN),
    "HunyuanVideoTransformer3DModel": Family("HunyuanVideo", _HUNYUAN),
    "LTXVideoTransformer3DModel": Family("LTX-Video", _LTX),
}
"""Families by class of denoiser."""


@dataclass(frozen=True)
class Place:
    """The place of a layer in the original checkpoint.

    Attributes:
        name: Name of the layer there.
        parts: Diffusers' names of the layers whose rows it has, in order; one if it is not joined.
        swapped: Whether the two halves of its rows are exchanged: scale and shift in diffusers, shift
            and scale in the original.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False

    @property
    def joined(self) -> bool:
        """Whether the layer has the rows of several layers of diffusers."""
        return len(self.parts) > 1


def place_of(model: ModelMixin, path: str) -> Place:
    """The place of a layer in the original checkpoint.

    Args:
        model: A denoiser of a class in :data:`FAMILIES`.
        path: Name of a linear or convolutional layer of it.

    Raises:
        ValueError: If the original has no such layer.
    """
    if type(model).__name__ == "UNet2DConditionModel":
        upsampled = re.match(r"up_blocks\.(\d+)\.upsamplers", path)
        attends = upsampled is None or hasattr(model.up_blocks[int(upsampled[1])], "attentions")
        number = model.config["layers_per_block"]
        return Place(unet_name(path, number, upsampler=2 if attends else 1), (path,))
    names = FAMILIES[type(model).__name__].names
    found = NUMBERED.fullmatch(path)
    block = found[2] if found else ""
    target = names.get(f"{found[1]}.*.{found[3]}" if found else path)
    if target is None:
        raise ValueError(
            f"the original checkpoint of {type(model).__name__} has no layer for {path}; train other "
            "layers (model.weights.targets) or export a pipeline folder (--format merged)"
        )
    parts = tuple(ours.replace("*", block) for ours, theirs in names.items() if theirs == target)
    parent = model.get_submodule(path.rpartition(".")[0])
    swapped = isinstance(parent, AdaLayerNormContinuous) and "adaLN_modulation" in target
    return Place(target.replace("*", block), parts, swapped)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(path: str, layers_per_block: int, *, upsampler: int = 2) -> str:
    """Name of a UNet's layer in Stable Diffusion's original checkpoints.

    Args:
        path: Name in diffusers.
        layers_per_block: Residual layers of a down block.
        upsampler: Index of an upsampler in its block: 1 in a block without attention, otherwise 2.

    Raises:
        ValueError: If the original has no such layer.
    """
    if path in _UNET_ENDS:
        return _UNET_ENDS[path]
    down = re.fullmatch(r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
    up = re.fullmatch(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
    middle = re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", path)
    if down is not None:
        kind, rest = down[2], down[4]
        at = (layers_per_block + 1) * int(down[1]) + int(down[3]) + 1
        if kind == "downsamplers":
            return f"input_blocks.{at + layers_per_block}.0.{rest.replace('conv', 'op', 1)}"
        block = f"input_blocks.{at}"
    elif up is not None:
        kind, rest = up[2], up[4]
        at = (layers_per_block + 1) * int(up[1]) + int(up[3])
        if kind == "upsamplers":
            return f"output_blocks.{at + layers_per_block}.{upsampler}.{rest}"
        block = f"output_blocks.{at}"
    elif middle is not None:
        kind, rest = middle[1], middle[3]
        if kind == "resnets":
            head, _, tail = rest.partition(".")
            return f"middle_block.{2 * int(middle[2])}.{_RESNET[head]}{tail and '.' + tail}"
        return f"middle_block.{2 * int(middle[2]) + 1}.{rest}"
    else:
        raise ValueError(f"the original checkpoint of Stable Diffusion has no layer for {path}")
    if kind == "resnets":
        head, _, tail = rest.partition(".")
        return f"{block}.0.{_RESNET[head]}{tail and '.' + tail}"
    return f"{block}.1.{rest}"
