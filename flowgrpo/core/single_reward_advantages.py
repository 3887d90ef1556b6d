"""Kinds of advantage for a single number: the weighted sum of all rewards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.group_statistics import (
    RELATIVE_FLOOR,
    check_clip,
    has_no_variance,
    members,
)
from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Float, Int, Tensor, torch

REWARD = ""
"""Name of the single number that the kinds for one reward normalise."""


class _SingleReward:
    """The shared part of the kinds for a single reward, which normalise the weighted sum."""

    is_binary: ClassVar[bool] = False
    adds_best: ClassVar[bool] = False
    is_separate: ClassVar[bool] = False

    @property
    def over_batch(self) -> bool:
        return getattr(self, "std", "") == "batch"

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """The weighted sum."""
        return {REWARD: scores.reward}

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """Advantages of the one number."""
        return self(values[REWARD], groups)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage(_SingleReward):
    """``(reward - mean of the group) / std``, clipped."""

    is_default: ClassVar[bool] = True
    kind: Literal["group"] = "group"
    std: Literal["group", "batch", "none"] = "group"
    """Which standard deviation divides: ``group`` the group's own; ``batch`` that of all rewards of
    the iteration on all processes (Flow-GRPO's ``global_std``); ``none`` divides by nothing
    (Dr. GRPO)."""
    ddof: Literal[0, 1] = 0
    """0 divides by G, 1 by G - 1. Flow-GRPO uses 0, DanceGRPO 1."""
    epsilon: float = 1e-4
    """Added to the standard deviation. Flow-GRPO uses 1e-4, DanceGRPO 1e-8."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """The advantage of each candidate; zero for candidates without a finite reward.

        Args:
            rewards: The rewards of all processes; NaN marks a candidate whose reward failed, which
                enters no statistic.
            groups: The group of each candidate.
        """
        result = torch.zeros_like(rewards)
        finite = rewards[rewards.isfinite()].double()
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
class BetaAdvantage(_SingleReward):
    """For rewards of 0 and 1: ``(reward - p) / f(p)`` with a Beta density f (BNPO, arXiv:2506.02864).

    ``p`` is the group's mean. Over the groups of an iteration it is modelled as Beta(a, b), fitted
    by its mean and variance; ``f`` is the density of Beta(1 + a / 3, 1 + b / 3), for which the
    gradient varies least. As training changes the distribution of ``p``, ``f`` changes with it.
    Beta(3/2, 3/2) is the group's standard deviation up to a factor (GRPO); Beta(1, 1) divides by
    nothing.
    """

    is_binary: ClassVar[bool] = True
    kind: Literal["beta"] = "beta"
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero."""
        check_clip(self.clip)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """Advantages as those of :class:`GroupAdvantage`; a group of equal rewards gets zero.

        Raises:
            ValueError: If a finite reward is neither 0 nor 1.
        """
        finite = rewards[rewards.isfinite()]
        if bool(((finite != 0) & (finite != 1)).any()):
            odd = float(finite[(finite != 0) & (finite != 1)][0])
            raise ValueError(
                f"algorithm.advantage.kind = 'beta' needs rewards of 0 and 1, but one is {odd:g}"
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

    If all means are equal, or there is only one, no Beta distribution fits; the result is then
    (3/2, 3/2), as in GRPO.
    """
    if has_no_variance(means):
        return 1.5, 1.5
    mean, variance = float(means.mean()), float(means.var(correction=0))
    # 0 if the mean of every group is 0 or 1: no variance can be larger.
    total = max(0.0, mean * (1 - mean) / variance - 1)
    return 1 + total * mean / 3, 1 + total * (1 - mean) / 3


@dataclass(frozen=True, kw_only=True)
class VirtualBest(_SingleReward):
    """``(reward - mean) / std``, with one perfect candidate added to the statistics (NGRPO, arXiv:2509.18851).

    A group in which all candidates fail has variance then: each gets ``-1 / sqrt(G)`` (``ddof`` 0),
    and the model moves away from them. A group in which all candidates are perfect gets zero.
    Advantages sum to less than zero; the paper bounds this with a narrower clip range for falling
    ratios than for rising ones (``loss.clip_high`` above ``loss.clip_range``).
    """

    adds_best: ClassVar[bool] = True
    kind: Literal["virtual_best"] = "virtual_best"
    best: float = 1.0
    """The largest possible reward. A larger one is an error."""
    ddof: Literal[0, 1] = 0
    """0 divides by G + 1, 1 by G."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """Advantages as those of :class:`GroupAdvantage`.

        Raises:
            ValueError: If a reward exceeds ``best``.
        """
        finite = rewards[rewards.isfinite()]
        if finite.numel() and float(finite.max()) > self.best * (1 + RELATIVE_FLOOR):
            raise ValueError(
                f"algorithm.advantage.best = {self.best:g} must be the largest possible reward, but "
                f"one is {float(finite.max()):g}"
            )
        result = torch.zeros_like(rewards)
        for rows, values in members(rewards, groups):
            with_best = torch.cat([values, values.new_tensor([self.best])])
            if len(values) < 2 or has_no_variance(with_best):
                continue
            std = with_best.std(correction=self.ddof) + self.epsilon
            advantage = (values - with_best.mean()) / std
            result[rows] = advantage.clamp(-self.clip, self.clip).to(result.dtype)
        return result


@dataclass(frozen=True, kw_only=True)
class BestAdvantage(_SingleReward):
    """1 for the best samples of a group and 0 for the others: rejection sampling (RAFT, arXiv:2304.06767).

    A sample that equals the last chosen one is chosen, too, as in Flow-GRPO's released code, whose
    ``keep`` is 1. A group of equal rewards gets zero (the released code trains on all of it).
    """

    kind: Literal["best"] = "best"
    keep: int = 1
    """Samples that are chosen of each group, at least 1 and below the group size."""

    @property
    def clip(self) -> float:
        """Advantages are at most 1."""
        return 1.0

    def check(self) -> None:
        """Raise ValueError if no sample would be chosen."""
        if self.keep < 1:
            raise ValueError(f"advantage.keep must be at least 1, got {self.keep}")

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """1 or 0 for each candidate; 0 without a finite reward.

        If failures leave a group no more than ``keep`` rewards, those above the lowest are chosen.
        """
        result = torch.zeros_like(rewards)
        for rows, values in members(rewards, groups):
            if has_no_variance(values):
                continue
            last = values.topk(min(self.keep, len(values))).values[-1]
            chosen = values >= last if self.keep < len(values) else values > last
            result[rows] = chosen.to(result.dtype)
        return result
