"""DiffusionNFT's forward-process objective (arXiv:2509.16117).

It uses no log-probability. It adds noise to finished samples, lets the model predict the samples from
these, and moves the prediction towards good samples and away from bad ones.
"""

from dataclasses import dataclass
from typing import Literal

from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossNeeds,
    LossOutputs,
    remaining_share,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least


def nft_loss(
    x0: Float[Tensor, "actions *latent"],
    old_x0: Float[Tensor, "actions *latent"],
    sample: Float[Tensor, "actions *latent"],
    optimality: Float[Tensor, " actions"],
    beta: float,
) -> Float[Tensor, " actions"]:
    """DiffusionNFT's objective (arXiv:2509.16117, eq. 5), with the released code's weighting.

    The policy defines two implicit policies, a positive and a negative one. They predict the data
    ``x0+ = beta x0 + (1 - beta) old_x0`` and ``x0- = (1 + beta) old_x0 - beta x0``. On both paths
    ``x0`` is affine in the model's output, so this mixes outputs as the paper does. The loss is
    ``(r L+ + (1 - r) L-) / beta`` with ``L = mean((x0 - sample)^2) / mean(|x0 - sample|)``.

    Args:
        x0: Data predicted by the model for a noised sample; carries gradients.
        old_x0: Data predicted by the policy that sampled.
        sample: The clean sample.
        optimality: ``r`` in [0, 1].
        beta: Distance of the implicit policies from the old policy, above 0.
    """
    x0, old, sample = x0.float(), old_x0.detach().float(), sample.detach().float()
    losses = []
    for implicit in (beta * x0 + (1 - beta) * old, (1 + beta) * old - beta * x0):
        error = implicit - sample
        # The released code normalises by the mean absolute error, in float64 and without gradient.
        size = error.detach().double().abs().flatten(1).mean(1).clamp(min=1e-5)
        losses.append(error.square().flatten(1).mean(1) / size.float())
    positive, negative = losses
    return (optimality * positive + (1 - optimality) * negative) / beta


@dataclass(frozen=True, kw_only=True)
class NFTLoss(Loss):
    """DiffusionNFT's forward-process objective (arXiv:2509.16117): no density, no stochastic steps.

    Belongs to the algorithm ``diffusion_nft``. Samples come from a behaviour policy whose weights
    follow the trained ones; it is part of the formula and of every checkpoint.
    """

    kind: Literal["nft"] = "nft"
    beta: float = 1.0
    """Distance of the implicit positive and negative policies from the one that sampled, above 0;
    the paper uses 1, and 0.1 for OCR and for several rewards."""
    advantage_scale: float = 5.0
    """An advantage of this size counts as wholly good or bad; the loss is multiplied by it, too."""
    trail: Literal["half", "late", "none"] = "half"
    """How slowly the behaviour policy follows the trained one: the share of it that remains after an
    iteration. After n optimizer steps, ``half`` is min(0.001 n, 0.5) and ``late`` is
    min(0.0075 max(n - 75, 0), 0.999); ``none`` samples with the trained weights."""
    kl_coef: float = 1e-4
    """Weight of the squared difference to the reference's output; 0 does not evaluate it at all."""
    zero_advantage: Literal["skip", "train"] = "skip"
    """What happens to samples with advantage 0, such as those of a group of equal rewards: ``skip``
    leaves them out; ``train`` pulls the policy towards the old policy on them (an optimality of 1/2), as
    the released code does. Samples whose reward failed are left out either way."""

    @property
    def needs(self) -> LossNeeds:
        """Noised samples, the behaviour policy, and the reference for a KL."""
        return LossNeeds(
            action_kinds=("noised_sample",),
            old_policy=self.remaining_share,
            reference=self.kl_coef > 0,
            all_actions=self.kl_coef > 0 or self.zero_advantage == "train",
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each noised sample; zero where the reward failed, or is to be skipped."""
        assert inputs.old_policy is not None
        x0 = inputs.per_action(inputs.policy.prediction.x0)
        old_x0 = inputs.per_action(inputs.old_policy.prediction.x0)
        optimality = self.optimality(inputs.advantage)
        loss = nft_loss(x0, old_x0, inputs.x_next, optimality, self.beta)
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        trained = inputs.advantage != 0
        if self.zero_advantage == "train":
            known = inputs.has_reward
            trained = torch.ones_like(trained) if known is None else known
        return LossOutputs(self.advantage_scale * loss * trained, kl)

    def remaining_share(self, num_updates: int) -> float:
        """The share of the behaviour weights that remains after this many optimizer steps, in [0, 1)."""
        return remaining_share(self.trail, num_updates)

    def optimality(self, advantage: Float[Tensor, " actions"]) -> Float[Tensor, " actions"]:
        """How good a sample is, in [0, 1]: ``A / (2 advantage_scale) + 1/2``, clamped."""
        return (advantage / (2 * self.advantage_scale) + 0.5).clamp(0, 1)

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("beta", self.beta, 1e-12)
        require_at_least("advantage_scale", self.advantage_scale, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
