"""Settings of rewards: which model, its options, how its score counts, and what happens on failure.

The raw score ``r`` of a model is shaped in this order; a setting at its default does nothing::

    r = scale * r + shift              affine transform to the units of the other rewards
    r = min(max(r, low), high)         clip
    r = log(1 + r)                     log, damps heavy tails; needs r > -1
    r = 1 if r > threshold else 0      threshold (DanceGRPO's binary reward, arXiv:2505.07818)
    term = weight * schedule(i) * r    in iteration i

The reward of a sample is the sum of the terms (:func:`weighted_sum`). Nothing here imports torch
until a score is shaped, so that configurations can be read quickly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.tensors import Float, Tensor, torch

LONGEST_WAIT = 600.0
"""Seconds to which the pauses between two attempts double."""


class RewardError(RuntimeError):
    """A reward model failed and retries cannot help, or it is unsuitable for training."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward model: a term of the trained reward, or with weight 0 a metric only."""

    model: str
    """File name in ``reward_models``, or an import path ``"package.module:name"`` of a class or a
    function."""
    name: str = ""
    """Its name in metrics; by default ``score``, or the last part of ``model``."""
    score: str = ""
    """Which of the scores this is, if the model returns several by name. Rewards with a ``score`` of the
    same model and options are computed in one call of one model."""
    weight: float = 1.0
    """Factor in the reward; with 0 the score is logged and not trained on."""
    scale: float = 1.0
    """The score is multiplied by ``scale`` first, then ``shift`` is added. Metrics show the score as
    the model returned it."""
    shift: float = 0.0
    """Added after ``scale``."""
    clip: tuple[float, ...] = ()
    """``[low, high]``: limits of the score, applied after ``scale`` and ``shift``."""
    log: bool = False
    """Use ``log(1 + r)``, which damps large scores; after ``clip``. A score of -1 or less ends the
    run."""
    threshold: float | None = None
    """Use 1 above the threshold and 0 otherwise; after ``scale``, ``shift`` and ``clip``. Excludes
    ``log``."""
    schedule: tuple[tuple[float, ...], ...] = ()
    """``[[iteration, factor], ...]``: factor of ``weight``, linear between the given iterations and
    constant outside; ``[[100, 0], [200, 1]]`` warms a reward up. Evaluations use the full weight."""
    ignores_prompt: bool = False
    """Whether the reward is meant to score media without regard to their prompts. A run whose trained
    rewards all ignore prompts is refused without it, because the model may then stop following them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for the class."""

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or self.score or self.model.rsplit(":", 1)[-1].rsplit(".", 1)[-1]

    def check(self, path: str) -> None:
        """Refuse settings that contradict each other.

        Args:
            path: Key of this reward in the configuration, such as ``rewards.0``, for messages.

        Raises:
            ConfigError: Naming the key, the value and what is allowed.
        """
        if self.scale == 0:
            raise ConfigError(f"{path}.scale must not be 0, because the score would not count")
        if self.clip and (len(self.clip) != 2 or not self.clip[0] < self.clip[1]):
            raise ConfigError(
                f"{path}.clip must be [low, high] with low < high, got {[*self.clip]}"
            )
        if self.log and self.threshold is not None:
            raise ConfigError(
                f"{path}.log and {path}.threshold = {self.threshold} exclude each other: remove one "
                "of them"
            )
        if self.log and self.clip and self.clip[0] <= -1:
            raise ConfigError(
                f"{path}.log needs scores above -1, but {path}.clip starts at {self.clip[0]}"
            )
        if not self.schedule:
            return
        points = [[*p] for p in self.schedule]
        if any(len(p) != 2 or p[0] < 0 or p[1] < 0 for p in points):
            raise ConfigError(
                f"{path}.schedule must be a list of [iteration, factor], neither of them negative, "
                f"got {points}"
            )
        if any(a[0] >= b[0] for a, b in pairwise(points)):
            raise ConfigError(f"{path}.schedule must have ascending iterations, got {points}")
        if self.weight == 0 or all(factor == 0 for _, factor in points):
            raise ConfigError(
                f"{path}.schedule = {points} with weight {self.weight} never counts; to log a reward "
                "without training on it, set weight = 0 and no schedule"
            )

    def weight_at(self, iteration: int | None) -> float:
        """The weight in an iteration, counted from 0; the full weight for None (evaluation)."""
        if iteration is None or not self.schedule:
            return self.weight
        before = [p for p in self.schedule if p[0] <= iteration]
        after = [p for p in self.schedule if p[0] > iteration]
        if not before or not after:
            return self.weight * (before[-1] if before else after[0])[1]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return self.weight * (y0 + (y1 - y0) * (iteration - x0) / (x1 - x0))

    def shaped(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Apply scale, shift, clip, log and threshold to raw scores. NaN stays NaN.

        Raises:
            RewardError: If ``log`` is set and a score is -1 or less.
        """
        r = self.scale * scores + self.shift
        if self.clip:
            r = r.clamp(*self.clip)
        if self.log:
            low = r[r <= -1]
            if len(low):
                raise RewardError(
                    f"reward {self.label!r}: log needs scores above -1 and got {float(low[0]):g}; "
                    "set its shift, its scale or clip"
                )
            r = torch.log1p(r)
        if self.threshold is not None:
            r = torch.where(r.isnan(), r, (r > self.threshold).to(r))
        return r


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What happens when a reward model raises an error or returns NaN."""

    retries: int = 2
    """Further attempts before a score counts as failed."""
    wait: float = 1.0
    """Seconds before the first retry; doubles with each, up to 10 minutes."""
    timeout: float = 1800.0
    """Seconds that one call of a reward model may take; 0 for no limit. A call that takes longer ends the
    run with a checkpoint and without a retry, because the model is still busy."""
    then: Literal["drop", "stop"] = "drop"
    """``drop`` leaves the sample out of its group; ``stop`` ends the run."""
    probe: Literal["refuse", "warn", "off"] = "refuse"
    """What to do at the start with a trained reward that gives all images of the base model the same
    score. A binary reward that is rarely 1 can be constant there without being wrong."""
    max_rate: float = 0.2
    """Share of failed scores in one iteration above which the run stops in any case."""

    def pause(self, attempt: int) -> float:
        """Seconds to wait before an attempt; the first retry is attempt 1."""
        return min(self.wait * 2 ** (attempt - 1), max(self.wait, LONGEST_WAIT))


def weighted_sum(
    rewards: Sequence[Reward], raw: Mapping[str, Float[Tensor, " batch"]], iteration: int | None
) -> Float[Tensor, " batch"]:
    """The reward of each sample: the sum of the shaped scores times their weights.

    Args:
        rewards: All of them; those with weight 0 in this iteration are skipped.
        raw: Scores by :attr:`Reward.label`; NaN where scoring failed.
        iteration: Counted from 0; None for evaluations, which use full weights.

    Returns:
        One reward per sample; NaN where the score of a reward with a weight is NaN.
    """
    result = torch.zeros_like(next(iter(raw.values())))
    for reward in rewards:
        weight = reward.weight_at(iteration)
        if weight != 0:
            result = result + weight * reward.shaped(raw[reward.label])
    return result


def check_rewards(
    rewards: Sequence[Reward], num_iterations: int, alone: bool = True, binary: bool = False
) -> None:
    """Refuse rewards that cannot be trained on.

    Args:
        rewards: All of them.
        num_iterations: Length of the run.
        alone: Whether the rewards are the only training signal, without a preference in addition.
        binary: Whether the advantage needs a single reward of 0 and 1.

    Raises:
        ConfigError: Naming the key, the value and what is allowed.
    """
    for i, reward in enumerate(rewards):
        reward.check(f"rewards.{i}")
    weights = [r.weight for r in rewards if r.weight != 0]
    if binary and weights != [1.0]:
        raise ConfigError(
            "algorithm.advantage.kind = 'beta' needs exactly one reward of 0 and 1, with weight 1; "
            f"the weights are {[r.weight for r in rewards]} (weight 0 logs a reward only)"
        )
    if not alone:
        return
    if not rewards:
        raise ConfigError(
            "rewards: there are none, and the algorithm trains on them; add a table [[rewards]]"
        )
    if all(r.weight == 0 for r in rewards):
        raise ConfigError("rewards: every weight is 0, so there is nothing to train on")
    # Which weights are 0 changes only at the points of the schedules.
    points = {math.ceil(p[0]) for r in rewards for p in r.schedule}
    points |= {math.floor(p[0]) + 1 for r in rewards for p in r.schedule}
    for iteration in [0, *sorted(p for p in points if 0 < p < num_iterations)]:
        if all(r.weight_at(iteration) == 0 for r in rewards):
            raise ConfigError(
                f"rewards: the schedules make every weight 0 in iteration {iteration}, so there is "
                "nothing to train on"
            )
