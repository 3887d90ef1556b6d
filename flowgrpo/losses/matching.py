"""Losses that replace the density of a sample by the model's error on noised versions of it.

A sample's log-likelihood under a flow or diffusion model is, up to constants, a weighted mean of
``-w(t) mse(prediction - target)`` over times and noise. With the same time and noise for the current
and the old policy, the difference of two such terms is a ratio that needs no stochastic sampler.
Advantage Weighted Matching (arXiv:2509.25050), V-GRPO (arXiv:2604.23380) and the ELBO policy
gradients (arXiv:2602.04663) are this loss with different weights and penalties.
"""

import math
from dataclasses import dataclass
from typing import Literal

from flowgrpo.core.matching import squared_error
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import Prediction, Step
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossNeeds,
    LossOutputs,
    PolicyOutputs,
    Trail,
    remaining_share,
    velocity_kl,
)
from flowgrpo.losses.checks import check_reference_guidance, require_at_least

Weight = Literal["uniform", "t", "t_squared", "huber", "ghuber", "adaptive"]
_FLOOR = 1e-10  # Keeps the powers of a vanishing error differentiable; the released code's value.


def log_likelihood(
    prediction: Prediction,
    data: Float[Tensor, "batch *latent"],
    step: Step,
    weight: Weight,
    power: float = 0.25,
) -> Float[Tensor, " batch"]:
    """The term of a sample's log-likelihood at one time, up to constants: ``-w(t) mse``.

    With ``mse`` from :func:`squared_error` and ``t`` the weight of the noise:

    - ``uniform``: ``-mse``; ``t``: ``-t mse``; ``t_squared``: ``-t^2 mse`` (arXiv:2509.25050)
    - ``huber``: ``-t sqrt(mse)``; ``ghuber``: ``-(t / p) mse^p`` (its released code)
    - ``adaptive``: ``-mse(x0 - data) / mean(|x0 - data|)``, the divisor without gradient
      (arXiv:2602.04663 and arXiv:2604.23380)

    Args:
        prediction: The prediction at the noised samples; each ``(batch, *latent)``.
        data: The samples.
        step: The time of the noised samples.
        weight: The weight, as above.
        power: ``p`` of ``ghuber``.
    """
    if weight == "adaptive":
        error = prediction.x0.float() - data.detach().float()
        size = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return -error.square().flatten(1).mean(1) / size
    mse, t = squared_error(prediction, data, step), step.noise
    if weight == "huber":
        return -t * ((mse + _FLOOR).sqrt() - math.sqrt(_FLOOR))
    if weight == "ghuber":
        return -(t / power) * ((mse + _FLOOR) ** power - _FLOOR**power)
    return -mse * {"uniform": 1.0, "t": t, "t_squared": t * t}[weight]


def matching_surrogate(
    new: Float[Tensor, " actions"],
    old: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    surrogate: Literal["ratio", "pepg"],
    clip_range: float,
) -> Float[Tensor, " actions"]:
    """The policy loss of each action, from its log-likelihood terms under two policies.

    With ``r = exp(new - old)``: ``ratio`` is ``max(-A r, -A clip(r, 1 - c, 1 + c))``, and ``pepg`` is
    ``-r (A - log r) new`` with gradient through ``new`` alone (arXiv:2602.04663). There, EPG is
    ``ratio`` without a clip, and PAR has the gradient of PEPG.

    Args:
        new: Terms of the policy that is trained; they carry gradients.
        old: Terms of the policy that sampled.
        advantage: Advantages.
        surrogate: The form, as above.
        clip_range: ``c``.
    """
    log_ratio = new - old.detach()
    if surrogate == "pepg":
        settled = log_ratio.detach()
        return -settled.exp() * (advantage - settled) * new
    ratio = log_ratio.exp()
    return torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    )


