"""Flow-GRPO (arXiv:2505.05470) and its Fast variant.

A group of trajectories per prompt; each trajectory's reward, relative to its group, is the
advantage of all its stochastic steps. *Fast* makes only a few steps stochastic: a group follows the
ODE from one shared noise, parts in a random window, and follows the ODE again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.trajectories import (
    TrajectoryPlan,
    candidate_advantages,
    collect_trajectories,
    credit_trajectories,
)
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class FlowGRPO:
    """Trajectory-level credit; which steps are stochastic is free to choose."""

    kind: Literal["flow_grpo"] = "flow_grpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    shared_noise: bool = False
    """Whether a group starts from one noise. What its samples share is then computed once."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(std="batch"))
    """From rewards to advantages."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Trajectories with the iteration's stochastic steps, the same for every group."""
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        stochastic = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        plan = self._plan(stochastic)
        return collect_trajectories(policy, groups, scorer, random, plan)

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The trajectory's advantage for each of its actions."""
        c = experience.candidates
        advantage = candidate_advantages(self.advantage, experience)
        return credit_trajectories(experience.actions, c, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if no step of such a grid can be stochastic."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.select(num_steps, 0, Random(0).generator())

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt with these stochastic steps; see :meth:`TrajectoryPlan.cost`."""
        return self._plan(stochastic).cost(num_steps)

    def _plan(self, stochastic: Sequence[int]) -> TrajectoryPlan:
        return TrajectoryPlan(self.group_size, self.transition, stochastic, self.shared_noise)
