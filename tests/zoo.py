"""What the tests of reward models share: pictures, and tiny checkpoints in the published layouts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertTokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    RobertaTokenizer,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    VJEPA2Config,
    VJEPA2Model,
)

from flowgrpo.data.prompts import Prompt
from tests.tiny.parts import WORDS, clip_tokenizer, with_specials

TEXTS = ("a red cube", "two blue dogs riding a bus", "a photo of a cat")
PROMPTS = [Prompt(t) for t in TEXTS]


def noise(number: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images with coarse structure, so that resizing leaves something of them."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 5, 7, generator=random)
    fine = torch.rand(number, 3, height, width, generator=random)
    images: Tensor = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (images + 0.2 * fine).clamp(0, 1)


def films(number: int, frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Videos that fade from one picture to another, with noise in every frame."""
    random = torch.Generator().manual_seed(seed + 100)
    start, end = (noise(number, height, width, seed + i)[:, None] for i in (0, 1))
    time = torch.linspace(0, 1, frames).view(1, -1, 1, 1, 1)
    grain = 0.1 * torch.rand(number, frames, 3, height, width, generator=random)
    return (start + time * (end - start) + grain).clamp(0, 1)


def pil(media: Tensor) -> list[Image.Image]:
    """The images as a picture file would hold them."""
    arrays = [np.round(m.permute(1, 2, 0).double().numpy() * 255) for m in media]
    return [Image.fromarray(a.astype(np.uint8)) for a in arrays]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Draw weights without touching the random state of others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def save_clip(folder: Path) -> Path:
    """A ``CLIPModel`` of some kilobytes, 32x32."""
    tokenizer = clip_tokenizer()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    ids = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), **ids},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        initializer_factor=5.0,
    )
    with seeded():
        CLIPModel(config).save_pretrained(folder)
    return folder


TINY_HPS = "flowgrpo-tiny-hps"


@contextmanager
def hps_folder(folder: Path) -> Iterator[Path]:
    """HPS v2.1's checkpoint and its architecture, which open_clip knows for that long."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{TINY_HPS}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    with seeded():
        state = open_clip.create_model(TINY_HPS).state_dict()
    state = {k: v * 3 if "conv1" in k or "proj" in k else v for k, v in state.items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    yield folder
    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


def save_open_clip(folder: Path) -> Path:
    """A tiny CLIP in open_clip's own folder format, ``local-dir:...``."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    sizes = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": sizes, "preprocess_cfg": {}})
    )
    with seeded(3):
        model = open_clip.CLIP(**sizes)
    with torch.no_grad():
        # Or all pictures would look alike to it.
        model.visual.conv1.weight.mul_(20)
        model.visual.transformer.resblocks[0].attn.out_proj.weight.mul_(50)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_aesthetic(folder: Path) -> Path:
    """A ``CLIPModel`` and the aesthetic predictor's head."""
    save_clip(folder)
    head: dict[str, Tensor] = {}
    mlp_state(head, "layers", 16, torch.Generator().manual_seed(1))
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


def save_image_reward(folder: Path) -> Path:
    """ImageReward's checkpoint and tokenizer."""
    save_bert_tokenizer(folder)
    torch.save(image_reward_state(), folder / "ImageReward.pt")
    return folder


def save_mask2former(folder: Path) -> Path:
    """A Mask2Former of the published kind, tiny, sure of itself, for COCO's 80 classes."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    with seeded():
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(100)
    model.save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A ``Dinov2Model`` of some kilobytes, patches of 14."""
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        layerscale_value=1.0,
        initializer_range=0.2,
    )
    with seeded():
        Dinov2Model(config).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A ``SiglipModel`` of some kilobytes, with its text tower, as on the hub."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 32}, vision_config={**sizes, "image_size": 28, "patch_size": 14}
    )  # fmt: skip
    with seeded():
        model = SiglipModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def save_clap(folder: Path) -> Path:
    """A ``ClapModel`` that hears one second at 8 kHz, with its extractor and its tokenizer."""
    tokenizer = RobertaTokenizer(
        **with_specials("bytes", "<s>", "<pad>", "</s>", "<unk>", "<mask>")
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 34,
        "pad_token_id": tokenizer.pad_token_id,
    }
    audio = {
        "num_mel_bins": 16,
        "spec_size": 64,
        "window_size": 4,
        "patch_size": 2,
        "patch_stride": [2, 2],
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
    }
    with seeded():
        model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        hop_length=80,
        max_length_s=1,
        fft_window_size=256,
        frequency_max=4000,
        truncation="rand_trunc",
    ).save_pretrained(folder)
    return folder


