"""Checks of the grid of denoising steps, and of settings that belong to single steps."""

from dataclasses import replace
from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import CalibratedSDE

FORESEEN = 10_000
"""Most iterations of a run whose choices of steps are computed before it starts."""


def check_steps(config: Any) -> None:
    """Check a transition's ``levels``, ``loss.step_weight`` and ``loss.chunks`` of a configuration.

    Raises:
        ConfigError: If a stochastic step has no level, the algorithm already weighs its steps, or an action
            has no chunk that belongs to one sample and one optimizer step.
    """
    algorithm, needs = config.algorithm, config.loss.needs
    if isinstance(algorithm.transition, CalibratedSDE):
        last = max(stochastic_steps(config), default=0)
        number = len(algorithm.transition.levels)
        if number <= last:
            raise ConfigError(
                f"algorithm.transition.levels has {counted(number, 'number')}, but steps up to {last} are stochastic; "
                f"give {last + 1}, one for each step from 0 on"
            )
    name = type(algorithm).__name__
    if algorithm.action_kind == "neighbor":
        _check_neighbors(config)
    if needs.step_weight is not None and algorithm.scales_steps:
        raise ConfigError(
            f"{name} already weighs its steps; set loss.step_weight to 'none', or switch the algorithm's "
            "own weights off (algorithm.noise_weights = false)"
        )
    if not needs.chunks:
        return
    if not getattr(algorithm, "credits_trajectories", False):
        raise ConfigError(
            f"loss.chunks gives consecutive steps of a sample one ratio and one advantage, but {name} gives "
            "each step an advantage of its own; use algorithm.kind = 'flow_grpo', 'dance_grpo', 'mix_grpo' "
            "or 'pref_grpo', or remove loss.chunks"
        )
    covered, needed = sum(needs.chunks), config.sampling.num_steps - 1
    if covered < needed:
        raise ConfigError(
            f"loss.chunks = {list(needs.chunks)} covers steps 0 to {covered - 1}, but with sampling.num_steps = "
            f"{counted(needed + 1, 'step')} up to {needed - 1} can be trained; add {needed - covered} to the sizes"
        )
    if config.train.split in ("steps", "actions"):
        raise ConfigError(
            f"loss.chunks needs all actions of a chunk in one optimizer step, which train.split = "
            f"{config.train.split!r} divides; use 'groups' or 'samples'"
        )


def check_grid(config: Any) -> None:
    """Raise ConfigError if the grid of steps is contradictory, or has no step that can be trained."""
    if config.sampling.base_after is not None:
        raise ConfigError(
            "sampling.base_after: rollouts are sampled by the trained model alone; set "
            "evaluation.base_after instead"
        )
    try:
        config.sampling.check()
        config.evaluation_sampling().check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.sampling.num_steps == 1 and config.algorithm.action_kind == "step":
        raise ConfigError(
            "sampling.num_steps must be at least 2, got 1: a single step ends at the data without noise, so "
            "it has no density to train on. A model that was distilled to one step can be trained with 2 or "
            "more, or with algorithm.kind = 'diffusion_nft' or 'find', which train no denoising step"
        )


def steps_of_any_iteration(config: Any, algorithm: Any) -> list[int]:
    """The steps that an algorithm trains in any iteration of a run, ascending."""
    found, steps = set[int](), config.sampling.num_steps
    # Of a longer run, iterations at equal distances.
    every = -(-config.train.iterations // FORESEEN)
    for iteration in range(0, config.train.iterations, every):
        random = Random(config.run.seed).at("train", iteration)
        found.update(algorithm.trained_steps(steps, iteration, random))
        if len(found) >= steps - 1:  # the last step is never trained by its density
            break
    return sorted(found)


def stochastic_steps(config: Any) -> list[int]:
    """The steps at which an algorithm's transition is used in any iteration of a run, ascending."""
    algorithm = config.algorithm
    if hasattr(algorithm, "depths"):
        # Branches are stochastic whether or not their depth is trained.
        algorithm = replace(algorithm, depths=AllSteps(), pruned=())
    last = [config.sampling.num_steps - 1] if getattr(algorithm, "noise_last", False) else []
    return [*steps_of_any_iteration(config, algorithm), *last]


def _check_neighbors(config: Any) -> None:
    train, anchors = config.train, config.algorithm.anchors
    if train.train_batch < anchors:
        raise ConfigError(
            f"train.train_batch = {train.train_batch} must be at least algorithm.anchors = {anchors}, as the "
            "anchors of a group are trained in one batch"
        )
    if train.without_advantage == "drop":
        raise ConfigError(
            "train.without_advantage = 'drop' leaves out samples that the probabilities of neighbor_grpo are "
            "over; set it to 'count'"
        )
