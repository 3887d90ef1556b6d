"""Transitions: one reverse denoising step as a Gaussian distribution of the next state.

A state lies on a path ``x = signal * x0 + noise * x1`` between data ``x0`` and Gaussian noise
``x1``. On a rectified-flow path ``signal = 1 - sigma`` and ``noise = sigma``; on a diffusion path
``signal = sqrt(alpha_bar)`` and ``noise = sqrt(1 - alpha_bar)``. Sampling starts at noise (``sigma =
1``) and ends at data (``sigma = 0``), so ``dt = sigma - sigma_next`` is positive.

A transition maps a state, the model's prediction and the interval to a :class:`Gaussian`. Its
``std`` is the standard deviation of ``x_next``: it includes the square root of ``dt``. Every
``log_prob`` is the MEAN over latent elements, not the sum, as usual for these methods: a clip range
of 1e-4 on 65,536 elements is 6.6 nats of the true ratio.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted

Path = Literal["flow", "diffusion"]
Predicted = Literal["velocity", "noise", "v", "data"]


@dataclass(frozen=True)
class Step:
    """One interval of a sampling grid.

    Attributes:
        path: The path that the weights belong to.
        signal: Weight of the data before the step.
        noise: Weight of the noise before the step; ``sigma`` on a flow path.
        signal_next: Weight of the data after the step.
        noise_next: Weight of the noise after the step.
        sigma_max: The second largest ``sigma`` of the grid, at which Flow-SDE's noise is capped.
        noise_scale: Standard deviation of the path's pure noise, 1 for nearly all models. The noise
            that a step injects is scaled by it as well, which is equivalent to dividing all states
            by it.
        predicted: The model's output: the velocity ``x1 - x0`` on a flow path; on a diffusion path
            the noise, the data, or ``v = signal * x1 - noise * x0`` (arXiv:2202.00512).
        index: The index of the step in the sampling grid; -1 if it is on none.
    """

    path: Path
    signal: float
    noise: float
    signal_next: float
    noise_next: float
    sigma_max: float = 1.0
    noise_scale: float = 1.0
    predicted: Predicted = "velocity"
    index: int = field(default=-1, compare=False)

    @classmethod
    def flow(
        cls,
        sigma: float,
        sigma_next: float,
        sigma_max: float = 1.0,
        noise_scale: float = 1.0,
        index: int = -1,
    ) -> "Step":
        """A step on the rectified-flow path, from ``sigma`` to ``sigma_next``."""
        ends = (1 - sigma, sigma, 1 - sigma_next, sigma_next)
        return cls("flow", *ends, sigma_max, noise_scale, index=index)

    @classmethod
    def diffusion(
        cls, alpha_bar: float, alpha_bar_next: float, predicted: Predicted = "noise"
    ) -> "Step":
        """A step on the variance-preserving path, by the cumulative products of ``alpha``."""
        return cls(
            "diffusion",
            math.sqrt(alpha_bar),
            math.sqrt(max(0.0, 1 - alpha_bar)),
            math.sqrt(alpha_bar_next),
            math.sqrt(max(0.0, 1 - alpha_bar_next)),
            predicted=predicted,
        )

    @property
    def dt(self) -> float:
        """Length of a flow step, positive."""
        return self.noise - self.noise_next


@dataclass(frozen=True)
class Prediction:
    """The model's prediction at a state, as the two ends of its path.

    Attributes:
        x0: The predicted data.
        x1: The predicted noise.
        output: The model's output as it is; on a flow path the velocity ``x1 - x0``.
    """

    x0: Float[Tensor, "batch *latent"]
    x1: Float[Tensor, "batch *latent"]
    output: Float[Tensor, "batch *latent"]

    @classmethod
    def from_velocity(
        cls,
        x: Float[Tensor, "batch *latent"],
        velocity: Float[Tensor, "batch *latent"],
        sigma: float,
    ) -> "Prediction":
        """From a rectified-flow model's output at ``x = (1 - sigma) x0 + sigma x1``."""
        return cls(x - sigma * velocity, x + (1 - sigma) * velocity, velocity)

    @classmethod
    def from_output(
        cls, x: Float[Tensor, "batch *latent"], output: Float[Tensor, "batch *latent"], step: Step
    ) -> "Prediction":
        """From a model's output before a step, by ``step.predicted``."""
        signal, noise = step.signal, step.noise
        if step.predicted == "velocity":
            return cls.from_velocity(x, output, noise)
        if step.predicted == "noise":
            return cls((x - noise * output) / signal, output, output)
        if step.predicted == "v":
            return cls(signal * x - noise * output, signal * output + noise * x, output)
        return cls(output, (x - signal * output) / noise, output)


