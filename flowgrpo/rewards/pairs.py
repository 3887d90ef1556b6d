"""Preferences within a group: settings, and the pairwise scorer that turns verdicts into win rates.

A preference replaces distances between scores by win rates (Pref-GRPO, arXiv:2508.20751): the win
rate of a sample is the mean, over its comparisons with other samples of the group, of the
probability that it is better.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted
from flowgrpo.core.win_rates import pairs_of, win_rates
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import check_name
from flowgrpo.rewards.protocols import PairwiseJudge, RewardModel
from flowgrpo.rewards.settings import Failures, Reward, RewardError

log = logging.getLogger(__name__)

PAIRS_PER_CALL = 32
"""Pairs in one call of a judge."""


@dataclass(frozen=True, kw_only=True)
class PairwisePreference:
    """A pairwise judge compares two samples at a time."""

    kind: Literal["judged"] = "judged"
    model: str
    """File name in ``reward_models``, or an import path ``"package.module:name"``, of a pairwise judge:
    an object with the method ``compare``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for the class."""
    weight: float = 1.0
    """Weight of the win rate among the rewards."""
    opponents: int = 0
    """Each sample is compared with this many next samples on a ring, so with twice as many in all; 0
    compares all pairs, which are G (G - 1) / 2."""
    swap: bool = False
    """Whether each pair is shown in both orders, at twice the cost, which cancels a judge's preference
    for the first or the second place."""

    def check(self) -> None:
        """Raise ValueError if a setting is out of range or there is no such judge; loads no model."""
        if self.weight <= 0:
            raise ValueError(f"algorithm.preference.weight must be above 0, got {self.weight}")
        if self.opponents < 0:
            raise ValueError(
                f"algorithm.preference.opponents must be at least 0, got {self.opponents}"
            )
        check_name(self.model, "algorithm.preference.model")

    def comparisons(self, group_size: int) -> int:
        """Number of verdicts that a group needs."""
        return len(pairs_of(group_size, self.opponents)) * (2 if self.swap else 1)


@dataclass(frozen=True, kw_only=True)
class PointwisePreference:
    """Of two samples, the one with the higher score of a pointwise reward wins.

    Win rates keep the order of the scores and drop the distances, so that tiny differences within a
    group are not amplified.
    """

    kind: Literal["compared"] = "compared"
    reward: str = ""
    """Name of the reward; may have weight 0. Empty if there is only one."""
    weight: float = 1.0
    """Weight of the win rate among the rewards."""
    tie_margin: float = 0.0
    """Scores that differ by no more than this are a tie."""

    def check(self) -> None:
        """Raise ValueError if a setting is out of range."""
        if self.weight <= 0:
            raise ValueError(f"algorithm.preference.weight must be above 0, got {self.weight}")
        if self.tie_margin < 0:
            raise ValueError(
                f"algorithm.preference.tie_margin must be at least 0, got {self.tie_margin}"
            )

    def chosen(self, labels: list[str]) -> str:
        """Name of the reward that is compared, one of ``labels``.

        Raises:
            ValueError: If there is no reward of that name, or none is named and there are several.
        """
        if self.reward in labels:
            return self.reward
        if self.reward or len(labels) != 1:
            raise ValueError(
                f"algorithm.preference.reward = {self.reward!r} must be the name of one of the rewards: "
                f"{', '.join(labels)}"
            )
        return labels[0]


Preference = PairwisePreference | PointwisePreference


@runtime_checkable
class Host(Protocol):
    """The part of a reward scorer that comparisons use: its models, its thread and its counts.

    Attributes:
        failures: What happens when a model fails.
        seconds: Time spent scoring; comparisons add theirs.
    """

    failures: Failures
    seconds: float

    def loaded(self, model: Reward) -> RewardModel | PairwiseJudge:
        """A model, loaded at first use."""
        ...

    def run(self, work: Callable[[], Any]) -> "Future[Any]":
        """Do work on the scorer's thread."""
        ...

    def call(self, label: str) -> AbstractContextManager[None]:
        """The context of one call of a model."""
        ...


