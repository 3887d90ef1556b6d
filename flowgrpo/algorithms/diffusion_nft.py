"""DiffusionNFT (arXiv:2509.16117): training on the forward process, without densities.

Samples come from any deterministic solver. Training adds fresh noise to finished samples, and the
model learns to predict good samples and to avoid bad ones (the loss ``nft``). There are no
stochastic steps and no log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.credit import trajectory_advantages
from flowgrpo.algorithms.noised_samples import collect_noised_samples
from flowgrpo.algorithms.previews import Previews
from flowgrpo.algorithms.trajectories import TrajectoryPlan, check_fraction
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.solvers import PlainSolver
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True, kw_only=True)
class DiffusionNFT(AlgorithmBase):
    """Sample-level credit on the forward process.

    It trains the model as a flow model, which checkpoints that were distilled to a few steps (Turbo,
    Lightning, Schnell) are not: their images may lose detail, and a run says so at its start.
    """

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
    previews: Previews = field(default_factory=Previews)
    """Previews that choose the initial noises of the samples (Sol-RL)."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(std="batch"))
    """From rewards to advantages, which the loss maps to [0, 1]."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Deterministic samples, each from a noise of its own."""
        return TrajectoryPlan(
            self.group_size, self.transition, [], solver=self.solver, previews=self.previews
        )

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, and record noised versions of each sample as its actions.

        Each sample is trained at a random part of the grid's times of its own.
        """
        end = policy.num_steps()
        plan = self.plan(end, iteration, random)

        def times(group: int, sample: int) -> set[int]:
            order = torch.randperm(end, generator=random.generator("times", group, sample))
            return set(order[: max(1, int(end * self.timestep_fraction))].tolist())

        return collect_noised_samples(policy, groups, scorer, random, plan, times)

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The sample's advantage, at each time that it is trained at."""
        return trajectory_advantages(self.advantage, experience)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        self.advantage.check()
        self.previews.check(self.group_size, num_steps)
        check_fraction(self.timestep_fraction)
