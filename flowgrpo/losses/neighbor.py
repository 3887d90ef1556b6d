"""Neighbor GRPO's loss (arXiv:2511.16955): the policy of a deterministic step, by distances to neighbours.

No step is stochastic. At a denoising step, the candidates are the next states of all samples of a group. The
policy takes one ODE step from the state of one of them, the anchor, and its probability of candidate ``i``
is the softmax over the candidates of minus their squared distance to where that step ends (eq. 8). Raising
it moves the step's end towards the candidate, and away from the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.tensors import Float, Int, Tensor, torch
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
    velocity_kl,
)
from flowgrpo.losses.checks import require_at_least
from flowgrpo.losses.clipped import clipped_surrogate


def neighbor_log_prob(
    end: Float[Tensor, "anchors *latent"],
    candidates: Float[Tensor, "actions *latent"],
    anchor: Int[Tensor, " actions"],
) -> Float[Tensor, " actions"]:
    """The log-probability of each candidate for its anchor (eq. 8), in fp32.

    The squared distance is the mean over latent elements, as log-probabilities are everywhere here. The
    paper writes the sum, with which the softmax of latents with thousands of elements is 1 for the
    anchor's own next state and 0 for all others; the gradients at ratios of 1 differ by a factor only, as
    advantages sum to 0.

    Args:
        end: Where the step from each anchor ends.
        candidates: Next states.
        anchor: The row of ``end`` for each candidate; candidates with one row are alternatives.
    """
    distance = (candidates.float() - end.float()[anchor]).square().flatten(1).mean(1)
    # The log of the sum of exponentials over each anchor's candidates, of which the nearest is taken out.
    number = len(end)
    nearest = torch.full((number,), torch.inf, device=distance.device)
    nearest = nearest.scatter_reduce(0, anchor, distance.detach(), "amin")
    shifted = nearest[anchor] - distance
    total = torch.zeros(number, device=distance.device).index_add(0, anchor, shifted.exp())
    return shifted - total.log()[anchor]


@dataclass(frozen=True, kw_only=True)
class NeighborLoss(Loss):
    """Clipped surrogate of the probabilities of neighbours, plus ``kl_coef`` times a KL (eq. 9).

    It belongs to ``neighbor_grpo``. The candidates of an anchor stay together, so that the samples of a
    group cannot be divided among optimizer steps.
    """

    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("log_prob/noise", reduce="max"),
        LossMetric("ratio/deviation", by_step="ratio_deviation"),
        LossMetric("ratio/clip_fraction", by_step="clip_fraction"),
    )

    kind: Literal["neighbor"] = "neighbor"
    clip_range: float = 1e-4
    """Largest change of the ratio in one iteration. The paper's is not known; this is that of ``clipped``."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the reference's output; 0 does not evaluate it at all."""

    @property
    def needs(self) -> LossNeeds:
        """All candidates of an anchor, also those without advantage."""
        return LossNeeds(
            action_kinds=("neighbor",),
            reference=self.kl_coef > 0,
            whole_groups=True,
            is_additive=True,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of each pair of an anchor and a candidate."""
        log_prob = neighbor_log_prob(inputs.policy.gaussian.mean, inputs.x_next, inputs.state)
        log_ratio = log_prob - inputs.old_log_prob
        loss = clipped_surrogate(log_ratio, inputs.advantage.to(log_ratio), self.clip_range)
        kl = None
        if inputs.reference is not None:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        change = torch.expm1(log_ratio.detach()).abs()
        metrics = {
            "ratio/deviation": change,
            "ratio/clip_fraction": (change > self.clip_range).float(),
        }
        if inputs.first_update:
            metrics["log_prob/noise"] = log_ratio.detach().abs()
        return LossOutputs(loss, kl, metrics)

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("clip_range", self.clip_range, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)

    def warning(self, metrics: Mapping[str, float]) -> str:
        """A warning if numerical noise alone moves ratios out of the clip range."""
        noise = metrics.get("log_prob/noise", 0.0)
        if noise <= self.clip_range:
            return ""
        return (
            f"before any update, log-probabilities in the replay differ by up to {noise:.1e} from those "
            f"of the rollout, more than loss.clip_range = {self.clip_range:g}; use a higher model.dtype, or "
            "widen the clip range"
        )
