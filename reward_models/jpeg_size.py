"""Size of an image as a JPEG: a reward without weights, to try out a setup (arXiv:2305.13301)."""

import io
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.pictures import check_media, finite_only, pictures

__all__ = ["JPEGSize"]


class JPEGSize:
    """Kilobytes of the image as a JPEG, positive or negative; about 1 to 300 at 512x512.

    Deterministic; a model learns within minutes to draw detailed or empty images. An
    image with NaN scores NaN. Flow-GRPO's compressibility reward is 1/500 of ``small``; DDPO's is
    equal to it.
    """

    ignores_prompt = True

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
        check_media(media, prompts)
        sizes = []
        for image in pictures(media):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=self.quality)
            sizes.append(self.sign * buffer.tell() / 1000)
        return finite_only(torch.tensor(sizes), media)
