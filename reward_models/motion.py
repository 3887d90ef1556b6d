"""Amount of motion in a video, without weights."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.pictures import check_media, eight_bits, finite_only, luma

__all__ = ["Motion"]


class Motion:
    """``min(ceiling, rate * mean |Y[t+1] - Y[t]|)`` over pixels and pairs of consecutive frames.

    ``Y`` is the luma (0.299 R + 0.587 G + 0.114 B) in [0, 1], averaged over tiles of ``tile`` x
    ``tile`` pixels so that noise does not count as motion; incomplete tiles at the border are
    dropped. ``rate`` is ``fps`` if it is given, which makes the score a change per second and
    comparable between frame rates, and 1 otherwise. The range is 0 (a still) to ``ceiling``;
    without ``fps`` at most 1, usually 0.005 to 0.05.

    Flicker and cuts count as motion. Combine it with :class:`TemporalConsistency`, or use a low
    ceiling.

    Videos are rounded to 8 bits first; one with NaN scores NaN. No weights.
    """

    ignores_prompt = True

    def __init__(self, tile: int = 8, ceiling: float = 1.0, fps: float = 0.0):
        """
        Args:
            tile: Side of the tiles in pixels; 1 looks at every pixel.
            ceiling: Highest score.
            fps: Frames per second; 0 counts per frame.

        Raises:
            ValueError: If an option is out of range.
        """
        if tile < 1 or not ceiling > 0 or fps < 0:
            raise ValueError(
                "tile must be at least 1, ceiling positive and fps at least 0, "
                f"got {tile}, {ceiling}, {fps}"
            )
        self.tile, self.ceiling, self.rate = tile, ceiling, fps or 1.0

    def __call__(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a video has a single frame, or is smaller than a tile.
        """
        check_media(media, prompts, video=True)
        if media.shape[1] < 2 or min(media.shape[-2:]) < self.tile:
            raise ValueError(
                f"motion needs 2 frames of at least {self.tile}x{self.tile} pixels, "
                f"got {tuple(media.shape)}"
            )
        tiles = F.avg_pool2d(luma(eight_bits(media)), self.tile)
        change = (tiles[:, 1:] - tiles[:, :-1]).abs().mean((1, 2, 3))
        return finite_only((self.rate * change).clamp(max=self.ceiling), media)
