"""Rewards as a configuration names them: which model, its options, and how its score counts.

A raw score ``r`` of the model becomes the reward's part of the sum in this order; what is not set
does nothing::

    r = scale * r + shift              affine: to the units that the rest is in
    r = min(max(r, low), high)         clip
    r = log(1 + r)                     log    (taming of heavy tails; needs r > -1)
    r = 1 if r > threshold else 0      threshold (DanceGRPO's binary reward, arXiv:2505.07818)
    part = weight * schedule(i) * r    in iteration i
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import import_path, suggest
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.rewards.protocols import PairwiseJudge, RewardModel


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
    scale: float = 1.0
    """First step from score to reward: the score times ``scale``, plus ``shift``. Metrics show the
    score as the model gave it."""
    shift: float = 0.0
    """Added after ``scale``."""
    clip: tuple[float, ...] = ()
    """``[low, high]``: what lies outside is moved to the nearer end. After ``scale`` and ``shift``."""
    log: bool = False
    """Take ``log(1 + r)``, which tames large scores; after ``clip``. A score of -1 or less ends the
    run."""
    threshold: float | None = None
    """Count 1 above it and 0 otherwise; after ``scale``, ``shift`` and ``clip``. Not with ``log``."""
    schedule: tuple[tuple[float, ...], ...] = ()
    """``[[iteration, factor], ...]``: factor of ``weight``, linear between these iterations and
    constant outside; ``[[100, 0], [200, 1]]`` warms a reward in. Evaluations use the full weight."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for the class."""

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.name or self.model.rsplit(":", 1)[-1].rsplit(".", 1)[-1]

    def check(self, path: str) -> None:
        """Find values that make no sense; ``path`` is the table's place, for the message.

        Raises:
            ConfigError: Naming the key, the value and what is allowed.
        """
        if self.scale == 0:
            raise ConfigError(f"{path}.scale must not be 0, which leaves nothing of the score")
        if self.clip and (len(self.clip) != 2 or not self.clip[0] < self.clip[1]):
            raise ConfigError(
                f"{path}.clip must be [low, high] with low < high, got {[*self.clip]}"
            )
        if self.log and self.threshold is not None:
            raise ConfigError(
                f"{path}.log and {path}.threshold = {self.threshold} exclude each other: a binary "
                "score has no tail to tame"
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
                f"{path}.schedule = {points} with weight {self.weight} never counts; a weight of 0 "
                "without a schedule measures a reward without training on it"
            )

    def weight_at(self, iteration: int | None) -> float:
        """The weight in an iteration, counted from 0; the full one outside of training."""
        if iteration is None or not self.schedule:
            return self.weight
        before = [p for p in self.schedule if p[0] <= iteration]
        after = [p for p in self.schedule if p[0] > iteration]
        if not before or not after:
            return self.weight * (before[-1] if before else after[0])[1]
        (x0, y0), (x1, y1) = before[-1], after[0]
        return self.weight * (y0 + (y1 - y0) * (iteration - x0) / (x1 - x0))

    def shaped(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """What the weight multiplies, from raw scores. NaN stays NaN.

        Raises:
            RewardError: If ``log`` meets a score of -1 or less.
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


def total(
    rewards: Sequence[Reward], raw: Mapping[str, Float[Tensor, " batch"]], iteration: int | None
) -> Float[Tensor, " batch"]:
    """The weighted sum of an iteration; NaN where a reward that counts then has failed."""
    result = torch.zeros_like(next(iter(raw.values())))
    for reward in rewards:
        weight = reward.weight_at(iteration)
        if weight != 0:
            result = result + weight * reward.shaped(raw[reward.label])
    return result


def check_rewards(
    rewards: Sequence[Reward], num_iterations: int, alone: bool = True, binary: bool = False
) -> None:
    """Find rewards that cannot be trained on.

    Args:
        rewards: All of them.
        num_iterations: Of the run.
        alone: Whether nothing else is trained on, such as a preference.
        binary: Whether the advantage is made for rewards of 0 and 1.

    Raises:
        ConfigError: Naming the key, the value and what is allowed.
    """
    for i, reward in enumerate(rewards):
        reward.check(f"rewards.{i}")
    weights = [r.weight for r in rewards if r.weight != 0]
    if binary and weights != [1.0]:
        raise ConfigError(
            "algorithm.advantage.kind = 'beta' is for one reward of 0 and 1 with weight 1, but the "
            f"weights of rewards are {[r.weight for r in rewards]}; weight 0 only measures one"
        )
    if not alone:
        return
    if all(r.weight == 0 for r in rewards):
        raise ConfigError("rewards: every weight is 0, so that there is nothing to train on")
    for iteration in range(num_iterations):
        if all(r.weight_at(iteration) == 0 for r in rewards):
            raise ConfigError(
                f"rewards: by their schedules every weight is 0 in iteration {iteration}, so that "
                "there is nothing to train on"
            )


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

    found = (m.name for m in pkgutil.iter_modules(reward_models.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def checked(label: str, values: Any, number: int) -> Float[Tensor, " batch"]:
    """The scores as a CPU tensor. Raises RewardError on a wrong shape, which no retry mends."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"reward {label!r} returned no numbers but {values!r}") from error
    if tensor.shape != (number,):
        raise RewardError(
            f"reward {label!r} returned shape {tuple(tensor.shape)} for {number} samples; expected ({number},)"
        )
    return torch.where(tensor.isfinite(), tensor, math.nan)
