"""The rollout of one iteration: sampling, scoring, and refilling groups of equal rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.training.refill import refilled
from flowgrpo.training.setup import TrainingRun


@dataclass
class RolloutSummary:
    """What is known of the rollout of an iteration besides its experience.

    Attributes:
        scoring_seconds: Time in reward models.
        metrics: ``group/refilled`` and ``staleness``, which the experience does not show.
    """

    scoring_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def collect(
    run: TrainingRun, iteration: int, seed: Random, random: Random
) -> tuple[Experience, RolloutSummary]:
    """Sample and score this process's groups of an iteration, and refill those of equal rewards.

    Args:
        run: The run.
        iteration: Counted from 0.
        seed: Keyed by the seed alone.
        random: Keyed by the iteration.
    """
    config, session, scorer, summary = run.config, run.session, run.scorer, RolloutSummary()
    number = config.train.groups

    def sample(groups: Sequence[Group]) -> Experience:
        with run.policy.together():
            found = config.algorithm.collect(run.policy, groups, scorer, random, iteration)
        scorer.check_rate()
        summary.scoring_seconds += scorer.seconds
        return found

    def further(round_: int) -> Sequence[Group]:
        # From an order of their own, so that the prompts of later iterations stay the same.
        return session.share(run.prompts.groups(iteration, number, seed.at("refill", round_)))

    experience = sample(session.share(run.prompts.groups(iteration, number, seed)))
    replaced = 0
    if scorer.trains_policy(iteration):
        experience, replaced = refilled(
            experience,
            rounds=config.train.refill,
            further=further,
            collect=sample,
            gather=session.gather,
            num_groups=number,
            together=run.policy.together,
        )
    summary.metrics |= {"group/refilled": float(replaced), "staleness": 0.0}
    return experience, summary
