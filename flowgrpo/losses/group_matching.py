"""Losses on noised samples that compare the samples of a group with each other.

DGPO (arXiv:2510.08425) weights a group by how badly the model orders it, and centred reward
distillation (CRD, arXiv:2603.14128) regresses differences of implicit rewards on differences of
advantages. In both, the unknown normaliser of the optimal policy cancels within a prompt. Direct
preference optimisation of pairs is DGPO with groups of two.
"""

import math
from dataclasses import dataclass
from typing import Literal

from flowgrpo.core.matching import error_scale, squared_error
from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch
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


def group_sum(
    values: Float[Tensor, " actions"], group: Int[Tensor, " actions"]
) -> Float[Tensor, " actions"]:
    """For each action, the sum of the values over its group."""
    _, index = group.unique(return_inverse=True)
    total = torch.zeros(int(index.max()) + 1, dtype=values.dtype, device=values.device)
    return total.index_add(0, index, values)[index]


def dgpo_weight(
    error: Float[Tensor, " actions"],
    reference_error: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    group: Int[Tensor, " actions"],
    known: Bool[Tensor, " actions"],
    beta: float,
) -> Float[Tensor, " actions"]:
    """DGPO's weight of each action's group, in (0, 1): ``sigmoid(beta / G sum A (d - d_ref))``.

    It is 1/2 where the model is as good as the reference, and small where the group is ordered already.

    Args:
        error: Squared errors ``d`` of the policy that is trained.
        reference_error: Squared errors of the reference.
        advantage: Advantages ``A``.
        group: Labels of groups.
        known: Whether each action's reward is known; the others do not count in ``G``.
        beta: Strength; errors differ by some 1e-3, so values around 100 are usual.
    """
    gain = advantage * (error - reference_error).detach()
    size = group_sum(known.to(error.dtype), group).clamp(min=1)
    return torch.sigmoid(beta / size * group_sum(gain, group))


