"""TP-GRPO, TurningPoint-GRPO (arXiv:2602.06422): a step's reward is the change that it makes.

The state before every stochastic step is completed by the ODE and scored, which gives rewards
``R_0, ..., R_n`` along a trajectory (``R_n`` is that of its image). The reward of step ``k`` is the
increment ``R_{k+1} - R_k``. At a turning point, where a trajectory changes from a step against its
overall trend to a step with it, the reward is the aggregate ``R_n - R_k`` instead: the step's effect
on later steps is larger than its own increment.

Without turning points the increments alone remain, which are the dense rewards of DenseGRPO
(arXiv:2601.20218, eq. 7 and 10) and the gains of Stepwise-Flow-GRPO (arXiv:2603.28718). The latter
completes states in five steps, and standardises the gains of all steps and samples of a group together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, CreditView, Policy, Scorer
from flowgrpo.algorithms.collection import Collection, coarse_nodes
from flowgrpo.algorithms.credit import StepTable, check_kind, step_advantages
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.group_statistics import RELATIVE_FLOOR
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch
from flowgrpo.core.transitions import CPS, ODE, Transition, require_noise
from flowgrpo.data.experience import INITIAL, Cost, Experience
from flowgrpo.data.prompts import Group

TurningPoints = Literal["consistent", "plain", "none"]


@dataclass(frozen=True, kw_only=True)
class TPGRPO(AlgorithmBase):
    """Step-level credit by incremental rewards, aggregated at turning points."""

    kind: Literal["tp_grpo"] = "tp_grpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=CPS)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    shared_noise: bool = False
    """Whether a group starts from one noise. The steps that its samples share are computed once."""
    turning_points: TurningPoints = "consistent"
    """``plain`` is definition 4.1, ``consistent`` the stricter 5.1 that the paper recommends;
    ``none`` gives every step its increment."""
    balance: Literal["batch", "group", "none"] = "batch"
    """Where equal numbers of turning points with rising and with falling rewards are kept: ``batch``
    among all trajectories of the iteration on all processes (appendix D), ``group`` in each group,
    ``none`` nowhere."""
    rivals: Literal["step", "group"] = "step"
    """The step rewards that one is compared with: those of its group at the same ``step`` (TP-GRPO,
    DenseGRPO), or of its ``group`` at all steps (Stepwise-Flow-GRPO), so that steps which change the
    reward more get larger advantages."""
    completion_steps: int = 0
    """Most steps of a completion, which are longer where fewer than all are taken; 0 takes all steps of
    the grid (TP-GRPO, DenseGRPO), Stepwise-Flow-GRPO 5, and 1 decodes the model's prediction."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From the step rewards of a group to advantages. Multi-reward kinds use the step
    rewards and turning points of each reward."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> "CompletedTrajectories":
        """Trajectories with the iteration's stochastic steps, and completions from each of them."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return CompletedTrajectories(
            self.group_size,
            self.transition,
            steps,
            self.shared_noise,
            completion_steps=self.completion_steps,
        )

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample trajectories, and complete the state before each stochastic step by the ODE.

        The forward pass of a stochastic step also gives the ODE step from the same state, so a
        completion costs one evaluation less than the number of its steps. Completions that would
        repeat another are not computed: the completion from before an ODE step equals that from
        after it, and the completion of the last state is the trajectory's image.
        """
        plan = self.plan(policy.num_steps(), iteration, random)
        collection = Collection(policy, groups, scorer, self.transition)
        for samples, records in sample_trajectories(collection, random, plan):
            for record in records:
                # The ODE step from the same state; the completion judges the step before.
                nodes = coarse_nodes(record.step, policy.num_steps(), self.completion_steps)
                interval = policy.scheduler.interval(nodes[0], nodes[1])
                x_next = ODE()(record.x, record.prediction, interval).mean
                collection.complete(
                    samples, x_next, nodes[1], step=record.step - 1, nodes=nodes[1:], compare=False
                )
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The step rewards, standardised over the group at each step or over all of them."""

        def derive(numbers: Tensor) -> StepTable:
            states, steps = self._states(experience, numbers)
            return states.with_values(self.step_rewards(states.values, states.group), steps)

        found = step_advantages(self.advantage, experience, derive, jointly=self.rivals == "group")
        return found.of(experience.actions)

    def turns(self, experience: Experience) -> StepTable:
        """1 where a step is credited as a turning point of any normalised reward; else 0."""
        found = []
        for values in self.advantage.inputs(experience.all_candidates.scores).values():
            states, steps = self._states(experience, values)
            found.append(self._turning(states.values, states.group))
        return states.with_values(torch.stack(found).any(0).double(), steps)

    def step_rewards(
        self,
        rewards: Float[Tensor, "trajectories states"],
        group: Int[Tensor, " trajectories"],
    ) -> Float[Tensor, "trajectories states-1"]:
        """The reward of each step: its increment, or the aggregate at a turning point.

        Args:
            rewards: Rewards of the completions before each step, and last that of the image.
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
        if self.completion_steps < 0:
            raise ValueError(
                f"algorithm.completion_steps must be at least 0, got {self.completion_steps}"
            )
        self.steps.check(num_steps)

    def credit_view(self, experience: Experience) -> CreditView:
        """Candidates are the states of one trajectory.

        A completion is shown at the last stochastic step before it, as the ODE steps between lead to
        the same image.
        """
        trained = sorted(set(experience.actions.step.tolist()))
        steps = set(experience.candidates.step.tolist())
        turns = self.turns(experience)
        return CreditView(
            rivals=self.group_size,
            candidates="states",
            column={s: max((t for t in trained if t <= s), default=INITIAL) for s in steps},
            shares_baseline=self.shared_noise,
            turning_points={
                (int(g), int(s)): [turns.steps[int(j)] for j in row.nonzero().flatten()]
                for g, s, row in zip(turns.group, turns.sample, turns.values, strict=True)
            },
        )

    def _states(
        self, experience: Experience, numbers: Float[Tensor, " candidates"]
    ) -> tuple[StepTable, Sequence[int]]:
        """A table of the states before each trained step and the image, and the trained steps."""
        c, steps = experience.all_candidates, sorted(set(experience.actions.step.tolist()))
        # The candidate before step s has the step s - 1; the last column is the image.
        table = StepTable.of_candidates(c, numbers, [*(s - 1 for s in steps), int(c.step.max())])
        values = table.values
        if self.shared_noise:
            # The group has one completion of its first state, recorded for sample 0.
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
        """The steps that are credited as turning points."""
        _, aggregate = differences(rewards)
        if self.turning_points == "none":
            return torch.zeros_like(aggregate, dtype=torch.bool)
        turning = turning_points(rewards, consistent=self.turning_points == "consistent")
        if self.balance == "none":
            return turning
        over = group if self.balance == "group" else torch.zeros_like(group)
        return balance(turning, aggregate, over)


