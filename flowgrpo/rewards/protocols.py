"""What a reward is: anything that scores media, learns while it scores, or compares two media."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data.prompts import Prompt


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores media: a class with ``__call__`` or a plain function.

    ``media`` holds images ``(B, C, H, W)`` or videos ``(B, F, C, H, W)`` in [0, 1], fp32; the result
    holds one finite score per sample, higher is better.
    """

    def __call__(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]: ...


@runtime_checkable
class LearningReward(RewardModel, Protocol):
    """A reward that learns during the run, such as a discriminator; its state goes with the run's."""

    def update(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Mapping[str, float]:
        """Learn from an iteration's media, after they were scored; returns what to log."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """All that learning changes."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        ...


@runtime_checkable
class PairwiseJudge(Protocol):
    """Anything that says which of two media fits a prompt better.

    ``first`` and ``second`` hold media as for :class:`RewardModel`. The result holds, per pair, how
    surely the first one is better: 1 it is, 0 the second is, 0.5 neither; NaN where no verdict came.
    """

    def compare(
        self,
        first: Float[Tensor, "batch *frames channels height width"],
        second: Float[Tensor, "batch *frames channels height width"],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, " batch"]: ...
