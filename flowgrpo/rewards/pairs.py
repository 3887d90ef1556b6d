"""Preferences within a group: who says which of two is better, and what becomes of failed verdicts."""

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from flowgrpo.core.imports import import_path, suggest
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.win_rates import pairs_of, win_rates
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.protocols import PairwiseJudge
from flowgrpo.rewards.scorer import Reward, RewardError, RewardScorer, available_rewards

log = logging.getLogger(__name__)

PAIRS_PER_CALL = 32
"""Pairs that a judge is handed at once."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge looks at two samples and says which fits the prompt better."""

    kind: Literal["judged"] = "judged"
    model: str
    """File name in ``reward_models``, or an import path ``"package.module:name"``, of something with
    ``compare``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for the class."""
    weight: float = 1.0
    """Weight of the win rate among the rewards."""
    opponents: int = 0
    """Each sample meets this many next ones around a ring, and so twice as many in all; 0 lets all
    meet, in G (G - 1) / 2 comparisons."""
    swap: bool = False
    """Whether each pair is shown in both orders, at twice the cost. A judge that prefers a place then
    prefers nobody."""

    def check(self) -> None:
        """Raise ValueError if the settings make no sense, or name no judge; nothing is loaded."""
        if self.weight <= 0:
            raise ValueError(f"algorithm.preference.weight must be above 0, got {self.weight}")
        if self.opponents < 0:
            raise ValueError(
                f"algorithm.preference.opponents must be at least 0, got {self.opponents}"
            )
        if ":" in self.model:
            import_path(self.model)
        elif self.model not in available_rewards():
            raise ValueError(
                f"unknown algorithm.preference.model {self.model!r}"
                f"{suggest(self.model, available_rewards())}"
            )

    def comparisons(self, group_size: int) -> int:
        """Verdicts that a group costs."""
        return len(pairs_of(group_size, self.opponents)) * (2 if self.swap else 1)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A pointwise reward says which is better: the one that scores higher.

    Win rates keep the order of the scores and forget their distances, so that tiny differences in a
    group weigh no more than they can bear.
    """

    kind: Literal["compared"] = "compared"
    reward: str = ""
    """Name of the reward; may have weight 0. Empty if there is only one."""
    weight: float = 1.0
    """Weight of the win rate among the rewards."""
    tie_margin: float = 0.0
    """Scores that differ by no more are a tie."""

    def check(self) -> None:
        """Raise ValueError if the settings make no sense."""
        if self.weight <= 0:
            raise ValueError(f"algorithm.preference.weight must be above 0, got {self.weight}")
        if self.tie_margin < 0:
            raise ValueError(
                f"algorithm.preference.tie_margin must be at least 0, got {self.tie_margin}"
            )

    def chosen(self, labels: list[str]) -> str:
        """The reward's name. Raises ValueError if there is none of that name, or too many."""
        if self.reward in labels:
            return self.reward
        if self.reward or len(labels) != 1:
            raise ValueError(
                f"algorithm.preference.reward = {self.reward!r} must be the name of one of the rewards: "
                f"{', '.join(labels)}"
            )
        return labels[0]


Preference = Judged | Compared


class Referee:
    """Has the pairs of whole groups judged, in the background thread of a :class:`RewardScorer`.

    Attributes:
        asked: Comparisons asked for so far.
        missing: Those that got no verdict.
    """

    def __init__(self, judge: RewardScorer, settings: Judged):
        """Load the judge of pairs, once for each :class:`RewardScorer`.

        Raises:
            ValueError: If there is no such judge, or it cannot compare.
        """
        self.judge, self.settings = judge, settings
        model = judge.loaded(Reward(model=settings.model, options=settings.options))
        if not isinstance(model, PairwiseJudge):
            raise ValueError(
                f"algorithm.preference.model = {settings.model!r} has no method 'compare'"
            )
        self.model: PairwiseJudge = model
        self.asked = self.missing = 0

    def submit(
        self, media: Float[Tensor, "group *frames channels height width"], prompt: Prompt
    ) -> "Future[Tensor]":
        """The win rates of a whole group; its media are kept until then."""
        return self.judge.run(lambda: self.rates(media, prompt))

    def rates(
        self, media: Float[Tensor, "group *frames channels height width"], prompt: Prompt
    ) -> Float[Tensor, " group"]:
        """The win rates of a group now. A pair counts if it has a verdict in every order asked for.

        Raises:
            RewardError: If verdicts fail and the configuration says to stop.
        """
        began, pairs = time.perf_counter(), pairs_of(len(media), self.settings.opponents)
        first, second = (torch.tensor([pair[k] for pair in pairs]) for k in (0, 1))
        verdicts = self._verdicts(media, first, second, prompt)
        if self.settings.swap:
            verdicts = (verdicts + 1 - self._verdicts(media, second, first, prompt)) / 2
        self.judge.seconds += time.perf_counter() - began
        return win_rates(len(media), pairs, verdicts)

    def check_rate(self) -> None:
        """Raise RewardError if too many comparisons got no verdict."""
        most = self.judge.failures.max_rate
        if self.missing > most * self.asked:
            raise RewardError(
                f"{self.missing} of {self.asked} comparisons got no verdict from {self.settings.model!r}, "
                f"more than failures.max_rate = {most} allows"
            )

    def _verdicts(
        self, media: Tensor, first: Tensor, second: Tensor, prompt: Prompt
    ) -> Float[Tensor, " pairs"]:
        """One verdict per pair; NaN where none came however often it was asked for."""
        failures = self.judge.failures
        verdicts = torch.full((len(first),), torch.nan)
        problem: object = "it gave no verdict"
        for attempt in range(failures.retries + 1):
            missing = verdicts.isnan().nonzero().squeeze(1)
            if not len(missing):
                break
            if attempt:
                time.sleep(failures.wait * 2 ** (attempt - 1))
            for rows in missing.split(PAIRS_PER_CALL):
                try:
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
                f"{self.settings.model!r} gave no verdict on {failed} of {len(verdicts)} pairs: {problem}"
            )
        return verdicts

    def _checked(self, found: Any, number: int) -> Float[Tensor, " pairs"]:
        """Verdicts as a CPU tensor. Raises RewardError on what no retry mends."""
        verdicts = torch.as_tensor(found, dtype=torch.float32).detach().cpu()
        given = verdicts[~verdicts.isnan()]
        if verdicts.shape != (number,) or bool(((given < 0) | (given > 1)).any()):
            raise RewardError(
                f"{self.settings.model!r} must give one number in [0, 1], or NaN, for each of {number} "
                f"pairs; got {verdicts.tolist()}"
            )
        return verdicts
