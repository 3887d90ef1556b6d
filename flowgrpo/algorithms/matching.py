"""Training on the forward process with times and noise that a group shares.

The collector of the losses that replace a density by the error of the model on noised samples:
Advantage Weighted Matching (arXiv:2509.25050), V-GRPO (arXiv:2604.23380), the ELBO policy gradients
(arXiv:2602.04663), DGPO (arXiv:2510.08425) and centred reward distillation (arXiv:2603.14128). Samples
come from any deterministic solver with any number of steps; nothing is stochastic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.credit import (
    check_best_of,
    credit_trajectories,
    extremes,
    own_advantages,
)
from flowgrpo.algorithms.noised_samples import collect_noised_samples
from flowgrpo.algorithms.previews import Previews
from flowgrpo.algorithms.trajectories import TrajectoryPlan
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.solvers import Solver
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind
from flowgrpo.policy.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Matching(AlgorithmBase):
    """Sample-level credit on the forward process, at a few times that all samples share.

    All samples of an iteration are trained at the same times, so that a batch of one time is full. The
    losses ``matching``, ``dgpo`` and ``crd`` belong to it; ``nft`` can be used, too.

    It trains the model as a flow model, which checkpoints that were distilled to a few steps (Turbo,
    Lightning, Schnell) are not: their images may lose detail, and a run says so at its start.
    """

    action_kind: ClassVar[ActionKind] = "noised_sample"
    kind: Literal["matching"] = "matching"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    solver: Solver = "dpm_2m"
    """How samples are drawn."""
    num_times: int = 4
    """Times of the grid at which each sample is trained, from 1 to the number in ``time_range``. V-GRPO
    found 2 too few, 4 best and 8 little better; AWM uses 6."""
    time_range: tuple[float, float] = (0.0, 1.0)
    """The part of the sampling grid that the times are drawn from: 0 is noise, 1 is data."""
    times: Literal["stratified", "random"] = "stratified"
    """How the times are drawn anew in each iteration: ``stratified`` divides the range into
    ``num_times`` parts and draws one time from each; ``random`` draws without replacement."""
    share_noise: bool = True
    """Whether all samples of a group get the same noise at the same time. Their errors then differ by
    the samples alone, which lowers the variance of comparisons within the group (V-GRPO, DGPO). AWM
    and the ELBO policy gradients draw noise for each sample."""
    previews: Previews = field(default_factory=Previews)
    """Previews that choose the initial noises of the samples (Sol-RL)."""
    rollout_guidance: float | None = None
    """Guidance scale with which samples are drawn; if unset, ``sampling.guidance_scale``."""
    trained_guidance: tuple[float, ...] = ()
    """Guidance scales at which the model is trained on every noised sample, such as ``[1.0, 3.0]`` for a
    model that is used without guidance and with it; each costs a forward pass with gradients. If empty,
    ``sampling.guidance_scale``."""
    best_of: int = 0
    """Train only on this many samples of a group, half the best and half the worst; 0 for all. With the
    loss ``dpo`` the two that make its pair are enough."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From rewards to advantages."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Deterministic samples, each from a noise of its own."""
        return TrajectoryPlan(
            self.group_size,
            self.transition,
            [],
            solver=self.solver,
            guidance=self.rollout_guidance,
            previews=self.previews,
        )

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, and record noised versions of each sample as its actions."""
        end = policy.num_steps()
        plan = self.plan(end, iteration, random)
        drawn = self.drawn_times(end, random)
        return collect_noised_samples(
            policy,
            groups,
            scorer,
            random,
            plan,
            lambda *_: drawn,
            shared_noise=self.share_noise,
            guidance=self.trained_guidance,
        )

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The sample's advantage, at each time that it is trained at; zero between best and worst."""
        c = experience.candidates
        advantage = own_advantages(self.advantage, experience)
        if self.best_of:
            # Statistics are over the whole group; only then are the samples between dropped.
            advantage = extremes(advantage, c.group, self.best_of)
        return credit_trajectories(experience.actions, c, advantage)

    def drawn_times(self, num_steps: int, random: Random) -> list[int]:
        """The grid nodes of an iteration, ascending."""
        nodes = torch.tensor(self._nodes(num_steps))
        generator = random.generator("times")
        if self.times == "random":
            order = torch.randperm(len(nodes), generator=generator)[: self.num_times]
            return sorted(nodes[order].tolist())
        # The bounds of num_times parts whose sizes differ by one at most.
        bounds = [round(i * len(nodes) / self.num_times) for i in range(self.num_times + 1)]
        drawn = [
            int(torch.randint(low, high, (), generator=generator)) for low, high in pairwise(bounds)
        ]
        return nodes[torch.tensor(drawn)].tolist()

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        self.advantage.check()
        self.previews.check(self.group_size, num_steps)
        check_best_of(self.best_of, self.group_size)
        for scale in (self.rollout_guidance, *self.trained_guidance):
            if scale is not None and not -1e6 <= scale <= 1e6:
                raise ValueError(
                    "algorithm.rollout_guidance and algorithm.trained_guidance must be a number from -1e6 to "
                    f"1e6, got {scale:g}"
                )
        if len(set(self.trained_guidance)) < len(self.trained_guidance):
            raise ValueError(
                f"algorithm.trained_guidance = {list(self.trained_guidance)} names a scale twice; remove it"
            )
        low, high = self.time_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"algorithm.time_range must be two numbers with 0 <= low < high <= 1, got [{low:g}, {high:g}]"
            )
        number = len(self._nodes(num_steps))
        if not 1 <= self.num_times <= number:
            raise ValueError(
                f"algorithm.num_times must be from 1 to {number}, the times of {counted(num_steps, 'step')} in "
                f"algorithm.time_range [{low:g}, {high:g}]; got {self.num_times}"
            )

    def samplings(self, own: Sampling) -> list[Sampling]:
        """The arguments of the pipeline's calls with other guidance scales than the policy's own."""
        scales = [self.rollout_guidance, *self.trained_guidance]
        return [replace(own, guidance_scale=s) for s in scales if s is not None]

    def _nodes(self, num_steps: int) -> list[int]:
        """The grid nodes in the time range; the last node is data and is not among them."""
        low, high = self.time_range
        return [i for i in range(num_steps) if low <= i / num_steps < high]
