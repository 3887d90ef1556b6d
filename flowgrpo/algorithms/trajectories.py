"""Whole trajectories: what Flow-GRPO and DanceGRPO collect, and TP-GRPO and VGPO look into."""

from collections.abc import Collection as Several
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.algorithms.collection import Collection, Samples, Watch
from flowgrpo.algorithms.credit import scored_of
from flowgrpo.core.advantages import Advantage, of_scored
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import Transition
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True)
class TrajectoryPlan:
    """How trajectories are sampled.

    Attributes:
        group_size: Samples per prompt.
        transition: The stochastic step.
        stochastic: The stochastic steps, ascending.
        shared_noise: Whether the samples of a group start from the same noise.
        solver: How the steps after the last stochastic one are taken.
        num_after: How many steps are taken there, of about equal parts of the grid; None takes all.
    """

    group_size: int
    transition: Transition
    stochastic: Sequence[int]
    shared_noise: bool
    solver: Solver = "euler"
    num_after: int | None = None

    def nodes(self, num_steps: int) -> list[int]:
        """The grid nodes of a trajectory, from noise to data."""
        begin = self.stochastic[-1] + 1
        left = num_steps - begin
        number = left if self.num_after is None else min(self.num_after, left)
        after = [begin + round(left * i / number) for i in range(1, number + 1)]
        return [*range(begin + 1), *after]

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt: ``G T`` evaluations; ``(k + 1) + G (T - k - 1)`` with shared noise,
        where ``k`` is the first stochastic step and ``T`` the number of steps that are taken."""
        alone = self.stochastic[0] + 1 if self.shared_noise else 0
        nfe = alone + self.group_size * (len(self.nodes(num_steps)) - 1 - alone)
        return Cost(float(nfe), float(self.group_size), float(self.group_size))


def collect_trajectories(
    policy: PipelinePolicy,
    groups: Sequence[Group],
    scorer: RewardScorer,
    random: Random,
    plan: TrajectoryPlan,
    watch: Watch | None = None,
) -> Experience:
    """Sample ``group_size`` trajectories per group, and record every stochastic step.

    ``watch`` sees every batch that goes to the judge.

    Where a group shares its initial noise, its samples are one until the first stochastic step.
    That part is computed once per group, and all samples' first actions share one state.
    """
    collection = Collection(policy, groups, scorer, plan.transition, watch)
    for _ in walk(collection, random, plan):
        pass
    return collection.experience()


def walk(
    collection: Collection, random: Random, plan: TrajectoryPlan, record: Several[int] = ()
) -> Iterator[tuple[Samples, Sequence[StepRecord]]]:
    """Sample trajectories, note their actions, and judge their images.

    Args:
        collection: Where they go.
        random: Keyed by the iteration.
        plan: How to sample.
        record: Steps to visit besides the stochastic ones; none before the first of these.

    Yields:
        What went through the model, to look further into: first, where noise is shared, one sample
        per group at the first stochastic step; then batch by batch the samples and their visits.
    """
    policy, size = collection.policy, plan.group_size
    samples = Samples.of(collection.groups, size, random, 1 if plan.shared_noise else None)
    nodes, x, later = plan.nodes(policy.num_steps()), None, list(plan.stochastic)
    if plan.shared_noise:
        first = later.pop(0)
        nodes = nodes[first + 1 :]
        roots, parted = samples[::size], []
        for rollout in policy.run(
            roots.prompts, roots.noise, nodes=range(first + 2), record=[first], decode=False
        ):
            begin, end = rollout.rows.start, rollout.rows.stop
            parted.append(collection.branch(samples[begin * size : end * size], rollout.records[0]))
            yield roots[begin:end], rollout.records
        x = torch.cat(parted)

    for rollout in policy.run(
        samples.prompts,
        samples.noise,
        nodes=nodes,
        x=x,
        stochastic=later,
        transition=plan.transition,
        record={*later, *record},
        solver=plan.solver,
    ):
        assert rollout.media is not None
        part = samples[rollout.rows.start : rollout.rows.stop]
        collection.submit(part, rollout.media, policy.num_steps() - 1)
        for taken in rollout.records:
            if taken.step in later:
                collection.act(part, taken)
        yield part, rollout.records


def candidate_advantages(
    advantage: Advantage, experience: Experience
) -> Float[Tensor, " candidates"]:
    """The advantage of each of this rank's candidates, with statistics over all ranks.

    Args:
        advantage: The statistics.
        experience: With one candidate per sample.
    """
    scored = scored_of(experience)
    # Groups are whole on one rank, and gathering keeps the order.
    mine = torch.isin(scored.group, experience.candidates.group.unique())
    return of_scored(advantage, scored)[mine]


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


def random_part(
    actions: Actions, stochastic: Sequence[int], fraction: float, random: Random
) -> Int[Tensor, " rows"]:
    """Rows of the actions to train on: of each sample its own random part of the steps.

    Args:
        actions: All of them.
        stochastic: The stochastic steps.
        fraction: Share of these, in (0, 1]; at least one step is kept.
        random: Keyed by the iteration.
    """
    number = max(1, int(len(stochastic) * fraction))
    keys = list(zip(actions.group.tolist(), actions.sample.tolist(), strict=True))
    chosen: dict[tuple[int, int], set[int]] = {}
    for g, s in set(keys):
        order = torch.randperm(len(stochastic), generator=random.generator("fraction", g, s))
        chosen[g, s] = {stochastic[int(i)] for i in order[:number]}
    rows = [
        i
        for i, (k, step) in enumerate(zip(keys, actions.step.tolist(), strict=True))
        if step in chosen[k]
    ]
    return torch.tensor(rows)


def check_fraction(fraction: float) -> None:
    """Raise ValueError if it is no share of the steps."""
    if not 0 < fraction <= 1:
        raise ValueError(f"algorithm.timestep_fraction must be in (0, 1], got {fraction}")