@dataclass(frozen=True)
class Gaussian:
    """The distribution of ``x_next``: independent normals.

    Attributes:
        mean: Carries the gradient of the model.
        std: One number for all latent elements, or one for each (FIND's initial noise). Includes the
            square root of the step's length; 0 for a deterministic step.
        normalised: False drops the variance and all constants from ``log_prob``, which leaves
            ``-(x_next - mean)^2``, as the released code of Flow-CPS does.
    """

    mean: Float[Tensor, "batch *latent"]
    std: float | Float[Tensor, "#batch *latent"]
    normalised: bool = True

    def sample(self, noise: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *latent"]:
        """``mean + std * noise``."""
        return self.mean + self.std * noise

    def log_prob(self, x_next: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
        """Log-density of ``x_next``, the mean over latent elements, in fp32.

        Raises:
            ValueError: If the step is deterministic and has no density.
        """
        if isinstance(self.std, Tensor):
            error = ((x_next.detach().float() - self.mean.float()) / self.std).square()
            return -(error / 2 + self.std.log()).flatten(1).mean(1) - 0.5 * math.log(2 * math.pi)
        if self.std <= 0:
            raise ValueError(
                "a deterministic step (std = 0) has no log-probability: do not train on it"
            )
        error = (x_next.detach().float() - self.mean.float()).square().flatten(1).mean(1)
        if not self.normalised:
            return -error
        return -error / (2 * self.std**2) - math.log(self.std) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, kw_only=True)
class ODE:
    """The deterministic step: Euler on a flow path, DDIM with eta 0 on a diffusion path."""

    kind: Literal["ode"] = "ode"

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        if step.path == "flow":
            return Gaussian(x - step.dt * prediction.output, 0.0)
        return Gaussian(step.signal_next * prediction.x0 + step.noise_next * prediction.x1, 0.0)


def _reverse_sde(
    x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step, diffusion: float
) -> Gaussian:
    """Euler-Maruyama on the reverse SDE that keeps the flow's marginals, with a diffusion ``g``.

    ``dx = [v - g^2/2 * score] dt + g dw`` with ``score = -x1 / sigma`` (arXiv:2505.05470, eq. 8).
    """
    drift = prediction.output + 0.5 * diffusion**2 * prediction.x1 / step.noise
    return Gaussian(x - step.dt * drift, step.noise_scale * diffusion * math.sqrt(step.dt))


@dataclass(frozen=True, kw_only=True)
class FlowSDE:
    """Flow-GRPO's step: ``g = noise_level * sqrt(sigma / (1 - sigma))`` (arXiv:2505.05470, eq. 9).

    At ``sigma = 1``, where ``g`` would be infinite, ``1 - sigma`` inside ``g`` uses the grid's next
    sigma, as in the released code; that step's ``std`` is exactly ``noise_level`` on any grid.
    """

    kind: Literal["flow_sde"] = "flow_sde"
    noise_level: float = 0.7
    """Strength of the injected noise, above 0; the paper uses 0.7."""
    schedule: Literal["root", "linear"] = "root"
    """How ``g`` depends on sigma: ``root`` is the paper's; ``linear`` is ``g = noise_level * sigma_1 *
    sigma`` with the grid's second sigma, as in Flow-GRPO's Wan script with ``noise_level`` 1."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        require_path(self, step.path)
        if self.schedule == "linear":
            return _reverse_sde(x, prediction, step, self.noise_level * step.sigma_max * step.noise)
        # Grids such as UniPC's begin at 0.9999 instead of 1, where g would be as large.
        capped = step.sigma_max if step.noise > 0.9995 else step.noise
        return _reverse_sde(
            x, prediction, step, self.noise_level * math.sqrt(step.noise / (1 - capped))
        )


@dataclass(frozen=True, kw_only=True)
class DanceSDE:
    """DanceGRPO's step for flows: a constant ``g = noise_level`` (arXiv:2505.07818, eq. 8)."""

    kind: Literal["dance_sde"] = "dance_sde"
    noise_level: float = 0.3
    """The constant diffusion coefficient, above 0; the paper uses 0.3."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        require_path(self, step.path)
        return _reverse_sde(x, prediction, step, self.noise_level)


@dataclass(frozen=True, kw_only=True)
class CalibratedSDE:
    """DenseGRPO's step for flows: a diffusion coefficient ``g`` of its own for each denoising step.

    The formula of ``flow_sde`` with ``g = levels[k]`` at step ``k`` (arXiv:2601.20218, eq. 11).
    ``python -m benchmarks.calibrate_noise`` finds levels by the paper's algorithm 1.
    """

    kind: Literal["calibrated_sde"] = "calibrated_sde"
    levels: tuple[float, ...] = ()
    """``g`` of each denoising step from step 0 on, above 0; one for every stochastic step."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        require_path(self, step.path)
        if not 0 <= step.index < len(self.levels):
            raise ValueError(
                f"transition.levels of calibrated_sde has {counted(len(self.levels), 'number')}, but step {step.index} is "
                "stochastic; give one for each step from 0 to the last stochastic one"
            )
        return _reverse_sde(x, prediction, step, self.levels[step.index])


@dataclass(frozen=True, kw_only=True)
class StepwiseSDE:
    """Stepwise-Flow-GRPO's step for flows, after DDIM (arXiv:2603.28718, eq. 8).

    ``x_next = (1 - s') x0 + sqrt(s'^2 - std^2) x1 + std * noise`` with ``std = eta s' sqrt(1 - s)`` from
    ``s`` to ``s'``. It keeps the noise variance exactly, as ``cps`` does, and injects the less the nearer
    the state is to pure noise: nothing at ``s = 1``, where a step has no density.
    """

    kind: Literal["stepwise_sde"] = "stepwise_sde"
    eta: float = 0.7
    """Strength of the injected noise in (0, 1]. The paper's value was not found; this is a choice."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        require_path(self, step.path)
        if step.noise > 0.9995:
            raise ValueError(
                "stepwise_sde injects no noise at sigma = 1, so that step 0 has no density to train on; leave it "
                "out, as algorithm.steps = {kind = 'window', start = 1, size = ...} does"
            )
        std = self.eta * step.noise_next * math.sqrt(step.signal)
        kept = math.sqrt(max(0.0, step.noise_next**2 - std**2))
        mean = step.signal_next * prediction.x0 + kept * prediction.x1
        return Gaussian(mean, step.noise_scale * std)


@dataclass(frozen=True, kw_only=True)
class CPS:
    """Coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952).

    ``std = noise_next * sin(noise_level * pi / 2)``. The predicted noise is scaled by the cosine of
    the same angle, so that predicted and injected noise together keep the weight ``noise_next``.
    """

    kind: Literal["cps"] = "cps"
    noise_level: float = 0.7
    """Share of the noise that is injected, as an angle in units of pi / 2: 0 is the ODE, 1 replaces
    all noise."""
    log_prob: Literal["gaussian", "unnormalised"] = "gaussian"
    """``unnormalised`` is the released code's ``-(x_next - mean)^2``. Its log-ratios are smaller by a
    factor of ``2 std^2``, so it needs other clip ranges."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        angle = self.noise_level * math.pi / 2
        kept = step.noise_next * math.cos(angle)
        mean = step.signal_next * prediction.x0 + kept * prediction.x1
        std = step.noise_scale * step.noise_next * math.sin(angle)
        return Gaussian(mean, std, self.log_prob == "gaussian")


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """The stochastic DDIM step of diffusion models (arXiv:2010.02502, eq. 12 and 16).

    ``eta = 1`` has the variance of the DDPM posterior; DanceGRPO and DDPO use it for Stable Diffusion.
    """

    kind: Literal["ddim"] = "ddim"
    eta: float = 1.0
    """Strength of the injected noise in (0, 1]."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        require_path(self, step.path)
        ratio = (step.signal / step.signal_next) ** 2
        variance = (
            (step.noise_next / step.noise) ** 2 * max(0.0, 1 - ratio) if step.noise > 0 else 0.0
        )
        std = self.eta * math.sqrt(variance)
        kept = math.sqrt(max(0.0, step.noise_next**2 - std**2))
        return Gaussian(step.signal_next * prediction.x0 + kept * prediction.x1, std)


@runtime_checkable
class CustomTransition(Protocol):
    """A user's own transition: a frozen dataclass, named in a configuration by its import path."""

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian: ...


