"""Earlier groups that are trained on again, with importance weights (after OP-GRPO, arXiv:2604.04142).

With ``mu`` the policy that sampled a trajectory, ``k`` the trained policy at the start of an iteration,
and ``p`` the policy that is trained in it, a replayed action at step ``t`` has the loss::

    w max(-A r_t, -A clip(r_t, 1 - c, 1 + c))       r_t = p(a_t) / k(a_t)
    w = exp( mean over the trajectory's actions of log k(a_t) - log mu(a_t) )

The ratio that is clipped is therefore 1 before the first update, as for fresh actions, and the clip bounds
the change of this iteration. The weight corrects for the policy that sampled: one number per trajectory,
of the geometric mean of its ratios, without gradient.

Published as text are replay of good trajectories, a correction by the sequence that leaves the clip
intact, and that late steps are dropped because their ratios are ill-conditioned. Formulas and numbers are
not public as code; those above and the defaults are this library's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo.config.replay import ReplaySettings
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Actions, Experience, Latents
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.training.replay import Replay

Gather = Callable[[list[Any]], list[Any]]
"""Joins the lists of all processes, in the order of their ranks."""


@dataclass(frozen=True)
class Stored:
    """The kept actions of a group, on the CPU.

    Attributes:
        iteration: When it was sampled.
        prompt: The index of its prompt in the file of training prompts.
        tensors: ``states``; ``state`` and ``next_state``, rows of them; ``step``, ``sample``, ``log_prob``
            under the policy that sampled, and ``advantage`` of each action.
    """

    iteration: int
    prompt: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, actions: Actions, advantage: Tensor, iteration: int, prompt: int) -> "Stored":
        """The actions of one group."""
        tensors = {
            "states": actions.states.joined(),
            "state": actions.state,
            "next_state": actions.next_state,
            "step": actions.step,
            "sample": actions.sample,
            "log_prob": actions.old_log_prob,
            "advantage": advantage,
        }
        return cls(
            iteration, prompt, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        )

    def actions(self, group: int, device: torch.device) -> Actions:
        """The actions as those of a group of this index, with their states on a device."""
        t = self.tensors
        return Actions(
            states=Latents([t["states"].to(device)]),
            state=t["state"],
            next_state=t["next_state"],
            step=t["step"],
            old_log_prob=t["log_prob"],
            group=torch.full_like(t["step"], group),
            sample=t["sample"],
        )


class ReplayBuffer:
    """Groups of earlier iterations; every process holds all of them, so that any can train on any.

    Attributes:
        groups: From the oldest to the newest.
    """

    def __init__(self, settings: ReplaySettings, prompts: Sequence[Prompt]):
        """
        Args:
            settings: What is kept and replayed.
            prompts: The training prompts, in the order of their file.
        """
        self.settings, self.prompts = settings, prompts
        self.groups: list[Stored] = []
        self._index = {id(prompt): i for i, prompt in enumerate(prompts)}

    def drawn(
        self, shape: torch.Size, random: Random, rank: int, num_ranks: int, first: int
    ) -> list[tuple[int, Stored]]:
        """The stored groups that this process trains on in an iteration, with their group indices.

        They are drawn without replacement from the stored groups whose states have the shape of the fresh
        ones. If there are fewer than an iteration replays, none is drawn.

        Args:
            shape: Of one state of this iteration.
            random: Keyed by the iteration.
            rank: This process.
            num_ranks: Number of processes.
            first: The lowest index that no fresh group has.
        """
        alike = [g for g in self.groups if g.tensors["states"].shape[1:] == shape]
        number = self.settings.groups
        if len(alike) < number:
            return []
        order = torch.randperm(len(alike), generator=random.generator("replay"))[:number]
        each = number // num_ranks
        chosen = [(first + i, alike[row]) for i, row in enumerate(order.tolist())]
        return chosen[rank * each : (rank + 1) * each]

    def add(
        self,
        groups: Sequence[Group],
        actions: Actions,
        advantages: Tensor,
        iteration: int,
        last_step: int,
        gather: Gather,
    ) -> None:
        """Store the fresh groups of all processes, and forget the oldest ones beyond the capacity.

        Args:
            groups: The fresh groups of this process.
            actions: Their actions.
            advantages: One per action, or several.
            iteration: In which they were sampled.
            last_step: Steps from this one on are not kept.
            gather: Joins lists of all processes.
        """
        a = actions
        total = advantages if advantages.ndim == 1 else advantages.sum(1)
        good = total > 0 if self.settings.keep == "good" else total != 0
        kept = good & (a.step < last_step)
        own = []
        for group in groups:
            rows = (kept & (a.group == group.index)).nonzero().squeeze(1)
            if len(rows):
                prompt = self._index[id(group.prompt)]
                own.append(Stored.of(a.select(rows), advantages[rows], iteration, prompt))
        self.groups = [*self.groups, *gather(own)][-self.settings.capacity :]

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors for a checkpoint."""
        return {
            f"{i:06d}/{name}": tensor
            for i, g in enumerate(self.groups)
            for name, tensor in {
                **g.tensors,
                "place": torch.tensor([g.iteration, g.prompt]),
            }.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the result of :meth:`state`."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            number, name = key.split("/")
            found.setdefault(number, {})[name] = tensor
        self.groups = []
        for number in sorted(found):
            iteration, prompt = found[number].pop("place").tolist()
            self.groups.append(Stored(iteration, prompt, found[number]))


@dataclass(frozen=True)
class Replayed:
    """An iteration's actions with replayed ones.

    Attributes:
        experience: With further groups and actions.
        advantages: Of all actions; those of replayed ones are multiplied by their weights.
        metrics: What to log.
    """

    experience: Experience
    advantages: Tensor
    metrics: Mapping[str, float]


def with_replayed(
    buffer: ReplayBuffer,
    replay: Replay,
    experience: Experience,
    advantages: Tensor,
    random: Random,
    *,
    iteration: int,
    num_groups: int,
    rank: int,
    num_ranks: int,
    gather: Gather,
) -> Replayed:
    """Add replayed groups to an iteration, and store its fresh groups. All processes call this.

    One forward pass without gradients for each replayed state gives ``log k``, and the means where the loss
    needs them.

    Args:
        buffer: The earlier groups.
        replay: Evaluates actions with the present weights.
        experience: Fresh actions of this process.
        advantages: Of the fresh actions.
        random: Keyed by the iteration.
        iteration: Counted from 0.
        num_groups: Fresh groups of all processes.
        rank: This process.
        num_ranks: Number of processes.
        gather: Joins lists of all processes.
    """
    policy, fresh = replay.policy, experience.actions
    one = fresh.states[0]
    drawn = buffer.drawn(one.shape, random, rank, num_ranks, num_groups)
    found = Replayed(experience, advantages, {"replay/groups": 0.0})
    if drawn:
        groups, now, own, weights = _reweighted(buffer, replay, experience, drawn)
        ages = [float(iteration - g.iteration) for _, g in drawn]
        found = Replayed(
            replace(
                experience,
                groups=[*experience.groups, *groups],
                actions=Actions.concatenate([fresh, now]),
            ),
            torch.cat([advantages, own.to(advantages.device)]),
            _metrics(gather(ages), gather(weights)),
        )
    last_step = policy.num_steps() - buffer.settings.skip_last
    buffer.add(experience.groups, fresh, advantages, iteration, last_step, gather)
    return found


def _reweighted(
    buffer: ReplayBuffer,
    replay: Replay,
    experience: Experience,
    drawn: Sequence[tuple[int, Stored]],
) -> tuple[list[Group], Actions, Tensor, list[float]]:
    """Drawn groups, their actions under the present weights, weighted advantages, and the weights.

    The weights are one for each trajectory.
    """
    device = experience.actions.states[0].device
    groups = [Group(index, buffer.prompts[g.prompt]) for index, g in drawn]
    stored = Actions.concatenate([g.actions(index, device) for index, g in drawn])
    now = evaluated(replay, replace(experience, groups=groups, actions=stored))
    each, row = sequence_weights(now.old_log_prob - stored.old_log_prob, stored)
    each = each.clamp(max=buffer.settings.max_weight)
    own = torch.cat([g.tensors["advantage"] for _, g in drawn])
    weight = each[row].to(own.dtype)
    return groups, now, own * (weight if own.ndim == 1 else weight[:, None]), each.tolist()


def _metrics(ages: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
    """What to log about the replayed groups and trajectories of all processes."""
    return {
        "replay/groups": float(len(ages)),
        "replay/age": sum(ages) / len(ages),
        "replay/weight": sum(weights) / len(weights),
        "replay/largest_weight": max(weights),
    }


def evaluated(replay: Replay, experience: Experience) -> Actions:
    """The actions with the log-probabilities, and the means if they are kept, of the present weights."""
    policy, actions = replay.policy, experience.actions
    number = len(actions)
    log_prob, means = torch.empty(number), [torch.empty(0)] * number
    every = torch.ones(number, dtype=torch.bool)
    with torch.no_grad(), policy.together():
        for batch, rows in replay.batches(experience, torch.arange(number), every):
            gaussian = replay.record(experience, batch).gaussian
            _, state = batch.starts()
            own = replace(gaussian, mean=gaussian.mean[state.to(gaussian.mean.device)])
            log_prob[rows] = own.log_prob(batch.x_next.to(own.mean.device)).cpu().float()
            if policy.keeps_means:
                for row, mean in zip(rows.tolist(), own.mean, strict=True):
                    means[row] = mean
    return replace(
        actions,
        old_log_prob=log_prob,
        old_mean=torch.stack(means) if policy.keeps_means else None,
    )


def sequence_weights(log_ratio: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """For each trajectory, ``exp`` of the mean log-ratio of its actions; and each action's trajectory."""
    key = torch.stack([actions.group, actions.sample], 1)
    _, row = key.unique(dim=0, return_inverse=True)
    number = torch.bincount(row).to(log_ratio)
    total = torch.zeros_like(number).index_add_(0, row, log_ratio)
    return (total / number).exp(), row
