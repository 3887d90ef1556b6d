"""FIND (arXiv:2407.19453): the distribution of the initial noise is the policy.

The sampler is deterministic and the model frozen, so a sample is one action: its initial noise. No
gradient goes through the model, and training costs next to nothing. It belongs to
``model.weights.kind = "noise"``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.algorithms.trajectories import candidate_advantages, credit_trajectories
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Actions, Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.step_plan import INITIAL
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class FIND:
    """Credit for the initial noise.

    Differs from the paper in what rewards are compared with: the group's own mean here, a value
    function of distribution and prompt that is trained beside it there (its dynamic reward
    calibration), since it draws one sample at a time.
    """

    kind: Literal["find"] = "find"
    group_size: int = 12
    """Samples per prompt, at least 2."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic after the initial noise."""
    solver: Solver = "euler"
    """How samples are drawn."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From rewards to advantages."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Samples, and as actions the noise that each began with."""
        collection = Collection(policy, groups, scorer, self.transition)
        samples, end = Samples.of(groups, self.group_size, random), policy.num_steps()
        gaussian = policy.replay([], torch.zeros(1), INITIAL, self.transition).gaussian
        for rollout in policy.run(samples.prompts, samples.noise, record=[0], solver=self.solver):
            assert rollout.media is not None
            part = samples[rollout.rows.start : rollout.rows.stop]
            collection.submit(part, rollout.media, end - 1)
            (first,) = rollout.records
            size = len(part)
            collection.add(
                Actions(
                    states=torch.zeros_like(first.x[:1]),
                    state=torch.zeros(size, dtype=torch.long),
                    x_next=first.x,
                    step=torch.full((size,), INITIAL),
                    old_log_prob=gaussian.log_prob(first.x).detach().cpu(),
                    group=part.group,
                    sample=part.sample,
                )
            )
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The sample's advantage for its initial noise."""
        advantage = candidate_advantages(self.advantage, experience)
        return credit_trajectories(experience.actions, experience.candidates, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting makes no sense."""
        self.advantage.check()
        if self.group_size < 2:
            raise ValueError(f"algorithm.group_size must be at least 2, got {self.group_size}")

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt: ``G T`` evaluations and ``G`` decodes; training evaluates nothing."""
        size = float(self.group_size)
        return Cost(nfe=size * num_steps, decodes=size, rewards=size)
