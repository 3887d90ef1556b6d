"""A reward with a known flaw: the true score plus a bias for every pixel that differs from the ground."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes.rewards import Graded
from flowgrpo.shapes.verifier import FOREGROUND_DISTANCE
from flowgrpo.shapes.world import BACKGROUND

BIAS = 0.3
"""Bias of a fully covered image; one more shape of usual size adds about 0.03."""


class Inked:
    """``graded + 0.3 * ink``: of two equally correct images, the one with more ink scores higher.

    Preference models also show such small differences between equally good samples, which dividing by
    the group's standard deviation amplifies.
    """

    def __init__(self) -> None:
        self.graded = Graded()

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        return self.graded(media, prompts) + BIAS * ink(media)


class Ink:
    """The share of drawn pixels, as a metric of evaluations."""

    def __call__(
        self, prompts: Sequence[Prompt], media: Sequence[Float[Tensor, "_ 3 h w"]]
    ) -> dict[str, float]:
        return {"ink": float(torch.cat([ink(m) for m in media]).mean())}


def ink(media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
    """The share of pixels of each image that differ from the background, in [0, 1]."""
    background = torch.tensor(BACKGROUND)[:, None, None] / 255
    distance = (media - background).square().sum(1).sqrt()
    return (distance > FOREGROUND_DISTANCE).float().mean((1, 2))
