"""Checks of a loss that matches distributions, whose fake score is a second model beside the policy."""

from typing import Any

from flowgrpo.core.errors import ConfigError


def check_distribution_matching(config: Any) -> None:
    """Check the settings of a :class:`flowgrpo.config.Config` against a loss with a fake score.

    Raises:
        ConfigError: With the key that it excludes, and what to set.
    """
    if config.loss.needs.fake_score is None:
        return
    name = type(config.loss).__name__
    if config.parallel.is_sharded:
        raise ConfigError(
            f"parallel.shard = {config.parallel.shard!r} is not possible with the loss {name}: its fake score has an "
            "optimizer of its own, which is not divided; set it to 'off'"
        )
    if config.model.dtype == "float16":
        raise ConfigError(
            f"model.dtype = 'float16' is not possible with the loss {name}: gradients are scaled for one optimizer, and "
            "the fake score has a second one; use 'bfloat16' or 'float32'"
        )
