"""What an update minimises: how actions are weighed by their advantage, and a distance to the reference.

Two kinds. ``clipped`` is a policy gradient on the density of stochastic steps; ``nft`` has no
density and compares what the model predicts for noised samples with the samples themselves.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from flowgrpo.core.transitions import (
    CPS,
    DDIM,
    DanceSDE,
    FlowSDE,
    Gaussian,
    Prediction,
    Step,
    Transition,
    gaussian_kl,
)


def clipped_surrogate(
    log_ratio: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    low: float,
    high: float | None = None,
) -> Float[Tensor, " actions"]:
    """PPO's pessimistic objective as a loss (arXiv:1707.06347, eq. 7).

    ``max(-A r, -A clip(r, 1 - low, 1 + high))`` with ``r = exp(log_ratio)``; ``high`` is ``low``
    unless given.
    """
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - low, 1 + (low if high is None else high))
    return torch.maximum(-advantage * ratio, -advantage * clipped)


def bounded_surrogate(
    log_ratio: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    moved: Float[Tensor, " actions"],
    bound: float,
) -> Float[Tensor, " actions"]:
    """``-A r``, and zero for actions that are ``bound`` away and still going (arXiv:2606.11025).

    Args:
        log_ratio: Log of the ratio ``r``.
        advantage: Advantage ``A``.
        moved: How far the step's distribution has moved, as a KL.
        bound: The largest ``moved`` from which an action may go on.
    """
    onwards = advantage * log_ratio.detach() > 0
    kept = ~(onwards & (moved.detach() > bound))
    return -advantage * torch.exp(log_ratio) * kept


def guarded_log_ratio(
    mean: Float[Tensor, "actions *latent"],
    old_mean: Float[Tensor, "actions *latent"],
    x_next: Float[Tensor, "actions *latent"],
    std: float,
) -> Float[Tensor, " actions"]:
    """GRPO-Guard's log-ratio (arXiv:2510.22319): centred on 0, and on one scale for all steps.

    With ``x_next = old_mean + std * noise`` the log-ratio of two normals is
    ``<d, noise> / std - |d|^2 / (2 std^2)``, where ``d = mean - old_mean``. Its expectation is below
    zero, and its scale follows ``std``. Without the second term and times ``std`` it is ``<d, noise>``;
    as everywhere, the mean over latent elements.

    Differs from the released code, which averages the second term over the batch too.
    """
    old = old_mean.detach().float()
    noise = (x_next.detach().float() - old) / std
    return ((mean.float() - old) * noise).flatten(1).mean(1)


def step_gain(transition: Transition, step: Step) -> float:
    """By how much ``mean`` moves when the model's prediction moves by one, above 0.

    The derivative with respect to what the model predicts (``step.predicted``). Every transition is
    linear in it, so one call with ``x = 0`` measures it.
    """
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return abs(float(transition(zero, Prediction.from_output(zero, one, step), step).mean))


def guard_weight(transition: Transition, step: Step) -> float:
    """What GRPO-Guard multiplies a step's loss by, so that all steps have gradients of one size.

    ``1 / dt`` for the SDEs, as published: their ``mean`` moves by about ``dt`` per unit of velocity.
    Other transitions have no such ``dt`` in them; there it is ``1 / step_gain``, which for
    coefficients-preserving sampling becomes ``1 / dt`` as its noise level goes to 0.
    """
    if isinstance(transition, FlowSDE | DanceSDE):
        return 1 / step.dt
    return 1 / step_gain(transition, step)


def nft_loss(
    x0: Float[Tensor, "actions *latent"],
    old_x0: Float[Tensor, "actions *latent"],
    sample: Float[Tensor, "actions *latent"],
    optimality: Float[Tensor, " actions"],
    beta: float,
) -> Float[Tensor, " actions"]:
    """DiffusionNFT's objective (arXiv:2509.16117, eq. 5), with the released code's weighting.

    The policy is one part of two implicit ones, a positive and a negative: of the data that they
    predict, ``x0+ = beta x0 + (1 - beta) old_x0`` and ``x0- = (1 + beta) old_x0 - beta x0``. On both
    paths ``x0`` is affine in the model's output, so this mixes outputs as the paper does. ``(r L+ +
    (1 - r) L-) / beta`` with ``L = mean((x0 - sample)^2) / mean(|x0 - sample|)``.

    Args:
        x0: Data predicted by the model for a noised sample; carries gradients.
        old_x0: The same by the policy that sampled.
        sample: The sample itself.
        optimality: ``r`` in [0, 1].
        beta: How far the implicit policies are from the old one, above 0.
    """
    x0, old, sample = x0.float(), old_x0.detach().float(), sample.detach().float()
    losses = []
    for implicit in (beta * x0 + (1 - beta) * old, (1 + beta) * old - beta * x0):
        error = implicit - sample
        size = error.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5)
        losses.append(error.square().flatten(1).mean(1) / size.float())
    positive, negative = losses
    return (optimality * positive + (1 - optimality) * negative) / beta


@dataclass(frozen=True, kw_only=True)
class ClippedLoss:
    """Clipped surrogate plus ``kl_coef`` times a KL to the reference."""

    is_default: ClassVar[bool] = True
    kind: Literal["clipped"] = "clipped"
    ratio: Literal["plain", "guard"] = "plain"
    """``plain`` is the ratio of densities; ``guard`` is GRPO-Guard's, centred and of one scale for
    all steps, with steps of one weight. Its clip ranges are smaller: 2e-6 to 4e-6 as published."""
    clip: Literal["ratio", "kl"] = "ratio"
    """What ``clip_range`` bounds: the ratio, or (Flow-DPPO) how far the step's distribution has moved
    as a KL."""
    clip_range: float = 1e-4
    """Allowed change of the ratio in one iteration. Ratios are of mean log-probabilities, so that
    the right value depends on the resolution."""
    clip_high: float | None = None
    """Allowed rise of the ratio, where it is not that of its fall; unset as ``clip_range``."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model; 0 does not evaluate the reference at all."""
    kl: Literal["exact", "flow_grpo", "velocity"] = "exact"
    """``exact`` is the KL of the step's normals; ``flow_grpo`` leaves out the step's length, as the
    code behind that paper's 0.04 does; ``velocity`` is the squared difference of the outputs."""

    @property
    def needs_old_mean(self) -> bool:
        """Whether the means of the policy that acted are part of the formula."""
        return self.ratio == "guard" or self.clip == "kl"

    def check(self) -> None:
        """Raise ValueError if the settings contradict each other or cannot train."""
        _at_least("clip_range", self.clip_range, 1e-12)
        _at_least("kl_coef", self.kl_coef, 0.0)
        if self.clip_high is not None:
            _at_least("clip_high", self.clip_high, 1e-12)
            if self.clip == "kl":
                raise ValueError("loss.clip_high has no meaning with loss.clip = 'kl'; remove it")
        if self.kl != "exact" and self.kl_coef == 0:
            raise ValueError(
                f"loss.kl = {self.kl!r} is set but loss.kl_coef is 0; set a coefficient or remove loss.kl"
            )

    def check_transition(self, transition: Transition) -> None:
        """Raise ValueError if the KL has no meaning for the step that is taken."""
        if self.kl == "flow_grpo" and isinstance(transition, CPS | DDIM):
            raise ValueError(
                f"loss.kl = 'flow_grpo' leaves a dt out of the step's variance, but that of "
                f"{transition.kind!r} has none in it; use loss.kl = 'exact', which is what the released "
                "code computes for it"
            )

    def log_ratio(
        self,
        policy: Gaussian,
        x_next: Float[Tensor, "actions *latent"],
        old_log_prob: Float[Tensor, " actions"],
        old_mean: Float[Tensor, "actions *latent"] | None,
    ) -> Float[Tensor, " actions"]:
        """The log-ratio of the chosen form; ``old_mean`` may be missing for ``plain``."""
        if self.ratio == "plain":
            return policy.log_prob(x_next) - old_log_prob
        assert old_mean is not None
        assert isinstance(policy.std, float), "refused by the configuration"
        return guarded_log_ratio(policy.mean, old_mean, x_next, policy.std)

    def surrogate(
        self,
        log_ratio: Float[Tensor, " actions"],
        advantage: Float[Tensor, " actions"],
        policy: Gaussian,
        old_mean: Float[Tensor, "actions *latent"] | None,
        weight: float,
    ) -> tuple[Float[Tensor, " actions"], Bool[Tensor, " actions"]]:
        """The loss of each action, clipped as chosen, and whether it is out of bounds.

        ``weight`` is :func:`guard_weight`, for ``ratio = "guard"``.
        """
        if self.clip == "kl":
            assert old_mean is not None
            old = Gaussian(old_mean, policy.std)
            moved = gaussian_kl(policy, old).detach()
            loss = bounded_surrogate(log_ratio, advantage, moved, self.clip_range)
            outside = moved > self.clip_range
        else:
            high = self.clip_range if self.clip_high is None else self.clip_high
            loss = clipped_surrogate(log_ratio, advantage, self.clip_range, high)
            change = torch.expm1(log_ratio.detach())
            outside = (change < -self.clip_range) | (change > high)
        return (loss * weight if self.ratio == "guard" else loss), outside

    def kl_to(
        self, policy: Gaussian, reference: Gaussian, step: Step, velocity_gap: Tensor
    ) -> Float[Tensor, " actions"]:
        """The chosen distance for each action; ``velocity_gap`` is output minus reference output."""
        if self.kl == "velocity":
            return velocity_kl(velocity_gap)
        exact = gaussian_kl(policy, reference)
        return exact if self.kl == "exact" else exact * step.dt


