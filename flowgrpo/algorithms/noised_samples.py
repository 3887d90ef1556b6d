"""Training on the forward process: finished samples, and noised versions of them as actions.

DiffusionNFT and the matching methods share it. An action's state is a finished sample with noise at a
time of the sampling grid, and its ``x_next`` is the sample itself. It has no density.
"""

from collections.abc import Callable, Sequence
from collections.abc import Collection as Container
from typing import TypeAlias

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.tensors import torch
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group

Times: TypeAlias = Callable[[int, int], Container[int]]
"""Maps a group's index and a sample's index to the grid nodes at which the sample is trained."""


def collect_noised_samples(
    policy: Policy,
    groups: Sequence[Group],
    scorer: Scorer,
    random: Random,
    plan: TrajectoryPlan,
    times: Times,
    *,
    shared_noise: bool = False,
    guidance: Sequence[float] = (),
) -> Experience:
    """Sample, score, and record a noised version of each sample at each of its times.

    Args:
        policy: The policy that is sampled.
        groups: The prompts.
        scorer: Scores the images.
        random: Keyed by the iteration.
        plan: How to sample; without stochastic steps.
        times: The times of each sample.
        shared_noise: Whether the samples of a group get the same noise at the same time.
        guidance: Guidance scales; each noised sample becomes an action for each. If empty, one action
            with the guidance of ``sampling``.
    """
    collection = Collection(policy, groups, scorer, plan.transition)
    end = policy.num_steps()
    for samples, records in sample_trajectories(collection, random, plan, record=[end - 1]):
        (last,) = records
        # The step streams of a sample are unused, because no step of the rollout was stochastic.
        noise = samples.noise
        if shared_noise:
            noise = SampleNoise([random.at("shared_noise", g.index) for g in samples.groups])
        chosen = [times(g.index, i) for g, i in zip(samples.groups, samples.numbers, strict=True)]
        for step in range(end):
            rows = [row for row, own in enumerate(chosen) if step in own]
            if rows:
                own, index = samples.take(rows), torch.tensor(rows)
                fresh = noise.at_step(step, last.x_next.shape[1:]).to(last.x_next.device)
                interval, data = policy.scheduler.interval(step, step + 1), last.x_next[index]
                # The state before the action is the sample with noise added as at the node.
                x = interval.signal * data + interval.noise * interval.noise_scale * fresh[index]
                for scale in guidance or (None,):
                    collection.add_actions(
                        own, step, x=x, x_next=last.x_next, next_row=index, guidance=scale
                    )
    return collection.experience()
