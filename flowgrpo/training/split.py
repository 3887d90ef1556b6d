"""Divides the actions of an iteration among its optimizer steps.

Each function returns, for every action, the optimizer step that trains on it, counted from 0. The
division depends on group, sample and step of an action and on the seed, and neither on the number of
processes nor on the order in which actions were collected.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgrpo.core.random import Random
from flowgrpo.data.experience import Actions


def split_groups(
    actions: Actions, updates: int, num_groups: int, random: Random
) -> Int[Tensor, " actions"]:
    """Whole groups, one of every ``updates`` consecutive groups for each optimizer step.

    A process has consecutive groups, and their number is a multiple of ``updates``
    (``Config.check``). Every optimizer step therefore trains on equally many groups of each process,
    and no process waits for another. Which of the consecutive groups an optimizer step gets is random.

    Args:
        actions: The actions of this process.
        updates: Number of optimizer steps.
        num_groups: Groups of the iteration on all processes.
        random: Keyed by the iteration.
    """
    generator = random.generator("updates")
    blocks = [torch.randperm(updates, generator=generator) for _ in range(0, num_groups, updates)]
    return torch.cat(blocks)[actions.group]


def split_samples(actions: Actions, updates: int, random: Random) -> Int[Tensor, " actions"]:
    """An equal number of each group's samples, in random order, with all their actions."""
    update_of = torch.zeros(len(actions), dtype=torch.long)
    for group in actions.group.unique().tolist():
        rows = (actions.group == group).nonzero().squeeze(1)
        samples, sample = actions.sample[rows].unique(return_inverse=True)
        generator = random.generator("updates", group)
        update_of[rows] = torch.randperm(len(samples), generator=generator)[sample] % updates
    return update_of


def split_steps(
    actions: Actions, updates: int, steps: Int[Tensor, " steps"]
) -> Int[Tensor, " actions"]:
    """Equal numbers of denoising steps, from noise to data.

    Args:
        actions: The actions of this process.
        updates: Number of optimizer steps.
        steps: The trained steps on all processes, ascending.
    """
    return torch.searchsorted(steps, actions.step.contiguous()) * updates // len(steps)


def split_actions(actions: Actions, updates: int, random: Random) -> Int[Tensor, " actions"]:
    """Equal numbers of each group's actions, in random order."""
    update_of = torch.zeros(len(actions), dtype=torch.long)
    for group in actions.group.unique().tolist():
        rows = (actions.group == group).nonzero().squeeze(1)
        rows = rows[actions.sample[rows].argsort(stable=True)]
        rows = rows[actions.step[rows].argsort(stable=True)]  # by step, then by sample
        generator = random.generator("updates", group)
        # A group continues where the group before it ended, so that the updates are of one size.
        position = torch.randperm(len(rows), generator=generator) + len(rows) * group
        update_of[rows] = position % updates
    return update_of


def has_advantage(
    actions: Actions, advantages: Float[Tensor, "actions *rewards"]
) -> Bool[Tensor, " actions"]:
    """Whether any action of each action's sample has an advantage other than 0."""
    key = torch.stack([actions.group, actions.sample], 1)
    samples, sample = key.unique(dim=0, return_inverse=True)
    size = torch.zeros(len(samples), dtype=advantages.dtype)
    size.index_add_(
        0, sample, advantages.abs() if advantages.ndim == 1 else advantages.abs().sum(1)
    )
    return size[sample] > 0
