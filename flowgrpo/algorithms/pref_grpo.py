"""Pref-GRPO (arXiv:2508.20751): win rates within the group instead of scores.

A sample is worth the share of its group that it beats. Scores that hardly differ make large
advantages out of little when they are standardised; an order is more trustworthy than distances.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.algorithms.collection import Samples
from flowgrpo.algorithms.credit import refuse_beta
from flowgrpo.algorithms.trajectories import (
    TrajectoryPlan,
    candidate_advantages,
    check_fraction,
    collect_trajectories,
    credit_trajectories,
    random_part,
)
from flowgrpo.core.advantages import Advantage, PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.core.win_rates import pairs_of, verdicts_by_score, win_rates
from flowgrpo.data.experience import Candidates, Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.pairs import (
    PairwisePreference,
    PairwiseScorer,
    PointwisePreference,
    Preference,
)
from flowgrpo.rewards.scorer import RewardScorer

WIN_RATE = "win_rate"
"""The name of the win rate among the scores."""


@dataclass(frozen=True, kw_only=True)
class PrefGRPO:
    """Trajectory-level credit by win rates, alone or beside pointwise rewards."""

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
    """Whether a group starts from one noise. What its samples share is then computed once."""
    preference: Preference = field(default_factory=PointwisePreference)
    """Who says which of two samples is better."""
    advantage: Advantage = field(default_factory=PerReward)
    """From win rates and rewards to advantages. With ``per_reward``, the released code's, the weights
    of preference and rewards are those of their advantages."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Trajectories, and the win rate of each in its group, beside the other scores.

        Raises:
            RewardError: If too many comparisons get no verdict.
        """
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        stochastic = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        plan = self._plan(stochastic)
        if isinstance(self.preference, PairwisePreference):
            whole = WholeGroups(PairwiseScorer(scorer, self.preference), self.group_size)
            experience = collect_trajectories(policy, groups, scorer, random, plan, whole.watch)
            rates = whole.rates()
        else:
            name = self.preference.chosen([r.label for r in scorer.rewards])
            experience = collect_trajectories(policy, groups, scorer, random, plan)
            c = experience.candidates
            rates = rates_by_score(c.scores[name], c.group, self.preference.tie_margin)
        kept = random_part(experience.actions, stochastic, self.timestep_fraction, random)
        experience = replace(experience, actions=experience.actions.select(kept))
        return _with_rates(experience, rates, self.preference.weight)

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The trajectory's advantage for each of its actions."""
        advantage = candidate_advantages(self.advantage, experience)
        return credit_trajectories(experience.actions, experience.candidates, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        refuse_beta(self.advantage, "win rates")
        self.preference.check()
        check_fraction(self.timestep_fraction)
        self.steps.select(num_steps, 0, Random(0).generator())

    def check_rewards(self, labels: list[str]) -> None:
        """Raise ValueError if the rewards of these names do not go with the preference."""
        if WIN_RATE in labels:
            raise ValueError(
                f"a reward is called {WIN_RATE!r}, as the win rate is; give it another name"
            )
        if isinstance(self.preference, PointwisePreference):
            self.preference.chosen(labels)

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt, without the comparisons; see :meth:`TrajectoryPlan.cost`."""
        return self._plan(stochastic).cost(num_steps)

    def _plan(self, stochastic: Sequence[int]) -> TrajectoryPlan:
        return TrajectoryPlan(self.group_size, self.transition, stochastic, self.shared_noise)


class WholeGroups:
    """Collects the media of batches until a group is whole, and has its pairs judged."""

    def __init__(self, pairwise: PairwiseScorer, size: int):
        self.pairwise, self.size = pairwise, size
        self._waiting: list[tuple[Group, Tensor]] = []
        self._rates: list[Future[Tensor]] = []

    def watch(self, samples: Samples, media: Tensor) -> None:
        """See a batch; the samples of a group come in a row."""
        self._waiting += zip(samples.groups, media, strict=True)
        while len(self._waiting) >= self.size:
            whole, self._waiting = self._waiting[: self.size], self._waiting[self.size :]
            group = whole[0][0]
            assert all(g.index == group.index for g, _ in whole)
            self._rates.append(
                self.pairwise.submit(torch.stack([m for _, m in whole]), group.prompt)
            )

    def rates(self) -> Float[Tensor, " candidates"]:
        """The win rates of all samples, when all are judged.

        Raises:
            RewardError: If too many comparisons got no verdict.
        """
        found = torch.cat([r.result() for r in self._rates])
        self.pairwise.check_rate()
        return found


def rates_by_score(
    scores: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"], tie_margin: float
) -> Float[Tensor, " candidates"]:
    """Win rates within each group by comparing scores; NaN where a score is."""
    rates = torch.full_like(scores, torch.nan)
    for group in groups.unique():
        rows = (groups == group).nonzero().squeeze(1)
        pairs = pairs_of(len(rows))
        rates[rows] = win_rates(
            len(rows), pairs, verdicts_by_score(scores[rows], pairs, tie_margin)
        )
    return rates


def _with_rates(
    experience: Experience, rates: Float[Tensor, " candidates"], weight: float
) -> Experience:
    """The win rate as one more score, and its part in the reward."""
    c = experience.candidates
    candidates: Candidates = replace(
        c, scores={**c.scores, WIN_RATE: rates}, reward=c.reward + weight * rates
    )
    weights = {**experience.weights, WIN_RATE: weight}
    return replace(
        experience, candidates=candidates, all_rewards=candidates.reward, weights=weights
    )
