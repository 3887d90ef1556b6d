"""Direct preference optimisation of pairs of noised pictures (Diffusion-DPO, arXiv:2311.12908).

The density of a picture is replaced by the model's error on a noised version of it. The same loss is
used for flow models with the error of the velocity. It needs no reward: a preference is a chosen and a
rejected picture of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from flowgrpo.core.matching import squared_error
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


def pairs_of(
    advantage: Float[Tensor, " actions"], group: Int[Tensor, " actions"]
) -> Int[Tensor, "pairs 2"]:
    """The rows of each group's chosen and rejected action: of highest and of lowest advantage.

    Of equal advantages the first row is taken. A group without a positive and a negative advantage has
    no pair.

    Args:
        advantage: Advantages; 1 and -1 where the pairs are given.
        group: Labels of groups.
    """
    found = []
    for label in group.unique():
        rows = (group == label).nonzero().squeeze(1)
        values = advantage[rows]
        if bool(values.max() > 0) and bool(values.min() < 0):
            found.append(torch.stack([rows[values.argmax()], rows[values.argmin()]]))
    return torch.stack(found) if found else group.new_empty((0, 2))


def preference_margin(
    error: Float[Tensor, " actions"],
    reference_error: Float[Tensor, " actions"],
    pairs: Int[Tensor, "pairs 2"],
    beta: float,
) -> Float[Tensor, " pairs"]:
    """The implicit reward of the chosen picture above that of the rejected one, for each pair.

    With the squared errors ``d`` it is ``-beta / 2 ((d_w - d_w,ref) - (d_l - d_l,ref))``: the argument of
    the log-sigmoid in equation 14 of arXiv:2311.12908, in the scale of its released code.

    Args:
        error: Squared errors of the policy that is trained, means over latent elements.
        reference_error: Squared errors of the reference.
        pairs: Rows of the chosen and of the rejected action.
        beta: Strength.
    """
    gap = (error - reference_error.detach())[pairs]
    return -beta / 2 * (gap[:, 0] - gap[:, 1])


@dataclass(frozen=True, kw_only=True)
class DPOLoss(Loss):
    """Diffusion-DPO (arXiv:2311.12908), and its form for flow models.

    The loss of a pair is ``-log sigmoid(-beta / 2 ((d_w - d_w,ref) - (d_l - d_l,ref)))`` with ``d`` the mean
    squared error of the noise (diffusion) or of the velocity (flow) on the chosen picture ``w`` and the
    rejected one ``l``, at one time and with one noise. Belongs to the algorithm ``pairs``. With
    ``matching`` it is online DPO: of each group the sample of highest advantage is the chosen one, that
    of lowest advantage the rejected one, and the others have no loss. A batch holds whole groups, so
    ``train.train_batch`` must be at least ``algorithm.group_size``.
    """

    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("dpo/accuracy"),
        LossMetric("dpo/margin"),
        LossMetric("dpo/chosen_error"),
    )
    kind: Literal["dpo"] = "dpo"
    beta: float = 5000.0
    """Strength of the preference, above 0: 5000 in the paper for SDXL and in the released code, 2000 in the
    paper for Stable Diffusion 1.5. It multiplies errors of about 1e-4 and depends on the latents; online
    DPO on SD3.5 uses 100."""
    kl_coef: float = 0.0
    """Weight of the squared difference to the reference's output, in addition."""

    @property
    def needs(self) -> LossNeeds:
        """Noised samples in whole groups, and the reference."""
        return LossNeeds(action_kinds=("noised_sample",), reference=True, whole_groups=True)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """The loss of its pair for each action; zero for actions without a pair."""
        assert inputs.reference is not None
        error, reference = (
            squared_error(inputs.prediction(policy), inputs.x_next, inputs.interval)
            for policy in (inputs.policy, inputs.reference)
        )
        pairs = pairs_of(inputs.advantage, inputs.group)
        margin = preference_margin(error, reference, pairs, self.beta)
        each = -torch.nn.functional.logsigmoid(margin)
        # Both actions of a pair carry its loss, so that the mean over actions is the mean over pairs.
        loss = torch.zeros_like(error).index_add(0, pairs.flatten(), each.repeat_interleave(2))
        kl = None
        if self.kl_coef > 0:
            kl = inputs.per_action(velocity_kl(inputs.policy, inputs.reference))
        return LossOutputs(
            loss,
            kl,
            {
                "dpo/accuracy": (margin > 0).float(),
                "dpo/margin": margin,
                "dpo/chosen_error": (error - reference)[pairs[:, 0]],
            },
        )

    def check(self) -> None:
        """Raise ValueError if the settings cannot train."""
        require_at_least("beta", self.beta, 1e-12)
        require_at_least("kl_coef", self.kl_coef, 0.0)
