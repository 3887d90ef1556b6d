"""Checks of a loss's settings."""

import math


def require_at_least(key: str, value: int | float, least: int | float) -> None:
    """Raise ValueError unless a setting is finite and at least ``least``.

    Args:
        key: The key within the table ``loss``, such as ``kl_coef`` or ``fake.lr``.
        value: Its value.
        least: The smallest allowed value.
    """
    if not value >= least or math.isinf(value):
        raise ValueError(f"loss.{key} must be at least {least:g}, got {value}")
