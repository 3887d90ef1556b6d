"""What the tests of reward models share: pictures, and tiny checkpoints in the published layouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from flowgrpo.experience import Prompt
from tests.tiny.parts import WORDS, clip_tokenizer

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
