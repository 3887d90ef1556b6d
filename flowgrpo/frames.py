"""Any image reward on videos: its mean over frames."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from flowgrpo.experience import Prompt
from flowgrpo.judge import Reward, load_reward

__all__ = ["FrameMean"]


class FrameMean:
    """The mean of an image reward over every ``every``-th frame; the reward's own range."""

    def __init__(self, model: str, every: int = 1, options: dict[str, Any] | None = None):
        """
        Args:
            model: An image reward, by file name or import path.
            every: Stride over the frames.
            options: Arguments for the image reward.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.reward = load_reward(Reward(model=model, options=options or {}))
        self.every = every

    def __call__(
        self, media: Float[Tensor, "batch frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        frames = media[:, :: self.every]
        number = frames.shape[1]
        owners = [p for p in prompts for _ in range(number)]
        return self.reward(frames.flatten(0, 1), owners).view(len(prompts), number).mean(1)