Transition = FlowSDE | DanceSDE | CalibratedSDE | StepwiseSDE | CPS | DDIM | ODE | CustomTransition


def require_path(transition: Transition, path: Path) -> None:
    """Raise ValueError if a transition is not defined on a model's path."""
    flow_only = FlowSDE | DanceSDE | CalibratedSDE | StepwiseSDE
    if isinstance(transition, flow_only) and path != "flow":
        raise ValueError(
            f"{transition.kind} is defined on a rectified-flow path, but this model predicts noise on a "
            "diffusion path: use the transition 'ddim' or 'cps'"
        )
    if isinstance(transition, DDIM) and path != "diffusion":
        raise ValueError(
            "ddim is defined on a diffusion path, but this model predicts a flow: use the transition "
            "'flow_sde', 'dance_sde' or 'cps'"
        )


def require_noise(transition: Transition) -> None:
    """Raise ValueError if a transition is deterministic, so that its steps have no density to optimise.

    Also raises it if the noise level is above the maximum of the transition's formula.
    """
    # A user's own transition may call its strength otherwise; only a known zero is refused.
    strength = getattr(transition, "noise_level", getattr(transition, "eta", 1.0))
    if isinstance(transition, CalibratedSDE):
        if not transition.levels or not all(level > 0 for level in transition.levels):
            raise ValueError(
                "transition.levels of calibrated_sde must be numbers above 0, one for each step up to the "
                f"last stochastic one, got {list(transition.levels)}; 'python -m benchmarks.calibrate_noise' "
                "finds them"
            )
        return
    if isinstance(transition, ODE) or not strength > 0:
        raise ValueError(
            f"transition {transition} injects no noise, so that its steps have no density to train on"
        )
    if isinstance(transition, CPS | DDIM | StepwiseSDE) and strength > 1:
        name = "noise_level" if isinstance(transition, CPS) else "eta"
        raise ValueError(
            f"transition.{name} must be in (0, 1] for {transition.kind!r}, got {strength}"
        )


def gaussian_kl(policy: Gaussian, reference: Gaussian) -> Float[Tensor, " batch"]:
    """KL divergence of the policy's step from the reference's, the mean over latent elements.

    ``(mean - reference)^2 / (2 std^2)`` if both have the same number as standard deviation, as a
    denoiser's steps do; else ``log(s' / s) + (s^2 + (mean - reference)^2) / (2 s'^2) - 1/2``, where
    ``s'`` is the reference's standard deviation.

    Raises:
        ValueError: If the standard deviations are two different numbers.
    """
    gap = (policy.mean.float() - reference.mean.float()).square()
    if isinstance(policy.std, Tensor) or isinstance(reference.std, Tensor):
        own, other = (torch.as_tensor(g.std, device=gap.device) for g in (policy, reference))
        kl = (other / own).log() + (own.square() + gap) / (2 * other.square()) - 0.5
        return kl.flatten(1).mean(1)
    if policy.std != reference.std:
        raise ValueError(
            f"the KL of two steps needs equal standard deviations, got {policy.std} and {reference.std}"
        )
    return gap.flatten(1).mean(1) / (2 * policy.std**2)
