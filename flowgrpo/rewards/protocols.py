"""Protocols of rewards: models that score media, models that learn while they score, pairwise judges."""

import math
from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, Literal, Protocol, runtime_checkable

from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted
from flowgrpo.data.audio import Audio
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.settings import RewardError

Trained = Literal["both", "reward", "policy"]
"""What an iteration trains: the policy and the reward, or one of them alone."""


@runtime_checkable
class RewardModel(Protocol):
    """Scores media: a plain function, or an object with ``__call__``.

    ``media`` holds images ``(B, C, H, W)`` or videos ``(B, F, C, H, W)`` in [0, 1], fp32, and
    ``prompts`` one prompt per sample. The result holds one score per sample, where higher is
    better; NaN marks a sample that could not be scored.
    """

    def __call__(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]: ...


@runtime_checkable
class DifferentiableReward(RewardModel, Protocol):
    """A reward with a gradient: an object with ``scores_with_gradient`` besides ``__call__``.

    A function whose operations are all differentiable becomes one by an attribute that is the function
    itself: ``brightness.scores_with_gradient = brightness``.
    """

    def scores_with_gradient(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The scores of :meth:`__call__`, with the gradient of the media.

        Media are not rounded to 8 bits here, because rounding has no gradient; scores may differ by
        that much. The result may be on any device.
        """
        ...


@runtime_checkable
class AudioReward(Protocol):
    """Scores videos with their sound; only for pipelines that make sound.

    A class or a function becomes one by its attribute ``takes_audio = True``.
    """

    takes_audio: Literal[True]

    def __call__(
        self,
        media: Float[Tensor, "batch *frames channels height width"],
        prompts: Sequence[Prompt],
        audio: Audio,
    ) -> Float[Tensor, " batch"]:
        """As for :class:`RewardModel`; ``audio`` holds the sound of each sample."""
        ...


def takes_audio(model: object) -> bool:
    """Whether a reward is an :class:`AudioReward`."""
    return getattr(model, "takes_audio", False) is True


@runtime_checkable
class LearningReward(RewardModel, Protocol):
    """A reward that learns during the run, such as a discriminator. Its state is in checkpoints."""

    def update(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Mapping[str, float]:
        """Learn from an iteration's media after they were scored; returns metrics to log."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Everything that learning changes."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the result of :meth:`state`."""
        ...


@runtime_checkable
class AlternatingReward(LearningReward, Protocol):
    """A learning reward that takes turns with the policy, instead of learning in every iteration."""

    def trains(self, iteration: int) -> Trained:
        """What an iteration trains.

        Args:
            iteration: Counted from 0. The answer may depend on nothing else, so that it is equal in
                all processes and after a resume.
        """
        ...


@runtime_checkable
class PairwiseJudge(Protocol):
    """Compares two media of the same prompt.

    ``first`` and ``second`` hold media as for :class:`RewardModel`. The result holds, for each
    pair, the probability that the first one is better: 1 if it is, 0 if the second is, 0.5 for a
    tie; NaN where the judge gave no verdict.
    """

    def compare(
        self,
        first: Float[Tensor, "batch *frames channels height width"],
        second: Float[Tensor, "batch *frames channels height width"],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, " batch"]: ...


def checked_scores(label: str, values: Any, number: int) -> Float[Tensor, " batch"]:
    """Convert the result of a reward model to fp32 scores on the CPU; infinity becomes NaN.

    Args:
        label: Name of the reward, for messages.
        values: The result: a tensor, an array or a list.
        number: Samples that were scored.

    Raises:
        RewardError: If the result has another shape or holds no numbers. Retries cannot help then.
    """
    if isinstance(values, Mapping):
        raise RewardError(
            f"reward {label!r} returned several scores by name ({', '.join(map(str, values))}); choose one with the "
            "key 'score' of its table, and repeat the table for further ones"
        )
    if isinstance(values, tuple) and not all(isinstance(v, int | float) for v in values):
        raise RewardError(
            f"reward {label!r} returned a tuple of {', '.join(type(v).__name__ for v in values)}; return the "
            f"scores alone, {counted(number, 'number')}"
        )
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {label!r} returned {shortened(values)}; expected {counted(number, 'number')}"
        ) from error
    if tensor.shape != (number,):
        raise RewardError(
            f"reward {label!r} returned shape {tuple(tensor.shape)} for {counted(number, 'sample')}; expected ({number},)"
        )
    return torch.where(tensor.isfinite(), tensor, math.nan)
