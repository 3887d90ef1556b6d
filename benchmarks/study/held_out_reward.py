"""A reward that no run of the study is trained on: how much of a picture has colours of the world."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes.world import BACKGROUND, WORLD, World

NEAR = 0.12
"""RGB distance (components in [0, 1]) up to which a pixel has a colour of the world."""


class Palette:
    """Mean share of pixels near the background or a colour of the world, as a metric of evaluations.

    It looks at drawing, not at the prompt: smears, mixed colours and soft edges lower it. Of the world's
    own pictures it is 0.95 to 0.99, since edges are anti-aliased.
    """

    def __init__(self, world: World = WORLD):
        self.world = world

    def __call__(
        self, prompts: Sequence[Prompt], media: Sequence[Float[Tensor, "_ 3 h w"]]
    ) -> dict[str, float]:
        return {"palette": float(torch.cat([palette_share(m, self.world) for m in media]).mean())}


class PaletteReward:
    """The same share of each image as a reward, which GARDO measures beside the trained one."""

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        return palette_share(media)


def palette_share(
    media: Float[Tensor, "batch 3 h w"], world: World = WORLD
) -> Float[Tensor, " batch"]:
    """The share of pixels of each image near a colour of the world, in [0, 1]."""
    colors = torch.tensor([BACKGROUND, *world.colors.values()]).float() / 255
    gaps = media[:, None] - colors[None, :, :, None, None]
    nearest = gaps.square().sum(2).sqrt().min(1).values
    return (nearest <= NEAR).float().mean((1, 2))
