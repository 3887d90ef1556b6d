"""Names and sizes of layers in programs that read adapters, as facts about those programs.

LAYERS: linear and convolutional layers of the original models at their published sizes, as ComfyUI's
classes in ``comfy/ldm`` have them: name, number of blocks with it, rows, columns. FLUX.2 and Z-Image from
their published checkpoints' names (those of ``comfy/utils.py`` and of diffusers'
``loaders/single_file_utils.py``) and sizes. sd-scripts' classes (``library/flux_models.py``,
``sd3_models.py``, ``chroma_models.py``) have the same names.

PARTS: the names under which ComfyUI finds parts of a layer: ``transformer.`` and diffusers' name, with the
layer, the first row in units of the model's width, and the number of rows in the same unit
(``comfy/utils.py``: ``mmdit_to_diffusers``, ``flux_to_diffusers``, ``z_image_to_diffusers``).
"""

Layers = dict[str, tuple[int, int, int]]


def _flux(double: int, single: int, modulated: bool) -> Layers:
    w, m = 3072, 12288
    layers: Layers = {}
    for stream in ("img", "txt"):
        if modulated:
            layers[f"double_blocks.*.{stream}_mod.lin"] = (double, 6 * w, w)
        layers |= {
            f"double_blocks.*.{stream}_attn.qkv": (double, 3 * w, w),
            f"double_blocks.*.{stream}_attn.proj": (double, w, w),
            f"double_blocks.*.{stream}_mlp.0": (double, m, w),
            f"double_blocks.*.{stream}_mlp.2": (double, w, m),
        }
    layers |= {
        "single_blocks.*.linear1": (single, 3 * w + m, w),
        "single_blocks.*.linear2": (single, w, w + m),
    }
    if modulated:
        layers["single_blocks.*.modulation.lin"] = (single, 3 * w, w)
    return layers


