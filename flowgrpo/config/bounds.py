"""The smallest and largest allowed values of the numbers in a configuration.

The upper limits are far above what any run needs. They refuse slips of the keyboard, such as three
zeros too many, which would otherwise end in a run without a visible end or in a lack of memory after
long work.
"""

import math
from collections.abc import Mapping
from typing import Any

from flowgrpo.core.errors import ConfigError

ANY = math.inf
TINY = 1e-12
"""In place of "above 0"."""
BOUNDS: Mapping[str, tuple[float, float]] = {
    "sampling.num_steps": (1, 1000),
    "sampling.shift": (TINY, 1e6),
    "sampling.guidance_scale": (-1e6, 1e6),
    "sampling.height": (1, 16384),
    "sampling.width": (1, 16384),
    "sampling.num_frames": (1, 10_000),
    "algorithm.group_size": (1, 100_000),
    "algorithm.previews.number": (0, 100_000),
    "algorithm.previews.num_steps": (1, 1000),
    "algorithm.empty_prompts": (0, 1),
    "algorithm.distinct_times": (0, 1000),
    "algorithm.last": (1, 1000),
    "algorithm.renoised": (0, 1000),
    "algorithm.span": (1, 1000),
    "train.iterations": (1, 10_000_000),
    "train.groups": (1, 100_000),
    "train.updates": (1, 100_000),
    "train.epochs": (1, 1000),
    "train.refill": (0, 1000),
    "train.staleness": (0, 1),
    "train.replay.groups": (0, 100_000),
    "train.replay.capacity": (1, 100_000),
    "train.replay.skip_last": (0, 1000),
    "train.replay.max_weight": (TINY, 1e6),
    "train.rollout_batch": (1, ANY),
    "train.train_batch": (1, ANY),
    "train.lr": (TINY, ANY),
    "train.warmup": (0, ANY),
    "train.ema_decay": (0, ANY),
    "train.ema_every": (1, ANY),
    "train.weight_decay": (0, ANY),
    "train.spike_factor": (0, ANY),
    "train.max_grad_norm": (TINY, ANY),
    "train.monitor_states": (0, ANY),
    "train.early_stopping.patience": (1, 1_000_000),
    "train.early_stopping.min_gain": (0, ANY),
    "failures.retries": (0, 100),
    "failures.wait": (0, 3600),
    "failures.timeout": (0, ANY),
    "failures.max_rate": (0, 1),
    "evaluation.every": (0, ANY),
    "evaluation.images": (1, 1_000_000),
    "evaluation.images_during": (0, 1_000_000),
    "evaluation.num_steps": (1, 1000),
    "evaluation.guidance_scale": (-1e6, 1e6),
    "evaluation.base_after": (TINY, 1000),
    "evaluation.grid_prompts": (1, 1000),
    "evaluation.grid_samples": (1, 1000),
    "evaluation.inspected_prompts": (0, 1000),
    "model.weights.rank": (1, 65536),
    "model.weights.alpha": (1, 1_000_000),
    "memory.prompt_cache_gb": (0, 1_000_000),
    "memory.prompt_disk_gb": (0, 1_000_000),
    "memory.decode_batch": (0, ANY),
    "memory.score_batch": (0, ANY),
    "parallel.shard_group": (0, 100_000),
    "parallel.context": (1, 100_000),
    "run.threads": (0, 1024),
    "run.checkpoint_every": (1, ANY),
    "run.checkpoint_minutes": (0, ANY),
    "run.keep_checkpoints": (1, ANY),
    "run.rank_timeout_minutes": (0.01, ANY),
}
"""By dotted key. A key that a configuration does not have, or that is not set, is not checked."""
LARGEST_ITERATION = 1_000_000
"""Samples of one iteration."""
LARGEST_GRID = 1000
"""Images of the comparison grid."""


def check_bounds(config: Any) -> None:
    """Refuse numbers of a :class:`flowgrpo.config.Config` that are out of range.

    Raises:
        ConfigError: With the key, its value and the nearest allowed one.
    """
    # Pictures that are not sampled have no group.
    given = config.algorithm.num_targets > 0
    for key, (least, most) in BOUNDS.items():
        value = _value(config, key)
        if value is None or (given and key == "algorithm.group_size"):
            continue
        if key == "algorithm.group_size":
            least = getattr(config.algorithm, "least_group_size", 2)
        if value < least:
            raise ConfigError(f"{key} must be at least {least}, got {value}")
        if value > most:
            raise ConfigError(f"{key} must be at most {most:,}, got {value}")
    for words, first, second, most in (
        ("samples per iteration", "train.groups", "algorithm.group_size", LARGEST_ITERATION),
        ("images", "evaluation.grid_prompts", "evaluation.grid_samples", LARGEST_GRID),
    ):
        one, other = _value(config, first), _value(config, second)
        if one * other > most:
            raise ConfigError(
                f"{first} = {one} times {second} = {other} are {one * other:,} {words}, more than the "
                f"largest number, {most:,}"
            )


def _value(config: Any, key: str) -> Any:
    """The value at a dotted key; None if a part of it is missing."""
    here: Any = config
    for part in key.split("."):
        here = getattr(here, part, None)
    return here
