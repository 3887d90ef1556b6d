"""Rewards to advantages: how much better a candidate is than its group.

First come the statistics of one reward, then the kinds that combine several: rewards on different scales, added up, are
dominated by the one that varies most, and different mixtures of scores with equal sums get equal advantages, so these kinds
normalise each reward before they combine them.

A group without variance gets exactly zero. Dividing its rounding errors by a small epsilon would
make large advantages out of nothing; see ``docs/algorithms.md``. What decides is a kind's own
statistics: a group of nothing but failures does vary for :class:`VirtualBest`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RELATIVE_FLOOR = 1e-6
"""A standard deviation below this share of the rewards' magnitude is rounding, not signal."""


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage:
    """``(reward - mean of the group) / std``, clipped."""

    is_default: ClassVar[bool] = True
    kind: Literal["group"] = "group"
    std: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides: the group's own, that of all rewards of the iteration on
    all ranks (Flow-GRPO's ``global_std``), or nobody's (Dr. GRPO)."""
    ddof: Literal[0, 1] = 0
    """0 divides by G, 1 by G - 1. Flow-GRPO uses 0, DanceGRPO 1."""
    epsilon: float = 1e-4
    """Added to the standard deviation. Flow-GRPO uses 1e-4, DanceGRPO 1e-8."""
    clip: float = 5.0
    """Advantages are cut to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def __call__(
        self,
        rewards: Float[Tensor, " candidates"],
        groups: Int[Tensor, " candidates"],
        all_rewards: Float[Tensor, " all_candidates"],
    ) -> Float[Tensor, " candidates"]:
        """Advantages in fp64 arithmetic; zero for candidates without a finite reward.

        Args:
            rewards: NaN marks a candidate whose reward failed; it does not enter any statistic.
            groups: The group of each candidate.
            all_rewards: The rewards of all ranks, for ``std = "batch"``.
        """
        result = torch.zeros_like(rewards)
        finite = all_rewards[all_rewards.isfinite()].double()
        for rows, values in members(rewards, groups):
            if has_no_variance(values):
                continue
            centred = values - values.mean()
            if self.std != "none":
                spread = values if self.std == "group" else finite
                centred = centred / (spread.std(correction=self.ddof) + self.epsilon)
            result[rows] = centred.clamp(-self.clip, self.clip).to(result.dtype)
        return result


@dataclass(frozen=True, kw_only=True)
class BetaAdvantage:
    """For rewards of 0 and 1: ``(reward - p) / f(p)`` with a Beta density f (BNPO, arXiv:2506.02864).

    ``p`` is the group's mean. Over the groups of an iteration it is taken as Beta(a, b), fitted by
    its mean and variance; ``f`` is the density of Beta(1 + a / 3, 1 + b / 3), with which the gradient
    varies least. As training moves the distribution of ``p``, so moves ``f``. Beta(3/2, 3/2) is the
    group's standard deviation up to a factor (GRPO), Beta(1, 1) no normalisation.
    """

    kind: Literal["beta"] = "beta"
    clip: float = 5.0
    """Advantages are cut to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero."""
        check_clip(self.clip)

    def __call__(
        self,
        rewards: Float[Tensor, " candidates"],
        groups: Int[Tensor, " candidates"],
        all_rewards: Float[Tensor, " all_candidates"],
    ) -> Float[Tensor, " candidates"]:
        """Advantages as :class:`GroupAdvantage` gives them; a group of equal rewards gets zero.

        Raises:
            ValueError: If a finite reward is neither 0 nor 1.
        """
        finite = rewards[rewards.isfinite()]
        if bool(((finite != 0) & (finite != 1)).any()):
            odd = float(finite[(finite != 0) & (finite != 1)][0])
            raise ValueError(
                f"algorithm.advantage.kind = 'beta' is for rewards of 0 and 1, but one is {odd:g}"
            )
        result = torch.zeros_like(rewards)
        found = list(members(rewards, groups))
        alpha, beta = beta_parameters(torch.stack([v.mean() for _, v in found])) if found else (1.0, 1.0)  # fmt: skip
        log_constant = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
        for rows, values in found:
            if has_no_variance(values):
                continue
            p = float(values.mean())
            log_density = (alpha - 1) * math.log(p) + (beta - 1) * math.log(1 - p) - log_constant
            advantage = (values - p) / math.exp(log_density)
            result[rows] = advantage.clamp(-self.clip, self.clip).to(result.dtype)
        return result


def beta_parameters(means: Float[Tensor, " groups"]) -> tuple[float, float]:
    """BNPO's ``alpha`` and ``beta`` for the mean rewards of groups.

    Where the means are all equal, or there is only one, no Beta distribution fits; then (3/2, 3/2),
    as in GRPO.
    """
    if has_no_variance(means):
        return 1.5, 1.5
    mean, variance = float(means.mean()), float(means.var(correction=0))
    # 0 if every group is all right or all wrong, which no variance can exceed.
    total = max(0.0, mean * (1 - mean) / variance - 1)
    return 1 + total * mean / 3, 1 + total * (1 - mean) / 3


@dataclass(frozen=True, kw_only=True)
class VirtualBest:
    """``(reward - mean) / std`` with one perfect candidate more in the statistics (NGRPO, arXiv:2509.18851).

    A group in which all fail is not flat any more: each gets ``-1 / sqrt(G)`` (``ddof`` 0), and the
    model moves away from what it did. A group in which all are perfect gets zero. Advantages sum to
    less than zero; the paper bounds this with a narrower clip range for falling ratios than for
    rising ones (``loss.clip_high`` above ``loss.clip_range``).
    """

    kind: Literal["virtual_best"] = "virtual_best"
    best: float = 1.0
    """The largest reward there is. A larger one is an error."""
    ddof: Literal[0, 1] = 0
    """0 divides by G + 1, 1 by G."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""
    clip: float = 5.0
    """Advantages are cut to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def __call__(
        self,
        rewards: Float[Tensor, " candidates"],
        groups: Int[Tensor, " candidates"],
        all_rewards: Float[Tensor, " all_candidates"],
    ) -> Float[Tensor, " candidates"]:
        """Advantages as :class:`GroupAdvantage` gives them.

        Raises:
            ValueError: If a reward exceeds ``best``.
        """
        finite = rewards[rewards.isfinite()]
        if finite.numel() and float(finite.max()) > self.best * (1 + RELATIVE_FLOOR):
            raise ValueError(
                f"algorithm.advantage.best = {self.best:g} is to be the largest reward, but one is "
                f"{float(finite.max()):g}"
            )
        result = torch.zeros_like(rewards)
        for rows, values in members(rewards, groups):
            known = torch.cat([values, values.new_tensor([self.best])])
            if len(values) < 2 or has_no_variance(known):
                continue
            advantage = (values - known.mean()) / (known.std(correction=self.ddof) + self.epsilon)
            result[rows] = advantage.clamp(-self.clip, self.clip).to(result.dtype)
        return result


GroupStatistics = GroupAdvantage | BetaAdvantage | VirtualBest
"""Advantages of one reward."""


def members(
    rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]]:
    """Of each group, in ascending order: the rows with a finite reward, and these in fp64."""
    for group in groups.unique():
        rows = ((groups == group) & rewards.isfinite()).nonzero().squeeze(1)
        if len(rows):
            yield rows, rewards[rows].double()


def check_clip(clip: float, epsilon: float = 0.0) -> None:
    """Raise ValueError if every advantage would be zero, or of the wrong sign."""
    if not clip > 0:
        raise ValueError(f"advantage.clip must be above 0, got {clip}")
    if not epsilon >= 0:
        raise ValueError(f"advantage.epsilon must be at least 0, got {epsilon}")


def has_no_variance(values: Float[Tensor, " values"]) -> bool:
    """Whether rewards are equal up to rounding, or fewer than two."""
    if values.numel() < 2:
        return True
    scale = float(values.abs().max())
    return float(values.max() - values.min()) <= RELATIVE_FLOOR * max(scale, 1e-12)


def zero_variance_groups(
    rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
) -> Bool[Tensor, " groups"]:
    """For each group, in ascending order, whether it teaches nothing."""
    flags = [has_no_variance(rewards[(groups == g) & rewards.isfinite()]) for g in groups.unique()]
    return torch.tensor(flags, dtype=torch.bool)


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