@dataclass(frozen=True)
class CompletedTrajectories(TrajectoryPlan):
    """Trajectories, with a completion of the state before each stochastic step.

    Attributes:
        completion_steps: Most steps of a completion; 0 for all steps of the grid.
    """

    completion_steps: int = 0

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt: that of the trajectories, and for each sample and stochastic step ``s``
        a completion in ``min(completion_steps, T - s) - 1`` evaluations, ``T - s - 1`` without a limit;
        with shared noise the first step has only one."""
        plain = super().cost(num_steps)
        most = self.completion_steps
        first, *later = (len(coarse_nodes(s, num_steps, most)) - 2 for s in self.steps)
        number = 1 if self.shared_noise else self.group_size
        candidates = plain.decodes + number + self.group_size * len(later)
        nfe = plain.nfe + number * first + self.group_size * sum(later)
        return Cost(nfe, candidates, candidates)


def differences(
    rewards: Float[Tensor, "trajectories states"],
) -> tuple[Float[Tensor, "trajectories states-1"], Float[Tensor, "trajectories states-1"]]:
    """Increments ``R_{k+1} - R_k`` and aggregates ``R_n - R_k``.

    Differences of rewards that are equal up to rounding are exactly zero.
    """
    before = rewards[:, :-1]
    return _difference(rewards[:, 1:], before), _difference(rewards[:, -1:], before)


def _difference(
    later: Float[Tensor, "trajectories _"], earlier: Float[Tensor, "trajectories _"]
) -> Float[Tensor, "trajectories _"]:
    scale = torch.maximum(later.abs(), earlier.abs())
    difference = later - earlier
    return torch.where(difference.abs() <= RELATIVE_FLOOR * scale, 0.0, difference)


def turning_points(
    rewards: Float[Tensor, "trajectories states"], consistent: bool
) -> Bool[Tensor, "trajectories states-1"]:
    """Steps with the overall trend that follow a step against it (definition 4.1).

    With ``s_k = sign(R_{k+1} - R_k) sign(R_n - R_0)``: ``s_{k-1} < 0`` and ``s_k > 0``; the first
    step has no predecessor and needs only ``s_0 > 0``. Consistent turning points (definition 5.1)
    also have the direction of the steps after them: ``sign(R_{k+1} - R_k) = sign(R_n - R_{k+1})``,
    neither of them zero. The last step has no steps after it and is never consistent. A step for
    which one of these rewards is missing is not a turning point.

    Args:
        rewards: ``R_0`` to ``R_n`` of each trajectory.
        consistent: Whether to use definition 5.1.
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
    """Keep as many turning points with rising as with falling rewards in each group.

    Those with the smallest aggregates are dropped. A group that has only rising or only falling ones
    keeps all of them, as in the released code.

    Args:
        turning: The turning points.
        aggregate: Their aggregates ``R_n - R_k``; a turning point with 0 is always dropped.
        group: Trajectories with the same label are balanced with each other.
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
