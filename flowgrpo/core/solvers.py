"""Deterministic solvers that use more than the last state."""

import math
from typing import Literal

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import Gaussian, Prediction, Step

PlainSolver = Literal["euler", "dpm_2m"]
"""``euler`` is the step of :class:`flowgrpo.core.transitions.ODE` (DDIM on a diffusion path); ``dpm_2m``
is :class:`SecondOrder`."""
Solver = Literal["euler", "dpm_2m", "dpm_2m_continued"]
"""``dpm_2m_continued`` is :class:`SecondOrder` that continues from the last stochastic step: its first
step extrapolates from that step's prediction."""


class SecondOrder:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), for one run of consecutive steps.

    It integrates the predicted data exactly over the log of the signal-to-noise ratio, with a linear
    extrapolation from the previous step: second order at one evaluation per step. The first step (unless
    :meth:`observe` has noted a step before it), steps from pure noise and the step to the data are of
    first order and equal the ODE step.
    """

    def __init__(self) -> None:
        # The predicted data and the log signal-to-noise ratio of the previous step.
        self._previous: tuple[Tensor, float] | None = None

    def observe(self, prediction: Prediction, step: Step) -> None:
        """Note a step that was taken in another way, from which the next one extrapolates."""
        self._previous = prediction.x0, _log_snr(step.signal, step.noise)

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        """The next state, with ``std`` 0."""
        before = _log_snr(step.signal, step.noise)
        after = _log_snr(step.signal_next, step.noise_next)
        length, x0 = after - before, prediction.x0
        if self._previous is not None and math.isfinite(length):
            previous_x0, previous = self._previous
            # The correction is 0 after a step from pure noise, whose length is infinite.
            x0 = x0 + (x0 - previous_x0) * length / (2 * (before - previous))
        self.observe(prediction, step)
        # exp(-length) times the noise ratio, written without a division by 0 at either end.
        kept = step.noise_next / step.noise
        shrunk = step.signal_next - kept * step.signal
        return Gaussian(kept * x + shrunk * x0, 0.0)


def _log_snr(signal: float, noise: float) -> float:
    """``log(signal / noise)``, infinite at the ends of the path."""
    if signal <= 0:
        return -math.inf
    return math.inf if noise <= 0 else math.log(signal / noise)
