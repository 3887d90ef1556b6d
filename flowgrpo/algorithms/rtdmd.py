"""RTDMD (arXiv:2605.26108): rewards for models of a few steps, whose distribution stays near a teacher's.

Minimising the KL from a teacher that rewards have tilted, ``p_teacher exp(r / beta)``, has two parts::

    policy gradient      at the stochastic steps of an iteration, as in Flow-GRPO (SubGRPO)
    distribution match   at the last step, which is deterministic (the loss ``dmd``)

Differs from the released code in these points. Steps that are not trained follow the ODE; there they are
stochastic with noise that a group shares. Evaluations are deterministic; there they are stochastic too.
The fake score has no consistency term (its weight there is 0.01), and no reward is differentiated through
the last step (1e-4).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.credit import trajectory_advantages
from flowgrpo.algorithms.dmd import add_generated
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import CPS, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True, kw_only=True)
class RTDMD(AlgorithmBase):
    """Flow-GRPO's trajectories, and the last step of each for distribution matching."""

    action_kind: ClassVar[ActionKind] = "step_and_generated"
    kind: Literal["rtdmd"] = "rtdmd"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=lambda: CPS(noise_level=0.9))
    """The stochastic step. ``cps`` is exact for long steps."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained by the policy gradient. RTDMD draws two of the first three of
    four steps in each iteration, ``{kind = "random_steps", count = 2, first = 0, last = 3}``."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(std="batch"))
    """From rewards to advantages. With several rewards, RTDMD has ``gdpo``."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Trajectories with the iteration's stochastic steps, the same for every group."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return TrajectoryPlan(self.group_size, self.transition, steps)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample whole trajectories, and record the prediction of the last step besides the stochastic ones."""
        last = policy.num_steps() - 1
        plan = self.plan(policy.num_steps(), iteration, random)
        collection = Collection(policy, groups, scorer, self.transition)
        for part, records in sample_trajectories(collection, random, plan, record=[last]):
            (taken,) = (r for r in records if r.step == last)
            add_generated(collection, part, last, taken.x, taken.prediction.x0)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The trajectory's advantage for each step; 1 for the predictions, which all count alike."""
        advantages = trajectory_advantages(self.advantage, experience)
        return torch.where(experience.actions.is_generated, 1.0, advantages)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if no step of the grid can be stochastic."""
        if num_steps < 2:
            raise ValueError(
                "algorithm.kind = 'rtdmd' trains stochastic steps before the last, so that sampling.num_steps "
                f"must be at least 2, got {num_steps}; 'dmd' distils to a single step, without rewards"
            )
        require_noise(self.transition)
        self.advantage.check()
        self.steps.check(num_steps)