@dataclass(frozen=True, kw_only=True)
class DGPOLoss(Loss):
    """Direct group preference optimisation (arXiv:2510.08425) on noised samples.

    The loss of an action is ``w A d``: ``d`` is the squared error of the model on the noised sample, and
    ``w`` the weight of its group at this time (:func:`dgpo_weight`). Its gradient is that of
    ``-log sigmoid(-s)`` over ``beta``. Actions that have left the clip range keep their part in ``w``
    and give no gradient. Groups larger than ``train.train_batch`` take a second pass, which costs one
    more evaluation of the trained and of the old policy.
    """

    kind: Literal["dgpo"] = "dgpo"
    beta: float = 100.0
    """Strength of the preference, above 0; the release uses 100, and 10 for PickScore."""
    clip_range: float = 1e-2
    """Actions are left out where ``exp(d_old - d)`` has gone beyond ``1 + clip_range`` for a positive
    advantage, or below ``1 - clip_range`` for another; 0 clips nothing."""
    compare_with: Literal["reference", "old"] = "reference"
    """Whose errors ``w`` compares with: the reference's, or the old policy's (the release's ``2b``)."""
    trail: Trail = "third"
    """How slowly the old policy follows the trained one; see the loss ``matching``."""
    sample_old_after: int = 200
    """Optimizer steps after which the old policy samples; the trained one does before."""
    kl_coef: float = 0.02
    """Weight of the squared difference to the reference's output; 0.001 for PickScore."""

    @property
    def needs(self) -> LossNeeds:
        """Noised samples in whole groups, the old policy and the reference."""
        return LossNeeds(
            action_kinds=("noised_sample",),
            old_policy=lambda n: remaining_share(self.trail, n),
            old_policy_samples_from=self.sample_old_after,
            reference=self.kl_coef > 0 or self.compare_with == "reference",
            whole_groups=True,
            group_term=True,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each noised sample; zero where the advantage is."""
        assert inputs.old_policy is not None
        other = inputs.reference if self.compare_with == "reference" else inputs.old_policy
        assert other is not None
        advantage = inputs.advantage
        error, old_error, base_error = (
            squared_error(inputs.prediction(policy), inputs.x_next, inputs.interval)
            for policy in (inputs.policy, inputs.old_policy, other)
        )
        if inputs.whole is None:
            weight = dgpo_weight(
                error, base_error, advantage, inputs.group, _known(inputs), self.beta
            )
        else:
            w, none = inputs.whole, torch.zeros_like(inputs.whole.term)
            each = dgpo_weight(w.term, none, w.advantage, w.group, w.known, self.beta)
            weight = w.of(each, inputs.group)
        if self.clip_range > 0:
            ratio = (old_error - error).detach().exp()
            rises, limit = advantage > 0, self.clip_range
            left = torch.where(rises, ratio > 1 + limit, ratio < 1 - limit)
            error = torch.where(left, error.detach(), error)
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(weight * advantage * error, kl)

    def group_term(self, inputs: LossInputs) -> Float[Tensor, " actions"]:
        """``d - d_ref``, the difference of squared errors."""
        other = inputs.reference if self.compare_with == "reference" else inputs.old_policy
        assert other is not None
        error, base_error = (
            squared_error(inputs.prediction(policy), inputs.x_next, inputs.interval)
            for policy in (inputs.policy, other)
        )
        return error - base_error

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("beta", self.beta, 1e-12)
        for key in ("clip_range", "kl_coef", "sample_old_after"):
            require_at_least(key, getattr(self, key), 0.0)


@dataclass(frozen=True, kw_only=True)
class CRDLoss(Loss):
    """Centred reward distillation (arXiv:2603.14128) on noised samples.

    With the implicit reward ``rho = d_old / n_old - d / n`` from squared errors, and the optimality
    ``a = A / 10 + 1/2`` in [0, 1], the loss is ``(5 / beta) (beta (rho - mean rho) - (a - mean a))^2``;
    the means run over the prompt's samples at one time. Groups larger than
    ``train.train_batch`` take a second pass, as for :class:`DGPOLoss`. The KL of good samples weighs more:
    ``m + a (1 - m)`` with ``m = 1e-4 / kl_coef``.

    Differs from the port that publishes the settings: its means run over all prompts of a batch, where
    the normalisers of the prompts do not cancel; and the policy that samples is one with the old policy or
    the trained one, not a third.
    """

    kind: Literal["crd"] = "crd"
    beta: float = 1.0
    """Scale of the implicit reward, above 0. The target is ``rho - mean rho = (a - mean a) / beta``."""
    normalised: bool = True
    """Whether each squared error is divided by the mean absolute error, without gradient."""
    trail: Trail = "rising"
    """How slowly the old policy follows the trained one; see the loss ``matching``."""
    sampler: Literal["trained", "old"] = "trained"
    """Which policy samples. If the old policy samples, ``rho`` of fresh samples stays near 0."""
    kl_coef: float = 0.1
    """Weight of the squared difference to the reference's output; 0 does not evaluate it at all."""
    reference_guidance: float | None = None
    """Guidance scale with which the reference is evaluated, 4.5 as published for a model that is trained
    without guidance; if unset, that of training. The KL then keeps the model near the guided reference."""

    @property
    def needs(self) -> LossNeeds:
        """Noised samples in whole groups, the old policy, and the reference for a KL."""
        return LossNeeds(
            action_kinds=("noised_sample",),
            old_policy=lambda n: remaining_share(self.trail, n),
            old_policy_samples_from=math.inf if self.sampler == "trained" else 0,
            reference=self.kl_coef > 0,
            reference_guidance=self.reference_guidance,
            whole_groups=True,
            group_term=True,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each noised sample; zero where the reward failed."""
        assert inputs.old_policy is not None
        known = _known(inputs)
        optimality = (inputs.advantage / 10 + 0.5).clamp(0, 1)
        implied = self.group_term(inputs)
        if inputs.whole is None:
            mean = _group_mean(implied.detach(), inputs.group, known)
            usual = _group_mean(optimality, inputs.group, known)
        else:
            w = inputs.whole
            mean = w.of(_group_mean(w.term, w.group, w.known), inputs.group)
            every = (w.advantage / 10 + 0.5).clamp(0, 1)
            usual = w.of(_group_mean(every, w.group, w.known), inputs.group)
        gap = self.beta * (implied - mean)
        gap = gap - (optimality - usual)
        kl = None
        if inputs.reference is not None:
            least = min(1.0, 1e-4 / self.kl_coef)
            weight = least + optimality * (1 - least)
            kl = weight * inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(5 / self.beta * gap.square() * known, kl)

    def group_term(self, inputs: LossInputs) -> Float[Tensor, " actions"]:
        """The implicit reward ``rho``."""
        assert inputs.old_policy is not None
        return self._relative(inputs, inputs.old_policy) - self._relative(inputs, inputs.policy)

    def _relative(self, inputs: LossInputs, policy: PolicyOutputs) -> Float[Tensor, " actions"]:
        """The squared error, divided by the mean absolute error if that is asked for."""
        prediction, step = inputs.prediction(policy), inputs.interval
        error = squared_error(prediction, inputs.x_next, step)
        if not self.normalised:
            return error
        gap = (prediction.x0.float() - inputs.x_next.float()).detach().abs()
        size = gap.flatten(1).mean(1) * error_scale(step)
        return error / size.clamp(min=1e-5)

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("beta", self.beta, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
        check_reference_guidance(self.reference_guidance, self.kl_coef)


def _known(inputs: LossInputs) -> Bool[Tensor, " actions"]:
    """Whether each action's reward is known."""
    if inputs.has_reward is None:
        return torch.ones_like(inputs.advantage, dtype=torch.bool)
    return inputs.has_reward


def _group_mean(
    values: Float[Tensor, " actions"],
    group: Int[Tensor, " actions"],
    known: Bool[Tensor, " actions"],
) -> Float[Tensor, " actions"]:
    """For each action, the mean over the actions of its group whose reward is known."""
    number = group_sum(known.to(values.dtype), group).clamp(min=1)
    return group_sum(values * known, group) / number