@dataclass(frozen=True, kw_only=True)
class MatchingLoss(Loss):
    """Likelihoods by matching: AWM, V-GRPO and the ELBO policy gradients.

    Belongs to the algorithm ``matching``, and trains on noised samples of ``diffusion_nft``, too. The
    ratio is taken at each time by itself. V-GRPO averages the terms of a sample before it takes the
    ratio; with one update per iteration, the ratio is 1 and the gradients are equal.
    """

    kind: Literal["matching"] = "matching"
    weight: Weight = "adaptive"
    """Weight of the error at a time: ``adaptive`` (V-GRPO, EPG), ``ghuber`` (AWM), ``uniform``, ``t``,
    ``t_squared`` or ``huber``."""
    power: float = 0.25
    """Exponent of the mean squared error in ``ghuber``, in (0, 1]."""
    surrogate: Literal["ratio", "pepg"] = "ratio"
    """``ratio``: the clipped ratio (AWM, V-GRPO, EPG). ``pepg``: the advantage minus the log-ratio, which
    pulls to the old policy (PEPG, PAR)."""
    clip_range: float = 1.0
    """The ratio is clipped to [1 - c, 1 + c]. 1 hardly ever acts; V-GRPO uses 0.006 to 0.01 with several
    updates. ``pepg`` does not clip."""
    advantage_scale: float = 1.0
    """Advantages are divided by this: 5 in AWM, whose advantages are clipped at 5."""
    soft_clip: float = 0.0
    """V-GRPO's soft bound of advantages, ``eta tanh(A / eta)``; it uses 3. 0 does not bound them."""
    trail: Trail = "none"
    """How slowly the old policy follows the trained one, by its remaining share after an iteration with
    n optimizer steps so far: ``none`` copies the trained weights, ``third`` is min(0.001 n, 0.3) (AWM),
    ``half`` min(0.001 n, 0.5) (EPG), ``late`` min(0.0075 max(n - 75, 0), 0.999), ``rising``
    min(0.25 + 0.005 n, 0.999)."""
    sampler: Literal["old", "trained"] = "old"
    """Which policy samples. With ``trained`` and a trail, the old policy is only the centre of the
    proximal term, as in AWM; the ratio is then defined in the first update of an iteration alone."""
    proximal_coef: float = 0.0
    """Weight of the squared difference to the old policy's prediction; AWM uses 1."""
    proximal: Literal["output", "data"] = "output"
    """The prediction that the proximal term compares: the model's output (AWM) or the predicted data
    (V-GRPO)."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the reference's output; 0 does not evaluate it at all."""
    reference_guidance: float | None = None
    """Guidance scale with which the reference is evaluated; if unset, that of training. A reference with
    guidance teaches the model to do without it: the KL then distils guidance while the rewards improve on
    it."""

    @property
    def needs(self) -> LossNeeds:
        """Noised samples, the old policy, and the reference for a KL."""
        separate = self._is_centre_only
        return LossNeeds(
            action_kinds=("noised_sample",),
            old_policy=lambda n: remaining_share(self.trail, n),
            old_policy_samples_from=math.inf if separate else 0,
            old_policy_is_copied=self.trail == "none",
            single_update=separate,
            reference=self.kl_coef > 0,
            reference_guidance=self.reference_guidance,
            all_actions=self.kl_coef > 0 or self.proximal_coef > 0,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each noised sample; only the penalties where the advantage is 0."""
        assert inputs.old_policy is not None
        new, old = self._term(inputs, inputs.policy), self._term(inputs, inputs.old_policy)
        if self._is_centre_only:
            old = new.detach()
        advantage = self.bounded(inputs.advantage)
        loss = matching_surrogate(new, old, advantage, self.surrogate, self.clip_range)
        # Without an advantage, pepg would still pull to the old policy; only a penalty does that.
        loss = loss * (advantage != 0)
        if self.proximal_coef > 0:
            loss = loss + self.proximal_coef * inputs.per_action(self._distance(inputs))
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(loss, kl)

    def bounded(self, advantage: Float[Tensor, " actions"]) -> Float[Tensor, " actions"]:
        """Advantages on the scale of the loss, with the soft bound."""
        scaled = advantage / self.advantage_scale
        return self.soft_clip * torch.tanh(scaled / self.soft_clip) if self.soft_clip else scaled

    @property
    def _is_centre_only(self) -> bool:
        """Whether the old policy is not the one that sampled."""
        return self.sampler == "trained" and self.trail != "none"

    def _term(self, inputs: LossInputs, policy: PolicyOutputs) -> Float[Tensor, " actions"]:
        own = inputs.prediction(policy)
        return log_likelihood(own, inputs.x_next, inputs.interval, self.weight, self.power)

    def _distance(self, inputs: LossInputs) -> Float[Tensor, " states"]:
        assert inputs.old_policy is not None
        if self.proximal == "output":
            return velocity_kl(inputs.policy, inputs.old_policy)
        gap = inputs.policy.prediction.x0 - inputs.old_policy.prediction.x0
        return gap.float().square().flatten(1).mean(1)

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        for key in ("power", "advantage_scale", "clip_range"):
            require_at_least(key, getattr(self, key), 1e-12)
        for key in ("soft_clip", "proximal_coef", "kl_coef"):
            require_at_least(key, getattr(self, key), 0.0)
        check_reference_guidance(self.reference_guidance, self.kl_coef)
        if self.power > 1:
            raise ValueError(f"loss.power must be at most 1, got {self.power}")
