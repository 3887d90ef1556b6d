"""TP-GRPO, TurningPoint-GRPO (arXiv:2602.06422): each step is worth what it changed.

The state before every stochastic step is completed by the ODE and judged. A step's reward is the
difference that it made. Where a trajectory turns, from steps against its overall trend to one with
it, the step gets all that follows: its effect on later steps is more than its own difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.credit import (
    StepTable,
    candidates_of,
    check_kind,
    scored_of,
    standings,
)
from flowgrpo.algorithms.trajectories import TrajectoryPlan, walk
from flowgrpo.core.advantages import RELATIVE_FLOOR, Advantage, GroupAdvantage, numbers
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.transitions import CPS, ODE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer

TurningPoints = Literal["consistent", "plain", "none"]


@dataclass(frozen=True, kw_only=True)
class TPGRPO:
    """Step-level credit by incremental rewards, aggregated at turning points."""

    kind: Literal["tp_grpo"] = "tp_grpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=CPS)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    shared_noise: bool = False
    """Whether a group starts from one noise. What its samples share is then computed once."""
    turning_points: TurningPoints = "consistent"
    """``plain`` is definition 4.1, ``consistent`` the stricter 5.1 that the paper recommends;
    ``none`` leaves every step its own difference."""
    balance: Literal["batch", "group", "none"] = "batch"
    """Among what equal numbers of turning points that go up and down are kept: all trajectories of
    the iteration on all processes (appendix D), those of each group, or nothing."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From the step rewards of a group, step by step, to advantages. Kinds that look at each reward
    have the step rewards and turning points of each."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Trajectories, and the ODE completion of the state before each stochastic step.

        The forward pass that a stochastic step was drawn from also gives the ODE step, so that a
        completion costs one evaluation less than there are steps left. A completion from before an
        ODE step is that from after it, and the last state's is the trajectory's image: neither is
        done twice.
        """
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        stochastic = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        collection = Collection(policy, groups, scorer, self.transition)
        for samples, records in walk(collection, random, self._plan(stochastic)):
            for record in records:
                ahead = ODE()(record.x, record.prediction, record.interval).mean
                collection.complete(
                    samples, ahead, record.step + 1, step=record.step - 1, compare=False
                )
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The step rewards, standardised over the group at each step."""

        def derive(numbers: Tensor) -> StepTable:
            states, steps = self._states(experience, numbers)
            return states.with_values(self.step_rewards(states.values, states.group), steps)

        return standings(self.advantage, experience, derive).of(experience.actions)

    def turns(self, experience: Experience) -> StepTable:
        """1 where a step is credited as a turning point, of any reward that is looked at; else 0."""
        found = []
        for values in numbers(self.advantage, scored_of(experience)).values():
            states, steps = self._states(experience, values)
            found.append(self._turning(states.values, states.group))
        return states.with_values(torch.stack(found).any(0).double(), steps)

    def step_rewards(
        self,
        rewards: Float[Tensor, "trajectories states"],
        group: Int[Tensor, " trajectories"],
    ) -> Float[Tensor, "trajectories states-1"]:
        """What each step is credited with: its difference, or at a turning point all that follows.

        Args:
            rewards: Of the completions before each step, and last of the trajectory's image.
            group: The group of each trajectory.
        """
        increment, aggregate = differences(rewards)
        return torch.where(self._turning(rewards, group), aggregate, increment)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        check_kind(self.advantage, "differences of rewards", bounded=False)
        if self.group_size < 2:
            raise ValueError(f"algorithm.group_size must be at least 2, got {self.group_size}")
        self.steps.select(num_steps, 0, Random(0).generator())

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt: that of the trajectories, and for each sample and stochastic step ``s``
        a completion in ``T - s - 1`` evaluations; the first of them once if noise is shared."""
        plain = self._plan(stochastic).cost(num_steps)
        first, *later = (num_steps - s - 1 for s in stochastic)
        number = 1 if self.shared_noise else self.group_size
        candidates = plain.decodes + number + self.group_size * len(later)
        nfe = plain.nfe + number * first + self.group_size * sum(later)
        return Cost(nfe, candidates, candidates)

    def _states(
        self, experience: Experience, numbers: Float[Tensor, " candidates"]
    ) -> tuple[StepTable, Sequence[int]]:
        """The numbers of the states before each trained step and of the image; and those steps."""
        c, steps = candidates_of(experience), sorted(set(experience.actions.step.tolist()))
        # The candidate before a step has the step's number less one; the last is the image itself.
        table = StepTable.of_candidates(c, numbers, [*(s - 1 for s in steps), int(c.step.max())])
        values = table.values
        if self.shared_noise:
            # One baseline serves the group; it was completed for the first sample.
            first = {
                int(g): values[i, 0].clone()
                for i, g in enumerate(table.group)
                if table.sample[i] == 0
            }
            values[:, 0] = torch.stack([first[int(g)] for g in table.group])
        return table, steps

    def _turning(
        self, rewards: Float[Tensor, "trajectories states"], group: Int[Tensor, " trajectories"]
    ) -> Bool[Tensor, "trajectories states-1"]:
        """The turning points that are credited as such."""
        _, aggregate = differences(rewards)
        if self.turning_points == "none":
            return torch.zeros_like(aggregate, dtype=torch.bool)
        turning = turning_points(rewards, consistent=self.turning_points == "consistent")
        if self.balance == "none":
            return turning
        over = group if self.balance == "group" else torch.zeros_like(group)
        return balance(turning, aggregate, over)

    def _plan(self, stochastic: Sequence[int]) -> TrajectoryPlan:
        return TrajectoryPlan(self.group_size, self.transition, stochastic, self.shared_noise)


def differences(
    rewards: Float[Tensor, "trajectories states"],
) -> tuple[Float[Tensor, "trajectories states-1"], Float[Tensor, "trajectories states-1"]]:
    """Incremental rewards ``R_{k+1} - R_k`` and aggregated ones ``R_n - R_k``.

    Differences of rewards that are equal up to rounding are exactly zero.
    """
    return _difference(rewards[:, 1:], rewards[:, :-1]), _difference(
        rewards[:, -1:], rewards[:, :-1]
    )


def _difference(
    later: Float[Tensor, "trajectories _"], earlier: Float[Tensor, "trajectories _"]
) -> Float[Tensor, "trajectories _"]:
    scale = torch.maximum(later.abs(), earlier.abs())
    difference = later - earlier
    return torch.where(difference.abs() <= RELATIVE_FLOOR * scale, 0.0, difference)


def turning_points(
    rewards: Float[Tensor, "trajectories states"], consistent: bool
) -> Bool[Tensor, "trajectories states-1"]:
    """Steps with the overall trend after a step against it (definition 4.1).

    With ``s_k = sign(R_{k+1} - R_k) sign(R_n - R_0)``: ``s_{k-1} < 0`` and ``s_k > 0``; the first
    step has no predecessor and needs only ``s_0 > 0``. Consistent ones also go the way that remains
    after them, ``sign(R_{k+1} - R_k) = sign(R_n - R_{k+1})``, neither of them zero (definition 5.1).
    The last step, after which nothing remains, is never one of these. Where a reward is missing
    that this needs, there is no turning point.
    """
    increment, aggregate = differences(rewards)
    direction = increment.sign()
    trend = direction * aggregate[:, :1].sign()
    before = torch.full_like(trend[:, :1], -1.0)
    turning = (trend > 0) & (torch.cat([before, trend[:, :-1]], 1) < 0)
    if consistent:
        remaining = torch.cat([aggregate[:, 1:], torch.zeros_like(aggregate[:, :1])], 1)
        turning &= direction * remaining.sign() > 0
    return turning


def balance(
    turning: Bool[Tensor, "trajectories steps"],
    aggregate: Float[Tensor, "trajectories steps"],
    group: Int[Tensor, " trajectories"],
) -> Bool[Tensor, "trajectories steps"]:
    """As many turning points up as down in each group: those with the smallest aggregates go.

    ``group`` says what is balanced with what. A group that has only one kind keeps all of them, as in the released code.
    """
    kept = turning & (aggregate != 0)
    for g in group.unique():
        own = kept & (group == g)[:, None]
        up, down = ((own & (aggregate * sign > 0)).nonzero() for sign in (1, -1))
        number = min(len(up), len(down))
        for points in (up, down):
            if number and len(points) > number:
                size = aggregate[points[:, 0], points[:, 1]].abs()
                dropped = points[size.argsort(stable=True)[: len(points) - number]]
                kept[dropped[:, 0], dropped[:, 1]] = False
    return kept