LAYERS: dict[str, Layers] = {
    "flux": _flux(19, 38, True)
    | {
        "img_in": (1, 3072, 64),
        "txt_in": (1, 3072, 4096),
        "time_in.in_layer": (1, 3072, 256),
        "time_in.out_layer": (1, 3072, 3072),
        "vector_in.in_layer": (1, 3072, 768),
        "vector_in.out_layer": (1, 3072, 3072),
        "guidance_in.in_layer": (1, 3072, 256),
        "guidance_in.out_layer": (1, 3072, 3072),
        "final_layer.linear": (1, 64, 3072),
        "final_layer.adaLN_modulation.1": (1, 6144, 3072),
    },
    "chroma": _flux(19, 38, False)
    | {
        "img_in": (1, 3072, 64),
        "txt_in": (1, 3072, 4096),
        "final_layer.linear": (1, 64, 3072),
        "distilled_guidance_layer.in_proj": (1, 5120, 64),
        "distilled_guidance_layer.layers.*.in_layer": (5, 5120, 5120),
        "distilled_guidance_layer.layers.*.out_layer": (5, 5120, 5120),
        "distilled_guidance_layer.out_proj": (1, 3072, 5120),
    },
    "flux2": {
        "double_blocks.*.img_attn.qkv": (8, 18432, 6144),
        "double_blocks.*.img_attn.proj": (8, 6144, 6144),
        "double_blocks.*.img_mlp.0": (8, 36864, 6144),
        "double_blocks.*.img_mlp.2": (8, 6144, 18432),
        "double_blocks.*.txt_attn.qkv": (8, 18432, 6144),
        "double_blocks.*.txt_attn.proj": (8, 6144, 6144),
        "double_blocks.*.txt_mlp.0": (8, 36864, 6144),
        "double_blocks.*.txt_mlp.2": (8, 6144, 18432),
        "single_blocks.*.linear1": (48, 55296, 6144),
        "single_blocks.*.linear2": (48, 6144, 24576),
        "double_stream_modulation_img.lin": (1, 36864, 6144),
        "double_stream_modulation_txt.lin": (1, 36864, 6144),
        "single_stream_modulation.lin": (1, 18432, 6144),
        "img_in": (1, 6144, 128),
        "txt_in": (1, 6144, 15360),
        "time_in.in_layer": (1, 6144, 256),
        "time_in.out_layer": (1, 6144, 6144),
        "guidance_in.in_layer": (1, 6144, 256),
        "guidance_in.out_layer": (1, 6144, 6144),
        "final_layer.linear": (1, 128, 6144),
        "final_layer.adaLN_modulation.1": (1, 12288, 6144),
    },
    # The first 13 blocks have attn2 and 9 modulations of the image stream, the others 6; the last block
    # has no text output, and 2 modulations of the text stream.
    "sd35_medium": {
        "x_embedder.proj": (1, 1536, 64),
        "context_embedder": (1, 1536, 4096),
        "t_embedder.mlp.0": (1, 1536, 256),
        "t_embedder.mlp.2": (1, 1536, 1536),
        "y_embedder.mlp.0": (1, 1536, 2048),
        "y_embedder.mlp.2": (1, 1536, 1536),
        "joint_blocks.*.x_block.attn.qkv": (24, 4608, 1536),
        "joint_blocks.*.x_block.attn.proj": (24, 1536, 1536),
        "joint_blocks.*.x_block.attn2.qkv": (13, 4608, 1536),
        "joint_blocks.*.x_block.attn2.proj": (13, 1536, 1536),
        "joint_blocks.*.x_block.mlp.fc1": (24, 6144, 1536),
        "joint_blocks.*.x_block.mlp.fc2": (24, 1536, 6144),
        "joint_blocks.*.x_block.adaLN_modulation.1": (24, -1, 1536),
        "joint_blocks.*.context_block.attn.qkv": (24, 4608, 1536),
        "joint_blocks.*.context_block.attn.proj": (23, 1536, 1536),
        "joint_blocks.*.context_block.mlp.fc1": (23, 6144, 1536),
        "joint_blocks.*.context_block.mlp.fc2": (23, 1536, 6144),
        "joint_blocks.*.context_block.adaLN_modulation.1": (24, -1, 1536),
        "final_layer.linear": (1, 64, 1536),
        "final_layer.adaLN_modulation.1": (1, 3072, 1536),
    },
    "qwen_image": {
        "img_in": (1, 3072, 64),
        "txt_in": (1, 3072, 3584),
        "time_text_embed.timestep_embedder.linear_1": (1, 3072, 256),
        "time_text_embed.timestep_embedder.linear_2": (1, 3072, 3072),
        **{
            f"transformer_blocks.*.attn.{name}": (60, 3072, 3072)
            for name in (
                "to_q", "to_k", "to_v", "to_out.0",
                "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
            )
        },
        "transformer_blocks.*.img_mod.1": (60, 18432, 3072),
        "transformer_blocks.*.img_mlp.net.0.proj": (60, 12288, 3072),
        "transformer_blocks.*.img_mlp.net.2": (60, 3072, 12288),
        "transformer_blocks.*.txt_mod.1": (60, 18432, 3072),
        "transformer_blocks.*.txt_mlp.net.0.proj": (60, 12288, 3072),
        "transformer_blocks.*.txt_mlp.net.2": (60, 3072, 12288),
        "norm_out.linear": (1, 6144, 3072),
        "proj_out": (1, 64, 3072),
    },
    "z_image": {
        **{
            f"{part}.*.{name}": (number, rows, columns)
            for part, number in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2))
            for name, rows, columns in (
                ("attention.qkv", 11520, 3840),
                ("attention.out", 3840, 3840),
                ("feed_forward.w1", 10240, 3840),
                ("feed_forward.w2", 3840, 10240),
                ("feed_forward.w3", 10240, 3840),
                ("adaLN_modulation.0", 15360, 256),
            )
            if (part, name) != ("context_refiner", "adaLN_modulation.0")
        },
        "x_embedder": (1, 3840, 64),
        "cap_embedder.1": (1, 3840, 2560),
        "t_embedder.mlp.0": (1, 1024, 256),
        "t_embedder.mlp.2": (1, 256, 1024),
        "final_layer.linear": (1, 64, 3840),
        "final_layer.adaLN_modulation.1": (1, 3840, 256),
    },
    # Image-to-video at 14B; text-to-video has no k_img, v_img and img_emb.
    "wan_i2v": {
        **{
            f"blocks.*.{name}": (40, 5120, 5120)
            for name in (
                "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o",
                "cross_attn.k_img", "cross_attn.v_img",
            )
        },
        "blocks.*.ffn.0": (40, 13824, 5120),
        "blocks.*.ffn.2": (40, 5120, 13824),
        "text_embedding.0": (1, 5120, 4096),
        "text_embedding.2": (1, 5120, 5120),
        "time_embedding.0": (1, 5120, 256),
        "time_embedding.2": (1, 5120, 5120),
        "time_projection.1": (1, 30720, 5120),
        "img_emb.proj.1": (1, 1280, 1280),
        "img_emb.proj.3": (1, 5120, 1280),
        "head.head": (1, 64, 5120),
    },
    "hunyuan_video": _flux(20, 40, True)
    | {
        "txt_in.input_embedder": (1, 3072, 4096),
        "txt_in.t_embedder.in_layer": (1, 3072, 256),
        "txt_in.t_embedder.out_layer": (1, 3072, 3072),
        "txt_in.c_embedder.in_layer": (1, 3072, 4096),
        "txt_in.c_embedder.out_layer": (1, 3072, 3072),
        "txt_in.individual_token_refiner.blocks.*.self_attn.qkv": (2, 9216, 3072),
        "txt_in.individual_token_refiner.blocks.*.self_attn.proj": (2, 3072, 3072),
        "txt_in.individual_token_refiner.blocks.*.mlp.0": (2, 12288, 3072),
        "txt_in.individual_token_refiner.blocks.*.mlp.2": (2, 3072, 12288),
        "txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1": (2, 6144, 3072),
        "time_in.in_layer": (1, 3072, 256),
        "time_in.out_layer": (1, 3072, 3072),
        "vector_in.in_layer": (1, 3072, 768),
        "vector_in.out_layer": (1, 3072, 3072),
        "guidance_in.in_layer": (1, 3072, 256),
        "guidance_in.out_layer": (1, 3072, 3072),
        "final_layer.linear": (1, 64, 3072),
        "final_layer.adaLN_modulation.1": (1, 6144, 3072),
    },
    "ltx_video": {
        **{
            f"transformer_blocks.*.{attention}.{name}": (28, 2048, 2048)
            for attention in ("attn1", "attn2")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        },
        "transformer_blocks.*.ff.net.0.proj": (28, 8192, 2048),
        "transformer_blocks.*.ff.net.2": (28, 2048, 8192),
        "patchify_proj": (1, 2048, 128),
        "adaln_single.emb.timestep_embedder.linear_1": (1, 2048, 256),
        "adaln_single.emb.timestep_embedder.linear_2": (1, 2048, 2048),
        "adaln_single.linear": (1, 12288, 2048),
        "caption_projection.linear_1": (1, 2048, 4096),
        "caption_projection.linear_2": (1, 2048, 2048),
        "proj_out": (1, 128, 2048),
    },
}  # fmt: skip

