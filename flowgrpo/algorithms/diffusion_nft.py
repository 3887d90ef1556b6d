"""DiffusionNFT (arXiv:2509.16117): training on the forward process, without densities.

Samples come from any deterministic solver. Training adds fresh noise to finished samples, and the
model learns to predict good samples and to avoid bad ones (the loss ``nft``). There are no
stochastic steps and no log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.algorithms.credit import trajectory_advantages
from flowgrpo.algorithms.trajectories import TrajectoryPlan, check_fraction, sample_trajectories
from flowgrpo.core.advantages import Advantage, GroupAdvantage
from flowgrpo.core.random import Random
from flowgrpo.core.solvers import PlainSolver
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT(AlgorithmBase):
    """Sample-level credit on the forward process."""

    action_kind: ClassVar[ActionKind] = "noised_sample"
    kind: Literal["diffusion_nft"] = "diffusion_nft"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    solver: PlainSolver = "dpm_2m"
    """How samples are drawn."""
    timestep_fraction: float = 0.99
    """Share of the grid's times that each sample is trained at, in (0, 1], at random."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(std="batch"))
    """From rewards to advantages, which the loss maps to [0, 1]."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Deterministic samples, each from a noise of its own."""
        return TrajectoryPlan(self.group_size, self.transition, [], solver=self.solver)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, and record noised versions of each sample as its actions.

        An action's state is the sample with noise at time ``step`` of the grid, its ``x_next`` the
        sample itself. It has no density; ``old_log_prob`` is 0.
        """
        collection = Collection(policy, groups, scorer, self.transition)
        end = policy.num_steps()
        plan = self.plan(end, iteration, random)
        for samples, records in sample_trajectories(collection, random, plan, record=[end - 1]):
            (last,) = records
            times = [self._times(end, random, g.index, i) for g, i in zip(samples.groups, samples.numbers, strict=True)]  # fmt: skip
            for step in range(end):
                rows = [row for row, chosen in enumerate(times) if step in chosen]
                if rows:
                    noised = _noised(policy, samples, last.x_next, step, torch.tensor(rows))
                    collection.add_actions(noised)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The sample's advantage, at each time that it is trained at."""
        return trajectory_advantages(self.advantage, experience)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        self.advantage.check()
        check_fraction(self.timestep_fraction)

    def _times(self, num_steps: int, random: Random, group: int, sample: int) -> set[int]:
        """The grid nodes that a sample is trained at."""
        order = torch.randperm(num_steps, generator=random.generator("times", group, sample))
        return set(order[: max(1, int(num_steps * self.timestep_fraction))].tolist())


def _noised(
    policy: Policy,
    samples: Samples,
    x0: Float[Tensor, "samples *latent"],
    step: int,
    rows: Tensor,
) -> Actions:
    """The samples of some rows, with noise added as at a node of the grid."""
    interval = policy.scheduler.interval(step, step + 1)
    # Each sample's stream of this step is unused, as no step of the rollout was stochastic.
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
