"""Flow-GRPO (arXiv:2505.05470) and its Fast variant.

A group of ``G`` trajectories is sampled per prompt. The reward of a trajectory's image, relative to its
group, is the advantage of all stochastic steps of the trajectory (eq. 4)::

    A_i = (r_i - mean(r_1 ... r_G)) / std(r)

*Fast* makes only a few steps stochastic: the samples of a group follow the ODE from one shared noise,
diverge in a random window of stochastic steps, and follow the ODE again to the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.credit import trajectory_advantages
from flowgrpo.algorithms.previews import Previews
from flowgrpo.algorithms.trajectories import TrajectoryPlan, collect_trajectories
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(AlgorithmBase):
    """Trajectory-level credit, with a free choice of the stochastic steps."""

    kind: Literal["flow_grpo"] = "flow_grpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    shared_noise: bool = False
    """Whether a group starts from one noise. The steps that its samples share are computed once."""
    noise_last: bool = False
    """Whether the last step adds noise too, which is not trained and stays in the images of rollouts, as
    in Flow-GRPO's code when all steps are stochastic. Evaluations are without noise either way."""
    previews: Previews = field(default_factory=Previews)
    """Previews that choose the initial noises of the samples (Sol-RL)."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(std="batch"))
    """From rewards to advantages."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Trajectories with the iteration's stochastic steps, the same for every group."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return TrajectoryPlan(
            self.group_size,
            self.transition,
            steps,
            self.shared_noise,
            noise_last=self.noise_last,
            previews=self.previews,
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
        """The trajectory's advantage, for each of its actions."""
        return trajectory_advantages(self.advantage, experience)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if no step of the grid can be stochastic."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.check(num_steps)
        self.previews.check(self.group_size, num_steps, self.shared_noise)