@dataclass(frozen=True, kw_only=True)
class NFTLoss:
    """DiffusionNFT's forward-process objective (arXiv:2509.16117): no density, no stochastic steps.

    Belongs to the algorithm ``diffusion_nft``. The policy that samples trails behind the one that
    is trained; it is part of the formula and of every checkpoint.
    """

    kind: Literal["nft"] = "nft"
    beta: float = 1.0
    """How far the implicit positive and negative policies are from the one that sampled, above 0;
    the paper uses 1, and 0.1 for OCR and several rewards."""
    advantage_scale: float = 5.0
    """An advantage of this size counts as wholly good or bad; the loss is multiplied by it, too."""
    trail: Literal["half", "late", "none"] = "half"
    """Of the sampling policy, how much stays when it follows after an iteration. With n optimizer
    steps so far: ``half`` min(0.001 n, 0.5), ``late`` min(0.0075 max(n - 75, 0), 0.999); ``none``
    samples with the trained weights."""
    kl_coef: float = 1e-4
    """Weight of the squared difference to the reference's output; 0 does not evaluate it at all."""

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        _at_least("beta", self.beta, 1e-12)
        _at_least("advantage_scale", self.advantage_scale, 1e-12)
        _at_least("kl_coef", self.kl_coef, 0.0)

    def kept(self, num_updates: int) -> float:
        """The share of the sampling policy that stays after this many optimizer steps, in [0, 1)."""
        if self.trail == "half":
            return min(0.001 * num_updates, 0.5)
        return min(0.0075 * max(num_updates - 75, 0), 0.999) if self.trail == "late" else 0.0

    def optimality(self, advantage: Float[Tensor, " actions"]) -> Float[Tensor, " actions"]:
        """How good a sample is, in [0, 1]: ``A / (2 advantage_scale) + 1/2``, cut."""
        return (advantage / (2 * self.advantage_scale) + 0.5).clamp(0, 1)

    def loss(
        self,
        x0: Float[Tensor, "actions *latent"],
        old_x0: Float[Tensor, "actions *latent"],
        sample: Float[Tensor, "actions *latent"],
        advantage: Float[Tensor, " actions"],
    ) -> Float[Tensor, " actions"]:
        """The loss of each action; zero where the advantage is exactly zero.

        An action without advantage would only be pulled towards the old policy. It is left out, as
        everywhere, since its reward may have failed.
        """
        full = nft_loss(x0, old_x0, sample, self.optimality(advantage), self.beta)
        return self.advantage_scale * full * (advantage != 0)


Loss = ClippedLoss | NFTLoss


def velocity_kl(gap: Float[Tensor, "states *latent"]) -> Float[Tensor, " states"]:
    """The mean square of a difference of outputs."""
    return gap.float().square().flatten(1).mean(1)


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least or math.isinf(value):
        raise ValueError(f"loss.{key} must be at least {least:g}, got {value}")