_FLUX_PARTS = {
    "transformer_blocks.*.attn.to_q": ("double_blocks.*.img_attn.qkv", 0, 1),
    "transformer_blocks.*.attn.to_k": ("double_blocks.*.img_attn.qkv", 1, 1),
    "transformer_blocks.*.attn.to_v": ("double_blocks.*.img_attn.qkv", 2, 1),
    "transformer_blocks.*.attn.add_q_proj": ("double_blocks.*.txt_attn.qkv", 0, 1),
    "transformer_blocks.*.attn.add_k_proj": ("double_blocks.*.txt_attn.qkv", 1, 1),
    "transformer_blocks.*.attn.add_v_proj": ("double_blocks.*.txt_attn.qkv", 2, 1),
    "single_transformer_blocks.*.attn.to_q": ("single_blocks.*.linear1", 0, 1),
    "single_transformer_blocks.*.attn.to_k": ("single_blocks.*.linear1", 1, 1),
    "single_transformer_blocks.*.attn.to_v": ("single_blocks.*.linear1", 2, 1),
    "single_transformer_blocks.*.proj_mlp": ("single_blocks.*.linear1", 3, 4),
}
PARTS: dict[str, dict[str, tuple[str, int, int]]] = {
    "flux": _FLUX_PARTS,
    "chroma": _FLUX_PARTS,
    "flux2": {k: v for k, v in _FLUX_PARTS.items() if not k.startswith("single")},
    "sd35_medium": {
        f"transformer_blocks.*.{ours}": (f"joint_blocks.*.{theirs}", row, 1)
        for theirs, parts in {
            "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        }.items()
        for row, ours in enumerate(parts)
    },
    "z_image": {
        f"{part}.*.attention.{name}": (f"{part}.*.attention.qkv", row, 1)
        for part in ("layers", "noise_refiner", "context_refiner")
        for row, name in enumerate(("to_q", "to_k", "to_v"))
    },
}

WIDTH = {"flux": 3072, "chroma": 3072, "flux2": 6144, "sd35_medium": 1536, "z_image": 3840}
"""The model's width, in which PARTS counts rows."""

SD_SCRIPTS_FLUX = ("double_blocks.", "single_blocks.", "img_in", "time_in", "vector_in", "guidance_in", "txt_in")  # fmt: skip
"""Beginnings of the layers of FLUX and Chroma for which ``networks/lora_flux.py`` makes an adapter from a
file; ``lora_sd3.py`` makes one for every layer."""

SDXL_ATTENTION = {
    "input_blocks.4.1": 2, "input_blocks.5.1": 2, "input_blocks.7.1": 10, "input_blocks.8.1": 10,
    "middle_block.1": 10,
    "output_blocks.0.1": 10, "output_blocks.1.1": 10, "output_blocks.2.1": 10,
    "output_blocks.3.1": 2, "output_blocks.4.1": 2, "output_blocks.5.1": 2,
}  # fmt: skip
"""SDXL's attention modules and their numbers of transformer blocks (``library/sdxl_original_unet.py``,
``comfy/ldm/modules/diffusionmodules/openaimodel.py``)."""
SD15_ATTENTION = {
    **{f"down_blocks.{i}.attentions.{j}": 1 for i in (0, 1, 2) for j in (0, 1)},
    "mid_block.attentions.0": 1,
    **{f"up_blocks.{i}.attentions.{j}": 1 for i in (1, 2, 3) for j in (0, 1, 2)},
}
"""The same of SD1.5, by the names that sd-scripts (``library/original_unet.py``), ComfyUI
(``unet_to_diffusers``) and AUTOMATIC1111 (``convert_diffusers_name_to_compvis``) know."""
UNET_LAYERS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
"""Layers of a transformer block of a UNet. With ``proj_in`` and ``proj_out`` of every attention module,
sd-scripts reports 192 modules for SD1.5 and 722 for SDXL."""
SDXL_RESIDUAL = {
    "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.4.0.emb_layers.1",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
}
"""Some residual layers and resamplers of SDXL in diffusers and in the original checkpoint
(``library/sdxl_model_util.py``)."""