class PairwiseScorer:
    """Compares the pairs of whole groups, in the background thread of the reward scorer.

    Attributes:
        asked: Comparisons so far.
        missing: Comparisons without a verdict, after all retries.
    """

    def __init__(self, scorer: Host, settings: PairwisePreference):
        """Load the pairwise judge, once for each reward scorer.

        Raises:
            ValueError: If there is no such judge, or it has no method ``compare``.
        """
        self.scorer, self.settings = scorer, settings
        model = scorer.loaded(Reward(model=settings.model, options=settings.options))
        if not isinstance(model, PairwiseJudge):
            raise ValueError(
                f"algorithm.preference.model = {settings.model!r} has no method 'compare'"
            )
        self.model: PairwiseJudge = model
        self.asked = self.missing = 0

    def submit(
        self, media: Float[Tensor, "group *frames channels height width"], prompt: Prompt
    ) -> "Future[Tensor]":
        """The win rates of a whole group, computed in the background; media are held until then."""
        return self.scorer.run(lambda: self.rates(media, prompt))

    def rates(
        self, media: Float[Tensor, "group *frames channels height width"], prompt: Prompt
    ) -> Float[Tensor, " group"]:
        """The win rates of a group, each in [0, 1].

        With ``swap`` the result of a pair is
        ``(p(first beats second) + 1 - p(second beats first)) / 2``. A pair without a verdict, or
        with a verdict in one order only, counts for neither sample.

        Raises:
            RewardError: If verdicts fail and the configuration says to stop.
        """
        began, pairs = time.perf_counter(), pairs_of(len(media), self.settings.opponents)
        first, second = (torch.tensor([pair[k] for pair in pairs]) for k in (0, 1))
        verdicts = self._verdicts(media, first, second, prompt)
        if self.settings.swap:
            verdicts = (verdicts + 1 - self._verdicts(media, second, first, prompt)) / 2
        self.scorer.seconds += time.perf_counter() - began
        return win_rates(len(media), pairs, verdicts)

    def check_rate(self) -> None:
        """Raise RewardError if a larger share than ``failures.max_rate`` has no verdict."""
        most = self.scorer.failures.max_rate
        if self.missing > most * self.asked:
            raise RewardError(
                f"{self.missing} of {self.asked} comparisons got no verdict from {self.settings.model!r}, "
                f"more than failures.max_rate = {most} allows"
            )

    def _verdicts(
        self, media: Tensor, first: Tensor, second: Tensor, prompt: Prompt
    ) -> Float[Tensor, " pairs"]:
        """One verdict per pair, in [0, 1]; NaN where the judge gave none in any attempt."""
        failures = self.scorer.failures
        verdicts = torch.full((len(first),), torch.nan)
        problem: object = "it gave no verdict"
        for attempt in range(failures.retries + 1):
            missing = verdicts.isnan().nonzero().squeeze(1)
            if not len(missing):
                break
            if attempt:
                time.sleep(failures.pause(attempt))
            for rows in missing.split(PAIRS_PER_CALL):
                try:
                    with self.scorer.call(self.settings.model):
                        found = self.model.compare(
                            media[first[rows]], media[second[rows]], [prompt] * len(rows)
                        )
                except (RewardError, KeyboardInterrupt):
                    raise
                except Exception as error:
                    problem = error
                    log.warning("%r failed to compare (attempt %d): %s", self.settings.model, attempt + 1, error)  # fmt: skip
                    continue
                verdicts[rows] = self._checked(found, len(rows))
        failed = int(verdicts.isnan().sum())
        self.asked += len(verdicts)
        self.missing += failed
        if failed and failures.then == "stop":
            raise RewardError(
                f"{self.settings.model!r} gave no verdict on {failed} of {counted(len(verdicts), 'pair')}: {problem}"
            )
        return verdicts

    def _checked(self, found: Any, number: int) -> Float[Tensor, " pairs"]:
        """Verdicts as a CPU tensor. Raises RewardError on a wrong shape or range, where no retry helps."""
        verdicts = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
        given = verdicts[~verdicts.isnan()]
        if verdicts.shape != (number,) or bool(((given < 0) | (given > 1)).any()):
            raise RewardError(
                f"{self.settings.model!r} must give one number in [0, 1], or NaN, for each of {number} "
                f"pairs; got {verdicts.tolist()}"
            )
        return verdicts
