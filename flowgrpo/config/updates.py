"""Checks that the optimizer steps of an iteration can be made of it, and that sampling can go ahead of them."""

from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted


def check_split(config: Any, shares: int, workers: str) -> None:
    """Raise ConfigError if the groups, or what else is split, cannot be divided.

    Groups are divided among the processes, and what ``train.split`` names among the updates.
    """
    train, updates = config.train, config.train.updates
    step, among = shares, workers
    if train.split == "groups":
        step *= updates
        among = f"train.updates = {counted(updates, 'optimizer step')} and {among} ({updates} x {shares} = {step})"
    if train.groups % step:
        nearest = max(step, round(train.groups / step) * step)
        raise ConfigError(
            f"train.groups = {train.groups} cannot be divided among {among}; "
            f"the nearest that can is train.groups = {nearest}"
        )
    if train.split == "samples" and config.algorithm.group_size % updates:
        raise ConfigError(
            f"algorithm.group_size = {config.algorithm.group_size} cannot be divided among train.updates = "
            f"{counted(updates, 'optimizer step')} with train.split = 'samples'; use a divisor of the group size"
        )
    if train.split == "steps":
        random = Random(config.run.seed).at("train", 0)
        steps = config.algorithm.trained_steps(config.sampling.num_steps, 0, random)
        if not steps:
            raise ConfigError(
                f"train.split = 'steps' needs an algorithm that trains denoising steps, and "
                f"{type(config.algorithm).__name__} trains none; use 'groups' or 'samples'"
            )
        if len(steps) < updates:
            raise ConfigError(
                f"train.split = 'steps' cannot divide {counted(len(steps), 'trained step')} among train.updates = "
                f"{counted(updates, 'optimizer step')}; use at most {len(steps)}, or another train.split"
            )
    if config.loss.needs.whole_groups and train.split in ("samples", "actions"):
        raise ConfigError(
            f"the loss {type(config.loss).__name__} compares the samples of a group, which train.split = "
            f"{train.split!r} divides among optimizer steps; use 'groups' or 'steps'"
        )


def check_updates(config: Any) -> None:
    """Raise ConfigError if the loss is not defined for the batches and updates of an iteration."""
    loss, train, needs = config.loss, config.train, config.loss.needs
    size = config.algorithm.group_size
    if (
        needs.whole_groups
        and not needs.group_term
        and config.algorithm.action_kind == "noised_sample"
        and train.train_batch < size
    ):
        raise ConfigError(
            f"the loss {type(loss).__name__} compares the samples of a group in one batch; set "
            f"train.train_batch to at least algorithm.group_size = {size}, got {train.train_batch} "
            "(memory.gradient_checkpointing saves memory)"
        )
    if needs.single_update and train.optimizer_steps > 1:
        other = ", or let the old policy sample (loss.sampler = 'old')"
        raise ConfigError(
            f"the loss {type(loss).__name__} with these settings is defined in the first update of an "
            f"iteration only, and it has {train.optimizer_steps}; set train.updates and train.epochs to 1"
            f"{other if hasattr(loss, 'sampler') else ''}"
        )


def check_staleness(config: Any) -> None:
    """Raise ConfigError if what is configured needs the scores, or the update, before the next rollout."""
    if config.train.staleness == 0:
        return
    algorithm, loss, needs = config.algorithm, config.loss, config.loss.needs
    name = type(loss).__name__
    problem = ""
    if config.train.refill:
        problem = (
            "train.refill replaces groups by their rewards before the next rollout; set it to 0"
        )
    elif getattr(algorithm, "collect_reads_scores", False):
        problem = f"{type(algorithm).__name__} uses the scores while it samples"
    elif algorithm.action_kind == "noised_sample" or needs.old_policy is not None:
        problem = (
            f"the loss {name} has an old policy of its own, and no ratio to the weights that sampled an "
            "iteration before"
        )
    elif needs.single_update:
        problem = f"the loss {name} with these settings is defined for actions of the present weights only"
    if problem:
        also = "or set" if "; " in problem else "set"
        raise ConfigError(
            f"train.staleness = 1 is not possible here: {problem}; {also} train.staleness to 0"
        )
