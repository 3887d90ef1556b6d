"""The states of an iteration on which the distance of the policy from the reference is measured."""

from collections.abc import Callable
from typing import Any

import torch

from flowgrpo.data.experience import Actions, Experience
from flowgrpo.policy.arguments import call_key


def monitored(
    experience: Experience, limit: int, of_all: Callable[[list[Any]], list[Any]]
) -> list[Actions]:
    """The actions from this process's share of the monitored states, as one batch or none.

    Monitored are the first states, by group and sample, of the denoising step with which the iteration
    begins. They share a call of the pipeline.

    Args:
        experience: The experience of this process.
        limit: Number of states on all processes.
        of_all: Joins the lists of all processes.
    """
    actions = experience.actions
    key = {g.index: call_key(g.prompt) for g in experience.groups}
    # Those of the first action on all processes.
    step, first = of_all([(int(actions.step[0]), key[int(actions.group[0])])])[0]
    alike = torch.tensor([i for i, k in key.items() if k == first])
    rows = ((actions.step == step) & torch.isin(actions.group, alike)).nonzero().squeeze(1)
    found = {
        int(actions.state[i]): (int(actions.group[i]), int(actions.sample[i]))
        for i in reversed(rows.tolist())
    }
    last = sorted(of_all(list(found.values())))[:limit][-1]
    chosen = sorted(state for state, place in found.items() if place <= last)[:limit]
    own = torch.isin(actions.state, torch.tensor(chosen)).nonzero().squeeze(1)
    return [actions.select(own)] if chosen else []
