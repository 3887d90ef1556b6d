"""Advantages: how much better a candidate is than the others of its group.

A kind of advantage has two parts:

- :meth:`Advantage.inputs` chooses the numbers of the candidates that it normalises. The kinds for a single
  reward (:mod:`flowgrpo.core.single_reward_advantages`) take the weighted sum of all rewards; the others
  (:mod:`flowgrpo.core.multi_reward_advantages`) take each reward by itself, or tame some before the sum.
- :meth:`Advantage.combine` turns these numbers into advantages. Step-level algorithms call it on numbers that
  they derive from the inputs, such as differences between steps
  (:func:`flowgrpo.algorithms.credit.step_advantages`); others call :func:`candidate_advantages`.

All arithmetic is in fp64. A group without variance gets exactly zero: dividing its rounding errors
by a small epsilon would make large advantages out of nothing (see ``docs/algorithms.md``). Whether a
group has variance is decided on the numbers that a kind normalises; a group of nothing but failures
does vary for :class:`VirtualBest`.
"""

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from flowgrpo.core.multi_reward_advantages import GDPO, LogTamed, PerLoss, PerReward
from flowgrpo.core.scores import Scores
from flowgrpo.core.single_reward_advantages import (
    BestAdvantage,
    BetaAdvantage,
    GroupAdvantage,
    VirtualBest,
)
from flowgrpo.core.tensors import Float, Int, Tensor


@runtime_checkable
class AdvantageKind(Protocol):
    """The interface of all kinds of advantage, which are frozen dataclasses.

    Attributes:
        clip: Advantages are clipped to ``[-clip, clip]``.
        is_binary: Whether the kind takes only rewards of 0 and 1.
        adds_best: Whether the kind compares with a candidate that has the largest possible reward.
        is_separate: Whether each reward keeps advantages of its own, a column each, for a loss of its
            own.
        over_batch: Whether it has statistics over the whole batch besides those of each group.
    """

    is_binary: ClassVar[bool]
    adds_best: ClassVar[bool]
    is_separate: ClassVar[bool]

    @property
    def clip(self) -> float: ...

    @property
    def over_batch(self) -> bool: ...

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        ...

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """The numbers of each candidate that this kind normalises, by the name of their reward."""
        ...

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, "rows *rewards"]:
        """Advantages from the numbers of :meth:`inputs`, or from numbers derived from these.

        They are one per row, or with :attr:`is_separate` one per row and reward.

        Args:
            values: By the names that :meth:`inputs` gave; NaN marks a row that enters no statistic
                and gets the advantage 0.
            groups: Rows with the same label are compared.
            weights: Weight of each reward by its name.
        """
        ...


Advantage = (
    GroupAdvantage
    | BetaAdvantage
    | VirtualBest
    | BestAdvantage
    | PerReward
    | PerLoss
    | GDPO
    | LogTamed
)
"""The kinds of advantage that a configuration can name."""


def candidate_advantages(
    advantage: AdvantageKind, scores: Scores, groups: Int[Tensor, " candidates"]
) -> Float[Tensor, "candidates *rewards"]:
    """The advantage of each candidate within its group; zero where a trained reward failed.

    A kind with separate losses gives a column for each reward.

    Args:
        advantage: The kind.
        scores: The candidates of all processes.
        groups: Candidates with the same label are compared.
    """
    found = advantage.combine(advantage.inputs(scores), groups, scores.weights)
    return found.to(scores.reward.dtype)
