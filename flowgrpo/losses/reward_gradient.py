"""The loss of rewards with a gradient: the reward of an image that is decoded inside the graph.

DRaFT (arXiv:2309.17400) maximises the reward itself, ReFL (arXiv:2304.05977) and SRPO
(arXiv:2509.06942) only up to a margin, AlignProp (arXiv:2310.03739) minimises the distance to a target.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least

Form = Literal["linear", "hinge", "distance"]


def reward_loss(
    reward: Float[Tensor, " actions"], form: Form, target: float
) -> Float[Tensor, " actions"]:
    """A loss that falls as the reward rises.

    ``linear`` is ``-r``, ``hinge`` is ``max(target - r, 0)``, and ``distance`` is ``|r - target|``.

    Args:
        reward: Rewards that carry gradients.
        form: The form, as above.
        target: The reward beyond which ``hinge`` has no gradient, or that ``distance`` aims at.
    """
    if form == "linear":
        return -reward
    if form == "hinge":
        return (target - reward).clamp(min=0)
    return (reward - target).abs()


@dataclass(frozen=True, kw_only=True)
class RewardGradientLoss(Loss):
    """Rewards with a gradient.

    Belongs to the algorithms ``draft``, ``refl`` and ``srpo``. Every reward with a weight must have a
    gradient.
    """

    metrics: ClassVar[Sequence[LossMetric]] = (LossMetric("reward/differentiated"),)
    kind: Literal["reward_gradient"] = "reward_gradient"
    form: Form = "linear"
    """``linear`` maximises the reward (DRaFT); ``hinge`` only up to ``target`` (ReFL: 2; SRPO: 0.7 with
    HPS v2.1); ``distance`` moves it to ``target`` (AlignProp: 10 with the aesthetic predictor)."""
    target: float = 0.0
    """The reward that ``hinge`` and ``distance`` aim at, in the units of the weighted sum of rewards;
    ``linear`` ignores it, and it must then be 0."""
    scale: float = 1.0
    """Factor of the loss, above 0 (ReFL 1e-3, AlignProp 0.01). AdamW divides it out, but
    ``train.max_grad_norm`` does not."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the reference's output at the state from which the gradient
    starts; 0 does not evaluate it at all. No paper uses it; it slows the loss of diversity."""

    @property
    def needs(self) -> LossNeeds:
        """Rewards with a gradient, and the reference for a KL."""
        return LossNeeds(
            action_kinds=("differentiated",), reward_gradient=True, reference=self.kl_coef > 0
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each action, times its advantage, which is 1, or 0 where the reward failed."""
        assert inputs.reward is not None
        loss = self.scale * inputs.advantage * reward_loss(inputs.reward, self.form, self.target)
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(loss, kl, {"reward/differentiated": inputs.reward.detach()})

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("scale", self.scale, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
        if not math.isfinite(self.target):
            raise ValueError(f"loss.target must be finite, got {self.target}")
        if self.form == "linear" and self.target != 0:
            raise ValueError(
                f"loss.target = {self.target:g} has no effect with loss.form = 'linear'; set loss.form to "
                "'hinge' or 'distance', or remove it"
            )
