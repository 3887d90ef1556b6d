"""TempFlow-GRPO (arXiv:2508.04324): branches from the deterministic path, weighted by their noise.

A candidate follows the ODE except for one stochastic step ``k``, and judges that step alone. Steps that
inject more noise have more influence on the image, and get a larger weight in the loss::

    A_k^i = w_k * (R_k^i - mean) / std        mean and std over the branches of one seed at step k
    w_k   = std_k / mean over k of std_k      std_k is the standard deviation of the injected noise
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, CreditView, Policy, Scorer
from flowgrpo.algorithms.branches import BranchPlan, collect_branches, require_branches
from flowgrpo.algorithms.credit import branch_advantages, refuse_separate
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class TempFlowGRPO(AlgorithmBase):
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
    """Whether a step has a weight proportional to the noise that it injects, 1 on average."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From the rewards of the branches of one state to advantages."""

    @property
    def scales_steps(self) -> bool:
        """Whether weights are used: they are proportional to ``std``, gradients to ``1 / std``."""
        return self.noise_weights

    def plan(self, num_steps: int, iteration: int, random: Random) -> BranchPlan:
        """Branches at the iteration's steps of each seed's path."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return BranchPlan(self.group_size, self.seeds, self.transition, steps)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample the branches, and complete each to an image."""
        plan = self.plan(policy.num_steps(), iteration, random)
        return collect_branches(policy, groups, scorer, random, plan)

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """A branch's advantage over those of its seed and step, times the weight of the step.

        The weight multiplies the loss of an action. A clipped surrogate times a positive factor is
        the surrogate of the multiplied advantage, so the factor is applied here, after the advantage
        was clipped.
        """
        advantage = branch_advantages(self.advantage, experience, self.group_size // self.seeds)
        if not self.noise_weights:
            return advantage
        weights = noise_weights(list(experience.step_std.values()))
        by_step = dict(zip(experience.step_std, weights.tolist(), strict=True))
        return advantage * torch.tensor([by_step[s] for s in experience.actions.step.tolist()])

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        refuse_separate(self.advantage, "branches from one state")
        self.steps.check(num_steps)
        require_branches(self.group_size, self.seeds)

    def credit_view(self, experience: Experience) -> CreditView:
        """Candidates are branches, compared with those of their seed and step."""
        return CreditView(rivals=self.group_size // self.seeds, candidates="branches")


def noise_weights(stds: Sequence[float]) -> Float[Tensor, " steps"]:
    """``std_k / mean(std)`` of the steps' injected noise, ``g sqrt(dt)`` for an SDE; 1 on average."""
    std = torch.tensor(stds, dtype=torch.float32)
    return std / std.mean()
