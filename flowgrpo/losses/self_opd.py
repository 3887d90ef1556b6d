"""Self-OPD's loss (arXiv:2608.26872): the mean of a step is drawn to good branches and away from bad ones.

From one state several branches leave by a stochastic step. The policy's mean is regressed on all of them,
each with a signed weight: its advantage, which is bounded and, where it is negative, made smaller the more
the branch points in the direction of the best one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least


def repulsion(
    direction: Float[Tensor, "actions *latent"],
    advantage: Float[Tensor, " actions"],
    known: Bool[Tensor, " actions"],
    state: Int[Tensor, " actions"],
) -> Float[Tensor, " actions"]:
    """The share of its advantage that each branch keeps: ``(1 - cos) / 2`` if it is negative, else 1.

    ``cos`` is the cosine of the branch's direction and that of the best branch from its state, which is
    the first of equal ones. A bad branch next to the best one is hardly repelled, and one opposite to it
    fully.

    Args:
        direction: From the mean of the step to where each branch ends.
        advantage: Advantages.
        known: Whether each branch has a reward; the others are never the best.
        state: The state of each branch; branches with one label are compared.
    """
    unit = torch.nn.functional.normalize(direction.float().flatten(1), dim=1)
    order = torch.arange(len(state), device=state.device)
    number = int(state.max()) + 1
    value = torch.where(known, advantage, -torch.inf)
    highest = torch.full((number,), -torch.inf, dtype=value.dtype, device=value.device)
    highest = highest.scatter_reduce(0, state, value, "amax")
    rows = torch.where(value == highest[state], order, len(state))
    best = torch.full_like(order[:1], len(state)).repeat(number)
    best = best.scatter_reduce(0, state, rows, "amin")
    cosine = (unit * unit[best[state]]).sum(1)
    return torch.where(advantage < 0, (1 - cosine) / 2, 1.0)


@dataclass(frozen=True, kw_only=True)
class SelfOPDLoss(Loss):
    """All-branch regression of Self-OPD (arXiv:2608.26872).

    The loss of a branch is ``w mean((m - x_next)^2) / (2 std^2)``, with the mean ``m`` and the standard
    deviation ``std`` of the policy's step and the weight ``w = clip(A r, -weight_clip, weight_clip)``, where
    ``r`` is :func:`repulsion`. It belongs to the algorithm ``self_opd``, and trains on the stochastic steps of
    other algorithms, too. It needs no log-probability. The branches of a state are compared within an optimizer
    step, so ``train.split`` should not divide them: ``groups`` or ``steps``.
    """

    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("branch/attraction"),
        LossMetric("branch/repulsion"),
    )

    kind: Literal["self_opd"] = "self_opd"
    weight_clip: float = 1.0
    """Largest size of a branch's weight."""
    direction_aware: bool = True
    """Whether branches with a negative advantage are repelled less where they point to the best branch."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the reference's output; 0, as in the release, does not evaluate it."""

    @property
    def needs(self) -> LossNeeds:
        """Stochastic steps, also those without advantage, which may be the best of their state; and the
        reference for a KL."""
        return LossNeeds(reference=self.kl_coef > 0, all_actions=True, balanced_steps=True)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each branch; zero where it has no advantage."""
        gaussian, advantage = inputs.gaussian, inputs.advantage.float()
        gap = inputs.x_next - gaussian.mean
        weight = advantage
        if self.direction_aware:
            known = inputs.has_reward
            known = torch.ones_like(advantage, dtype=torch.bool) if known is None else known
            weight = advantage * repulsion(gap.detach(), advantage, known, inputs.state)
        weight = weight.clamp(-self.weight_clip, self.weight_clip)
        distance = (gap / gaussian.std).square().flatten(1).mean(1) / 2
        metrics = {
            "branch/attraction": weight.clamp(min=0),
            "branch/repulsion": -weight.clamp(max=0),
        }
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(weight * distance, kl, metrics)

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("weight_clip", self.weight_clip, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
