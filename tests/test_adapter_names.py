"""How many layers of an adapter each program loads, and at which strength, at published sizes.

The programs' names and sizes are tables of facts (:mod:`tests.original_names`). The readers below find
layers as the programs do: by looking up names that they derive from their own layers.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from flowgrpo.policy import LoRA
from flowgrpo.policy.export.adapter_files import comfyui_tensors, kohya_tensors
from flowgrpo.policy.export.checkpoint_file import original_weights
from flowgrpo.policy.export.layer_names import place_of
from flowgrpo.policy.weights import ADAPTER, Trainable
from tests.original_names import (
    LAYERS,
    PARTS,
    SD15_ATTENTION,
    SD_SCRIPTS_FLUX,
    SDXL_ATTENTION,
    SDXL_RESIDUAL,
    UNET_LAYERS,
    WIDTH,
)

SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "joint_attention_dim": 4096,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 384,
    "sample_size": 128,
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "chroma": ("ChromaTransformer2DModel", {}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "sd35_medium": ("SD3Transformer2DModel", SD35_MEDIUM),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
    "z_image": ("ZImageTransformer2DModel", {}),
    "wan_i2v": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}),
    "ltx_video": ("LTXVideoTransformer3DModel", {}),
}
"""Classes and the published configurations, as far as they differ from the classes' defaults."""
RANK, ALPHA = 2, 4


def adapted(kind: str, config: Mapping[str, Any], target: str) -> tuple[ModelMixin, int]:
    """A model without memory for its weights, and the number of its adapted layers."""
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    number = sum(re.fullmatch(target, n) is not None for n in layers)
    weights = LoRA(rank=RANK, alpha=ALPHA, targets=(f"re:{target}",))
    Trainable({"transformer": model}, weights, seed=0, with_reference=False)
    return model, number


