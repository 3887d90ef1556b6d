"""Distillation to a few steps by distribution matching (DMD2, arXiv:2405.14867), without rewards.

The generator samples in the few steps of ``sampling``. At one step of its own trajectories, the data that
it predicts there is matched with a teacher's distribution (the loss ``dmd``). The fake score learns from
the same predictions. Training on states of the generator's own trajectories is DMD2's backward simulation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.core.random import Random
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import ODE, Transition
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True)
class MatchPlan:
    """Trajectories up to a step whose prediction is matched.

    Attributes:
        group_size: Samples per prompt.
        step: The step.
        steps: The stochastic steps that are trained by their density; none.
    """

    group_size: int
    step: int
    steps: Sequence[int] = ()

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt: ``G (k + 1)`` evaluations for step ``k``; nothing is decoded."""
        return Cost(float(self.group_size * (self.step + 1)), 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class DMD(AlgorithmBase):
    """Records predictions of the data along the generator's own trajectories; the loss ``dmd`` belongs to it.

    It needs no rewards. Those that are configured are measured in evaluations.
    """

    action_kind: ClassVar[ActionKind] = "generated"
    needs_rewards: ClassVar[bool] = False
    assigns_credit: ClassVar[bool] = False
    least_group_size: ClassVar[int] = 1
    kind: Literal["dmd"] = "dmd"
    group_size: int = 1
    """Samples per prompt, at least 1; they share nothing but the prompt."""
    transition: Transition = field(default_factory=ODE)
    """The generator's step: ``ode``, with which evaluations sample, or a stochastic one, such as ``cps``."""
    matched: Literal["random", "last"] = "random"
    """The step whose prediction is matched: a ``random`` one in each iteration, the same for all samples
    (DMD2), or the ``last``, whose prediction is the sample."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> MatchPlan:
        """The step of an iteration."""
        step = num_steps - 1
        if self.matched == "random":
            step = random.integer("matched") % num_steps
        return MatchPlan(self.group_size, step)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample up to the matched step, and record its prediction."""
        step = self.plan(policy.num_steps(), iteration, random).step
        collection = Collection(policy, groups, scorer, self.transition)
        samples = Samples.of(groups, self.group_size, random)
        for rollout in policy.run(
            samples.prompts,
            samples.noise,
            nodes=range(step + 2),
            stochastic=() if isinstance(self.transition, ODE) else range(step),
            transition=self.transition,
            record=[step],
            decode=False,
        ):
            (taken,) = rollout.records
            part = samples[rollout.rows.start : rollout.rows.stop]
            add_generated(collection, part, step, taken.x, taken.prediction.x0)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """1 for all actions: every prediction counts alike."""
        return torch.ones(len(experience.actions))

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range; all that the types allow is in range."""


def add_generated(
    collection: Collection,
    samples: Samples,
    step: int,
    x: Float[Tensor, "samples *latent"],
    x0: Float[Tensor, "samples *latent"],
) -> None:
    """Record the data that the model predicts at a state of each sample."""
    collection.add_actions(samples, step, x=x, x_next=x0, generated=True)
