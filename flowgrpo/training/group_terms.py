"""The first of two passes over groups that are larger than a batch.

A loss that couples a group through one number per action gets this number for all actions of the group
before it is called for a part of them. The pass has no gradients and the same weights as the second.
"""

from collections.abc import Sequence

import torch

from flowgrpo.data.experience import Experience
from flowgrpo.losses.base import WholeGroups
from flowgrpo.training.replay import Batch, Replay


def whole_groups(
    replay: Replay,
    experience: Experience,
    batches: Sequence[Batch],
    first_update: bool,
) -> list[WholeGroups | None]:
    """For each batch that holds a part of a group, the terms of the whole group; None for the others.

    All processes call this. It costs one evaluation of the trained policy, and of the old policy if the
    loss needs one, for each state of a divided group.

    Args:
        replay: Evaluates batches.
        experience: The actions of this process.
        batches: Actions of one step, with their advantages and the reference's outputs if the loss needs them.
            One that holds a part of a group holds no other.
        first_update: Whether no optimizer step has been taken since the actions were sampled.
    """
    # A group is compared at one time and with one guidance scale, as in a batch that holds all of it.
    parts: dict[tuple[int, float | None, int], list[int]] = {}
    for i, actions in enumerate(b.actions for b in batches):
        scale = None if actions.guidance is None else float(actions.guidance[0])
        for group in actions.group.unique().tolist():
            parts.setdefault((int(actions.step[0]), scale, group), []).append(i)
    divided = {i: found[0] for found in parts.values() if len(found) > 1 for i in found}
    gathered: dict[int, list[WholeGroups]] = {}
    with torch.no_grad(), replay.policy.together():
        for i, batch in enumerate(batches):
            if i not in divided:
                continue
            inputs = replay.inputs(experience, batch, first_update)
            assert inputs.has_reward is not None
            term = replay.loss.group_term(inputs).detach()
            part = WholeGroups(term, inputs.advantage, inputs.group, inputs.has_reward)
            gathered.setdefault(divided[i], []).append(part)
    joined = {
        first: WholeGroups(
            *(
                torch.cat([getattr(p, k) for p in found])
                for k in ("term", "advantage", "group", "known")
            )
        )
        for first, found in gathered.items()
    }
    return [joined[divided[i]] if i in divided else None for i in range(len(batches))]
