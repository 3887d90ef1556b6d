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


def check_reference_guidance(scale: float | None, kl_coef: float) -> None:
    """Raise ValueError if ``loss.reference_guidance`` is out of range, or there is no reference."""
    if scale is None:
        return
    if not -1e6 <= scale <= 1e6:
        raise ValueError(f"loss.reference_guidance must be from -1e6 to 1e6, got {scale:g}")
    if kl_coef == 0:
        raise ValueError(
            f"loss.reference_guidance = {scale:g} needs loss.kl_coef above 0, the weight of the difference to "
            "the reference"
        )
