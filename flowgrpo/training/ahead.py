"""The rollouts of a run, one after the other; with ``train.staleness = 1`` each before the update before it.

Iteration ``i`` then does, in this order:

1. Sample the candidates of iteration ``i + 1`` with the weights that ``i`` updates have made. Meanwhile the
   reward scorer still scores those of iteration ``i``.
2. Wait for the scores of iteration ``i``, and update on them.

The actions of an iteration were therefore sampled one update before the weights that train on them (none
in the first iteration). Their log-probabilities and means are those of the weights that sampled, so the
ratios are exact. These weights are part of a checkpoint: a run that resumes samples again what it had
sampled ahead, with the same weights and the same noise.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.random import Random
from flowgrpo.core.scores import Scores
from flowgrpo.data.audio import Audio
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.rollout import RolloutSummary, collect
from flowgrpo.training.setup import TrainingRun


class Rollouts:
    """Supplies the experience of each iteration, in order."""

    def __init__(self, run: TrainingRun, seed: Random):
        """
        Args:
            run: The run.
            seed: Keyed by the seed alone.
        """
        self.run, self.seed = run, seed
        self._ahead: _Unscored | None = None

    def of(self, iteration: int, random: Random) -> tuple[Experience, RolloutSummary]:
        """The experience of an iteration, and a summary of its rollout.

        Args:
            iteration: Counted from 0; the one after that of the last call.
            random: Keyed by the iteration.
        """
        run = self.run
        if run.config.train.staleness == 0:
            run.scorer.iteration = iteration
            with run.learner.behaviour_policy():
                return collect(run, iteration, self.seed, random)
        unscored = self._ahead
        if unscored is None:
            with run.learner.weights_before():
                unscored = self._sample(iteration)
        last = iteration + 1 == run.config.train.iterations
        self._ahead = None if last else self._sample(iteration + 1)
        experience, seconds = unscored.scored()
        metrics = {"group/refilled": 0.0, "staleness": float(iteration > 0)}
        return experience, RolloutSummary(seconds, metrics)

    def settle(self) -> None:
        """Wait for the scores of what was sampled ahead, because something else will be scored."""
        if self._ahead is not None:
            self._ahead.scored()

    def _sample(self, iteration: int) -> "_Unscored":
        """Sample the candidates of an iteration, and leave their scoring to the background."""
        config, scorer = self.run.config, self.run.scorer
        scorer.iteration = iteration
        scorer.run(scorer.reset)  # after what was submitted before, such as an evaluation
        deferred = DeferredScorer(scorer)
        groups = self.run.session.share(
            self.run.prompts.groups(iteration, config.train.groups, self.seed)
        )
        random = self.seed.at("train", iteration)
        policy = self.run.policy
        with policy.together():
            experience = config.algorithm.collect(policy, groups, deferred, random, iteration)
        return _Unscored(experience, deferred, type(config.algorithm).__name__)


class DeferredScorer:
    """A reward scorer whose results are NaN until :meth:`scores` waits for the real ones.

    An algorithm collects its experience with it as with a :class:`RewardScorer`, but does not wait.

    Attributes:
        keeps_media: False.
    """

    keeps_media = False

    def __init__(self, scorer: RewardScorer):
        self.scorer = scorer
        self._futures: list[tuple[Future[Scores], int]] = []

    def reset(self) -> None:
        """Nothing: the counts of the iteration before are still needed."""

    def submit(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None
    ) -> "Future[Scores]":
        """As :meth:`RewardScorer.submit`; the future's result is made of NaN."""
        real = self.scorer.submit(media, prompts, audio)
        return _Placeholder(self, real, len(prompts))

    def pairwise_scorer(self, preference: Any) -> Any:
        """Raise ConfigError: pairs are compared before the experience is complete."""
        raise ConfigError(
            "train.staleness = 1: comparisons of pairs cannot be deferred; set it to 0"
        )

    def closing(self) -> "Future[float]":
        """After all submissions so far are scored, check how many failed.

        Returns:
            The seconds that scoring took.
        """
        scorer = self.scorer

        def work() -> float:
            scorer.check_rate()
            return scorer.seconds

        return scorer.run(work)

    def scores(self) -> Scores:
        """Wait for the scores of all candidates, in the order in which results were asked for."""
        return Scores.concatenate([real.result() for real, _ in self._futures])

    @property
    def rows(self) -> int:
        """Candidates whose results were asked for."""
        return sum(number for _, number in self._futures)


class _Placeholder(Future[Scores]):
    """A result of NaN. It notes each time that it is asked for, since candidates can share scores."""

    def __init__(self, owner: DeferredScorer, real: "Future[Scores]", number: int):
        super().__init__()
        self._owner, self._real, self._number = owner, real, number
        nothing = torch.full((number,), torch.nan)
        self.set_result(Scores({}, nothing))

    def result(self, timeout: float | None = None) -> Scores:
        self._owner._futures.append((self._real, self._number))
        return super().result(timeout)


class _Unscored:
    """Experience whose scores are being computed."""

    def __init__(self, experience: Experience, deferred: DeferredScorer, algorithm: str):
        """
        Args:
            experience: With placeholders for the scores.
            deferred: Has the scores of its candidates, in their order.
            algorithm: Its name, for messages.

        Raises:
            ConfigError: If the algorithm has changed the scores or the candidates.
        """
        c = experience.candidates
        if c.scores.raw or len(c) != deferred.rows or bool(c.scores.valid.any()):
            raise ConfigError(
                f"train.staleness = 1: {algorithm} uses the scores while it samples, so they cannot be computed "
                "later; set train.staleness to 0"
            )
        self._experience, self._deferred = experience, deferred
        self._seconds = deferred.closing()
        self._result: tuple[Experience, float] | None = None

    def scored(self) -> tuple[Experience, float]:
        """Wait for the scores. Returns the experience, and the seconds that scoring took.

        Raises:
            RewardError: If a reward failed for good, or too often.
            DivergenceError: If too many media are not finite.
        """
        if self._result is None:
            candidates = replace(self._experience.candidates, scores=self._deferred.scores())
            experience = replace(self._experience, candidates=candidates)
            self._result = experience, self._seconds.result()
        return self._result
