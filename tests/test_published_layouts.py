"""Published checkpoints, without their weights: names and shapes of the files, on meta tensors.

The names, shapes and numbers of weights are facts about the published files: the indices of the
safetensors files and the sizes on their hub pages, and the modules of the authors' code. The rewards
must take them with nothing missing or left over.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ClapConfig,
    ClapModel,
    Dinov2Config,
    Dinov2Model,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)

from flowgrpo.memory.rewards import BYTES, LOADED, PARAMETERS, reward_sizes
from flowgrpo.rewards.loading import found
from flowgrpo.rewards.settings import Reward
from reward_models.image_reward import UNUSED, _empty, _renamed
from reward_models.shared.checkpoints import load_strictly, numbered
from reward_models.shared.qwen2_vl import head_part, modern_names, preference_head

Shapes = Mapping[str, tuple[int, ...]]


def weights(*groups: Shapes, repeat: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Meta tensors for patterns of names; ``{i}`` counts up to the number given for its prefix."""
    found: dict[str, Tensor] = {}
    for pattern, shape in (item for group in groups for item in group.items()):
        prefix, _, _ = pattern.partition(".{i}")
        numbers = range((repeat or {})[prefix]) if "{i}" in pattern else range(1)
        for i in numbers:
            found[pattern.replace("{i}", str(i))] = torch.empty(shape, device="meta")
    return found