def save_owlv2(folder: Path) -> Path:
    """An ``Owlv2ForObjectDetection`` with its processor, of some ten kilobytes."""
    tokenizer = clip_tokenizer()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ids}
    config = Owlv2Config(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16
    )  # fmt: skip
    with seeded():
        model = Owlv2ForObjectDetection(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(images, tokenizer).save_pretrained(folder)
    return folder


OWL2 = {
    "model_type": "mplug_owl2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "visual_config": {
        "visual_model": {
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
        },
        "visual_abstractor": {
            "hidden_size": 12,
            "encoder_hidden_size": 12,
            "intermediate_size": 10,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_learnable_queries": 3,
            "grid_size": 2,
            "layer_norm_eps": 1e-6,
        },
    },
}
"""The configuration of a tiny mPLUG-Owl2."""


def save_owl2(folder: Path) -> Path:
    """DeQA-Score's layout: configuration, two files of weights, CLIP's processor and a tokenizer."""
    tokenizer = clip_tokenizer()
    config = OWL2 | {"vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 28}
    CLIPImageProcessor(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    state = owl2_state(len(tokenizer))
    names = sorted(state)
    for n, part in enumerate((names[::2], names[1::2]), start=1):
        file = folder / f"model-0000{n}-of-00002.safetensors"
        save_file({k: state[k] for k in part}, file)
    return folder


OWL2_SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.{n}.self_attn.q_proj.weight": (16, 16),
    "model.layers.{n}.self_attn.o_proj.weight": (16, 16),
    "model.layers.{n}.self_attn.k_proj.multiway.{m}.weight": (16, 16),
    "model.layers.{n}.self_attn.v_proj.multiway.{m}.weight": (16, 16),
    "model.layers.{n}.input_layernorm.multiway.{m}.weight": (16,),
    "model.layers.{n}.post_attention_layernorm.multiway.{m}.weight": (16,),
    "model.layers.{n}.mlp.gate_proj.weight": (24, 16),
    "model.layers.{n}.mlp.up_proj.weight": (24, 16),
    "model.layers.{n}.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "model.vision_model.embeddings.cls_token": (1, 1, 12),
    "model.vision_model.embeddings.position_embedding": (1, 5, 12),
    "model.vision_model.embeddings.patch_embed.weight": (12, 3, 14, 14),
    "model.vision_model.embeddings.pre_layernorm.*": (12,),
    "model.vision_model.post_layernorm.*": (12,),
    "model.vision_model.encoder.layers.{n}.self_attn.query_key_value.*": (36, 12),
    "model.vision_model.encoder.layers.{n}.self_attn.dense.*": (12, 12),
    "model.vision_model.encoder.layers.{n}.mlp.fc1.*": (20, 12),
    "model.vision_model.encoder.layers.{n}.mlp.fc2.*": (12, 20),
    "model.vision_model.encoder.layers.{n}.input_layernorm.*": (12,),
    "model.vision_model.encoder.layers.{n}.post_attention_layernorm.*": (12,),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.attention.query.*": (12, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.attention.key.*": (12, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.attention.value.*": (12, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.attention.q_pos_embed": (3, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.attention.k_pos_embed": (5, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.output.out_proj.*": (12, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.output.mlp.w1.*": (10, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.output.mlp.w2.*": (12, 10),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.output.mlp.w3.*": (10, 12),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.output.mlp.ffn_ln.*": (10,),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.output.norm2.*": (12,),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.norm1.*": (12,),
    "model.visual_abstractor.encoder.layers.{n}.crossattention.normk.*": (12,),
    "model.visual_abstractor.visual_fc.*": (16, 12),
    "model.visual_abstractor.query_embeds": (1, 3, 12),
    "model.visual_abstractor.vit_eos": (1, 1, 16),
}
"""Published names; ``*`` is a weight and a bias, ``{n}`` a layer, ``{m}`` words and pictures."""


def owl2_state(words: int) -> dict[str, Tensor]:
    """Weights under the published names, of the sizes above."""
    shapes = OWL2_SHAPES | {"model.embed_tokens.weight": (words, 16), "lm_head.weight": (words, 16)}
    random = torch.Generator().manual_seed(11)
    state: dict[str, Tensor] = {}
    for pattern, shape in shapes.items():
        for n, m in product(
            (0, 1) if "{n}" in pattern else (0,), (0, 1) if "{m}" in pattern else (0,)
        ):
            name = pattern.format(n=n, m=m)
            scale = 0.05 if "patch_embed" in name else 0.4
            weight = scale * torch.randn(shape, generator=random)
            is_norm = len(shape) == 1 and not name.endswith("bias")
            state[name.replace("*", "weight")] = weight + 1 if is_norm else weight
            if name.endswith("*"):
                state[name.replace("*", "bias")] = 0.4 * torch.randn(shape[0], generator=random)
    return state


def save_vjepa2(folder: Path) -> Path:
    """A ``VJEPA2Model`` with its predictor, of some ten kilobytes."""
    config = VJEPA2Config(
        crop_size=32,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=2,
        pred_zero_init_mask_tokens=False,
        initializer_range=0.2,
    )
    with seeded():
        VJEPA2Model(config).save_pretrained(folder)
    return folder


def save_bert_tokenizer(folder: Path) -> Path:
    """BERT's tokenizer: the words of the tiny texts whole, letters for the rest."""
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pieces = (*specials, *(w.lower() for w in WORDS), *letters, *(f"##{x}" for x in letters))
    vocab = {token: i for i, token in enumerate(dict.fromkeys(pieces))}
    BertTokenizer(vocab=vocab, do_lower_case=True).save_pretrained(folder)
    return folder


WIDTH, PATCH, GRID, WORDS_KNOWN = 128, 8, 4, 512


def image_reward_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names of ImageReward, at tiny size."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) * inputs**-0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=random)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(WIDTH, generator=random)
        state[f"{name}.bias"] = 0.1 * torch.randn(WIDTH, generator=random)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    patches = torch.randn(WIDTH, 3, PATCH, PATCH, generator=random) * (3 * PATCH**2) ** -0.5
    state[f"{eye}.patch_embed.proj.weight"] = patches
    state[f"{eye}.patch_embed.proj.bias"] = torch.zeros(WIDTH)
    state[f"{eye}.cls_token"] = torch.randn(1, 1, WIDTH, generator=random)
    state[f"{eye}.pos_embed"] = torch.randn(1, 1 + GRID**2, WIDTH, generator=random)
    norm(f"{eye}.norm")
    for block in (f"{eye}.blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 256)
        linear(f"{block}.mlp.fc2", 256, WIDTH)
    words = torch.randn(WORDS_KNOWN, WIDTH, generator=random)
    state[f"{text}.embeddings.word_embeddings.weight"] = words
    state[f"{text}.embeddings.position_embeddings.weight"] = words[:40] * 0.5
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{text}.embeddings.LayerNorm")
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{attention}.self.{part}", WIDTH, WIDTH)
            linear(f"{layer}.{attention}.output.dense", WIDTH, WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", WIDTH, 256)
        linear(f"{layer}.output.dense", 256, WIDTH)
        norm(f"{layer}.output.LayerNorm")
    linear("blip.vision_proj", WIDTH, 8)
    linear("blip.text_proj", WIDTH, 8)
    mlp_state(state, "mlp.layers", WIDTH, random)
    return state


def mlp_state(state: dict[str, Tensor], prefix: str, width: int, random: torch.Generator) -> None:
    """The head that ImageReward and the aesthetic predictor share, with large weights."""
    widths = (width, 32, 16, 8, 4, 1)
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        weight = 2 * torch.randn(outputs, inputs, generator=random) * inputs**-0.5
        state[f"{prefix}.{number}.weight"] = weight
        state[f"{prefix}.{number}.bias"] = 0.1 * torch.randn(outputs, generator=random)


CHAT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% else %}<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What the chat template of Qwen2-VL makes of one question about one picture."""
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def qwen_vl_tokenizer() -> Qwen2Tokenizer:
    """Qwen-VL's tokenizer, with its special tokens at the first ids."""
    return Qwen2Tokenizer(
        **with_specials("bytes", *SPECIALS),
        chat_template=CHAT,
        extra_special_tokens=list(SPECIALS[1:]),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=32768,
    )


def qwen_sizes(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """The configuration that the tiny Qwen-VLs have in common."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    places = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end")
    }
    ids = {f"{name}_token_id": place for name, place in places.items()}
    for kind in ("image", "video"):
        ids[f"{kind}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
    return {"text_config": text, **ids}


def save_qwen2_vl(folder: Path) -> Path:
    """A ``Qwen2VLForConditionalGeneration`` with its processor, of some hundred kilobytes."""
    tokenizer = qwen_vl_tokenizer()
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "initializer_range": 0.2,
    }
    with seeded():
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(vision_config=vision, **qwen_sizes(tokenizer))
        )
    model.save_pretrained(folder)
    # As on the hub: limits so wide that they never matter to what was resized before.
    limits = {"min_pixels": 56 * 56, "max_pixels": 16384 * 28 * 28}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**limits),
        tokenizer,
        Qwen2VLVideoProcessor(**limits),
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a Qwen2-VL under the names that they had before transformers 4.52."""
    renamed = {}
    for key, tensor in state.items():
        key = key.replace("model.visual.", "visual.")
        renamed[key.replace("model.language_model.", "model.")] = tensor
    return renamed


def with_rows(state: dict[str, Tensor], number: int, seed: int) -> dict[str, Tensor]:
    """The weights with rows for further tokens, as in a resized vocabulary."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, 32, generator=random)
    wider = ("embed_tokens.weight", "lm_head.weight")
    return {k: torch.cat([v, rows]) if k.endswith(wider) else v for k, v in state.items()}


def hpsv3_state(base: Path) -> dict[str, Tensor]:
    """The published layout: a subclass of Qwen2-VL under today's names, and its head."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    state = with_rows(dict(model.state_dict()), 1, seed=5)
    random = torch.Generator().manual_seed(6)
    for n, (inputs, outputs) in {0: (32, 24), 3: (24, 16), 5: (16, 2)}.items():
        state[f"rm_head.{n}.weight"] = torch.randn(outputs, inputs, generator=random)
        state[f"rm_head.{n}.bias"] = torch.randn(outputs, generator=random)
    return {k: v.clone().contiguous() for k, v in state.items()}


def edit_reward_state(base: Path) -> dict[str, Tensor]:
    """The published layout: a subclass of Qwen2.5-VL under today's names, and its two heads."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base)
    state = with_rows(dict(model.state_dict()), 1, seed=5)
    random = torch.Generator().manual_seed(6)
    for head in (0, 1):
        for n, (inputs, outputs) in {0: (32, 24), 3: (24, 16), 5: (16, 2)}.items():
            name = f"rm_heads.head_{head}.{n}"
            state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random)
            state[f"{name}.bias"] = torch.randn(outputs, generator=random)
    return {k: v.clone().contiguous() for k, v in state.items()}


def video_align_state(base: Path) -> dict[str, Tensor]:
    """The published layout: peft around a subclass under the old names, with LoRAs unmerged."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    state = old_names(with_rows(dict(model.state_dict()), 3, seed=7))
    random = torch.Generator().manual_seed(8)
    state["rm_head.weight"] = torch.randn(1, 32, generator=random)
    wrapped = {}
    for key, tensor in state.items():
        if "layers" in key and key.endswith("_proj.weight") and not key.startswith("visual"):
            name = "base_model.model." + key.removesuffix(".weight")
            wrapped[f"{name}.base_layer.weight"] = tensor
            outputs, inputs = tensor.shape
            a, b = (torch.randn(s, generator=random) * 0.01 for s in ((64, inputs), (outputs, 64)))
            wrapped[f"{name}.lora_A.default.weight"] = a
            wrapped[f"{name}.lora_B.default.weight"] = b
        else:
            wrapped[f"base_model.model.{key}"] = tensor
    assert sum("lora_A" in k for k in wrapped) == 14
    return {
        k.replace("_proj.bias", "_proj.base_layer.bias") if "self_attn" in k else k: v.clone()
        for k, v in wrapped.items()
    }


def save_qwen25_vl(folder: Path, words: Sequence[str]) -> Path:
    """A ``Qwen2_5_VLForConditionalGeneration`` with its processor, which has ``words`` as tokens."""
    tokenizer = qwen_vl_tokenizer()
    tokenizer.add_tokens(list(words))
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    with seeded():
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(vision_config=vision, **qwen_sizes(tokenizer))
        )
    model.save_pretrained(folder)
    limits = {"min_pixels": 56 * 56, "max_pixels": 16384 * 28 * 28}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**limits),
        tokenizer,
        Qwen2VLVideoProcessor(**limits),
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def teach(
    folder: Path,
    lessons: Sequence[tuple[dict[str, Any], str, str]],
    doubts: dict[str, dict[str, float]],
) -> None:
    """Give the model in ``folder`` a head for words with which it answers as it is told.

    There are fewer tokens to answer than features, so the head is the solution of linear equations.

    Args:
        folder: Of a tiny Qwen2.5-VL.
        lessons: Inputs for the processor, a question as the processor takes it, and its answer.
        doubts: For an answer's token, other logits than 10 for it and 0 for all others.
    """
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer, seen, wanted = processor.tokenizer, [], []
    for media, question, answer in lessons:
        text = f"{question}{answer}<|im_end|>"
        inputs = processor(text=[text], return_tensors="pt", **media)
        if "second_per_grid_ts" in inputs:
            inputs["second_per_grid_ts"] = [1.0]
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        following = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        for place, token in enumerate(following, start=len(hidden) - len(following) - 1):
            logits = torch.zeros(len(tokenizer))
            said = doubts.get(tokenizer.decode([token]), {tokenizer.decode([token]): 10.0})
            for word, logit in said.items():
                logits[tokenizer.convert_tokens_to_ids(word)] = logit
            seen.append(hidden[place])
            wanted.append(logits)
    assert len(seen) <= 32
    head = torch.linalg.lstsq(torch.stack(seen).double(), torch.stack(wanted).double()).solution.T
    model.lm_head.weight.copy_(head.float())
    model.save_pretrained(folder)


def check_gradient(reward: Any, prompts: Sequence[Prompt], tolerance: float) -> None:
    """The scores with a gradient are the reward's own, and so is the slope along the gradient.

    Args:
        reward: Has ``scores_with_gradient``.
        prompts: As many as images.
        tolerance: Largest difference of a score, as a share of the scores' spread: rounding to 8 bits.
    """
    for height, width in ((33, 57), (101, 37), (64, 64)):
        media = (noise(len(prompts), height, width, seed=height) * 255).round() / 255
        media.requires_grad_()
        scores = reward.scores_with_gradient(media, prompts)
        own = reward(media.detach(), prompts)
        spread = float(own.std()) + 1e-3
        assert float((scores.detach().cpu() - own).abs().max()) < tolerance * spread
        (slope,) = torch.autograd.grad(scores.sum(), media)
        direction = slope / slope.norm()
        step = 1e-2
        with torch.no_grad():
            ends = [reward.scores_with_gradient((media + s * direction).clamp(0, 1), prompts).sum() for s in (-step, step)]  # fmt: skip
        found = float(ends[1] - ends[0]) / (2 * step)
        assert found == pytest.approx(float(slope.norm()), rel=0.05)
