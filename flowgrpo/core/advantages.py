"""Rewards to advantages: how much better a candidate is than its group.

A group without variance gets exactly zero. Dividing its rounding errors by a small epsilon would
make large advantages out of nothing; see ``docs/algorithms.md``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RELATIVE_FLOOR = 1e-6
"""A standard deviation below this share of the rewards' magnitude is rounding, not signal."""


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage:
    """``(reward - mean of the group) / std``, clipped."""

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
        """Raise ValueError if every advantage would be zero."""
        if self.clip <= 0:
            raise ValueError(f"advantage.clip must be above 0, got {self.clip}")

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
        for group in groups.unique():
            rows = ((groups == group) & rewards.isfinite()).nonzero().squeeze(1)
            values = rewards[rows].double()
            if has_no_variance(values):
                continue
            centred = values - values.mean()
            if self.std != "none":
                spread = values if self.std == "group" else finite
                centred = centred / (spread.std(correction=self.ddof) + self.epsilon)
            result[rows] = centred.clamp(-self.clip, self.clip).to(result.dtype)
        return result


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
