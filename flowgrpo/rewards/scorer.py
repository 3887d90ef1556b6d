"""The reward scorer: runs reward models in the background while sampling continues.

A reward model that fails is retried. If it keeps failing, the sample is dropped from its group or
the run stops, as :class:`~flowgrpo.rewards.settings.Failures` says. A missing score is never
replaced by a number.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

from flowgrpo.core.errors import ConfigError, DivergenceError
from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted
from flowgrpo.data.audio import Audio
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.calls import problem_of, unchanged
from flowgrpo.rewards.features import Features
from flowgrpo.rewards.loading import load_model
from flowgrpo.rewards.named import load_all
from flowgrpo.rewards.pairs import PairwisePreference, PairwiseScorer
from flowgrpo.rewards.protocols import (
    AlternatingReward,
    LearningReward,
    PairwiseJudge,
    RewardModel,
    Trained,
    checked_scores,
    takes_audio,
)
from flowgrpo.rewards.settings import Failures, Reward, RewardError, weighted_sum
from flowgrpo.rewards.streams import OwnStream
from flowgrpo.rewards.worker import Worker

__all__ = ["RewardScorer"]

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
"""Seconds between two calls of :attr:`RewardScorer.safe_point` while a result is awaited."""


class RewardScorer:
    """Scores candidates in the background, in the order in which they are submitted.

    Attributes:
        iteration: Iteration of the training run, which the schedules of weights depend on; None
            (evaluation) uses full weights.
        scored: Samples scored since the last :meth:`reset`.
        failures_seen: Samples without a score, after all retries, since the last :meth:`reset`.
        broken_media: Samples whose media are not finite, since the last :meth:`reset`; they count as
            failures, whatever a reward makes of them.
        safe_point: Called before each submission and while its result is awaited; it may raise to stop
            the run.
        seconds: Time spent scoring since the last :meth:`reset`.
        keeps_media: Whether experience keeps the media of its candidates, for inspection.
        features: Computes the features of candidates, in training only; None if nothing needs them.
        once: Does the work in one of several processes with the same candidates, and returns its result in
            all of them; None if each process scores its own candidates.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        failures: Failures | None = None,
        batch: int = 0,
        load: Callable[[Sequence[Reward]], list[RewardModel]] = load_all,
    ):
        """Load the reward models.

        Args:
            rewards: The rewards to train on, and those with weight 0 to log.
            failures: What happens when one fails.
            batch: Most samples in one call of a reward model; 0 scores each submission whole.
            load: Loads them.

        Raises:
            ValueError: If a reward is unknown, or two have the same name.
            ConfigError: If the settings of a reward contradict each other.
        """
        for reward in rewards:
            reward.check(f"reward {reward.label!r}")
        labels = [r.label for r in rewards]
        if len(set(labels)) != len(labels):
            raise ValueError(f"rewards: give them different names; got {labels}")
        self.rewards, self.failures = list(rewards), failures or Failures()
        self.iteration: int | None = None
        self.batch, self.keeps_media = batch, False
        self.models = load(rewards)
        self._problems: dict[str, str] = {}
        self._learners = {
            r.label: m
            for r, m in zip(rewards, self.models, strict=True)
            if isinstance(m, LearningReward)
        }
        self.safe_point: Callable[[], None] = lambda: None
        self.once: Callable[[Callable[[], Any]], Any] | None = None
        self.features: Features | None = None
        self._seen: list[tuple[Tensor, list[Prompt]]] = []
        self._judges: dict[str, RewardModel | PairwiseJudge] = {}
        self._worker, self._stream = Worker("reward-scorer"), OwnStream()
        self.reset()

    def reset(self) -> None:
        """Set the counters to 0."""
        self.failures_seen, self.scored, self.seconds = 0, 0, 0.0
        self.broken_media = 0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Call ``check(prompts)`` of every reward that has it; ValueError if prompts lack something."""
        for reward, model in zip(self.rewards, self.models, strict=True):
            check = getattr(model, "check", None)
            if check is not None:
                try:
                    check(prompts)
                except ValueError as error:
                    raise ValueError(f"reward {reward.label!r}: {error}") from error

    @property
    def audio_rewards(self) -> list[str]:
        """The names of the rewards that need sound."""
        pairs = zip(self.rewards, self.models, strict=True)
        return [r.label for r, model in pairs if takes_audio(model)]

    def check_audio(self, is_there: bool, where: str) -> None:
        """Check that rewards which need sound will get it.

        Args:
            is_there: Whether the media have sound.
            where: What they come from, for the message.

        Raises:
            ConfigError: If a reward needs sound, and there is none.
        """
        if self.audio_rewards and not is_there:
            raise ConfigError(
                f"rewards: {self.audio_rewards[0]!r} needs sound, and {where}; remove the reward, or use a "
                "pipeline that makes sound, such as LTX-2"
            )

    def submit(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None
    ) -> "Future[Scores]":
        """Score a batch in the background, in the order of submission.

        Args:
            media: ``(B, ...)`` in [0, 1].
            prompts: One per sample.
            audio: The sound of each sample, for rewards that need it.
        """
        self.safe_point()
        if self._learning():
            self._seen.append((media, list(prompts)))
        # Scored later, when the run may be in another iteration.
        listed, iteration = list(prompts), self.iteration
        return self.run(lambda: self._score_in_parts(media, listed, audio, iteration))

    def _score_in_parts(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None, iteration: int | None
    ) -> Scores:
        return Scores.concatenate(
            [
                self._score(media[r], prompts[r], audio[r] if audio else None, iteration)
                for r in self._parts(len(prompts))
            ]
        )

    def _parts(self, number: int) -> list[slice]:
        """The rows of a batch of ``number`` samples that one call of a reward model gets."""
        size = self.batch or max(1, number)
        return [slice(i, i + size) for i in range(0, number, size)]

    def learn(self, gather: Callable[[list[Any]], list[Any]] = lambda own: own) -> dict[str, float]:
        """Update the rewards that learn in this iteration with all media submitted since the last call.

        Args:
            gather: Joins the lists of all processes, so that all make the same update.

        Returns:
            The metrics of the updates, as ``learning/<reward>/<name>``.
        """
        learning = self._learning()
        if not learning:
            return {}
        seen, self._seen = gather(self._seen), []
        media, prompts = torch.cat([m for m, _ in seen]), [p for _, part in seen for p in part]

        def work() -> dict[str, float]:
            return {
                f"learning/{label}/{name}": value
                for label, model in learning.items()
                for name, value in self._updated(label, model, media, prompts).items()
            }

        return self.run(work).result()

    @property
    def learning_rewards(self) -> list[str]:
        """The names of the rewards that learn during a run."""
        return list(self._learners)

    def trains_policy(self, iteration: int) -> bool:
        """Whether an iteration updates the policy; not if a reward learns alone in it."""
        return all(trained(m, iteration) != "reward" for m in self._learners.values())

    def check_turns(self, num_iterations: int) -> None:
        """Check that a run updates the policy.

        Raises:
            ConfigError: If its rewards learn alone in all of its iterations.
        """
        if not any(map(self.trains_policy, range(num_iterations))):
            names = " and ".join(map(repr, self._learners))
            raise ConfigError(
                f"train.iterations = {num_iterations}: reward {names} learns alone in all of them, so the "
                "policy is never updated; raise train.iterations, or let the policy train more often"
            )

    def _learning(self) -> dict[str, LearningReward]:
        """The rewards that learn in this iteration, by name; none in evaluations."""
        i = self.iteration
        return {
            k: m for k, m in self._learners.items() if i is not None and trained(m, i) != "policy"
        }

    def _updated(
        self, label: str, model: LearningReward, media: Tensor, prompts: Sequence[Prompt]
    ) -> Mapping[str, float]:
        with self.call(label):
            return model.update(media, prompts)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The states of the learning rewards, for a checkpoint."""
        return {f"reward-{label}": dict(m.state()) for label, m in self._learners.items()}

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Resume from the result of :meth:`state`."""
        for label, model in self._learners.items():
            model.restore(parts[f"reward-{label}"])

    def run(self, work: Callable[[], Any]) -> "Future[Any]":
        """Run other scoring work, such as comparisons, in the background after earlier submissions.

        Calls of models inside belong in :meth:`call`.
        """
        if self.once is not None:
            work = partial(self._done_once, work, self.once)
        return _Watched(self._worker.submit(self._stream.doing(work)), self._watch)

    def _done_once(self, work: Callable[[], Any], once: Callable[[Callable[[], Any]], Any]) -> Any:
        """The result of work that one of several processes does; the others take over its counts."""

        def counted() -> tuple[Any, Sequence[Any]]:
            result = work()
            return result, (self.failures_seen, self.scored, self.seconds, self.broken_media)

        result, counts = once(counted)
        self.failures_seen, self.scored, self.seconds, self.broken_media = counts
        return result

    def call(self, label: str) -> AbstractContextManager[None]:
        """The context of one call of a model, whose duration ``failures.timeout`` limits."""
        return self._worker.call(label)

    def _watch(self) -> None:
        """Called while a result is awaited.

        Raises:
            RewardError: If a model has not returned in time. It is still busy, and a second call at the
                same time is not safe, so there is no retry.
        """
        self.safe_point()
        label, seconds = self._worker.current_call()
        if self.failures.timeout and seconds > self.failures.timeout:
            raise RewardError(
                f"reward {label!r} has not returned for {seconds:.0f} s, longer than failures.timeout = "
                f"{self.failures.timeout:g} allows; if it may take that long, raise failures.timeout "
                "(0 for no limit)"
            )

    def loaded(self, model: Reward) -> RewardModel | PairwiseJudge:
        """A model that is not one of the rewards, such as a pairwise judge; loaded once, at first use."""
        if model.label not in self._judges:
            self._judges[model.label] = load_model(model)
        return self._judges[model.label]

    def pairwise_scorer(self, preference: PairwisePreference) -> PairwiseScorer:
        """Make a scorer that compares pairs with a preference's judge, on this scorer's thread."""
        return PairwiseScorer(self, preference)

    def score(self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None) -> Scores:
        """Score a batch and wait for it. A failed score is NaN, and so is the reward of its sample.

        Raises:
            RewardError: If a reward does not return in time, or fails and the configuration says to
                stop.
        """
        iteration = self.iteration
        work = partial(self._score_in_parts, media, prompts, audio, iteration)
        result: Scores = self.run(work).result()
        return result

    def marks(
        self, media: Tensor, prompts: Sequence[Prompt]
    ) -> tuple[str, Float[Tensor, " batch"] | None]:
        """The name and the scores of the first reward that needs no sound; ``""`` and None without one."""
        pairs = zip(self.rewards, self.models, strict=True)
        found = next(((r, m) for r, m in pairs if not takes_audio(m)), None)
        if found is None:
            return "", None
        attempt = partial(self._attempt, *found)

        def work() -> Tensor:
            rows = self._parts(len(prompts))
            return torch.cat([attempt(media[r], prompts[r], None) for r in rows])

        return found[0].label, self.run(work).result()

    def _score(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None, iteration: int | None
    ) -> Scores:
        """Score a batch of an iteration, on the worker's thread."""
        began = time.perf_counter()
        raw = {
            r.label: self._attempt(r, m, media, prompts, audio)
            for r, m in zip(self.rewards, self.models, strict=True)
        }
        # Without rewards nothing is known of the media.
        nothing = torch.full((len(prompts),), math.nan)
        reward = weighted_sum(self.rewards, raw, iteration) if raw else nothing
        self.broken_media += int((~finite(media, audio)).sum())
        self.scored += len(prompts)
        if raw:
            self.failures_seen += int((~torch.stack(list(raw.values())).isfinite()).any(0).sum())
        features = None
        if self.features is not None and iteration is not None:
            with self.call("guard.features"):
                features = self.features(media)
        self.seconds += time.perf_counter() - began
        weights = {r.label: r.weight_at(iteration) for r in self.rewards if r.weight != 0}
        return Scores(raw, reward, weights, {r.label: r.shaped for r in self.rewards}, features)

    def probe(self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None) -> None:
        """Score a few different images before training starts, to find unsuitable rewards early.

        An image of uniform noise is scored with them. A reward that cannot score noise, or gives it
        the highest score, causes a warning only, because that can be intended.

        Args:
            media: Different images or videos of the base model.
            prompts: Their prompts.
            audio: Their sound, if there is any.

        Raises:
            RewardError: If a trained reward gives all of them the same score, or no finite score.
        """
        if self.failures.probe == "off" or not self.rewards:
            return
        random = torch.Generator().manual_seed(0)
        noise = torch.rand(media[:1].shape, generator=random).to(media)
        if audio is not None:
            hiss = 2 * torch.rand(audio.waveform[:1].shape, generator=random) - 1
            audio = Audio.concatenate([audio, Audio(hiss, audio.rate)])
        scores = self.score(torch.cat([media, noise]), [*prompts, prompts[0]], audio)
        for reward in self.rewards:
            values, on_noise = scores.raw[reward.label].split([len(prompts), 1])
            if not values.isfinite().any():
                raise RewardError(
                    f"reward {reward.label!r} gave no finite score to {len(values)} probe images"
                    + (f": {problem}" if (problem := self._problems.get(reward.label)) else "")
                )
            finite = values[values.isfinite()]
            if not bool(on_noise.isfinite().all()):
                log.warning("reward %r gave no finite score to noise", reward.label)
            elif reward.weight * float(on_noise) > float((reward.weight * finite).max()):
                log.warning(
                    "reward %r prefers noise (%.4g) to all %d probe images (at most %.4g): is its sign "
                    "right?",
                    reward.label, float(on_noise), len(finite), float(finite.max()),
                )  # fmt: skip
            if reward.weight != 0 and len(finite) > 1 and bool((finite == finite[0]).all()):
                problem = (
                    f"reward {reward.label!r} gave all {len(finite)} different probe images the same score "
                    f"{float(finite[0])}, so there is nothing to learn from it. Check its prompts and metadata; "
                    "set its weight to 0 to log it only, or failures.probe = 'warn' if it is rarely above 0"
                )
                if self.failures.probe == "refuse":
                    raise RewardError(problem)
                log.warning(problem)
        self.reset()

    def score_once(
        self, reward: Reward, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None
    ) -> Float[Tensor, " batch"] | None:
        """The scores of one reward in parts of :attr:`batch`, without retries; None if it fails."""
        model = self.models[self.rewards.index(reward)]

        def part(rows: slice) -> Float[Tensor, " batch"]:
            call = cast(Callable[..., Any], model)
            if takes_audio(model):
                call = partial(call, audio=audio[rows] if audio else None)
            with self.call(reward.label), unchanged(reward.label, media):
                values = call(media[rows], prompts[rows])
            return checked_scores(reward.label, values, len(prompts[rows]))

        def work() -> Float[Tensor, " batch"] | None:
            try:
                return torch.cat([part(rows) for rows in self._parts(len(prompts))])
            except (Exception, SystemExit) as error:
                log.info("reward %r failed with shuffled prompts: %s", reward.label, error)
                return None

        result: Float[Tensor, " batch"] | None = self.run(work).result()
        return result

    def check_rate(self) -> None:
        """Check how many scores failed since the last :meth:`reset`.

        Raises:
            DivergenceError: If the media themselves are to blame.
            RewardError: If there are too many failures.
        """
        self.check_media()
        if self.scored and self.failures_seen > self.failures.max_rate * self.scored:
            raise RewardError(
                f"{self.failures_seen} of {self.scored} scores failed, more than failures.max_rate = "
                f"{self.failures.max_rate} allows; the log has the errors"
            )

    def check_media(self) -> None:
        """Raise DivergenceError if too many media since the last :meth:`reset` were not finite."""
        if self.broken_media > self.failures.max_rate * self.scored:
            raise DivergenceError(
                f"{self.broken_media} of {counted(self.scored, 'image')} of the policy contain NaN or infinity"
            )

    def close(self, wait: bool = True) -> None:
        """Stop the background worker, after the score that it computes if ``wait``."""
        self._worker.close(wait)

    def _attempt(
        self,
        reward: Reward,
        model: RewardModel,
        media: Tensor,
        prompts: Sequence[Prompt],
        audio: Audio | None,
    ) -> Float[Tensor, " batch"]:
        """Call a reward model until every sample has a score or the retries are used up.

        A score of an earlier attempt is kept if a later attempt returns NaN for that sample.

        Raises:
            RewardError: If it needs sound and there is none, it returns anything but numbers, or it
                fails and the configuration says to stop.
        """
        call = cast(Callable[..., Any], model)
        if takes_audio(model):
            if audio is None:
                raise RewardError(f"reward {reward.label!r} needs sound, and the media have none")
            call = partial(call, audio=audio)
        fit = finite(media, audio if takes_audio(model) else None)
        scores = torch.full((len(prompts),), math.nan)
        for attempt in range(self.failures.retries + 1):
            if attempt:
                time.sleep(self.failures.pause(attempt))
            try:
                with self.call(reward.label), unchanged(reward.label, media):
                    values = call(media, prompts)
            except (RewardError, KeyboardInterrupt):
                raise
            except (Exception, SystemExit) as error:
                problem = problem_of(error)
                log.warning("reward %r failed (attempt %d): %s", reward.label, attempt + 1, problem)
                self._problems[reward.label] = problem
                continue
            values = checked_scores(reward.label, values, len(prompts))
            values = values.where(fit, math.nan)
            scores = torch.where(values.isfinite(), values, scores)
            problem = "it returned NaN or infinity"
            if bool((scores.isfinite() | ~fit).all()):
                return scores
        if self.failures.then == "stop":
            raise RewardError(
                f"reward {reward.label!r} failed {self.failures.retries + 1} times: {problem}"
            )
        return scores


class _Watched(Future[Any]):
    """The result of another future; whoever waits for it calls a function now and then."""

    def __init__(self, inner: Future[Any], watch: Callable[[], None]):
        super().__init__()
        self._watch = watch
        inner.add_done_callback(self._settle)

    def _settle(self, inner: Future[Any]) -> None:
        if inner.cancelled():
            self.cancel()
        elif (error := inner.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(inner.result())

    def result(self, timeout: float | int | None = None) -> Any:
        """The result, as of any future."""
        if timeout is not None:
            return super().result(timeout)
        while not self.done():
            self._watch()
            wait([self], timeout=WATCH_SECONDS)
        return super().result()


def trained(model: LearningReward, iteration: int) -> Trained:
    """What an iteration trains, as far as a reward decides it."""
    return model.trains(iteration) if isinstance(model, AlternatingReward) else "both"


def finite(media: Tensor, audio: Audio | None) -> Tensor:
    """Which samples of a batch are finite, with their sound; a boolean vector on the CPU."""
    pictures = media.flatten(1).isfinite().all(1).cpu()
    return pictures if audio is None else pictures & audio.is_finite
