"""Errors of predictions at noised samples, and directions between distributions that follow from them."""

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import Prediction, Step

SMALLEST = 1e-6
"""Smallest mean distance by which a direction is divided."""


def squared_error(
    prediction: Prediction, data: Float[Tensor, "batch *latent"], step: Step
) -> Float[Tensor, " batch"]:
    """Mean squared error of a prediction for noised samples.

    On a flow path it is the error of the velocity, on a diffusion path that of the noise: both follow
    from the error of the predicted data, ``x0 - data``, by ``1 / t`` and ``signal / noise``.

    Args:
        prediction: The prediction at the noised samples; each ``(batch, *latent)``.
        data: The samples.
        step: The time of the noised samples.
    """
    error = (prediction.x0.float() - data.detach().float()) * error_scale(step)
    return error.square().flatten(1).mean(1)


def error_scale(step: Step) -> float:
    """The factor from the error of the predicted data to that of the velocity or noise."""
    return (1.0 if step.path == "flow" else step.signal) / step.noise


def matching_direction(
    data: Float[Tensor, "batch *latent"],
    fake: Float[Tensor, "batch *latent"],
    teacher: Float[Tensor, "batch *latent"],
) -> Float[Tensor, "batch *latent"]:
    """The direction against which samples move to match the teacher's distribution.

    ``(fake - teacher) / mean |data - teacher|`` with the mean over a sample's elements.

    Args:
        data: The samples.
        fake: The data that the fake score predicts at noised versions of them.
        teacher: The data that the teacher predicts there.
    """
    size = (data - teacher).abs().flatten(1).mean(1).clamp(min=SMALLEST)
    return (fake - teacher) / size.view(-1, *[1] * (data.ndim - 1))
