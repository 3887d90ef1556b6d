"""Several rewards to advantages, without losing one in the sum of all.

Rewards on different scales, added up, are ruled by the one that varies most; and different mixtures
of scores with equal sums get equal advantages. These kinds look at each reward first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.core.advantages import (
    GroupAdvantage,
    GroupStatistics,
    check_clip,
    has_no_variance,
)

UNCLIPPED = float("inf")


@dataclass(frozen=True)
class Scored:
    """Candidates of all ranks as advantages see them.

    Attributes:
        reward: The weighted sum; NaN where a trained reward failed.
        group: The group of each candidate.
        scores: Raw scores of each reward.
        weights: Weight of each reward; those with weight 0 are only measured.
    """

    reward: Float[Tensor, " candidates"]
    group: Int[Tensor, " candidates"]
    scores: Mapping[str, Float[Tensor, " candidates"]]
    weights: Mapping[str, float]

    def trained(self) -> dict[str, Float[Tensor, " candidates"]]:
        """Scores of each trained reward, in fp64; NaN for candidates where any of them failed.

        Raises:
            ValueError: If there is none, or one has no scores.
        """
        names = [name for name, weight in self.weights.items() if weight != 0]
        unknown = [name for name in names if name not in self.scores]
        if not names or unknown:
            raise ValueError(
                f"advantages of several rewards need the weight of each; known weights: "
                f"{dict(self.weights)}, known scores: {list(self.scores)}"
            )
        whole = torch.stack([self.scores[n].isfinite() for n in names]).all(0)
        return {n: torch.where(whole, self.scores[n].double(), torch.nan) for n in names}


@dataclass(frozen=True, kw_only=True)
class PerReward:
    """``sum over rewards of weight * (score - mean of the group) / std`` (DanceGRPO, MixGRPO, Pref-GRPO).

    Weights are taken as they are; published ones mostly sum to 1. For actions within the clip range
    it is the same as the weighted sum of one loss per reward, as DanceGRPO's video code has it.
    """

    kind: Literal["per_reward"] = "per_reward"
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of each reward."""
    ddof: Literal[0, 1] = 1
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-8
    """Added to each standard deviation."""
    clip: float = 5.0
    """The sum is cut to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def of_scores(self, scored: Scored) -> Float[Tensor, " candidates"]:
        """Advantages of all candidates; zero where a trained reward failed."""
        one = GroupAdvantage(
            std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=UNCLIPPED
        )  # fmt: skip
        total = _weighted(one, scored)
        return total.clamp(-self.clip, self.clip).to(scored.reward.dtype)


@dataclass(frozen=True, kw_only=True)
class GDPO:
    """As ``per_reward``, then normalised over the whole batch (arXiv:2601.05242).

    The second normalisation keeps the size of advantages the same whatever the number of rewards.
    """

    kind: Literal["gdpo"] = "gdpo"
    ddof: Literal[0, 1] = 1
    """0 divides by the number of values, 1 by one less; in both normalisations."""
    epsilon: float = 1e-4
    """Added to each standard deviation."""
    clip: float = 5.0
    """Advantages are cut to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def of_scores(self, scored: Scored) -> Float[Tensor, " candidates"]:
        """Advantages of all candidates; zero where a trained reward failed or all are flat."""
        one = GroupAdvantage(ddof=self.ddof, epsilon=self.epsilon, clip=UNCLIPPED)
        total = _weighted(one, scored)
        whole = torch.stack([v.isfinite() for v in scored.trained().values()]).all(0)
        values = total[whole]
        if has_no_variance(values):
            return torch.zeros_like(scored.reward)
        normal = (total - values.mean()) / (values.std(correction=self.ddof) + self.epsilon)
        # A flat group is exactly zero before, and stays so: the mean is rounding.
        normal = torch.where(total == 0, total, normal)
        return normal.clamp(-self.clip, self.clip).to(scored.reward.dtype)


@dataclass(frozen=True, kw_only=True)
class LogTamed:
    """``log(1 + score)`` for rewards that vary much for their size, then as ``group`` (PaCo-RL, arXiv:2512.04784).

    A reward varies much if ``std / (mean + 1e-6)`` over the whole batch exceeds a threshold.
    """

    kind: Literal["log_tamed"] = "log_tamed"
    threshold: Literal["mean", "median", "fixed"] = "mean"
    """Of the ratios of all rewards the mean or the median, or ``fixed`` as in ``above``."""
    above: float = 1.0
    """The threshold, if it is fixed."""
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of the sum."""
    ddof: Literal[0, 1] = 0
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""
    clip: float = 5.0
    """Advantages are cut to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def of_scores(self, scored: Scored) -> Float[Tensor, " candidates"]:
        """Advantages of all candidates; zero where a trained reward failed.

        Raises:
            ValueError: If a score to be tamed is -1 or less.
        """
        total = self.tamed(scored)
        return self.of_sum(total, scored.group, total).to(scored.reward.dtype)

    @property
    def of_sum(self) -> GroupAdvantage:
        """What makes advantages of the tamed sum."""
        return GroupAdvantage(
            std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=self.clip
        )  # fmt: skip

    def tamed(self, scored: Scored) -> Float[Tensor, " candidates"]:
        """The weighted sum of scores, those tamed that vary much; NaN where a trained reward failed.

        Raises:
            ValueError: If a score to be tamed is -1 or less.
        """
        trained = scored.trained()
        finite = [v[v.isfinite()] for v in trained.values()]
        if not len(finite[0]):
            return torch.full_like(scored.reward, torch.nan).double()
        spreads = [float(v.std(correction=0) / (v.mean() + 1e-6)) for v in finite]
        threshold = {"mean": mean(spreads), "median": median(spreads), "fixed": self.above}
        total = torch.zeros_like(scored.reward).double()
        for (name, values), spread, known in zip(trained.items(), spreads, finite, strict=True):
            tamed = values
            if spread > threshold[self.threshold]:
                if float(known.min()) <= -1:
                    raise ValueError(
                        "algorithm.advantage.kind = 'log_tamed' needs scores above -1, but one is "
                        f"{float(known.min()):g}; shift the reward"
                    )
                tamed = torch.log1p(values)
            total = total + scored.weights[name] * tamed
        return total


Advantage = GroupStatistics | PerReward | GDPO | LogTamed
"""From scores to advantages, by whatever is compared: whole samples, or what step-level algorithms
make of their candidates."""


def numbers(advantage: Advantage, scored: Scored) -> dict[str, Float[Tensor, " candidates"]]:
    """What a kind standardises: each trained reward by its name, or one number of all, named ``""``."""
    if isinstance(advantage, PerReward | GDPO):
        return scored.trained()
    if isinstance(advantage, LogTamed):
        return {"": advantage.tamed(scored)}
    return {"": scored.reward}


def of_scored(advantage: Advantage, scored: Scored) -> Float[Tensor, " candidates"]:
    """Advantages of all candidates, of the weighted sum or of each reward as the kind has it."""
    if isinstance(advantage, PerReward | GDPO | LogTamed):
        return advantage.of_scores(scored)
    return advantage(scored.reward, scored.group, scored.reward)


def _weighted(one: GroupAdvantage, scored: Scored) -> Float[Tensor, " candidates"]:
    """The weighted sum of each reward's advantages, in fp64."""
    parts = [
        scored.weights[name] * one(values, scored.group, values)
        for name, values in scored.trained().items()
    ]
    return torch.stack(parts).sum(0)
