"""What the learner supplies to losses that treat denoising steps together: weights and ratios of chunks.

A loss declares both (:class:`flowgrpo.losses.base.LossNeeds`). The weight of an action multiplies its
advantage; it is divided by its mean over the optimizer step, so that it does not change the learning rate.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgrpo.core.transitions import Step, Transition
from flowgrpo.data.experience import Actions
from flowgrpo.losses.base import LossNeeds

SumOverProcesses = Callable[[Float[Tensor, " _"]], Float[Tensor, " _"]]


def chunk_of(step: Int[Tensor, " actions"], chunks: Sequence[int]) -> Int[Tensor, " actions"]:
    """The index of the chunk of each action's step; chunks are counted from step 0."""
    return torch.bucketize(step, torch.tensor(list(chunks)).cumsum(0), right=True)


def chunk_sizes(
    actions: Actions, chosen: Bool[Tensor, " actions"], chunks: Sequence[int]
) -> Float[Tensor, " actions"]:
    """For each chosen action, the number of chosen actions of its sample in its chunk; 1 for the others."""
    key = torch.stack([actions.group, actions.sample, chunk_of(actions.step, chunks)], 1)[chosen]
    _, row, number = key.unique(dim=0, return_inverse=True, return_counts=True)
    sizes = torch.ones(len(actions))
    sizes[chosen] = number[row].float()
    return sizes


def action_weights(
    actions: Actions,
    chosen: Bool[Tensor, " actions"],
    needs: LossNeeds,
    transition: Transition,
    interval: Callable[[int, int], Step],
    over_all: SumOverProcesses,
) -> Float[Tensor, " actions"] | None:
    """The factor of each action's advantage: 1 on average over the chosen actions of all processes.

    It is ``step_weight / chunk size``, as far as the loss asks for them; None if it asks for neither.

    Args:
        actions: The actions of this process.
        chosen: Those of the optimizer step.
        needs: What the loss declares.
        transition: The stochastic step.
        interval: The weights of signal and noise between two nodes of the grid.
        over_all: Sums a tensor over all processes.
    """
    if needs.step_weight is None and not needs.chunks:
        return None
    weight = torch.ones(len(actions))
    if needs.step_weight is not None:
        for step in actions.step[chosen].unique().tolist():
            weight[actions.step == step] = needs.step_weight(transition, interval(step, step + 1))
    if needs.chunks:
        weight = weight / chunk_sizes(actions, chosen, needs.chunks)
    total, number = over_all(torch.tensor([float(weight[chosen].sum()), float(chosen.sum())]))
    return weight * (float(number) / float(total)) if total > 0 else weight


def chunk_log_ratios(
    batches: Sequence[Actions], log_ratios: Sequence[Float[Tensor, " _"]], chunks: Sequence[int]
) -> list[Float[Tensor, " _"]]:
    """For each action of each batch, the mean log-ratio of its sample's actions in its chunk.

    Args:
        batches: All actions of an optimizer step that are trained.
        log_ratios: The log-ratio of each of them, on the CPU.
        chunks: Numbers of consecutive steps.
    """
    if not batches:
        return []
    keys = torch.cat(
        [torch.stack([b.group, b.sample, chunk_of(b.step, chunks)], 1) for b in batches]
    )
    _, row, number = keys.unique(dim=0, return_inverse=True, return_counts=True)
    total = torch.zeros(len(number), dtype=torch.float64)
    total.index_add_(0, row, torch.cat(list(log_ratios)).double())
    means = (total / number)[row].float()
    return list(means.split([len(b) for b in batches]))