def both(name: str, outputs: int, inputs: int) -> Shapes:
    """A linear layer with a bias."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# Qwen2-VL and Qwen2.5-VL, as in the files on the hub: "visual." and "model." before transformers 4.52.
def language(width: int, inner: int, kv: int, vocabulary: int) -> Shapes:
    layer = "model.layers.{i}"
    return {
        "model.embed_tokens.weight": (vocabulary, width),
        **both(f"{layer}.self_attn.q_proj", width, width),
        **both(f"{layer}.self_attn.k_proj", kv, width),
        **both(f"{layer}.self_attn.v_proj", kv, width),
        f"{layer}.self_attn.o_proj.weight": (width, width),
        f"{layer}.mlp.gate_proj.weight": (inner, width),
        f"{layer}.mlp.up_proj.weight": (inner, width),
        f"{layer}.mlp.down_proj.weight": (width, inner),
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.post_attention_layernorm.weight": (width,),
        "model.norm.weight": (width,),
    }


def sight(width: int, newer: bool) -> Shapes:
    block = "visual.blocks.{i}"
    shared = {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        **both(f"{block}.attn.qkv", 3840, 1280),
        **both(f"{block}.attn.proj", 1280, 1280),
        **both("visual.merger.mlp.0", 5120, 5120),
        **both("visual.merger.mlp.2", width, 5120),
    }
    if newer:
        return shared | {
            f"{block}.norm1.weight": (1280,),
            f"{block}.norm2.weight": (1280,),
            **both(f"{block}.mlp.gate_proj", 3420, 1280),
            **both(f"{block}.mlp.up_proj", 3420, 1280),
            **both(f"{block}.mlp.down_proj", 1280, 3420),
            "visual.merger.ln_q.weight": (1280,),
        }
    return shared | {
        **norm(f"{block}.norm1", 1280),
        **norm(f"{block}.norm2", 1280),
        **both(f"{block}.mlp.fc1", 5120, 1280),
        **both(f"{block}.mlp.fc2", 1280, 5120),
        **norm("visual.merger.ln_q", 1280),
    }


TEXT_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
TEXT_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
SIGHT_2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
SIGHT_25 = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}
QWEN = {
    # The base of HPSv3, of VideoAlign, and of EditReward, UnifiedReward and VideoScore2.
    "Qwen2-VL-7B": (Qwen2VLModel, Qwen2VLConfig, TEXT_7B, SIGHT_2 | {"hidden_size": 3584}, 8_291_375_616),
    "Qwen2-VL-2B": (Qwen2VLModel, Qwen2VLConfig, TEXT_2B, SIGHT_2 | {"hidden_size": 1536}, 2_208_985_600),
    "Qwen2.5-VL-7B": (Qwen2_5_VLModel, Qwen2_5_VLConfig, TEXT_7B, SIGHT_25, 8_292_166_656),
}  # fmt: skip


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_of_qwen_vl_are_those_of_its_class(name: str, prefix: str) -> None:
    kind, of_config, text, vision, published = QWEN[name]
    kv = text["hidden_size"] // text["num_attention_heads"] * text["num_key_value_heads"]
    width = text["hidden_size"]
    repeat = {"model.layers": 28, "visual.blocks": 32}
    own = language(width, text["intermediate_size"], kv, text["vocab_size"])
    state = weights(own, sight(width, "2.5" in name), repeat=repeat)
    tied = "2B" in name  # then the file has no second table
    number = sum(t.numel() for t in state.values()) + (0 if tied else own_rows(state))
    assert number == published
    head = {"lm_head.weight": torch.empty(1, device="meta")}
    found = modern_names({f"{prefix}{k}": v for k, v in (state | head).items()})
    with torch.device("meta"):
        model = kind(of_config(text_config=dict(text), vision_config=dict(vision)))
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def own_rows(state: Mapping[str, Tensor]) -> int:
    """Weights of the head for words, which is as large as the table of words."""
    return state["model.embed_tokens.weight"].numel()


@pytest.mark.parametrize("prefix", ["rm_head.", "rm_heads.head_0.", "rm_heads.head_1."])
def test_heads_of_hpsv3_and_edit_reward(prefix: str) -> None:
    """``Sequential(Linear(3584, 1024), ReLU, Dropout, Linear(1024, 16), ReLU, Linear(16, 2))``."""
    state = weights(both(f"{prefix}0", 1024, 3584), both(f"{prefix}3", 16, 1024), both(f"{prefix}5", 2, 16))  # fmt: skip
    with torch.device("meta"):
        head = preference_head(head_part(state, prefix), "x", "x")
    assert state == {}
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_image_reward_takes_its_published_file() -> None:
    """BLIP's ViT-L/16 and BERT with cross-attention, and the MLP; the file has 1.79 GB in fp32."""
    eye, text = "blip.visual_encoder", "blip.text_encoder"
    block, layer = f"{eye}.blocks.{{i}}", f"{text}.encoder.layer.{{i}}"
    attention: dict[str, tuple[int, ...]] = {}
    for part, width in (("attention", 768), ("crossattention", 1024)):
        attention |= both(f"{layer}.{part}.self.query", 768, 768)
        attention |= both(f"{layer}.{part}.self.key", 768, width)
        attention |= both(f"{layer}.{part}.self.value", 768, width)
        attention |= both(f"{layer}.{part}.output.dense", 768, 768)
        attention |= norm(f"{layer}.{part}.output.LayerNorm", 768)
    state = weights(
        {
            f"{eye}.patch_embed.proj.weight": (1024, 3, 16, 16),
            f"{eye}.patch_embed.proj.bias": (1024,),
            f"{eye}.cls_token": (1, 1, 1024),
            f"{eye}.pos_embed": (1, 197, 1024),
            f"{text}.embeddings.word_embeddings.weight": (30524, 768),
            f"{text}.embeddings.position_embeddings.weight": (512, 768),
            f"{text}.embeddings.position_ids": (1, 512),
        },
        norm(f"{eye}.norm", 1024),
        norm(f"{block}.norm1", 1024),
        norm(f"{block}.norm2", 1024),
        both(f"{block}.attn.qkv", 3072, 1024),
        both(f"{block}.attn.proj", 1024, 1024),
        both(f"{block}.mlp.fc1", 4096, 1024),
        both(f"{block}.mlp.fc2", 1024, 4096),
        norm(f"{text}.embeddings.LayerNorm", 768),
        attention,
        both(f"{layer}.intermediate.dense", 3072, 768),
        both(f"{layer}.output.dense", 768, 3072),
        norm(f"{layer}.output.LayerNorm", 768),
        both("blip.vision_proj", 256, 1024),
        both("blip.text_proj", 256, 768),
        *MLP,
        repeat={f"{eye}.blocks": 24, f"{text}.encoder.layer": 12},
    )
    assert 4 * sum(t.numel() for t in state.values()) == pytest.approx(1.79e9, rel=0.005)
    renamed = {_renamed(k): v for k, v in state.items() if not k.startswith(UNUSED)}
    with torch.device("meta"):
        load_strictly(_empty(renamed, "x"), renamed, "x", "ImageReward model")


WIDTHS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
MLP = [both(f"mlp.layers.{n}", *shape) for n, shape in WIDTHS.items()]


