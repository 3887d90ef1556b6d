"""Divergence: weights, gradients or images that are not finite, or a policy far from the reference."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flowgrpo.core.errors import DivergenceError
from flowgrpo.policy.sharding import local

MAX_DRIFT = 4.0
"""Largest mean squared distance from the reference policy's output, in units of the mean square of that
output, or of unit noise if that is larger: the last layer of a new model is often zero, and so is the
mean of an untrained initial noise (FIND). The negated reference has distance 4, an output of zeros 1."""
MAX_SKIPPED = 3
"""Iterations in a row, all of whose gradients are not finite, after which a run stops."""


def are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all values of all tensors are finite; of divided tensors, those of this process."""
    parts = [local(t) for t in tensors.values() if t.is_floating_point()]
    floats = [part for part in parts if part.numel()]
    if not floats:
        return True
    # Sums of absolute values can overflow; a maximum cannot, and it keeps NaN.
    largest = [n.float() for n in torch._foreach_norm(floats, float("inf"))]
    return bool(torch.stack(largest).isfinite().all())


def require_finite(parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check the parts of a checkpoint.

    Raises:
        DivergenceError: If a part is not finite.
    """
    for name, tensors in parts.items():
        if not are_finite(tensors):
            raise DivergenceError(f"the policy diverged: {name} contains NaN or infinity")


def check_drift(distance: float, reference_square: float) -> None:
    """Check how far the policy's output is from the reference policy's.

    Args:
        distance: Mean squared distance of the outputs.
        reference_square: Mean square of the reference policy's output.

    Raises:
        DivergenceError: If the distance is above :data:`MAX_DRIFT` in its unit, or not finite.
    """
    unit = max(1.0, reference_square)
    if not distance <= MAX_DRIFT * unit:
        raise DivergenceError(
            f"the policy diverged: the mean squared distance of its output from the reference policy's is "
            f"{distance:.3g}, more than {MAX_DRIFT:g} times the mean square of that output (at least 1), "
            f"{unit:.3g}"
        )
