"""Runs reward models on candidates while sampling goes on, and turns scores into rewards.

A reward that fails is retried; then, by configuration, the sample is dropped from its group or the
run stops. No score is ever made up.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import (
    Reward,
    RewardError,
    available_rewards,
    checked,
    load_model,
    load_reward,
    total,
)
from flowgrpo.rewards.protocols import LearningReward, PairwiseJudge, RewardModel

__all__ = [
    "Failures",
    "Reward",
    "RewardError",
    "RewardScorer",
    "Scores",
    "available_rewards",
    "load_reward",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What happens when a reward model raises an error or returns NaN."""

    retries: int = 2
    """Further attempts before a score counts as failed."""
    wait: float = 1.0
    """Seconds before the first retry; doubles with each."""
    then: Literal["drop", "stop"] = "drop"
    """``drop`` leaves the sample out of its group; ``stop`` ends the run."""
    probe: Literal["refuse", "warn", "off"] = "refuse"
    """What to do at the start with a trained reward that gives all images of the base model the same
    score. A rare binary reward can be constant for honest reasons."""
    max_rate: float = 0.2
    """Share of failed scores in one iteration above which the run stops all the same."""


class RewardScorer:
    """Scores candidates in the background, in the order in which they are submitted.

    Attributes:
        iteration: Of the training run, by which rewards' schedules go; None gives them full weight.
        failures_seen: Scores that failed for good since the last :meth:`reset`.
        seconds: Time spent scoring since the last :meth:`reset`.
        keeps_media: Whether experience holds the media of its candidates, for people to look at.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        failures: Failures | None = None,
        batch: int = 0,
    ):
        """Load the reward models.

        Args:
            rewards: Those to train on and those to measure.
            failures: What happens when one fails.
            batch: Most samples to score at once; 0 for as many as are submitted.

        Raises:
            ValueError: If one is unknown, or two have one name.
            ConfigError: If one counts its scores in a way that makes no sense.
        """
        for reward in rewards:
            reward.check(f"reward {reward.label!r}")
        labels = [r.label for r in rewards]
        if not rewards or len(set(labels)) != len(labels):
            raise ValueError(f"rewards: at least one, each with a name of its own; got {labels}")
        self.rewards, self.failures = list(rewards), failures or Failures()
        self.iteration: int | None = None
        self.batch, self.keeps_media = batch, False
        self.models = [load_reward(r) for r in rewards]
        self._learners = {
            r.label: m
            for r, m in zip(rewards, self.models, strict=True)
            if isinstance(m, LearningReward)
        }
        self._seen: list[tuple[Tensor, list[Prompt]]] = []
        self._others: dict[str, RewardModel | PairwiseJudge] = {}
        # One worker: reward models need not be thread-safe, and results do not depend on timing.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.failures_seen, self.scored, self.seconds = 0, 0, 0.0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError if prompts lack what a reward needs, where a reward can tell."""
        for reward, model in zip(self.rewards, self.models, strict=True):
            check = getattr(model, "check", None)
            if check is not None:
                try:
                    check(prompts)
                except ValueError as error:
                    raise ValueError(f"reward {reward.label!r}: {error}") from error

    def submit(self, media: Tensor, prompts: Sequence[Prompt]) -> "Future[Scores]":
        """Score a batch in the background. Media ``(B, ...)`` in [0, 1]."""
        if self._learners and self.iteration is not None:
            self._seen.append((media, list(prompts)))
        return self._worker.submit(self._score_in_parts, media, list(prompts))

    def _score_in_parts(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        size = self.batch or len(prompts)
        starts = range(0, len(prompts), size)
        parts = [self.score(media[i : i + size], prompts[i : i + size]) for i in starts]
        return Scores.concatenate(parts)

    def learn(self, gather: Callable[[list[Any]], list[Any]] = lambda own: own) -> dict[str, float]:
        """Let rewards that learn do so, from all that was scored since the last call.

        Args:
            gather: Joins the lists of all processes, so that all of them learn the same.

        Returns:
            What they report, by ``learning/<reward>/<name>``.
        """
        if not self._learners:
            return {}
        seen, self._seen = gather(self._seen), []
        media, prompts = torch.cat([m for m, _ in seen]), [p for _, part in seen for p in part]

        def work() -> dict[str, float]:
            return {
                f"learning/{label}/{name}": value
                for label, model in self._learners.items()
                for name, value in model.update(media, prompts).items()
            }

        return self._worker.submit(work).result()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What rewards have learnt, for a checkpoint."""
        return {f"reward-{label}": dict(m.state()) for label, m in self._learners.items()}

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from :meth:`state`."""
        for label, model in self._learners.items():
            model.restore(parts[f"reward-{label}"])

    def run(self, work: Callable[[], Tensor]) -> "Future[Tensor]":
        """Do other work of judging in the background, after what was submitted before."""
        return self._worker.submit(work)

    def loaded(self, model: Reward) -> RewardModel | PairwiseJudge:
        """Something that judges beside the rewards, loaded when it is first asked for."""
        if model.label not in self._others:
            self._others[model.label] = load_model(model)
        return self._others[model.label]

    def referee(self, preference: Any) -> Any:
        """A :class:`flowgrpo.rewards.pairs.Referee` for a preference, on this scorer's thread."""
        from flowgrpo.rewards.pairs import Referee

        return Referee(self, preference)

    def score(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score a batch now. Failed scores are NaN, and so are rewards that need them.

        Raises:
            RewardError: If a reward fails and the configuration says to stop.
        """
        began = time.perf_counter()
        raw = {
            r.label: self._attempt(r, m, media, prompts)
            for r, m in zip(self.rewards, self.models, strict=True)
        }
        reward = total(self.rewards, raw, self.iteration)
        self.scored += len(prompts)
        self.failures_seen += int((~torch.stack(list(raw.values())).isfinite()).any(0).sum())
        self.seconds += time.perf_counter() - began
        weights = {r.label: r.weight_at(self.iteration) for r in self.rewards if r.weight != 0}
        return Scores(raw, reward, weights, {r.label: r.shaped for r in self.rewards})

    def probe(self, media: Tensor, prompts: Sequence[Prompt]) -> None:
        """Score a few different images before the long work, to refuse an unfit reward.

        Noise is scored with them. A reward that cannot score it, or likes it best, gets a warning: it
        may be meant so.

        Raises:
            RewardError: If a trained reward gives every image the same score, or none a finite one.
        """
        if self.failures.probe == "off":
            return
        noise = torch.rand(media[:1].shape, generator=torch.Generator().manual_seed(0)).to(media)
        scores = self.score(torch.cat([media, noise]), [*prompts, prompts[0]])
        for reward in self.rewards:
            values, senseless = scores.raw[reward.label].split([len(prompts), 1])
            if not values.isfinite().any():
                raise RewardError(
                    f"reward {reward.label!r} gave no finite score to {len(values)} probe images"
                )
            finite = values[values.isfinite()]
            if not bool(senseless.isfinite().all()):
                log.warning("reward %r gave no finite score to noise", reward.label)
            elif reward.weight * float(senseless) > float((reward.weight * finite).max()):
                log.warning(
                    "reward %r prefers noise (%.4g) to all %d probe images (at most %.4g): is its sign "
                    "right?",
                    reward.label, float(senseless), len(finite), float(finite.max()),
                )  # fmt: skip
            if reward.weight != 0 and len(finite) > 1 and bool((finite == finite[0]).all()):
                problem = (
                    f"reward {reward.label!r} gave all {len(finite)} different probe images the same score "
                    f"{float(finite[0])}: there is nothing to learn from it. Check its prompts and metadata; set "
                    "its weight to 0 to measure it only, or failures.probe = 'warn' if it is merely rare"
                )
                if self.failures.probe == "refuse":
                    raise RewardError(problem)
                log.warning(problem)
        self.reset()

    def check_rate(self) -> None:
        """Raise RewardError if too many scores failed since the last :meth:`reset`."""
        if self.scored and self.failures_seen > self.failures.max_rate * self.scored:
            raise RewardError(
                f"{self.failures_seen} of {self.scored} scores failed, more than failures.max_rate = "
                f"{self.failures.max_rate} allows"
            )

    def close(self) -> None:
        """Stop the background worker."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _attempt(
        self, reward: Reward, model: RewardModel, media: Tensor, prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        missing = torch.full((len(prompts),), math.nan)
        for attempt in range(self.failures.retries + 1):
            if attempt:
                time.sleep(self.failures.wait * 2 ** (attempt - 1))
            try:
                values = model(media, prompts)
            except (RewardError, KeyboardInterrupt):
                raise
            except Exception as error:
                log.warning("reward %r failed (attempt %d): %s", reward.label, attempt + 1, error)
                problem: object = error
                continue
            values = checked(reward.label, values, len(prompts))
            missing = torch.where(values.isfinite(), values, missing)
            problem = "it returned NaN or infinity"
            if bool(missing.isfinite().all()):
                return missing
        if self.failures.then == "stop":
            raise RewardError(
                f"reward {reward.label!r} failed {self.failures.retries + 1} times: {problem}"
            )
        return missing
