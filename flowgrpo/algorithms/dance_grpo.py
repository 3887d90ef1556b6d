"""DanceGRPO (arXiv:2505.07818), for rectified flows and for diffusion models.

All steps are stochastic; a group shares its initial noise; each sample trains on a random part of
its steps. For Stable Diffusion the transition is ``ddim``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.algorithms.trajectories import (
    TrajectoryPlan,
    candidate_advantages,
    check_fraction,
    collect_trajectories,
    credit_trajectories,
    random_part,
)
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.transitions import DanceSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class DanceGRPO:
    """Trajectory-level credit on a random fraction of the steps, best and worst of a group."""

    kind: Literal["dance_grpo"] = "dance_grpo"
    group_size: int = 12
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=DanceSDE)
    """The stochastic step; ``ddim`` for models that predict noise."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic."""
    timestep_fraction: float = 0.6
    """Share of the stochastic steps that each sample trains on, in (0, 1]."""
    shared_noise: bool = True
    """Whether a group starts from one noise."""
    best_of: int = 0
    """Train only on this many samples of a group, half the best and half the worst; 0 for all."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(ddof=1, epsilon=1e-8))
    """From rewards to advantages."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Trajectories; of each sample's actions a random part, of each group the extremes."""
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        stochastic = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        plan = self._plan(stochastic)
        experience = collect_trajectories(policy, groups, scorer, random, plan)
        kept = random_part(experience.actions, stochastic, self.timestep_fraction, random)
        return replace(experience, actions=experience.actions.select(kept))

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The trajectory's advantage for each of its actions; zero between best and worst."""
        c = experience.candidates
        advantage = candidate_advantages(self.advantage, experience)
        if self.best_of:
            advantage = extremes(advantage, c.group, self.best_of)
        return credit_trajectories(experience.actions, c, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.select(num_steps, 0, Random(0).generator())
        check_fraction(self.timestep_fraction)
        if self.best_of % 2 or not 0 <= self.best_of <= self.group_size:
            raise ValueError(
                f"algorithm.best_of must be even and at most group_size = {self.group_size}, got {self.best_of}"
            )

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt with these stochastic steps; see :meth:`TrajectoryPlan.cost`."""
        return self._plan(stochastic).cost(num_steps)

    def _plan(self, stochastic: Sequence[int]) -> TrajectoryPlan:
        return TrajectoryPlan(self.group_size, self.transition, stochastic, self.shared_noise)


def extremes(
    advantage: Float[Tensor, " candidates"], group: Int[Tensor, " candidates"], number: int
) -> Float[Tensor, " candidates"]:
    """Zero all but the ``number / 2`` largest and smallest advantages of each group."""
    kept = torch.zeros_like(advantage)
    for g in group.unique():
        rows = (group == g).nonzero().squeeze(1)
        order = rows[advantage[rows].argsort(stable=True)]
        for part in (order[: number // 2], order[len(order) - number // 2 :]):
            kept[part] = advantage[part]
    return kept