def numbered(names: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A table's names with the numbers of blocks in place of the star."""
    most = 1 + max(int(n) for key in tensors for n in re.findall(r"[._](\d+)[._]", key))
    return {k.replace("*", str(i)): v for k, v in names.items() for i in range(most)}


def found(
    tensors: Mapping[str, Tensor], name: str, rows: int, columns: int, ends: tuple[str, str]
) -> bool:
    """Whether a program finds an adapter of a layer; it must fit, and have its whole strength."""
    down, up = (tensors.get(f"{name}.{end}.weight") for end in ends)
    if down is None or up is None:
        return False
    assert down[0].numel() == columns, name
    assert rows in (-1, len(up)), name
    assert up.shape[1] == len(down), name
    assert float(tensors[f"{name}.alpha"]) / len(down) == 1.0, name
    return True


def comfyui_loads(tensors: Mapping[str, Tensor], family: str) -> list[str]:
    """The names of a file that ComfyUI finds."""
    layers = numbered(LAYERS[family], tensors)
    ends = ("lora_A", "lora_B")
    names = {f"diffusion_model.{k}": (rows, columns) for k, (_, rows, columns) in layers.items()}
    for ours, (layer, _, height) in PARTS.get(family, {}).items():
        part = (height * WIDTH[family], LAYERS[family][layer][2])
        names |= numbered({f"transformer.{ours}": part}, tensors)
    return [k for k, (rows, columns) in names.items() if found(tensors, k, rows, columns, ends)]


def sd_scripts_loads(tensors: Mapping[str, Tensor], family: str) -> list[str]:
    """The names of a file that sd-scripts finds."""
    layers = numbered(LAYERS[family], tensors)
    if family != "sd35_medium":
        layers = {k: v for k, v in layers.items() if k.startswith(SD_SCRIPTS_FLUX)}
    names = {f"lora_unet_{k.replace('.', '_')}": v for k, v in layers.items()}
    ends = ("lora_down", "lora_up")
    return [k for k, (_, rows, columns) in names.items() if found(tensors, k, rows, columns, ends)]


@pytest.mark.parametrize("family", PUBLISHED)
def test_comfyui_loads_every_layer(family: str) -> None:
    model, layers = adapted(*PUBLISHED[family], ".*")
    tensors = comfyui_tensors(model)
    loaded = comfyui_loads(tensors, family)
    assert 3 * len(loaded) == len(tensors)
    if family == "hunyuan_video":
        # ComfyUI has no names for its parts, so they are joined: all of its layers are there.
        assert len(loaded) == sum(number for number, _, _ in LAYERS[family].values())
    else:
        assert len(loaded) == layers


@pytest.mark.parametrize("family", ["flux", "chroma", "sd35_medium"])
def test_sd_scripts_loads_every_layer(family: str) -> None:
    blocks = r"(single_)?transformer_blocks\..*"
    model, _ = adapted(*PUBLISHED[family], blocks)
    tensors = kohya_tensors(model)
    loaded = sd_scripts_loads(tensors, family)
    assert 3 * len(loaded) == len(tensors)
    assert len(loaded) == sum(n for k, (n, _, _) in LAYERS[family].items() if "_blocks." in k)


@pytest.mark.parametrize(
    ("config", "attention", "modules"),
    [(SD15, SD15_ATTENTION, 192), (SDXL, SDXL_ATTENTION, 722)],
)
def test_one_unet_file_for_all_programs(
    config: Mapping[str, Any], attention: Mapping[str, int], modules: int
) -> None:
    model, layers = adapted("UNet2DConditionModel", config, r".*attentions\..*")
    tensors = kohya_tensors(model)
    names = [f"{at}.{end}" for at in attention for end in ("proj_in", "proj_out")]
    for at, depth in attention.items():
        names += [f"{at}.transformer_blocks.{i}.{k}" for i in range(depth) for k in UNET_LAYERS]
    expected = {f"lora_unet_{n.replace('.', '_')}" for n in names}
    assert {k.split(".")[0] for k in tensors} == expected
    assert len(expected) == layers == modules
    assert {float(v) for k, v in tensors.items() if k.endswith("alpha")} == {float(RANK)}
    assert comfyui_tensors(model).keys() == tensors.keys()


def test_residual_layers_of_sdxl() -> None:
    model, _ = adapted("UNet2DConditionModel", SDXL, r".*resnets\..*|.*samplers\..*")
    assert {k: place_of(model, k).name for k in SDXL_RESIDUAL} == SDXL_RESIDUAL
    assert len({k.split(".")[0] for k in kohya_tensors(model)}) == 17 * 3 + 11 + 4


@pytest.mark.parametrize(
    ("kind", "config", "weights", "some"),
    [
        ("UNet2DConditionModel", SD15, 686, {"output_blocks.2.1.conv.weight": (1280, 1280, 3, 3)}),
        ("UNet2DConditionModel", SDXL, 1680, {"output_blocks.2.2.conv.weight": (1280, 1280, 3, 3)}),
        (
            "FluxTransformer2DModel",
            {"guidance_embeds": True},
            780,
            {
                "double_blocks.18.txt_attn.norm.key_norm.scale": (128,),
                "single_blocks.37.linear1.bias": (21504,),
                "final_layer.adaLN_modulation.1.weight": (6144, 3072),
            },
        ),
        (
            "SD3Transformer2DModel",
            SD35_MEDIUM,
            665,
            {
                "pos_embed": (1, 147456, 1536),
                "joint_blocks.12.x_block.attn2.ln_k.weight": (64,),
                "joint_blocks.22.context_block.attn.ln_q.weight": (64,),
                "joint_blocks.23.context_block.adaLN_modulation.1.bias": (3072,),
            },
        ),
    ],
)
def test_every_weight_has_its_original_name(
    kind: str, config: Mapping[str, Any], weights: int, some: dict[str, tuple[int, ...]]
) -> None:
    """As many weights as the published checkpoints have, and ComfyUI's classes."""
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    found = original_weights(model)
    assert len(found) == weights
    assert {k: tuple(found[k].shape) for k in some} == some


SMALL: dict[str, Callable[[], ModelMixin]] = {
    "flux": lambda: diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ),
    "sd35_medium": lambda: diffusers.SD3Transformer2DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        sample_size=8,
        dual_attention_layers=(0,),
    ),
}