def test_the_aesthetic_head_has_the_size_of_its_file() -> None:
    """``sac+logos+ava1-l14-linearMSE.pth`` has 3.7 MB."""
    with torch.device("meta"):
        head = numbered(WIDTHS)
    assert 4 * count(head) == pytest.approx(3.71e6, rel=0.01)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def vit(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": inner} | more


SIGLIP = vit(1152, 27, 16, 4304)
NUMBERS: list[tuple[str, Callable[[], nn.Module], float]] = [
    ("dino", lambda: Dinov2Model(Dinov2Config(image_size=518, patch_size=14)), 86_580_480),
    # google/siglip-so400m-patch14-384: 878 million on its hub page.
    ("siglip", lambda: SiglipModel(SiglipConfig(text_config={**SIGLIP, "max_position_embeddings": 64, "vocab_size": 32000}, vision_config={**SIGLIP, "image_size": 384, "patch_size": 14})), 878e6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "published"), NUMBERS, ids=[n for n, _, _ in NUMBERS])
def test_encoders_have_the_published_number_of_weights(
    name: str, make: Callable[[], nn.Module], published: float
) -> None:
    with torch.device("meta"):
        number = count(make())
    exact = float(published).is_integer() and published % 1000 != 0
    assert number == (published if exact else pytest.approx(published, rel=5e-4))


WITH_HEAD = 427_616_513 + 3.71e6 / 4
PUBLISHED: dict[str, Any] = {
    # PickScore's CLIP-H has as many weights as HPS's, whose fp16 file has 1,972,484,501 bytes.
    "pick_score": 986_109_441, "hpsv2": pytest.approx(1_972_484_501 / 2, rel=5e-4), "clip_score": 427_616_513,
    "aesthetic": pytest.approx(WITH_HEAD, rel=1e-4), "image_reward": pytest.approx(1.79e9 / 4, rel=5e-3),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_rewards_without_weights_have_their_published_number(name: str) -> None:
    """What estimates of memory build, and the numbers that they use where nothing is built."""
    reward: Any = found(name)
    models = vars(reward.without_weights()).values()
    number = sum(count(m) for m in models if isinstance(m, nn.Module))
    assert number == PARAMETERS[name]
    assert number == PUBLISHED[name]


HEAD = 152064 * 3584
"""Weights of the head for words of Qwen2-VL-7B and Qwen2.5-VL-7B."""
WITHOUT_HEAD = {
    "hpsv3": QWEN["Qwen2-VL-7B"][-1] - HEAD,
    "edit_reward": QWEN["Qwen2.5-VL-7B"][-1] - HEAD,
}
WITH_HEAD_OR_TIED = {
    "unified_reward": QWEN["Qwen2.5-VL-7B"][-1],
    "video_score2": QWEN["Qwen2.5-VL-7B"][-1],
    "video_align": QWEN["Qwen2-VL-2B"][-1],
}


@pytest.mark.parametrize("name", ["clap", "physics", "subject_identity", "siglip", "dino"])
def test_sizes_of_encoders_in_the_memory_estimate(name: str) -> None:
    """The configurations' defaults are those of the published checkpoints."""
    vision = {**SIGLIP, "image_size": 384, "patch_size": 14}
    makes: dict[str, list[Callable[[], nn.Module]]] = {
        "clap": [lambda: ClapModel(ClapConfig())],
        "physics": [lambda: VJEPA2Model(VJEPA2Config())],
        "dino": [lambda: Dinov2Model(Dinov2Config(image_size=518, patch_size=14))],
        "siglip": [lambda: SiglipVisionModel(SiglipVisionConfig(**vision))],
    }
    owl = {"vision_config": {"image_size": 960, "patch_size": 16}}
    makes["subject_identity"] = [
        *makes["dino"],
        lambda: Owlv2ForObjectDetection(Owlv2Config(**owl)),
    ]
    with torch.device("meta"):
        assert sum(count(make()) for make in makes[name]) == LOADED[name].parameters


def test_every_reward_has_a_size_in_the_memory_estimate() -> None:
    """The one that the documentation gives; a reward with another model has none."""
    assert {n: LOADED[n].parameters for n in WITHOUT_HEAD} == WITHOUT_HEAD
    assert {n: LOADED[n].parameters for n in WITH_HEAD_OR_TIED} == WITH_HEAD_OR_TIED
    shipped = {p.stem for p in Path("reward_models").glob("*.py")} - {"__init__", "vote_head"}
    assert shipped == {*PARAMETERS, *LOADED, *BYTES}
    sizes = reward_sizes([Reward(model=n) for n in sorted(shipped)], "cuda")
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([^|]+) \|$",
        Path("docs/rewards.md").read_text().partition("## Sound")[0],
        re.M,
    )
    for name, said in rows:
        if name in shipped and (said := said.removesuffix(" GB")) not in ("see above",):
            number = 0.0 if said in ("on the server", "the server's", "below 0.5") else float(said)
            assert sizes[name] == pytest.approx(number * 1e9, rel=0.075), name
    other = {"hpsv3": {"base": "me/other"}, "dino": {"model": "facebook/dinov2-large"}}
    assert list(
        reward_sizes([Reward(model=n, options=o) for n, o in other.items()], "cuda").values()
    ) == [None, None]
    half = Reward(model="dino", options={"model": "/models/dinov2-base", "dtype": "bfloat16"})
    assert reward_sizes([half], "cuda") == {"dino": 2 * 86_580_480}
