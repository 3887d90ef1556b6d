"""Kinds of advantage that take each reward by itself, or tame some before they are summed.

Rewards on different scales, added up, are dominated by the one that varies most, and different mixtures
of scores with equal sums get equal advantages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import ClassVar, Literal

from flowgrpo.core.group_statistics import check_clip, has_no_variance
from flowgrpo.core.scores import Scores, complete
from flowgrpo.core.single_reward_advantages import REWARD, GroupAdvantage
from flowgrpo.core.tensors import Float, Int, Tensor, torch

UNCLIPPED = float("inf")


class _MultiReward:
    """The shared part of the kinds that normalise each reward by itself."""

    is_binary: ClassVar[bool] = False
    adds_best: ClassVar[bool] = False
    is_separate: ClassVar[bool] = False

    @property
    def over_batch(self) -> bool:
        """Whether the standard deviations are those of the whole batch."""
        return getattr(self, "std", "") == "batch"

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """Each reward with a weight."""
        return scores.trained()


@dataclass(frozen=True, kw_only=True)
class PerReward(_MultiReward):
    """``sum over rewards of weight * (score - mean of the group) / std`` (DanceGRPO, MixGRPO, Pref-GRPO).

    Weights are used as they are; published ones mostly sum to 1. For actions within the clip range
    this equals the weighted sum of one loss per reward (:class:`PerLoss`).
    """

    kind: Literal["per_reward"] = "per_reward"
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of each reward."""
    ddof: Literal[0, 1] = 1
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-8
    """Added to each standard deviation."""
    clip: float = 5.0
    """The sum is clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """The weighted sum of each reward's advantages; zero where one of them failed."""
        each = GroupAdvantage(std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=UNCLIPPED)
        return _weighted_sum(each, complete(values), groups, weights).clamp(-self.clip, self.clip)


@dataclass(frozen=True, kw_only=True)
class PerLoss(_MultiReward):
    """``weight * (score - mean of the group) / std`` for each reward by itself, with a loss for each.

    The loss of an action is the sum of the losses for the advantages of each reward, as in DanceGRPO's
    code for HunyuanVideo (visual and motion quality). It differs from ``per_reward`` for actions beyond
    the clip range about which the rewards disagree: the part that would lead further away has no
    gradient there, and the other part keeps its own. Samples are ranked (``best_of``) by the sum.
    """

    is_separate: ClassVar[bool] = True
    kind: Literal["per_loss"] = "per_loss"
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of each reward."""
    ddof: Literal[0, 1] = 1
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-8
    """Added to each standard deviation."""
    clip: float = 5.0
    """The advantages of each reward are clipped to [-clip, clip], before its weight."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, "rows rewards"]:
        """Each reward's weighted advantages, a column each; zero where one of them failed."""
        each = GroupAdvantage(std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=self.clip)
        columns = [weights[n] * each(column, groups) for n, column in complete(values).items()]
        return torch.stack(columns, 1)


