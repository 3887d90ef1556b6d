"""TempFlow-GRPO (arXiv:2508.04324): branches from the deterministic path, weighted by their noise.

A candidate follows the ODE but for one stochastic step, and judges that step alone. Steps that
inject more noise decide more, and weigh more in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.branches import BranchPlan, collect_branches, credit_branches
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class TempFlowGRPO:
    """Step-level credit by branching from the deterministic path, with noise-aware weights."""

    kind: Literal["tempflow_grpo"] = "tempflow_grpo"
    group_size: int = 24
    """Branches per prompt and step, at least 2 for each seed."""
    seeds: int = 4
    """Initial noises per prompt. The branches are divided among them, and each is compared with
    those of its own seed."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are branched at and trained."""
    noise_weights: bool = True
    """Whether a step weighs in proportion to the noise that it injects, 1 on average."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From the rewards of the branches of one state to advantages."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Branches at the iteration's steps, each completed to an image."""
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        steps = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        return collect_branches(policy, groups, scorer, random, self._plan(steps))

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """A branch's advantage over those of its seed and step, times the weight of the step.

        The weight multiplies the loss; a clipped surrogate with a positive factor is that of the
        multiplied advantage, so it is put here, after the advantage was clipped.
        """
        advantage = credit_branches(experience, self.advantage, self.group_size // self.seeds)
        if not self.noise_weights:
            return advantage
        weights = noise_weights(list(experience.step_std.values()))
        by_step = dict(zip(experience.step_std, weights.tolist(), strict=True))
        return advantage * torch.tensor([by_step[s] for s in experience.actions.step.tolist()])

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.select(num_steps, 0, Random(0).generator())
        if self.seeds < 1 or self.group_size % self.seeds or self.group_size < 2 * self.seeds:
            raise ValueError(
                f"algorithm.group_size = {self.group_size} must be a multiple of algorithm.seeds = "
                f"{self.seeds}, with at least 2 branches for each seed to compare"
            )

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt with these stochastic steps; see :meth:`BranchPlan.cost`."""
        return self._plan(stochastic).cost(num_steps)

    def _plan(self, steps: Sequence[int]) -> BranchPlan:
        return BranchPlan(self.group_size, self.seeds, self.transition, steps)


def noise_weights(stds: Sequence[float]) -> Float[Tensor, " steps"]:
    """``std_k / mean(std)`` of the steps' injected noise, ``g sqrt(dt)`` for an SDE; 1 on average."""
    std = torch.tensor(stds, dtype=torch.float32)
    return std / std.mean()
