"""The loss of one action: a clipped policy gradient and a distance to the reference model."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.transitions import Gaussian, Step, gaussian_kl


def clipped_surrogate(
    log_prob: Float[Tensor, " actions"],
    old_log_prob: Float[Tensor, " actions"],
    advantage: Float[Tensor, " actions"],
    clip_range: float,
) -> Float[Tensor, " actions"]:
    """PPO's pessimistic objective as a loss (arXiv:1707.06347, eq. 7).

    ``max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range))`` with ``r = exp(log_prob - old_log_prob)``.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Clipped surrogate plus ``kl_coef`` times a KL to the reference."""

    clip_range: float = 1e-4
    """Allowed change of the ratio in one iteration. Ratios are of mean log-probabilities, so that
    the right value depends on the resolution."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference model; 0 does not evaluate the reference at all."""
    kl: Literal["exact", "flow_grpo", "velocity"] = "exact"
    """``exact`` is the KL of the step's normals; ``flow_grpo`` leaves out the step's length, as the
    code behind that paper's 0.04 does; ``velocity`` is the squared difference of the outputs."""

    def kl_to(
        self, policy: Gaussian, reference: Gaussian, step: Step, velocity_gap: Tensor
    ) -> Float[Tensor, " actions"]:
        """The chosen distance for each action; ``velocity_gap`` is output minus reference output."""
        if self.kl == "velocity":
            return velocity_gap.float().square().flatten(1).mean(1)
        exact = gaussian_kl(policy.mean, reference.mean, policy.std)
        return exact if self.kl == "exact" else exact * step.dt
