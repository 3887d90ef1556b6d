"""DiffusionNFT (arXiv:2509.16117): no density, no stochastic steps, no trajectory.

Samples come from any deterministic solver. Training adds noise to them anew, and the model learns to
predict good samples and to avoid bad ones. It belongs to the loss ``nft``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.algorithms.trajectories import (
    candidate_advantages,
    check_fraction,
    credit_trajectories,
)
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Actions, Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT:
    """Sample-level credit on the forward process."""

    kind: Literal["diffusion_nft"] = "diffusion_nft"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    solver: Solver = "dpm_2m"
    """How samples are drawn."""
    timestep_fraction: float = 0.99
    """Share of the grid's times that each sample is trained at, in (0, 1], at random."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(std="batch"))
    """From rewards to advantages; the loss makes a number in [0, 1] of them."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Samples, and as actions their noised versions.

        An action's ``states`` row is the sample with noise at time ``step`` of the grid, its
        ``x_next`` the sample itself. It has no density; ``old_log_prob`` is 0.
        """
        collection = Collection(policy, groups, scorer, self.transition)
        samples, end = Samples.of(groups, self.group_size, random), policy.num_steps()
        for rollout in policy.run(
            samples.prompts, samples.noise, record=[end - 1], solver=self.solver
        ):
            assert rollout.media is not None
            part = samples[rollout.rows.start : rollout.rows.stop]
            collection.submit(part, rollout.media, end - 1)
            (last,) = rollout.records
            times = [self._times(end, random, g.index, i) for g, i in zip(part.groups, part.numbers, strict=True)]  # fmt: skip
            for step in range(end):
                rows = [row for row, chosen in enumerate(times) if step in chosen]
                if rows:
                    collection.add(_noised(policy, part, last.x_next, step, torch.tensor(rows)))
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The sample's advantage at each time that it is trained at."""
        advantage = candidate_advantages(self.advantage, experience)
        return credit_trajectories(experience.actions, experience.candidates, advantage)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting makes no sense."""
        self.advantage.check()
        check_fraction(self.timestep_fraction)

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt: ``G T`` evaluations and ``G`` decodes."""
        size = float(self.group_size)
        return Cost(nfe=size * num_steps, decodes=size, rewards=size)

    def _times(self, num_steps: int, random: Random, group: int, sample: int) -> set[int]:
        """The grid nodes that a sample is trained at."""
        order = torch.randperm(num_steps, generator=random.generator("times", group, sample))
        return set(order[: max(1, int(num_steps * self.timestep_fraction))].tolist())


def _noised(
    policy: PipelinePolicy,
    samples: Samples,
    x0: Float[Tensor, "samples *latent"],
    step: int,
    rows: Tensor,
) -> Actions:
    """Some samples with noise as at a node of the grid."""
    interval = policy.scheduler.interval(step, step + 1)
    # No step of the rollout drew from these streams.
    fresh = samples.noise.at_step(step, x0.shape[1:]).to(x0.device)
    data = x0[rows]
    return Actions(
        states=interval.signal * data + interval.noise * fresh[rows],
        state=torch.arange(len(rows)),
        x_next=data,
        step=torch.full((len(rows),), step),
        old_log_prob=torch.zeros(len(rows)),
        group=samples.group[rows],
        sample=samples.sample[rows],
    )
