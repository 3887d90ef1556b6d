"""Rewards to advantages: how much better a candidate is than its group.

Here are the statistics of one reward; ``flowgrpo.core.several`` has those of several rewards.

A group without variance gets exactly zero. Dividing its rounding errors by a small epsilon would
make large advantages out of nothing; see ``docs/algorithms.md``. What decides is a kind's own
statistics: a group of nothing but failures does vary for :class:`VirtualBest`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
