"""Sampling branches: one stochastic step from a state of the ODE path, then the ODE to the data.

TempFlow-GRPO and G2RPO collect these. The candidates of a state differ by one injection of noise, so
each candidate judges that one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples, Strides, subgrids
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import Transition
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True)
class BranchPlan:
    """How branches are sampled in one iteration.

    Attributes:
        group_size: Branches per prompt and step.
        num_seeds: Initial noises per prompt; the branches are divided equally among them.
        transition: The stochastic step.
        steps: The steps at which branches leave the ODE path, ascending.
        granularities: Grid intervals per step of the completions.
        strides: How a granularity divides the grid; see :func:`subgrids`.
    """

    group_size: int
    num_seeds: int
    transition: Transition
    steps: Sequence[int]
    granularities: Sequence[int] = (1,)
    strides: Strides = "even"

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt.

        One ODE path per seed up to the last branching step ``k_max``, the forward pass of that step
        included: ``seeds (k_max + 1)`` evaluations. For each branch and step ``k``, the completion on
        the first sub-grid: ``ceil((T - k - 1) / g)`` evaluations with even strides; on every other
        sub-grid one evaluation less, as it starts from the same state. Equal sub-grids count once.
        """
        nfe, decodes = self.num_seeds * (self.steps[-1] + 1), 0
        for step in self.steps:
            grids = subgrids(step + 1, num_steps, self.granularities, self.strides)
            lengths = [len(nodes) - 1 for nodes in grids]
            nfe += self.group_size * (sum(lengths) - len(lengths) + 1)
            decodes += self.group_size * len(lengths)
        return Cost(float(nfe), float(decodes), float(decodes))


def require_branches(group_size: int, seeds: int) -> None:
    """Raise ValueError unless a group's branches are divided evenly among the seeds, at least 2 for each."""
    if seeds < 1 or group_size % seeds or group_size < 2 * seeds:
        raise ValueError(
            f"algorithm.group_size = {group_size} must be a multiple of algorithm.seeds = {seeds}, with at "
            "least 2 branches for each seed to compare"
        )


def collect_branches(
    policy: Policy, groups: Sequence[Group], scorer: Scorer, random: Random, plan: BranchPlan
) -> Experience:
    """Follow the ODE once per seed; at each branching step take one stochastic step per branch, and
    complete it by the ODE.

    All branches of a seed at a step start from one state, so one forward pass serves them, here and
    in training. The candidates of a branch have the branch's step.
    """
    collection = Collection(policy, groups, scorer, plan.transition)
    samples = Samples.of(groups, plan.group_size, random, plan.num_seeds)
    size = plan.group_size // plan.num_seeds
    seeds = samples[::size]
    for rollout in policy.run(
        seeds.prompts,
        seeds.noise,
        nodes=range(plan.steps[-1] + 2),
        record=plan.steps,
        decode=False,
    ):
        # Each seed of this batch has ``size`` consecutive branches.
        branches = samples[rollout.rows.start * size : rollout.rows.stop * size]
        for record in rollout.records:
            x_next = collection.branch(branches, record)
            collection.complete(
                branches,
                x_next,
                record.step + 1,
                step=record.step,
                granularities=plan.granularities,
                strides=plan.strides,
            )
    return collection.experience()
