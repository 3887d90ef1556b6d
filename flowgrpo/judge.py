"""Runs reward models on candidates while sampling goes on, and turns scores into rewards.

A reward that fails is retried; then, by configuration, the sample is dropped from its group or the
run stops. No score is ever made up.
"""

import importlib
import inspect
import logging
import math
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.experience import PairwiseJudge, Prompt, RewardModel
from flowgrpo.imports import import_path
from flowgrpo.names import suggest

log = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """A reward model failed for good, or is unfit to train on."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward model in the sum that is trained on, or measured beside it."""

    model: str
    """File name in ``reward_models``, or an import path ``"package.module:name"`` of a class or a
    function."""
    name: str = ""
    """How it is called in metrics; by default the last part of ``model``."""
    weight: float = 1.0
    """Factor in the reward; 0 measures it without training on it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for the class."""

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or self.model.rsplit(":", 1)[-1].rsplit(".", 1)[-1]


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


def load_model(reward: Reward) -> RewardModel | PairwiseJudge:
    """Import a reward model, or a judge of pairs, and make it.

    Raises:
        ValueError: If there is no such reward, with the nearest name, or its options are wrong.
    """
    path = reward.model
    if ":" not in path:
        if path not in available_rewards():
            raise ValueError(
                f"unknown reward {path!r}{suggest(path, available_rewards())} (known: "
                f"{', '.join(available_rewards())}; others by import path 'package.module:name')"
            )
        # Each file offers one reward, first in its __all__.
        path = f"reward_models.{path}:{importlib.import_module(f'reward_models.{path}').__all__[0]}"
    target = import_path(path)
    if not callable(target):
        raise ValueError(f"reward {path!r} is {target!r}, neither a class nor a function")
    if isinstance(target, type):
        try:
            inspect.signature(target).bind(**reward.options)
        except TypeError as error:
            raise ValueError(
                f"reward {reward.label!r}: {error}; it takes {inspect.signature(target)}"
            ) from error
        return target(**reward.options)
    if reward.options:
        raise ValueError(
            f"reward {reward.label!r} is a function and takes no options, got {reward.options}"
        )
    return target


def load_reward(reward: Reward) -> RewardModel:
    """As :func:`load_model`, for what scores single samples; ValueError for what judges pairs."""
    model = load_model(reward)
    if not isinstance(model, RewardModel):
        raise ValueError(
            f"reward {reward.label!r} judges pairs, not single samples: it belongs to the algorithm "
            "'pref_grpo', as algorithm.preference.model"
        )
    return model


def available_rewards() -> list[str]:
    """The short names of the rewards that come with flowgrpo."""
    import reward_models

    modules = pkgutil.iter_modules(reward_models.__path__)
    return sorted(m.name for m in modules if not m.name.startswith("_"))


@dataclass
class Scores:
    """What one batch of candidates got; collected when scoring is done."""

    raw: Mapping[str, Float[Tensor, " batch"]]
    reward: Float[Tensor, " batch"]


class Judge:
    """Scores candidates in the background, in the order in which they are submitted.

    Attributes:
        failures_seen: Scores that failed for good since the last :meth:`reset`.
        seconds: Time spent scoring since the last :meth:`reset`.
    """

    def __init__(self, rewards: Sequence[Reward], failures: Failures | None = None):
        """Load the reward models.

        Raises:
            ValueError: If one is unknown, or two have one name.
        """
        labels = [r.label for r in rewards]
        if not rewards or len(set(labels)) != len(labels):
            raise ValueError(f"rewards: at least one, each with a name of its own; got {labels}")
        self.rewards, self.failures = list(rewards), failures or Failures()
        self.models = [load_reward(r) for r in rewards]
        self._others: dict[str, RewardModel | PairwiseJudge] = {}
        # One worker: reward models need not be thread-safe, and results do not depend on timing.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge")
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.failures_seen, self.scored, self.seconds = 0, 0, 0.0

    def submit(self, media: Tensor, prompts: Sequence[Prompt]) -> "Future[Scores]":
        """Score a batch in the background. Media ``(B, ...)`` in [0, 1]."""
        return self._worker.submit(self.score, media, list(prompts))

    def run(self, work: Callable[[], Tensor]) -> "Future[Tensor]":
        """Do other work of judging in the background, after what was submitted before."""
        return self._worker.submit(work)

    def loaded(self, model: Reward) -> RewardModel | PairwiseJudge:
        """Something that judges beside the rewards, loaded when it is first asked for."""
        if model.label not in self._others:
            self._others[model.label] = load_model(model)
        return self._others[model.label]

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
        trained = [r for r in self.rewards if r.weight != 0]
        reward = torch.zeros(len(prompts))
        for item in trained:
            reward = reward + item.weight * raw[item.label]
        self.scored += len(prompts)
        self.failures_seen += int((~torch.stack(list(raw.values())).isfinite()).any(0).sum())
        self.seconds += time.perf_counter() - began
        return Scores(raw, reward)

    def probe(self, media: Tensor, prompts: Sequence[Prompt]) -> None:
        """Score a few different images before the long work, to refuse an unfit reward.

        Raises:
            RewardError: If a trained reward gives every image the same score, or none a finite one.
        """
        if self.failures.probe == "off":
            return
        scores = self.score(media, prompts)
        for reward in self.rewards:
            values = scores.raw[reward.label]
            if not values.isfinite().any():
                raise RewardError(
                    f"reward {reward.label!r} gave no finite score to {len(values)} probe images"
                )
            finite = values[values.isfinite()]
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
            values = _checked(reward.label, values, len(prompts))
            missing = torch.where(values.isfinite(), values, missing)
            problem = "it returned NaN or infinity"
            if bool(missing.isfinite().all()):
                return missing
        if self.failures.then == "stop":
            raise RewardError(
                f"reward {reward.label!r} failed {self.failures.retries + 1} times: {problem}"
            )
        return missing


def _checked(label: str, values: Any, number: int) -> Float[Tensor, " batch"]:
    """The scores as a CPU tensor. Raises RewardError on a wrong shape, which no retry mends."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {label!r} returned no numbers but {values!r}") from error
    if tensor.shape != (number,):
        raise RewardError(
            f"reward {label!r} returned shape {tuple(tensor.shape)} for {number} samples; expected ({number},)"
        )
    return tensor
