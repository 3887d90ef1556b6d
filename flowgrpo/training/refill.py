"""Replaces groups of equal rewards, which carry no training signal, by groups of further prompts.

An iteration has ``train.groups`` places, and each process owns some of them. In a round, every place
whose group is flat gets a further prompt, which is sampled and scored. The prompt and the noise of a
place depend on seed, iteration, round and place only, so that neither the number of processes nor a
resume changes them. All processes take part in the same rounds, also those without a flat group.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from flowgrpo.core.group_statistics import zero_variance_groups
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group

Collect = Callable[[Sequence[Group]], Experience]
"""Samples and scores groups."""


def refilled(
    experience: Experience,
    rounds: int,
    further: Callable[[int], Sequence[Group]],
    collect: Collect,
    gather: Callable[[Tensor], Tensor],
    num_groups: int,
    together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Experience, int]:
    """Replace flat groups until none is left, or for a number of rounds.

    Args:
        experience: What the first prompts gave, with groups numbered by their places.
        rounds: The most rounds.
        further: Maps a round, from 1, to this process's further groups, one for each of its places.
        collect: Samples and scores groups.
        gather: Concatenates a tensor of each process.
        num_groups: Places of all processes.
        together: Enters a context in which processes without further groups wait for the others.

    Returns:
        The experience, with as many groups, and the number of groups that were replaced on all
        processes. After the last round, flat groups remain.
    """
    replaced = 0
    for number in range(1, rounds + 1):
        flat = flat_groups(experience)
        left = int(gather(torch.tensor([len(flat)])).sum())
        if left == 0:
            break
        replaced += left
        # An index that no other group of the iteration has, so that its noise is its own.
        groups = [
            Group(g.index + number * num_groups, g.prompt)
            for g in further(number)
            if g.index in flat
        ]
        with together():
            more = collect(groups) if groups else None
        if more is not None:
            experience = merged(experience, flat, more, num_groups)
    return experience, replaced


def flat_groups(experience: Experience) -> set[int]:
    """The indices of the groups whose candidates all have equal rewards, or fewer than two have one."""
    c = experience.candidates
    flags = zero_variance_groups(c.reward, c.group)
    return {int(g) for g in c.group.unique()[flags]}


def merged(
    experience: Experience, dropped: Collection[int], more: Experience, num_groups: int
) -> Experience:
    """The experience without some groups, and with others in their places.

    Args:
        experience: With groups numbered by their places.
        dropped: The indices of the groups to leave out.
        more: The groups that replace them; the index modulo ``num_groups`` is the place.
        num_groups: Places of all processes.
    """
    gone = torch.tensor(sorted(dropped))
    a, c = experience.actions, experience.candidates
    kept_actions = (~torch.isin(a.group, gone)).nonzero().squeeze(1)
    kept = ~torch.isin(c.group, gone)
    place = {g.index % num_groups: i for i, g in enumerate(more.groups)}
    here = {g.index: i for i, g in enumerate(experience.groups)}
    number, added = len(experience.groups), len(more.groups)

    def by_place(old: Tensor, new: Tensor) -> Tensor:
        rows = [new[place[g]] if g in place else old[i] for g, i in here.items()]
        return torch.stack(rows)

    def total(old: float, new: float) -> float:
        return old + new * added / number

    media = None
    if experience.media is not None and more.media is not None:
        media = torch.cat([experience.media[kept], more.media])
    return replace(
        experience,
        groups=[
            Group(g.index, more.groups[place[g.index]].prompt) if g.index in place else g
            for g in experience.groups
        ],
        actions=Actions.concatenate(
            [
                a.select(kept_actions),
                replace(more.actions, group=more.actions.group % num_groups),
            ]
        ),
        candidates=Candidates.concatenate(
            [c.select(kept), replace(more.candidates, group=more.candidates.group % num_groups)]
        ),
        # The work for groups that were dropped has been done as well.
        cost=Cost(
            nfe=total(experience.cost.nfe, more.cost.nfe),
            decodes=total(experience.cost.decodes, more.cost.decodes),
            rewards=total(experience.cost.rewards, more.cost.rewards),
        ),
        diversity=by_place(experience.diversity, more.diversity),
        duplicates=by_place(experience.duplicates, more.duplicates),
        step_std={**experience.step_std, **more.step_std},
        media=media,
        by_group={k: by_place(v, more.by_group[k]) for k, v in experience.by_group.items()},
    )
