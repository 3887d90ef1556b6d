"""Temporal consistency of a video, without weights."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.pictures import check_media, eight_bits, finite_only, luma

__all__ = ["TemporalConsistency"]

FEWEST = {"flicker": 2, "smoothness": 3, "ssim": 2}
"""Frames that each metric needs."""
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
"""SSIM's usual window and constants (Wang et al. 2004), for values in [0, 1]."""


class TemporalConsistency:
    """Similarity of consecutive frames, by one of three metrics.

    ``flicker``: ``1 - mean |x[t+1] - x[t]|`` over the RGB values of consecutive frames, in [0, 1].
    This is VBench's temporal flickering (arXiv:2311.17982) without its choice of static prompts.
    1 for a still; usually 0.93 to 0.99.

    ``smoothness``: ``1 - mean |x[t] - (x[t-1] + x[t+1]) / 2|``, in [0, 1]: one minus the mean error
    of interpolating a frame from its neighbours. Slow motion lowers it little, shaking and flashing
    lower it much. 1 for a still and for linear fades; usually 0.96 to 0.995.

    ``ssim``: mean structural similarity of the luma of consecutive frames, window 11x11, Gaussian
    of standard deviation 1.5, without the border; in [-1, 1], usually 0.6 to 0.98.

    A still video has the highest score under all three: combine it with :class:`Motion`, or use
    weight 0 to log it only. Videos are rounded to 8 bits first; one with NaN scores NaN. No
    weights.
    """

    ignores_prompt = True

    def __init__(self, measure: Literal["flicker", "smoothness", "ssim"] = "smoothness"):
        """
        Args:
            measure: Which of the three metrics.

        Raises:
            ValueError: If there is no such metric.
        """
        if measure not in FEWEST:
            raise ValueError(f"measure must be one of {', '.join(FEWEST)}, got {measure!r}")
        self.measure = measure

    def __call__(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a video has too few frames, or is smaller than SSIM's window.
        """
        check_media(media, prompts, video=True)
        if media.shape[1] < FEWEST[self.measure]:
            raise ValueError(
                f"{self.measure} needs {FEWEST[self.measure]} frames, got {media.shape[1]}"
            )
        frames = eight_bits(media)
        if self.measure == "ssim":
            grey = luma(frames)
            first, second = grey[:, :-1].flatten(0, 1), grey[:, 1:].flatten(0, 1)
            return finite_only(ssim(first, second).view(len(media), -1).mean(1), media)
        x = frames.float() / 255
        gap = (
            x[:, 1:] - x[:, :-1]
            if self.measure == "flicker"
            else x[:, 1:-1] - (x[:, :-2] + x[:, 2:]) / 2
        )
        return finite_only(1 - gap.abs().flatten(1).mean(1), media)


def ssim(
    first: Float[Tensor, "pairs h w"], second: Float[Tensor, "pairs h w"]
) -> Float[Tensor, " pairs"]:
    """Mean structural similarity of grey images in [0, 1].

    Raises:
        ValueError: If the images are smaller than the window.
    """
    if min(first.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs {WINDOW}x{WINDOW} pixels at least, got {tuple(first.shape[-2:])}"
        )
    places = torch.arange(WINDOW, dtype=torch.float64, device=first.device) - WINDOW // 2
    line = torch.exp(-(places**2) / (2 * SIGMA**2))
    line = line / line.sum()
    a, b = first.double()[:, None], second.double()[:, None]  # variances are small differences

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    spread = (mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2)
    return (likeness / spread).mean((1, 2, 3)).float()
