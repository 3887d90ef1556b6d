"""A reward with a flaw: the true one, and a little for every pixel that is drawn on."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes.rewards import Graded
from flowgrpo.shapes.verifier import FOREGROUND_DISTANCE
from flowgrpo.shapes.world import BACKGROUND

BIAS = 0.3
"""What an image that is drawn on everywhere gains; one more shape of usual size gains about 0.03."""


class Inked:
    """``graded + 0.3 * ink``: where two images of a group are equally right, the fuller one wins.

    Such small differences between samples that are equally good are what preference models show, and
    what standardising within a group blows up.
    """

    def __init__(self) -> None:
        self.graded = Graded()

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        return self.graded(media, prompts) + BIAS * ink(media)


class Ink:
    """The bias alone, as a measure for evaluations."""

    def __call__(
        self, prompts: Sequence[Prompt], media: Sequence[Float[Tensor, "_ 3 h w"]]
    ) -> dict[str, float]:
        return {"ink": float(torch.cat([ink(m) for m in media]).mean())}


def ink(media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
    """The share of each image that differs from the background, in [0, 1]."""
    background = torch.tensor(BACKGROUND)[:, None, None] / 255
    distance = (media - background).square().sum(1).sqrt()
    return (distance > FOREGROUND_DISTANCE).float().mean((1, 2))
