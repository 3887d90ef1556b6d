"""Checks that the kinds of a configuration have their interfaces, and fit the weights that are trained."""

from typing import Any

from flowgrpo.algorithms import base as algorithms
from flowgrpo.core.errors import ConfigError
from flowgrpo.losses import base as losses
from flowgrpo.policy.settings import Noise


def check_interfaces(config: Any) -> None:
    """Raise ConfigError if the algorithm, its transition or the loss lacks a part that is called."""
    transition = getattr(config.algorithm, "transition", None)
    try:
        key = "algorithm"
        algorithms.check_interface(config.algorithm)
        key = "loss"
        losses.check_interface(config.loss)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    if not callable(transition):
        raise ConfigError(
            f"algorithm.transition: {type(transition).__name__} has no __call__(x, prediction, step), so "
            "it is no transition"
        )


def check_kinds(config: Any) -> None:
    """Raise ConfigError if the trained weights do not match the algorithm's kind of action or the guards."""
    algorithm, weights = config.algorithm, config.model.weights
    if config.evaluation.base_after is not None and (
        config.guard.resets or isinstance(weights, Noise)
    ):
        raise ConfigError(
            "evaluation.base_after needs the model before training as the reference policy, which guard.reset_every "
            "and guard.reset_above replace, and model.weights.kind = 'noise' does not have; remove it"
        )
    if config.guard.resets and isinstance(weights, Noise):
        raise ConfigError(
            "guard.reset_every and guard.reset_above replace the reference policy, and with "
            "model.weights.kind = 'noise' the reference is always the standard normal; remove them"
        )
    if (algorithm.action_kind == "initial_noise") != isinstance(weights, Noise):
        raise ConfigError(
            "algorithm.kind = 'find' and model.weights.kind = 'noise' belong together, but these "
            f"are {type(algorithm).__name__} and {type(weights).__name__}"
        )
