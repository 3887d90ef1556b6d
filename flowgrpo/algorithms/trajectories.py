"""Whole trajectories, one candidate each: what Flow-GRPO and DanceGRPO collect."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import Gaussian, Transition
from flowgrpo.experience import Actions, Candidates, Cost, Experience, Group
from flowgrpo.judge import Judge, Scores
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.scheduler import Visit


@dataclass(frozen=True)
class TrajectoryPlan:
    """How trajectories are sampled.

    Attributes:
        group_size: Samples per prompt.
        transition: The stochastic step.
        stochastic: The stochastic steps, ascending.
        shared_noise: Whether the samples of a group start from the same noise.
    """

    group_size: int
    transition: Transition
    stochastic: Sequence[int]
    shared_noise: bool


def collect_trajectories(
    policy: PipelinePolicy,
    groups: Sequence[Group],
    judge: Judge,
    random: Random,
    plan: TrajectoryPlan,
) -> Experience:
    """Sample ``group_size`` trajectories per group, and record every stochastic step.

    Where a group shares its initial noise, its samples are one until the first stochastic step.
    That part is computed once per group, and all samples' first actions share one state.
    """
    judge.reset()
    evaluations, decodes = policy.num_evaluations, policy.num_decodes
    owners = [(g, i) for g in groups for i in range(plan.group_size)]
    shared = [random.at("group", g.index) for g, _ in owners] if plan.shared_noise else None
    noise = SampleNoise([random.at("group", g.index, i) for g, i in owners], shared)
    group = torch.tensor([g.index for g, _ in owners])
    sample = torch.tensor([i for _, i in owners])
    actions: list[Actions] = []
    nodes, x, first = None, None, plan.stochastic[0]
    if plan.shared_noise:
        x, first_actions = _first_step(policy, groups, noise, plan, group, sample)
        actions.append(first_actions)
        nodes = range(first + 1, policy.num_steps() + 1)

    later = [s for s in plan.stochastic if nodes is None or s >= nodes[0]]
    scores: list[Future[Scores]] = []
    thumbnails: list[Tensor] = []
    rollouts = policy.run(
        [g.prompt for g, _ in owners],
        noise,
        nodes=nodes,
        x=x,
        stochastic=later,
        transition=plan.transition,
        record=later,
    )
    for rollout in rollouts:
        assert rollout.media is not None
        rows = slice(rollout.rows.start, rollout.rows.stop)
        scores.append(judge.submit(rollout.media, [g.prompt for g, _ in owners[rows]]))
        thumbnails.append(thumbnail(rollout.media))
        actions += [
            _recorded(visit, group[rows], sample[rows], policy.keeps_means)
            for visit in rollout.visits
        ]

    small = torch.cat(thumbnails).view(len(groups), plan.group_size, -1)
    candidates = _scored([s.result() for s in scores], group, sample, policy.num_steps() - 1)
    return Experience(
        groups=groups,
        transition=plan.transition,
        actions=Actions.concatenate(actions),
        candidates=candidates,
        cost=Cost(
            nfe=(policy.num_evaluations - evaluations) / len(groups),
            decodes=(policy.num_decodes - decodes) / len(groups),
        ),
        all_rewards=candidates.reward,
        diversity=small.std(1, correction=0).mean(1),
        duplicates=torch.tensor([float(len(g) - len(g.unique(dim=0))) for g in small]),
    )


def _scored(
    scores: Sequence[Scores],
    group: Int[Tensor, " samples"],
    sample: Int[Tensor, " samples"],
    last_step: int,
) -> Candidates:
    """One candidate per trajectory, from the scores of all batches."""
    return Candidates(
        group=group,
        sample=sample,
        step=torch.full_like(group, last_step),
        scores={name: torch.cat([s.raw[name] for s in scores]) for name in scores[0].raw},
        reward=torch.cat([s.reward for s in scores]),
    )


def thumbnail(
    media: Float[Tensor, "batch *frames channels height width"],
) -> Float[Tensor, "batch pixels"]:
    """8x8 averages of an image, or of the middle frame of a video, to compare samples by."""
    image = media[:, media.shape[1] // 2] if media.ndim == 5 else media
    return F.adaptive_avg_pool2d(image, 8).flatten(1)


def _first_step(
    policy: PipelinePolicy,
    groups: Sequence[Group],
    noise: SampleNoise,
    plan: TrajectoryPlan,
    group: Int[Tensor, " samples"],
    sample: Int[Tensor, " samples"],
) -> tuple[Float[Tensor, "samples *latent"], Actions]:
    """Follow the ODE once per group to the first stochastic step, and take that step per sample."""
    first, size = plan.stochastic[0], plan.group_size
    one_each = SampleNoise(
        noise.streams[::size], noise.initial_streams[::size] if noise.initial_streams else None
    )
    means, states, std, normalised = [], [], 0.0, True
    for rollout in policy.run(
        [g.prompt for g in groups],
        one_each,
        nodes=range(first + 2),
        stochastic=[first],
        transition=plan.transition,
        record=[first],
        decode=False,
    ):
        (visit,) = rollout.visits
        means.append(visit.gaussian.mean)
        states.append(visit.x)
        std, normalised = visit.gaussian.std, visit.gaussian.normalised
    gaussian = Gaussian(torch.cat(means).repeat_interleave(size, dim=0), std, normalised)
    fresh = noise.at_step(first, gaussian.mean.shape[1:]).to(gaussian.mean.device)
    x_next = gaussian.sample(fresh)
    actions = Actions(
        states=torch.cat(states),
        state=torch.arange(len(groups)).repeat_interleave(size),
        x_next=x_next,
        step=torch.full((len(group),), first),
        old_log_prob=gaussian.log_prob(x_next).cpu(),
        group=group,
        sample=sample,
        old_mean=gaussian.mean if policy.keeps_means else None,
    )
    return x_next, actions


def _recorded(
    visit: Visit, group: Int[Tensor, " batch"], sample: Int[Tensor, " batch"], keeps_means: bool
) -> Actions:
    return Actions(
        states=visit.x,
        state=torch.arange(len(group)),
        x_next=visit.x_next,
        step=torch.full((len(group),), visit.step),
        old_log_prob=visit.gaussian.log_prob(visit.x_next).cpu(),
        group=group,
        sample=sample,
        old_mean=visit.gaussian.mean if keeps_means else None,
    )


def credit_trajectories(
    actions: Actions, candidates: Candidates, advantage: Float[Tensor, " candidates"]
) -> Float[Tensor, " actions"]:
    """Every action of a trajectory gets the advantage of the trajectory's one candidate."""
    owner = {
        (int(g), int(s)): i
        for i, (g, s) in enumerate(zip(candidates.group, candidates.sample, strict=True))
    }
    rows = [owner[int(g), int(s)] for g, s in zip(actions.group, actions.sample, strict=True)]
    return advantage[torch.tensor(rows)]
