"""One stochastic step from a shared state, completed by the ODE: what TempFlow-GRPO and G2RPO collect.

Each candidate then differs from its rivals by one injection of noise, and judges that one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.collection import Collection, Samples, Strides, subgrids
from flowgrpo.algorithms.credit import candidates_of, scored_of
from flowgrpo.core.advantages import Advantage, of_scored
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import Transition
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True)
class BranchPlan:
    """How branches are sampled.

    Attributes:
        group_size: Branches per prompt and step.
        num_seeds: Initial noises per prompt, each with its equal share of the branches.
        transition: The stochastic step.
        steps: The steps that are branched at, ascending.
        granularities: Grid intervals per step of the completions.
        strides: How a granularity takes the grid; see :func:`subgrids`.
    """

    group_size: int
    num_seeds: int
    transition: Transition
    steps: Sequence[int]
    granularities: Sequence[int] = (1,)
    strides: Strides = "even"

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt.

        One path per seed to the last branching step ``k_max``, that step's forward pass included:
        ``seeds (k_max + 1)``. Per branch and step ``k`` the completion on the first sub-grid, in
        ``ceil((T - k - 1) / g)`` evaluations with even strides; on each other one in one less, as it
        begins in the same state. Equal sub-grids count once.
        """
        nfe, decodes = self.num_seeds * (self.steps[-1] + 1), 0
        for step in self.steps:
            grids = subgrids(step + 1, num_steps, self.granularities, self.strides)
            lengths = [len(nodes) - 1 for nodes in grids]
            nfe += self.group_size * (sum(lengths) - len(lengths) + 1)
            decodes += self.group_size * len(lengths)
        return Cost(float(nfe), float(decodes), float(decodes))


def collect_branches(
    policy: PipelinePolicy,
    groups: Sequence[Group],
    scorer: RewardScorer,
    random: Random,
    plan: BranchPlan,
) -> Experience:
    """Follow the ODE once per seed; from each branching step take one stochastic step per branch,
    and complete it by the ODE.

    All branches of a seed at a step start in one state, so one forward pass serves them, here and in
    training. A branch's candidates have its step.
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


def credit_branches(
    experience: Experience, advantage: Advantage, branches_per_seed: int
) -> Float[Tensor, " actions"]:
    """The sum, over granularities, of how much better a branch is than those from its state.

    Each comparison is among the branches of one seed at one step and granularity. A candidate whose
    reward failed adds nothing. Kinds of advantage with statistics over the batch have them over all
    candidates, of every step and granularity.
    """
    a, c = experience.actions, candidates_of(experience)
    rivals = torch.stack([c.group, c.sample // branches_per_seed, c.step, c.granularity])
    labels = torch.unique(rivals, dim=1, return_inverse=True)[1]
    worth = of_scored(advantage, replace(scored_of(experience), group=labels))
    sums: dict[tuple[int, ...], float] = {}
    for *key, value in zip(*(v.tolist() for v in (c.group, c.sample, c.step, worth)), strict=True):
        sums[tuple(key)] = sums.get(tuple(key), 0.0) + value
    keys = zip(a.group.tolist(), a.sample.tolist(), a.step.tolist(), strict=True)
    return torch.tensor([sums[key] for key in keys])
