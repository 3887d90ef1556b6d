"""Any image reward on videos: its mean or minimum over frames."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.protocols import LearningReward
from flowgrpo.rewards.scorer import Reward, load_reward

__all__ = ["FrameMean", "FrameScore"]


class FrameScore:
    """The mean or the minimum of an image reward over frames; the reward's own range.

    The minimum punishes a single broken frame. A video with a frame without a score has none.
    """

    def __init__(
        self,
        model: str,
        every: int = 1,
        frames: Sequence[int] = (),
        reduce: Literal["mean", "min"] = "mean",
        batch_size: int = 32,
        options: dict[str, Any] | None = None,
    ):
        """
        Args:
            model: An image reward, by file name or import path.
            every: Stride over the frames, from the first one.
            frames: Instead of a stride, the frames that count; negative ones from the end.
            reduce: What becomes of their scores.
            batch_size: Most frames that the image reward gets at once.
            options: Arguments for the image reward.

        Raises:
            ValueError: If an option is wrong.
        """
        if every < 1 or batch_size < 1 or reduce not in ("mean", "min"):
            raise ValueError(
                "every and batch_size must be at least 1 and reduce 'mean' or 'min', "
                f"got {every}, {batch_size}, {reduce!r}"
            )
        if frames and every != 1:
            raise ValueError(f"either every or frames, got {every} and {list(frames)}")
        self.reward = load_reward(Reward(model=model, options=options or {}))
        if isinstance(self.reward, LearningReward):
            raise ValueError(f"{model!r} learns from whole samples and cannot score frames")
        self.every, self.frames = every, list(frames)
        self.reduce, self.batch_size = reduce, batch_size

    def check(self, prompts: Sequence[Prompt]) -> None:
        """What the image reward says of the prompts, before the long work.

        Raises:
            ValueError: If they lack what it needs.
        """
        check = getattr(self.reward, "check", None)
        if check is not None:
            check(prompts)

    def __call__(
        self, media: Float[Tensor, "batch frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a chosen frame is not there.
        """
        number = media.shape[1]
        if wrong := [f for f in self.frames if not -number <= f < number]:
            raise ValueError(f"there is no frame {wrong[0]} in a video of {number}")
        chosen = media[:, self.frames or slice(None, None, self.every)]
        owners = [p for p in prompts for _ in range(chosen.shape[1])]
        scores = [
            self.reward(part, owners[start : start + self.batch_size])
            for start, part in zip(
                range(0, len(owners), self.batch_size),
                chosen.flatten(0, 1).split(self.batch_size),
                strict=True,
            )
        ]
        each = torch.cat([torch.as_tensor(s) for s in scores]).view(len(prompts), -1)
        return each.mean(1) if self.reduce == "mean" else each.amin(1)


class FrameMean(FrameScore):
    """The mean of an image reward over every ``every``-th frame; the reward's own range."""

    def __init__(self, model: str, every: int = 1, options: dict[str, Any] | None = None):
        """
        Args:
            model: An image reward, by file name or import path.
            every: Stride over the frames.
            options: Arguments for the image reward.
        """
        super().__init__(model, every=every, options=options)
