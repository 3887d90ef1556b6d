"""The states of the student's own trajectories, for on-policy distillation.

DiffusionOPD (arXiv:2605.15055) and Flow-OPD (arXiv:2605.08063). The loss ``distillation`` compares the
student's step at each state with a teacher's. Nothing is judged, so that rollouts need neither the last
steps nor a decoder nor rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.core.random import Random
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import ODE, Transition
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True)
class VisitPlan:
    """Trajectories whose states are visited.

    Attributes:
        group_size: Samples per prompt.
        steps: The first steps of the grid, whose states are trained.
        scored: Whether the samples are completed, decoded and scored.
    """

    group_size: int
    steps: Sequence[int]
    scored: bool

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt: ``G k`` evaluations for ``k`` trained steps; if scored, ``G T``, and ``G``
        decodes and scores."""
        nfe = self.group_size * (num_steps if self.scored else len(self.steps))
        decodes = self.group_size * self.scored
        return Cost(float(nfe), float(decodes), float(decodes))


@dataclass(frozen=True, kw_only=True)
class Distillation(AlgorithmBase):
    """Records the states that the student visits; the loss ``distillation`` belongs to it.

    It needs no rewards. Those that are configured are measured in evaluations, and in rollouts if
    ``score_rollouts`` is set; their weighted sum decides which weights are the best, and trains nothing.
    """

    action_kind: ClassVar[ActionKind] = "visited_state"
    needs_rewards: ClassVar[bool] = False
    assigns_credit: ClassVar[bool] = False
    least_group_size: ClassVar[int] = 1
    kind: Literal["distillation"] = "distillation"
    group_size: int = 1
    """Samples per prompt, at least 1; they share nothing but the prompt."""
    transition: Transition = field(default_factory=ODE)
    """The student's step: ``ode`` (DiffusionOPD's default), or a stochastic one, whose states are more
    varied (Flow-OPD)."""
    fraction: float = 0.99
    """The part of the steps, from noise on, whose states are trained, in (0, 1]: the first
    ``int(fraction * num_steps)``. DiffusionOPD's 0.99 leaves out the last step. A stochastic last step is
    never trained, because it adds no noise."""
    score_rollouts: bool = False
    """Whether the samples of rollouts are decoded and scored, for the metrics of an iteration. Evaluations
    always are."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> VisitPlan:
        """The states of the first steps."""
        number = int(self.fraction * num_steps + 1e-9)
        if not isinstance(self.transition, ODE):
            number = min(number, num_steps - 1)
        return VisitPlan(self.group_size, range(number), self.score_rollouts)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, and record the states before the trained steps as actions."""
        end = policy.num_steps()
        steps = self.plan(end, iteration, random).steps
        collection = Collection(policy, groups, scorer, self.transition)
        samples = Samples.of(groups, self.group_size, random)
        for rollout in policy.run(
            samples.prompts,
            samples.noise,
            nodes=range((end if self.score_rollouts else len(steps)) + 1),
            stochastic=() if isinstance(self.transition, ODE) else steps,
            transition=self.transition,
            record=steps,
            decode=self.score_rollouts,
        ):
            part = samples[rollout.rows.start : rollout.rows.stop]
            for taken in rollout.records:
                collection.add_actions(part, taken.step, x=taken.x, x_next=taken.x_next)
            if rollout.media is not None:
                collection.submit(part, rollout.media, end - 1, audio=rollout.audio)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """1 for all actions: every state counts alike."""
        return torch.ones(len(experience.actions))

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range, or no step is trained."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"algorithm.fraction must be in (0, 1], got {self.fraction:g}")
        if not self.plan(num_steps, 0, Random(0)).steps:
            raise ValueError(
                f"algorithm.fraction = {self.fraction:g} of sampling.num_steps = {counted(num_steps, 'step')} leaves no step to "
                "train on"
                + ("" if isinstance(self.transition, ODE) else " with a stochastic transition")
                + "; raise one of them"
            )

    def check_rewards(self, names: Sequence[str]) -> None:
        """Raise ValueError if rollouts are to be scored, and there is nothing to score them with."""
        if self.score_rollouts and not names:
            raise ValueError(
                "algorithm.score_rollouts = true scores rollouts, and there are no rewards; add a table "
                "[[rewards]], or set it to false"
            )
