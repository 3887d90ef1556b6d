"""Pref-GRPO (arXiv:2508.20751): win rates within the group instead of scores.

A sample's reward is the share of its group that it beats. Standardising scores that hardly differ
turns small differences into large advantages; win rates use only the order of the samples.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, PairwiseScorer, Policy, Scorer
from flowgrpo.algorithms.collection import Samples
from flowgrpo.algorithms.credit import refuse_binary, trajectory_advantages
from flowgrpo.algorithms.trajectories import (
    TrajectoryPlan,
    check_fraction,
    collect_trajectories,
    random_fraction,
)
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.multi_reward_advantages import PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Float, Int, Tensor, torch
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.core.win_rates import pairs_of, verdicts_by_score, win_rates
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.rewards.pairs import PairwisePreference, PointwisePreference, Preference

WIN_RATE = "win_rate"
"""Name of the win rate among the scores."""


@dataclass(frozen=True, kw_only=True)
class PrefGRPO(AlgorithmBase):
    """Trajectory-level credit by win rates, alone or together with pointwise rewards."""

    needs_rewards: ClassVar[bool] = False
    credits_trajectories: ClassVar[bool] = True
    kind: Literal["pref_grpo"] = "pref_grpo"
    group_size: int = 8
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic."""
    timestep_fraction: float = 0.6
    """Share of the stochastic steps that each sample trains on, in (0, 1]."""
    shared_noise: bool = True
    """Whether a group starts from one noise. The steps that its samples share are computed once."""
    preference: Preference = field(default_factory=PointwisePreference)
    """How it is decided which of two samples is better."""
    advantage: Advantage = field(default_factory=PerReward)
    """From win rates and rewards to advantages. With ``per_reward``, as in the released code, the
    weights of preference and rewards multiply their advantages."""

    @property
    def collect_reads_scores(self) -> bool:
        """Win rates are computed while samples are collected."""
        return True

    @property
    def comparisons(self) -> int:
        """Verdicts that a pairwise judge gives per prompt; 0 without one."""
        if not isinstance(self.preference, PairwisePreference):
            return 0
        return self.preference.comparisons(self.group_size)

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Trajectories with the iteration's stochastic steps; comparisons are not counted."""
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
        """Sample whole trajectories, and add the win rate of each in its group to its scores.

        Raises:
            RewardError: If too many comparisons get no verdict.
        """
        plan = self.plan(policy.num_steps(), iteration, random)
        if isinstance(self.preference, PairwisePreference):
            whole = WholeGroups(scorer.pairwise_scorer(self.preference), self.group_size)
            experience = collect_trajectories(policy, groups, scorer, random, plan, whole.add)
            rates = whole.rates()
        else:
            experience = collect_trajectories(policy, groups, scorer, random, plan)
            c = experience.candidates
            name = self.preference.chosen(list(c.scores.raw))
            rates = rates_by_score(c.scores.raw[name], c.group, self.preference.tie_margin)
        kept = random_fraction(experience.actions, plan.steps, self.timestep_fraction, random)
        c = experience.candidates
        scores = c.scores.with_score(WIN_RATE, rates, self.preference.weight)
        return replace(
            experience,
            actions=experience.actions.select(kept),
            candidates=replace(c, scores=scores),
        )

    def advantages(self, experience: Experience) -> Float[Tensor, "actions *rewards"]:
        """The trajectory's advantage, for each of its actions."""
        return trajectory_advantages(self.advantage, experience)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        refuse_binary(self.advantage, "win rates")
        self.preference.check()
        check_fraction(self.timestep_fraction)
        self.steps.check(num_steps)

    def check_rewards(self, names: Sequence[str]) -> None:
        """Raise ValueError if a name is taken, or the preference names a reward that is not there."""
        if WIN_RATE in names:
            raise ValueError(
                f"a reward is called {WIN_RATE!r}, as the win rate is; give it another name"
            )
        if isinstance(self.preference, PointwisePreference):
            self.preference.chosen(list(names))


class WholeGroups:
    """Keeps the media of batches until a group is whole, and then has its pairs compared."""

    def __init__(self, pairwise: PairwiseScorer, size: int):
        """Start with no group.

        Args:
            pairwise: Compares the pairs in the background.
            size: Samples per group.
        """
        self.pairwise, self.size = pairwise, size
        self._waiting: list[tuple[Group, Tensor]] = []
        self._rates: list[Future[Tensor]] = []

    def add(self, samples: Samples, media: Tensor) -> None:
        """Add a batch. The samples of a group are consecutive, but may be in several batches."""
        self._waiting += zip(samples.groups, media, strict=True)
        while len(self._waiting) >= self.size:
            whole, self._waiting = self._waiting[: self.size], self._waiting[self.size :]
            group = whole[0][0]
            assert all(g.index == group.index for g, _ in whole)
            self._rates.append(
                self.pairwise.submit(torch.stack([m for _, m in whole]), group.prompt)
            )

    def rates(self) -> Float[Tensor, " candidates"]:
        """Wait for all comparisons, and return the win rates of all samples.

        Raises:
            RewardError: If too many comparisons got no verdict.
        """
        found = torch.cat([r.result() for r in self._rates])
        self.pairwise.check_rate()
        return found


def rates_by_score(
    scores: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"], tie_margin: float
) -> Float[Tensor, " candidates"]:
    """Win rates within each group by comparing scores; NaN where a score is NaN."""
    rates = torch.full_like(scores, torch.nan)
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        pairs = pairs_of(len(rows))
        rates[rows] = win_rates(
            len(rows), pairs, verdicts_by_score(scores[rows], pairs, tie_margin)
        )
    return rates
