"""Supervised fine-tuning: the loss with which flow and diffusion models are pre-trained.

The mean squared error of the model's output on a noised picture. With weights of its own for each
picture it is reward-weighted regression; on the best samples of a group it is RAFT (arXiv:2304.06767).
"""

from dataclasses import dataclass
from typing import Literal

from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossNeeds,
    LossOutputs,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least
from flowgrpo.losses.matching import Weight, log_likelihood


@dataclass(frozen=True, kw_only=True)
class SupervisedLoss(Loss):
    """Regression to pictures: ``A w(t) mse`` of the velocity (flow) or of the noise (diffusion).

    Belongs to the algorithm ``pictures``, where ``A`` is the picture's weight. With ``matching`` and
    advantages of the kind ``best``, which are 1 for the best samples of a group, it is RAFT.
    """

    kind: Literal["supervised"] = "supervised"
    weight: Weight = "uniform"
    """Weight of the error at a time; ``uniform`` is the loss of pre-training. See the loss ``matching``."""
    power: float = 0.25
    """Exponent of the mean squared error in ``ghuber``, in (0, 1]."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the reference's output, which keeps the model near to what it
    was; 0 does not evaluate it at all."""

    @property
    def needs(self) -> LossNeeds:
        """Noised samples, and the reference for a KL."""
        return LossNeeds(
            action_kinds=("noised_sample",),
            reference=self.kl_coef > 0,
            all_actions=self.kl_coef > 0,
            is_additive=True,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The weighted error of each noised sample."""
        own, step = inputs.prediction(inputs.policy), inputs.interval
        term = log_likelihood(own, inputs.x_next, step, self.weight, self.power)
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(-inputs.advantage * term, kl)

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("power", self.power, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
        if self.power > 1:
            raise ValueError(f"loss.power must be at most 1, got {self.power}")
