"""MixGRPO (arXiv:2507.21802): stochastic steps in a window that slides, and its Flash variant.

Outside of the window all steps follow the ODE, so only the window's steps are trained.
*Flash* takes fewer and larger steps with a higher-order solver after the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.credit import trajectory_advantages
from flowgrpo.algorithms.trajectories import TrajectoryPlan, collect_trajectories
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.multi_reward_advantages import PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import Solver
from flowgrpo.core.steps import SlidingWindow, StepSelection
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class MixGRPO(AlgorithmBase):
    """Trajectory-level credit for the steps in a sliding window."""

    credits_trajectories: ClassVar[bool] = True
    kind: Literal["mix_grpo"] = "mix_grpo"
    group_size: int = 12
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step in the window."""
    steps: StepSelection = field(default_factory=SlidingWindow)
    """The window: ``sliding_window`` (progressive, or decaying with its ``decay``) or
    ``random_window``. The same on every process."""
    shared_noise: bool = True
    """Whether a group starts from one noise. The steps that its samples share are computed once."""
    flash: float = 1.0
    """Share of the steps after the window that are taken, as larger steps; the paper's Flash has 0.4,
    and 0.2 if the window stays at the start. 1 takes all."""
    flash_counts: Literal["steps", "nodes"] = "steps"
    """``flash`` is a share of the ``steps`` after the window, or of the ``nodes`` of the grid from its end
    on, of which the steps are one fewer, as in the released code. At least one step is taken."""
    solver: Solver = "euler"
    """Solver of the steps after the window: ``dpm_2m`` for Flash, or ``dpm_2m_continued``, whose first
    step is of second order too, as in the released code."""
    advantage: Advantage = field(default_factory=PerReward)
    """From rewards to advantages."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Trajectories with the iteration's window, the same for every group."""
        window = self.steps.select(num_steps, iteration, random.at("steps"))
        left = num_steps - window[-1] - 1
        # Differs from the released code, whose trajectory of one last node does not reach the data.
        by_nodes = self.flash_counts == "nodes"
        number = int((left + 1) * self.flash) - 1 if by_nodes else int(left * self.flash)
        num_after = None if self.flash == 1 else max(1, number)
        return TrajectoryPlan(
            self.group_size, self.transition, window, self.shared_noise, self.solver, num_after
        )

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample whole trajectories."""
        plan = self.plan(policy.num_steps(), iteration, random)
        return collect_trajectories(policy, groups, scorer, random, plan)

    def advantages(self, experience: Experience) -> Float[Tensor, "actions *rewards"]:
        """The trajectory's advantage, for each of its actions in the window."""
        return trajectory_advantages(self.advantage, experience)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.check(num_steps)
        if not 0 < self.flash <= 1:
            raise ValueError(f"algorithm.flash must be in (0, 1], got {self.flash}")
        if self.flash_counts == "nodes" and self.flash == 1:
            raise ValueError(
                "algorithm.flash_counts = 'nodes' has no effect with algorithm.flash = 1, which takes all "
                "steps; set flash below 1 or remove flash_counts"
            )
        window = self.steps.select(num_steps, 0, Random(0))
        if self.solver == "dpm_2m_continued" and self.shared_noise and len(window) < 2:
            raise ValueError(
                "algorithm.solver = 'dpm_2m_continued' continues from the window's last step, which the "
                "samples of a group share if the window has one step; use a window of at least 2, "
                "shared_noise = false, or 'dpm_2m'"
            )
