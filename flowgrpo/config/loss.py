"""Whether a loss and an algorithm belong together, with the kinds that do."""

from typing import Any

from flowgrpo.config.methods import partners
from flowgrpo.config.reference import to_table


def check_loss(config: Any) -> None:
    """Raise ValueError if the loss is not defined for what the algorithm collects."""
    algorithm = config.algorithm
    try:
        config.loss.check_algorithm(algorithm.action_kind, algorithm.transition)
    except ValueError as error:
        # Of a pair that a method has, something else is wrong, which the loss has said.
        if algorithm.action_kind in config.loss.needs.action_kinds:
            raise
        help_ = partners(_kind(config, "algorithm"), _kind(config, "loss"))
        raise ValueError(f"{error} ({help_})" if help_ else str(error)) from error


def _kind(config: Any, key: str) -> str:
    """The ``kind`` of a table, as a file writes it."""
    return str(to_table(config)[key].get("kind", ""))
