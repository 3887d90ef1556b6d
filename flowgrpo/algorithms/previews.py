"""Cheap previews of many samples, which choose the samples that are drawn exactly (Sol-RL, arXiv:2604.06916).

A group is drawn in two stages:

1. ``number`` previews start from initial noises of their own and take ``num_steps`` deterministic steps.
   They are decoded and scored, and not trained on.
2. The initial noises of the best and of the worst previews are drawn again as the algorithm draws its
   samples, scored again, and trained on.

The chosen samples differ more in reward than as many random ones, so that a group's advantages rest on
clearer differences, at a fraction of the cost of drawing all ``number`` samples exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.tensors import Float, Int, Tensor, torch
from flowgrpo.data.experience import Candidates, Cost
from flowgrpo.data.prompts import Group
from flowgrpo.policy.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Previews:
    """How many previews there are, and how they are drawn."""

    number: int = 0
    """Previews per prompt, of which ``group_size`` are chosen: half of them the best, half the worst.
    Sol-RL has 96 for groups of 24. 0 draws no previews."""
    num_steps: int = 6
    """Denoising steps of a preview; Sol-RL has 6 where samples take 10."""

    def check(self, group_size: int, num_steps: int, shared_noise: bool = False) -> None:
        """Raise ValueError if the settings contradict each other or the algorithm's.

        Args:
            group_size: Samples per prompt.
            num_steps: Steps of a sample.
            shared_noise: Whether the samples of a group start from one noise.
        """
        if self.number == 0:
            return
        if self.number <= group_size:
            raise ValueError(
                f"algorithm.previews.number must be above algorithm.group_size = {group_size}, got "
                f"{self.number}: with no more previews than samples, nothing is chosen; 0 draws no previews"
            )
        if not 1 <= self.num_steps <= num_steps:
            raise ValueError(
                f"algorithm.previews.num_steps must be from 1 to sampling.num_steps = {num_steps}, got "
                f"{self.num_steps}: a preview must not take more steps than a sample"
            )
        if shared_noise:
            raise ValueError(
                "algorithm.previews choose initial noises, and with algorithm.shared_noise = true the samples "
                "of a group have the same; set shared_noise = false, or previews.number = 0"
            )

    def cost(self) -> Cost:
        """The additional work per prompt."""
        number = float(self.number)
        return Cost(number * self.num_steps, number, number)


@dataclass(frozen=True)
class Chosen:
    """The samples of each group that previews have chosen.

    Attributes:
        number: Previews per group.
        seeds: For each group index, the numbers of the chosen initial noises, ascending. The noise of
            number ``i`` is that of a group's sample ``i`` if there were no previews.
        rewards: The rewards of the chosen previews, in this order; NaN where they failed.
    """

    number: int
    seeds: Mapping[int, Sequence[int]]
    rewards: Mapping[int, Float[Tensor, " samples"]]

    def joined(self, other: "Chosen | None") -> "Chosen":
        """The samples of both, which are of different groups."""
        if other is None:
            return self
        return Chosen(self.number, {**other.seeds, **self.seeds}, {**other.rewards, **self.rewards})

    def metrics(
        self, groups: Sequence[Group], candidates: Candidates
    ) -> dict[str, Float[Tensor, " groups"]]:
        """How well previews predicted, for each group; NaN where it is not defined.

        - ``previews/agreement``: correlation of the chosen samples' rewards with their previews' rewards.
        - ``previews/spread``: standard deviation of the chosen samples' rewards.

        Args:
            groups: The groups, in the order of the result.
            candidates: The scored samples, one of each number of a group.
        """
        agreement, spread = [], []
        for group in groups:
            rows = (candidates.group == group.index).nonzero().squeeze(1)
            rows = rows[candidates.sample[rows].argsort()]
            exact, before = candidates.reward[rows].double(), self.rewards[group.index].double()
            spread.append(float(exact[exact.isfinite()].std(correction=0)))
            known = exact.isfinite() & before.isfinite()
            exact, before = exact[known], before[known]
            varies = len(exact) > 1 and exact.std() > 0 and before.std() > 0
            agreement.append(
                float(torch.corrcoef(torch.stack([exact, before]))[0, 1]) if varies else torch.nan
            )
        return {
            "previews/agreement": torch.tensor(agreement),
            "previews/spread": torch.tensor(spread),
        }


def extreme_rows(reward: Float[Tensor, " previews"], number: int) -> Int[Tensor, " number"]:
    """The rows of the best and of the worst rewards, ascending; of an odd number, one more of the worst, as
    in the released code.

    Rewards that are not finite are chosen only if there are too few others. Of equal rewards, the first
    count as the worse ones.
    """
    known = reward.isfinite()
    order = torch.arange(len(reward))[known]
    order = order[reward[known].argsort(stable=True)]
    if len(order) < number:
        lost = (~known).nonzero().squeeze(1)[: number - len(order)]
        return torch.cat([order, lost]).sort().values
    worst = number - number // 2
    return torch.cat([order[:worst], order[len(order) - number + worst :]]).sort().values


def choose(
    policy: Policy,
    groups: Sequence[Group],
    scorer: Scorer,
    random: Random,
    settings: Previews,
    group_size: int,
    solver: Solver,
    sampling: Sampling,
) -> Chosen:
    """Draw and score previews, and choose ``group_size`` initial noises of each group.

    Args:
        policy: The policy that is sampled.
        groups: The prompts.
        scorer: Scores the previews.
        random: Keyed by the iteration.
        settings: The previews.
        group_size: Samples per prompt that are drawn exactly.
        solver: Solver of the previews.
        sampling: Arguments of the pipeline's call with which the samples are drawn; previews differ in
            their number of steps alone.
    """
    owners = [g for g in groups for _ in range(settings.number)]
    streams = [random.at("group", g.index, i) for g in groups for i in range(settings.number)]
    futures = []
    for rollout in policy.run(
        [g.prompt for g in owners],
        SampleNoise(streams),
        sampling=sampling.with_steps(settings.num_steps),
        solver=solver,
    ):
        assert rollout.media is not None
        part = owners[rollout.rows.start : rollout.rows.stop]
        futures.append(scorer.submit(rollout.media, [g.prompt for g in part], rollout.audio))
    reward = torch.cat([f.result().reward for f in futures])
    seeds, rewards = {}, {}
    for group, own in zip(groups, reward.split(settings.number), strict=True):
        rows = extreme_rows(own, group_size)
        seeds[group.index], rewards[group.index] = rows.tolist(), own[rows]
    return Chosen(settings.number, seeds, rewards)
