"""Sampling whole trajectories: the plan, and the loop that Flow-GRPO, DanceGRPO, MixGRPO, TP-GRPO,
VGPO and DiffusionNFT share."""

from collections.abc import Collection as Container
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.collection import Collection, OnBatch, Samples
from flowgrpo.algorithms.previews import Previews, choose
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import Solver
from flowgrpo.core.tensors import Int, Tensor, torch
from flowgrpo.core.transitions import Transition
from flowgrpo.data.experience import Actions, Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy.settings import Sampling
from flowgrpo.policy.step_plan import StepRecord


@dataclass(frozen=True)
class TrajectoryPlan:
    """How trajectories are sampled in one iteration.

    Attributes:
        group_size: Samples per prompt.
        transition: The stochastic step.
        steps: The stochastic steps, ascending; empty for deterministic samples.
        shared_noise: Whether the samples of a group start from the same noise. Needs a stochastic
            step.
        solver: Solver of the steps after the last stochastic one.
        num_after: Number of steps that are taken after the last stochastic one, of about equal parts
            of the grid; None takes all steps of the grid.
        noise_last: Whether the last step of the grid is stochastic as well; it is not trained.
        previews: Previews that choose the initial noises; none if their number is 0.
        guidance: Guidance scale of deterministic samples; None for that of ``sampling``.
    """

    group_size: int
    transition: Transition
    steps: Sequence[int]
    shared_noise: bool = False
    solver: Solver = "euler"
    num_after: int | None = None
    noise_last: bool = False
    previews: Previews = field(default_factory=Previews)
    guidance: float | None = None

    def nodes(self, num_steps: int) -> list[int]:
        """The grid nodes of a trajectory, from noise to data."""
        begin = self.steps[-1] + 1 if self.steps else 0
        left = num_steps - begin
        number = left if self.num_after is None else min(self.num_after, left)
        after = [begin + round(left * i / number) for i in range(1, number + 1)]
        return [*range(begin + 1), *after]

    def sampling(self, own: Sampling) -> Sampling:
        """The arguments of the pipeline's call: the policy's own, with the guidance of the plan."""
        return own if self.guidance is None else replace(own, guidance_scale=self.guidance)

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt: ``G T`` evaluations, or ``(k + 1) + G (T - k - 1)`` with shared noise,
        where ``k`` is the first stochastic step and ``T`` the number of steps that are taken; previews
        add their own."""
        shared = self.steps[0] + 1 if self.shared_noise else 0
        nfe = shared + self.group_size * (len(self.nodes(num_steps)) - 1 - shared)
        more, size = self.previews.cost(), float(self.group_size)
        return Cost(nfe + more.nfe, size + more.decodes, size + more.rewards)


def collect_trajectories(
    policy: Policy,
    groups: Sequence[Group],
    scorer: Scorer,
    random: Random,
    plan: TrajectoryPlan,
    on_batch: OnBatch | None = None,
) -> Experience:
    """Sample ``group_size`` trajectories per group, and record every stochastic step.

    If a group shares its initial noise, its samples are identical until the first stochastic step.
    That part is computed once per group, and the first actions of all its samples share one state.

    Args:
        policy: The policy that is sampled.
        groups: The prompts.
        scorer: Scores the images.
        random: Keyed by the iteration.
        plan: How to sample.
        on_batch: Called with every batch that is scored.
    """
    collection = Collection(policy, groups, scorer, plan.transition, on_batch)
    for _ in sample_trajectories(collection, random, plan):
        pass
    return collection.experience()


def sample_trajectories(
    collection: Collection,
    random: Random,
    plan: TrajectoryPlan,
    record: Container[int] = (),
    groups: Sequence[Group] | None = None,
) -> Iterator[tuple[Samples, Sequence[StepRecord]]]:
    """Sample trajectories, record their actions, and score their images.

    Args:
        collection: Receives actions and images.
        random: Keyed by the iteration.
        plan: How to sample.
        record: Steps to record besides the stochastic ones; none before the first stochastic step.
        groups: The groups that are sampled; None for all of the collection.

    Yields:
        The recorded steps, for algorithms that decode further candidates from them: first, if noise
        is shared, one sample per group at the first stochastic step; then each batch of samples.
    """
    policy, size = collection.policy, plan.group_size
    groups = collection.groups if groups is None else groups
    seeds = _preview(collection, random, plan, groups) if plan.previews.number else None
    samples = Samples.of(groups, size, random, 1 if plan.shared_noise else None, seeds)
    nodes, x, later = plan.nodes(policy.num_steps()), None, list(plan.steps)
    if plan.shared_noise:
        # One sample per group runs up to the first stochastic step, then all samples branch.
        first = later.pop(0)
        nodes = nodes[first + 1 :]
        roots, states = samples[::size], []
        for rollout in policy.run(
            roots.prompts, roots.noise, nodes=range(first + 2), record=[first], decode=False
        ):
            begin, end = rollout.rows.start, rollout.rows.stop
            states.append(collection.branch(samples[begin * size : end * size], rollout.records[0]))
            yield roots[begin:end], rollout.records
        x = torch.cat(states)

    for rollout in policy.run(
        samples.prompts,
        samples.noise,
        nodes=nodes,
        x=x,
        stochastic={*later, policy.num_steps() - 1} if plan.noise_last else later,
        transition=plan.transition,
        record={*later, *record},
        sampling=plan.sampling(policy.sampling),
        solver=plan.solver,
    ):
        assert rollout.media is not None
        part = samples[rollout.rows.start : rollout.rows.stop]
        collection.submit(part, rollout.media, policy.num_steps() - 1, audio=rollout.audio)
        for taken in rollout.records:
            if taken.step in later:
                collection.add_step(part, taken)
        yield part, rollout.records


def _preview(
    collection: Collection, random: Random, plan: TrajectoryPlan, groups: Sequence[Group]
) -> Mapping[int, Sequence[int]]:
    """The numbers of the initial noises that previews choose, by the index of their group."""
    policy = collection.policy
    args = policy, groups, collection.scorer, random, plan.previews, plan.group_size, plan.solver
    chosen = choose(*args, plan.sampling(policy.sampling))
    # Groups with other stochastic steps are sampled by a call of their own.
    collection.chosen = chosen.joined(collection.chosen)
    return chosen.seeds


def random_fraction(
    actions: Actions, steps: Sequence[int], fraction: float, random: Random
) -> Int[Tensor, " rows"]:
    """Rows of the actions to train on: a random part of the steps, drawn for each sample.

    Args:
        actions: All actions.
        steps: The stochastic steps.
        fraction: Share of these steps, in (0, 1]; at least one step is kept.
        random: Keyed by the iteration.
    """
    number = max(1, int(len(steps) * fraction))
    keys = list(zip(actions.group.tolist(), actions.sample.tolist(), strict=True))
    chosen: dict[tuple[int, int], set[int]] = {}
    for g, s in set(keys):
        order = torch.randperm(len(steps), generator=random.generator("fraction", g, s))
        chosen[g, s] = {steps[int(i)] for i in order[:number]}
    rows = [
        i
        for i, (k, step) in enumerate(zip(keys, actions.step.tolist(), strict=True))
        if step in chosen[k]
    ]
    return torch.tensor(rows)


def check_fraction(fraction: float) -> None:
    """Raise ValueError if a timestep fraction is not in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"algorithm.timestep_fraction must be in (0, 1], got {fraction}")
