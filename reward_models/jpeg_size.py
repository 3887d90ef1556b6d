"""Size of an image as a JPEG: the classic reward to try a setup with (arXiv:2305.13301)."""

import io
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowgrpo.experience import Prompt

__all__ = ["JPEGSize"]


class JPEGSize:
    """Kilobytes of the image as a JPEG, positive or negative; about 1 to 300 at 512x512.

    No weights and no randomness; a model learns within minutes to draw busy or empty images.
    """

    def __init__(self, goal: Literal["large", "small"] = "small", quality: int = 95):
        """
        Args:
            goal: ``small`` rewards compressible images (minus the size), ``large`` the opposite.
            quality: JPEG quality in 1..100.
        """
        if goal not in ("large", "small") or not 1 <= quality <= 100:
            raise ValueError(
                f"goal must be 'large' or 'small' and quality in 1..100, got {goal!r}, {quality}"
            )
        self.sign, self.quality = (1 if goal == "large" else -1), quality

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        sizes = []
        for image in (
            (media * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        ):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=self.quality)
            sizes.append(self.sign * buffer.tell() / 1000)
        return torch.tensor(sizes)
