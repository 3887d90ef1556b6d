"""Image rewards applied to videos: the mean or the minimum over frames."""

from collections.abc import Sequence
from typing import Any, Literal

from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.protocols import LearningReward, takes_audio
from flowgrpo.rewards.settings import Reward

__all__ = ["FrameMean", "FrameScore"]


class FrameScore:
    """The mean or the minimum of an image reward over frames, in the range of that reward.

    The minimum penalises a single bad frame. ``mean_positive`` is the mean of the scores above 0, and 0
    if there are none, as Flow-GRPO's OCR reward for videos has it. ``mean_top`` is the mean of the best
    frames, as Flash-GRPO's HPSv3 reward for videos has it. If one frame has no score, the video has none
    (NaN).
    """

    def __init__(
        self,
        model: str,
        every: int = 1,
        frames: Sequence[int] = (),
        reduce: Literal["mean", "min", "mean_positive", "mean_top"] = "mean",
        share: float = 0.3,
        batch_size: int = 32,
        options: dict[str, Any] | None = None,
    ):
        """
        Args:
            model: An image reward, by file name or import path.
            every: Stride over the frames, from the first one.
            frames: Indices of the frames to score, instead of a stride; negative ones count from
                the end.
            reduce: Mean or minimum of the frames' scores, the mean of those above 0, or that of the best.
            share: Share of the frames that ``mean_top`` takes, in (0, 1], rounded down to at least one.
            batch_size: Most frames in one call of the image reward.
            options: Arguments for the image reward.

        Raises:
            ValueError: If an option is wrong.
        """
        kinds = ("mean", "min", "mean_positive", "mean_top")
        if every < 1 or batch_size < 1 or reduce not in kinds or not 0 < share <= 1:
            raise ValueError(
                "every and batch_size must be at least 1, reduce one of 'mean', 'min', 'mean_positive' and "
                f"'mean_top', and share in (0, 1], got {every}, {batch_size}, {reduce!r}, {share}"
            )
        if frames and every != 1:
            raise ValueError(f"give either every or frames, got {every} and {list(frames)}")
        self.reward = load_reward(Reward(model=model, options=options or {}))
        if isinstance(self.reward, LearningReward):
            raise ValueError(f"{model!r} learns from whole samples, so it cannot score frames")
        if takes_audio(self.reward):
            raise ValueError(
                f"{model!r} needs the sound of a whole video, so it cannot score frames"
            )
        self.every, self.frames = every, list(frames)
        self.reduce, self.share, self.batch_size = reduce, share, batch_size

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check the prompts with the image reward.

        Raises:
            ValueError: If they lack something that it needs.
        """
        check = getattr(self.reward, "check", None)
        if check is not None:
            check(prompts)

    def __call__(
        self, media: Float[Tensor, "batch frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If the video has no frame of a given index.
        """
        number = media.shape[1]
        if wrong := [f for f in self.frames if not -number <= f < number]:
            raise ValueError(f"there is no frame {wrong[0]} in a video of {number}")
        # (B, F, C, H, W) -> (B, chosen, C, H, W); each frame is scored with its video's prompt.
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
        if self.reduce == "mean_positive":
            counted = (each > 0) | each.isnan()
            return (each * counted).sum(1) / counted.sum(1).clamp(min=1)
        if self.reduce == "mean_top":
            number = max(1, int(each.shape[1] * self.share))
            # topk puts NaN first, so that a video with a missing score has none.
            return each.topk(number, dim=1).values.mean(1)
        return each.mean(1) if self.reduce == "mean" else each.amin(1)


class FrameMean(FrameScore):
    """The mean of an image reward over every ``every``-th frame, in the range of that reward."""

    def __init__(self, model: str, every: int = 1, options: dict[str, Any] | None = None):
        """
        Args:
            model: An image reward, by file name or import path.
            every: Stride over the frames.
            options: Arguments for the image reward.
        """
        super().__init__(model, every=every, options=options)
