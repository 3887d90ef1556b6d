"""The advantage of whole samples, over all ranks."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.several import Advantage, Scored, of_scored
from flowgrpo.experience import Experience


def candidate_advantages(
    advantage: Advantage, experience: Experience, weights: Mapping[str, float] | None = None
) -> Float[Tensor, " candidates"]:
    """The advantage of each of this rank's candidates, with statistics over all ranks.

    Args:
        advantage: The statistics.
        experience: With one candidate per sample.
        weights: Of the rewards by name; by default those that the trainer gave.
    """
    own, everyone = experience.candidates, experience.everyone or experience.candidates
    weights = experience.weights if weights is None else weights
    scored = Scored(everyone.reward, everyone.group, everyone.scores, weights)
    # Groups are whole on one rank, and gathering keeps the order.
    mine = torch.isin(everyone.group, own.group.unique())
    return of_scored(advantage, scored)[mine]
