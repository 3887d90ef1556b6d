"""DanceGRPO (arXiv:2505.07818), for rectified flows and for diffusion models.

All steps are stochastic, a group shares its initial noise, and each sample trains on a random part of
its steps; optionally only the best and the worst samples of a group are trained on. For Stable
Diffusion the transition is ``ddim``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.credit import (
    check_best_of,
    credit_trajectories,
    extremes,
    own_advantages,
)
from flowgrpo.algorithms.trajectories import (
    TrajectoryPlan,
    check_fraction,
    collect_trajectories,
    random_fraction,
)
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import DanceSDE, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class DanceGRPO(AlgorithmBase):
    """Trajectory-level credit on a random fraction of the steps, best and worst of a group."""

    credits_trajectories: ClassVar[bool] = True
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

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Trajectories with the iteration's stochastic steps, the same for every group."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return TrajectoryPlan(self.group_size, self.transition, steps, self.shared_noise)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample whole trajectories, and keep a random part of each sample's actions."""
        plan = self.plan(policy.num_steps(), iteration, random)
        experience = collect_trajectories(policy, groups, scorer, random, plan)
        kept = random_fraction(experience.actions, plan.steps, self.timestep_fraction, random)
        return replace(experience, actions=experience.actions.select(kept))

    def advantages(self, experience: Experience) -> Float[Tensor, "actions *rewards"]:
        """The trajectory's advantage for each of its actions; zero between best and worst."""
        c = experience.candidates
        advantage = own_advantages(self.advantage, experience)
        if self.best_of:
            # Statistics are over the whole group; only then are the samples between dropped.
            advantage = extremes(advantage, c.group, self.best_of)
        return credit_trajectories(experience.actions, c, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.check(num_steps)
        check_fraction(self.timestep_fraction)
        check_best_of(self.best_of, self.group_size)
