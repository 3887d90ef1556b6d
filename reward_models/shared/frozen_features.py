"""Frozen features of pictures, by name, on which a head of votes rests."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

EMBEDDED = Path(__file__).resolve().parents[2] / "flowgrpo" / "shapes" / "model" / "vae"
"""The autoencoder of the embedded model."""


@runtime_checkable
class Embedder(Protocol):
    """Maps pictures to vectors."""

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images size"]:
        """One vector per picture."""
        ...


class Thumbnails:
    """Colours of 8x8 areas, in [-1, 1]: 192 features without a model."""

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images size"]:
        """One vector of 192 values per picture."""
        small = [np.asarray(i.resize((8, 8), Image.Resampling.BOX), np.float32) for i in images]
        return torch.from_numpy(np.stack(small)).flatten(1) / 127.5 - 1


class EmbeddedAutoencoder:
    """The encoder of the embedded model's autoencoder: mean and root mean square of its 64 channels.

    Pictures are resized to 64x64 pixels.
    """

    def __init__(self, device: str = "cpu"):
        """
        Args:
            device: Device of the encoder, which has 0.1 million weights.
        """
        from diffusers import AutoencoderKL

        self.device = device
        autoencoder = AutoencoderKL.from_pretrained(EMBEDDED, use_safetensors=True)
        self.encoder = autoencoder.encoder.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images size"]:
        """One vector of 128 values per picture."""
        pixels = np.stack([np.asarray(i.resize((64, 64)), np.float32) for i in images])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device) / 127.5 - 1
        x = self.encoder.conv_in(x)
        for block in self.encoder.down_blocks:
            x = block(x)
        x = self.encoder.mid_block(x).flatten(2)
        return torch.cat([x.mean(-1), x.square().mean(-1).sqrt()], dim=1).cpu()


class CLIPImages:
    """Image embeddings of CLIP, with the options of ``clip_score``."""

    def __init__(self, **options: Any):
        from reward_models.clip_score import CLIPScore

        self.clip = CLIPScore(**options)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images size"]:
        """One vector of length 1 per picture."""
        vectors = []
        for image in images:
            media = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
            pixels = self.clip.preprocess(media).to(self.clip.device, self.clip.dtype)
            vectors.append(self.clip.model.encode_image(pixels).float().cpu())
        return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def _reward(name: str, cls: str) -> Callable[..., Embedder]:
    """The reward model in a file of ``reward_models``, imported when it is made."""

    def make(**options: Any) -> Embedder:
        made: Embedder = getattr(import_module(f"reward_models.{name}"), cls)(**options)
        return made

    return make


KINDS: Mapping[str, Callable[..., Embedder]] = {
    "thumbnail": Thumbnails,
    "embedded": EmbeddedAutoencoder,
    "dino": _reward("dino", "DINOSimilarity"),
    "siglip": _reward("siglip", "SigLIPSimilarity"),
    "clip": CLIPImages,
}
"""All that a file can name. It cannot name an import path, so reading one runs no code of others."""
BATCH = 16


class FrozenFeatures:
    """Computes frozen features of pictures.

    Args:
        name: One of :data:`KINDS`.
        options: Arguments of its class.

    Raises:
        ValueError: If the name or an option is unknown.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None):
        if name not in KINDS:
            raise ValueError(f"unknown features {name!r} (known: {', '.join(KINDS)})")
        try:
            self.model = KINDS[name](**(options or {}))
        except TypeError as error:
            raise ValueError(f"features {name!r}: {error}") from error

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "images size"]:
        """One vector per picture, in fp32 on the CPU."""
        parts = [
            self.model.embed([i.convert("RGB") for i in images[s : s + BATCH]]).float().cpu()
            for s in range(0, len(images), BATCH)
        ]
        return torch.cat(parts)


def probe() -> Image.Image:
    """A fixed picture, by whose features a change of the feature model is noticed."""
    y, x = np.mgrid[0:64, 0:64]
    pixels = np.stack([4 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)
    pixels[16:40, 20:44] = (214, 40, 40)
    return Image.fromarray(pixels)
