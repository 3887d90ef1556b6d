"""Deterministic solvers that remember more than the last state."""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.transitions import Gaussian, Prediction, Step

Solver = Literal["euler", "dpm_2m"]
"""``euler`` is the step of :class:`flowgrpo.core.transitions.ODE` (DDIM on a diffusion path); ``dpm_2m``
is :class:`SecondOrder`."""


class SecondOrder:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), for one run of consecutive steps.

    Integrates the predicted data exactly over the log of signal over noise, with a linear guess from
    the step before: of second order at one evaluation a step. The first step, steps from pure noise
    and the step to the data are of first order, where it equals the ODE step.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, float] | None = None

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        """The next state, with ``std`` 0."""
        before, after = (
            _log_snr(step.signal, step.noise),
            _log_snr(step.signal_next, step.noise_next),
        )
        length, x0 = after - before, prediction.x0
        if self._last is not None and math.isfinite(length):
            last_x0, last = self._last
            # 0 after a step from pure noise, whose length is infinite.
            x0 = x0 + (x0 - last_x0) * length / (2 * (before - last))
        self._last = prediction.x0, before
        # exp(-length) * noise ratio, written so that neither end divides by 0.
        kept = step.noise_next / step.noise
        shrunk = step.signal_next - kept * step.signal
        return Gaussian(kept * x + shrunk * x0, 0.0)


def _log_snr(signal: float, noise: float) -> float:
    if signal <= 0:
        return -math.inf
    return math.inf if noise <= 0 else math.log(signal / noise)