@dataclass(frozen=True, kw_only=True)
class GDPO(_MultiReward):
    """As ``per_reward``, then normalised over the whole batch (arXiv:2601.05242).

    The second normalisation keeps the size of advantages the same for any number of rewards.
    """

    kind: Literal["gdpo"] = "gdpo"
    ddof: Literal[0, 1] = 1
    """0 divides by the number of values, 1 by one less; in both normalisations."""
    epsilon: float = 1e-4
    """Added to each standard deviation."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    @property
    def over_batch(self) -> bool:
        """Whether there are statistics over the batch: always, in the second normalisation."""
        return True

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """The normalised sums; zero where a reward failed or no group has variance."""
        values = complete(values)
        each = GroupAdvantage(ddof=self.ddof, epsilon=self.epsilon, clip=UNCLIPPED)
        total = _weighted_sum(each, values, groups, weights)
        known = total[next(iter(values.values())).isfinite()]
        if has_no_variance(known):
            return torch.zeros_like(total)
        normal = (total - known.mean()) / (known.std(correction=self.ddof) + self.epsilon)
        # A group without variance is exactly zero before this normalisation and stays so: the mean
        # that would be subtracted is rounding.
        normal = torch.where(total == 0, total, normal)
        return normal.clamp(-self.clip, self.clip)


@dataclass(frozen=True, kw_only=True)
class LogTamed:
    """``log(1 + score)`` for rewards that vary much for their size, then as ``group`` (PaCo-RL, arXiv:2512.04784).

    A reward varies much if ``std / (mean + 1e-6)`` over the whole batch exceeds a threshold.
    """

    is_binary: ClassVar[bool] = False
    adds_best: ClassVar[bool] = False
    is_separate: ClassVar[bool] = False
    kind: Literal["log_tamed"] = "log_tamed"
    threshold: Literal["mean", "median", "fixed"] = "mean"
    """The mean or the median of the ratios of all rewards, or ``fixed`` as given by ``above``."""
    above: float = 1.0
    """The threshold, if it is fixed."""
    centre: Literal["group", "none"] = "group"
    """``group`` subtracts the mean of the group. ``none`` subtracts nothing, so that with ``std`` =
    ``none`` the tamed sum itself is the advantage, as in the released code, whose aggregation
    functions return advantages; with positive rewards, all samples then have positive advantages."""
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of the sum."""
    ddof: Literal[0, 1] = 0
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    @property
    def over_batch(self) -> bool:
        """Whether the standard deviation is that of the whole batch."""
        return self.std == "batch"

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, of the wrong sign, or of no bounded size."""
        check_clip(self.clip, self.epsilon)
        if self.centre == "none" and self.std == "group":
            raise ValueError(
                "advantage.centre = 'none' keeps the rewards of groups that do not vary, which std = 'group' "
                "would divide by 0; use std = 'none', as the released code, or 'batch'"
            )

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """The weighted sum, in which the rewards that vary much are tamed.

        Raises:
            ValueError: If a score to be tamed is -1 or less.
        """
        trained = scores.trained()
        finite = [v[v.isfinite()] for v in trained.values()]
        if not len(finite[0]):
            return {REWARD: torch.full_like(scores.reward, torch.nan).double()}
        ratios = [float(v.std(correction=0) / (v.mean() + 1e-6)) for v in finite]
        threshold = {"mean": mean(ratios), "median": median(ratios), "fixed": self.above}
        total = torch.zeros_like(scores.reward).double()
        for (name, values), ratio, known in zip(trained.items(), ratios, finite, strict=True):
            tamed = values
            if ratio > threshold[self.threshold]:
                if float(known.min()) <= -1:
                    raise ValueError(
                        "algorithm.advantage.kind = 'log_tamed' needs scores above -1, but one is "
                        f"{float(known.min()):g}; shift the reward"
                    )
                tamed = torch.log1p(values)
            total = total + scores.weights[name] * tamed
        return {REWARD: total}

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """Advantages of the tamed sum, as :class:`GroupAdvantage` computes them, or uncentred."""
        if self.centre == "none":
            return self._uncentred(values[REWARD])
        of_sum = GroupAdvantage(std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=self.clip)
        return of_sum(values[REWARD], groups)

    def _uncentred(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The numbers themselves, by their deviation over the batch if ``std`` asks for it; 0 for NaN."""
        result, finite = values.double(), values[values.isfinite()].double()
        if self.std == "batch":
            if has_no_variance(finite):
                return torch.zeros_like(values)
            result = result / (finite.std(correction=self.ddof) + self.epsilon)
        return result.clamp(-self.clip, self.clip).nan_to_num().to(values.dtype)


def _weighted_sum(
    each: GroupAdvantage,
    values: Mapping[str, Float[Tensor, " rows"]],
    groups: Int[Tensor, " rows"],
    weights: Mapping[str, float],
) -> Float[Tensor, " rows"]:
    """The weighted sum of each reward's advantages."""
    parts = [weights[name] * each(column, groups) for name, column in values.items()]
    return torch.stack(parts).sum(0)
