"""Flow-GRPO (arXiv:2505.05470) and its Fast variant.

A group of ``G`` trajectories is sampled per prompt. The reward of a trajectory's image, relative to its
group, is the advantage of all stochastic steps of the trajectory (eq. 4)::

    A_i = (r_i - mean(r_1 ... r_G)) / std(r)

*Fast* makes only a few steps stochastic: the samples of a group follow the ODE from one shared noise,
diverge in a random window of stochastic steps, and follow the ODE again to the data.

Flash-GRPO (arXiv:2605.15980) draws one stochastic step for each prompt, the same for its whole group
(``steps_per``), and weighs a step's loss by the size of its gradient (``loss.step_weight``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.credit import trajectory_advantages
from flowgrpo.algorithms.previews import Previews
from flowgrpo.algorithms.trajectories import (
    TrajectoryPlan,
    collect_trajectories,
    sample_trajectories,
)
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, RandomSteps, RandomWindow, StepSelection
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class FlowGRPO(AlgorithmBase):
    """Trajectory-level credit, with a free choice of the stochastic steps."""

    credits_trajectories: ClassVar[bool] = True
    kind: Literal["flow_grpo"] = "flow_grpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    steps_per: Literal["iteration", "group"] = "iteration"
    """What draws steps of its own: each iteration, for all its groups, or (Flash-GRPO) each ``group``. The
    samples of a group have the same steps either way. ``group`` needs ``steps`` that are drawn at random."""
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
        """Trajectories with the iteration's stochastic steps, the same for every group.

        If groups draw their own, a plan with the steps of an imagined one: the work is the same for all.
        """
        return self._plan(self.steps.select(num_steps, iteration, random.at("steps")))

    def _plan(self, steps: Sequence[int]) -> TrajectoryPlan:
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
        """Sample whole trajectories; groups with the same steps together."""
        num_steps = policy.num_steps()
        if self.steps_per == "iteration":
            plan = self.plan(num_steps, iteration, random)
            return collect_trajectories(policy, groups, scorer, random, plan)
        alike: dict[tuple[int, ...], list[Group]] = {}
        for group in groups:
            own = self.steps.select(num_steps, iteration, random.at("steps", group.index))
            alike.setdefault(tuple(own), []).append(group)
        collection = Collection(policy, groups, scorer, self.transition)
        for steps, some in sorted(alike.items(), key=lambda item: item[0]):
            for _ in sample_trajectories(collection, random, self._plan(steps), groups=some):
                pass
        return collection.experience()

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """The stochastic steps; all that can be drawn if each group draws its own."""
        if self.steps_per == "group":
            assert isinstance(self.steps, RandomWindow | RandomSteps), "refused by check"
            return range(self.steps.first, self.steps.last)
        return super().trained_steps(num_steps, iteration, random)

    def advantages(self, experience: Experience) -> Float[Tensor, "actions *rewards"]:
        """The trajectory's advantage, for each of its actions."""
        return trajectory_advantages(self.advantage, experience)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if no step of the grid can be stochastic."""
        require_noise(self.transition)
        self.advantage.check()
        self.steps.check(num_steps)
        if self.steps_per == "group" and not isinstance(self.steps, RandomWindow | RandomSteps):
            raise ValueError(
                f"algorithm.steps_per = 'group' draws steps for each group, but algorithm.steps.kind = "
                f"{self.steps.kind!r} draws none; use 'random_window' or 'random_steps'"
            )
        if self.steps_per == "group" and self.shared_noise:
            raise ValueError(
                "algorithm.steps_per = 'group' needs algorithm.shared_noise = false: the steps that the "
                "samples of a group share end at another step in every group"
            )
        self.previews.check(self.group_size, num_steps, self.shared_noise)
