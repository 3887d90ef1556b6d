"""MixGRPO (arXiv:2507.21802): stochastic steps in a window that slides, and its Flash variant.

Outside of the window everything is deterministic, so only the window's steps are trained. *Flash*
takes larger steps of a higher-order solver after the window.
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
from flowgrpo.core.advantages import Advantage, PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import Solver
from flowgrpo.core.steps import SlidingWindow, StepSelection
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class MixGRPO:
    """Trajectory-level credit for the steps in a sliding window."""

    kind: Literal["mix_grpo"] = "mix_grpo"
    group_size: int = 12
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step in the window."""
    steps: StepSelection = field(default_factory=SlidingWindow)
    """The window: ``sliding_window`` (progressive, or decaying with its ``decay``) or
    ``random_window``. The same on every process."""
    shared_noise: bool = True
    """Whether a group starts from one noise. What its samples share is then computed once."""
    flash: float = 1.0
    """Share of the steps after the window that are taken, as larger steps; the paper's Flash has 0.4,
    and 0.2 where the window stays at the start. 1 takes all."""
    solver: Solver = "euler"
    """Solver of the steps after the window; ``dpm_2m`` for Flash."""
    advantage: Advantage = field(default_factory=PerReward)
    """From rewards to advantages."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Trajectories with the iteration's window, the same for every group."""
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        window = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        plan = self._plan(policy.num_steps(), window)
        return collect_trajectories(policy, groups, scorer, random, plan)

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The trajectory's advantage for each of its actions in the window."""
        advantage = candidate_advantages(self.advantage, experience)
        return credit_trajectories(experience.actions, experience.candidates, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.select(num_steps, 0, Random(0).generator())
        if not 0 < self.flash <= 1:
            raise ValueError(f"algorithm.flash must be in (0, 1], got {self.flash}")

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt with these stochastic steps; see :meth:`TrajectoryPlan.cost`."""
        return self._plan(num_steps, stochastic).cost(num_steps)

    def _plan(self, num_steps: int, window: Sequence[int]) -> TrajectoryPlan:
        left = num_steps - window[-1] - 1
        # Differs from the released code, which with one step does not reach the data.
        end = None if self.flash == 1 else max(1, int(left * self.flash))
        return TrajectoryPlan(
            self.group_size, self.transition, window, self.shared_noise, self.solver, end
        )