@pytest.mark.parametrize("family", SMALL)
def test_joined_layers_have_their_parts_in_place(family: str) -> None:
    """The product of a joined layer's matrices is the change of each part, in the part's rows."""
    model = SMALL[family]()
    width = 16
    weights = LoRA(rank=RANK, alpha=3, targets=(r"re:(single_)?transformer_blocks\..*",))
    trainable = Trainable({"transformer": model}, weights, seed=0, with_reference=False)
    with torch.no_grad():
        for i, parameter in enumerate(trainable.parameters.values()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    tensors = kohya_tensors(model)
    checked = 0
    for ours, (theirs, row, height) in PARTS[family].items():
        for i in range(2):
            name = f"lora_unet_{theirs.replace('*', str(i)).replace('.', '_')}"
            if f"{name}.alpha" not in tensors:
                continue
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            change = float(tensors[f"{name}.alpha"]) / len(down) * up @ down
            layer = model.get_submodule(ours.replace("*", str(i)))
            rows = slice(row * width, (row + height) * width)
            torch.testing.assert_close(change[rows], layer.get_delta_weight(ADAPTER))
            checked += 1
    assert checked == {"flux": 10, "sd35_medium": 15}[family]


def test_scale_and_shift_are_exchanged() -> None:
    """FLUX's last modulation has the scale first in diffusers, and the shift first in the original."""
    model = SMALL["flux"]()
    weights = LoRA(rank=RANK, alpha=ALPHA, targets=("norm_out.linear",))
    Trainable({"transformer": model}, weights, seed=0, with_reference=False)
    layer = model.norm_out.linear
    nn.init.normal_(layer.lora_B[ADAPTER].weight)
    tensors = comfyui_tensors(model)
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    change = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    scale, shift = layer.get_delta_weight(ADAPTER).chunk(2)
    torch.testing.assert_close(change, torch.cat([shift, scale]))


def test_weights_of_a_checkpoint_are_in_place() -> None:
    """Diffusers' own converter has FLUX's published width in its code, so values are compared here."""
    model = SMALL["flux"]()
    weights, ours = original_weights(model), model.state_dict()
    for theirs, rows in {"double_blocks.0.txt_attn.qkv": 3, "single_blocks.0.linear1": 7}.items():
        assert len(weights[f"{theirs}.weight"]) == len(weights[f"{theirs}.bias"]) == rows * 16
    for name, (theirs, row, height) in PARTS["flux"].items():
        for end in ("weight", "bias"):
            part = weights[f"{theirs}.{end}".replace("*", "0")][row * 16 : (row + height) * 16]
            assert torch.equal(part, ours[f"{name}.{end}".replace("*", "0")])
    scale, shift = ours["norm_out.linear.weight"].chunk(2)
    last = weights["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(last, torch.cat([shift, scale]))


def test_what_a_program_cannot_load_is_refused() -> None:
    model, _ = adapted("LTXVideoTransformer3DModel", {"num_layers": 1}, ".*")
    with pytest.raises(
        ValueError, match=r"in sd-scripts, for which it can write adapters of Stable"
    ):
        kohya_tensors(model)
    model, _ = adapted("SanaTransformer2DModel", {"num_layers": 1}, r".*attn1\.to_q")
    with pytest.raises(ValueError, match=r"no names for SanaTransformer2DModel in ComfyUI"):
        comfyui_tensors(model)
    flux = {"num_layers": 1, "num_single_layers": 1}
    model, _ = adapted("FluxTransformer2DModel", flux, "proj_out")
    with pytest.raises(ValueError, match=r"sd-scripts loads no adapter of proj_out"):
        kohya_tensors(model)
    model, _ = adapted("UNet2DConditionModel", SD15, "conv_in")
    with pytest.raises(ValueError, match=r"sd-scripts loads no adapter of conv_in"):
        kohya_tensors(model)
