"""Checks of the kind of advantage against the loss, the groups and the guards."""

from typing import Any

from flowgrpo.core.errors import ConfigError


def check_advantage(config: Any) -> None:
    """Check the advantages of a :class:`flowgrpo.config.Config`.

    Raises:
        ConfigError: If the loss is not defined for them or cannot learn from them, or a guard compares
            samples of a group that has one.
    """
    algorithm, loss, size = config.algorithm, config.loss, config.algorithm.group_size
    advantage, kind = getattr(algorithm, "advantage", None), getattr(loss, "kind", "")
    if getattr(advantage, "is_separate", False) and not loss.needs.is_additive:
        raise ConfigError(
            f"algorithm.advantage.kind = 'per_loss' adds the losses of several rewards, and the loss "
            f"{type(loss).__name__} is not proportional to the advantage; use 'per_reward'"
        )
    keep = getattr(advantage, "keep", 0)
    if keep >= size:
        raise ConfigError(
            f"algorithm.advantage.keep must be below algorithm.group_size = {size}, got {keep}: with all "
            "samples kept, nothing is chosen"
        )
    is_best = getattr(advantage, "kind", "") == "best"
    if kind == "dpo" and is_best:
        raise ConfigError(
            "loss.kind = 'dpo' needs a rejected sample, of negative advantage, and algorithm.advantage.kind = 'best' "
            "gives none; use 'group'"
        )
    if kind == "supervised" and advantage is not None and not is_best:
        raise ConfigError(
            "loss.kind = 'supervised' would train away from samples of negative advantage without a bound; set "
            "algorithm.advantage.kind = 'best', or use loss.kind = 'matching'"
        )
    if config.guard.novelty != "off" and size < 2:
        raise ConfigError(
            f"guard.novelty = {config.guard.novelty!r} compares the samples of a group, and algorithm.group_size = "
            f"{size}; raise it, or set guard.novelty = 'off'"
        )
