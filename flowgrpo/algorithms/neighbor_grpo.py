"""Neighbor GRPO (arXiv:2511.16955): exploration by perturbed initial noise, and no stochastic step.

The samples of a group start from noises near to each other and follow the ODE by any solver::

    x_T^i = sqrt(1 - q^2) x_T + q d_i        x_T shared by the group, d_i of each sample (eq. 7)

At each trained step, a few samples of the group are anchors. The policy's step from an anchor's state is
drawn to the next states of good samples and away from those of bad ones: the loss ``neighbor``. All
candidates of an anchor share its state, so that training takes one forward pass per anchor and step.

No code was published, and the paper's text was read in notes only. Not known are the trained steps (their
number is 4 of 8, from the published 1.33 = 4/12 * 4 evaluations per sample), the clip range, and the scale
of the distance; what is done here is said where it is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.algorithms.credit import credit_trajectories, own_advantages, refuse_separate
from flowgrpo.algorithms.trajectories import TrajectoryPlan
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.solvers import Solver
from flowgrpo.core.steps import StepSelection, Window
from flowgrpo.core.tensors import Float, Int, Tensor, torch
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind
from flowgrpo.losses.neighbor import neighbor_log_prob


@dataclass(frozen=True, kw_only=True)
class NeighborGRPO(AlgorithmBase):
    """Sample-level credit among trajectories of the ODE that start near to each other."""

    action_kind: ClassVar[ActionKind] = "neighbor"
    kind: Literal["neighbor_grpo"] = "neighbor_grpo"
    group_size: int = 12
    """Samples per prompt, at least 2."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    solver: Solver = "dpm_2m"
    """How samples are drawn. Training takes single ODE steps, whatever the solver."""
    steps: StepSelection = field(default_factory=lambda: Window(size=4))
    """Which steps are trained. The paper trains 4 of 8; which ones is not known."""
    perturbation: float = 0.3
    """Share ``q`` of a sample's own noise in its initial noise, in (0, 1]; 1 gives unrelated samples."""
    anchors: int = 4
    """Samples of a group from whose states the policy's steps are trained, drawn anew in each iteration;
    from 1 to ``group_size``."""
    quasi_norm: float = 0.8
    """``p`` of the norm by which the advantages of a group are divided, ``(sum |A|^p)^(1/p)``, in (0, 2]
    (eq. 11). Below 2 it is larger for groups whose rewards differ evenly than for those with few samples
    that stand out."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From rewards to advantages, before ``quasi_norm``."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Deterministic trajectories; what they share of their noise costs nothing."""
        return TrajectoryPlan(self.group_size, self.transition, [], solver=self.solver)

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """The steps whose ratios are trained."""
        return self.steps.select(num_steps, iteration, random.at("steps"))

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, and record for each anchor and trained step an action to every next state of its group."""
        num_steps = policy.num_steps()
        steps = self.trained_steps(num_steps, iteration, random)
        collection = Collection(policy, groups, scorer, self.transition)
        samples = Samples.of(groups, self.group_size, random)
        # By step: all next states; and of the anchors their states and where a single ODE step ends.
        ends: dict[int, list[Tensor]] = {step: [] for step in steps}
        starts: dict[int, list[Tensor]] = {step: [] for step in steps}
        means: dict[int, list[Tensor]] = {step: [] for step in steps}
        chosen = torch.cat([self._anchors(g, random) + i * self.group_size for i, g in enumerate(groups)])  # fmt: skip
        for rollout in policy.run(
            samples.prompts,
            samples.noise,
            nodes=range(num_steps + 1),
            x=self._initial(policy, groups, samples, random),
            record=steps,
            solver=self.solver,
        ):
            begin, stop = rollout.rows.start, rollout.rows.stop
            rows = chosen[(chosen >= begin) & (chosen < stop)] - begin
            for record in rollout.records:
                mean = ODE()(record.x, record.prediction, record.interval).mean
                ends[record.step].append(record.x_next)
                starts[record.step].append(record.x[rows])
                means[record.step].append(mean[rows])
            assert rollout.media is not None
            part = samples[begin:stop]
            collection.submit(part, rollout.media, num_steps - 1, audio=rollout.audio)
        # Each anchor with every sample of its group: (anchors, candidates), row by row.
        anchor = torch.arange(len(chosen)).repeat_interleave(self.group_size)
        candidate = (chosen // self.group_size * self.group_size)[:, None]
        candidate = (candidate + torch.arange(self.group_size)).flatten()
        pairs = samples.take(candidate.tolist())
        for step in steps:
            x_next, mean = torch.cat(ends[step]), torch.cat(means[step])
            log_prob = neighbor_log_prob(mean, x_next[candidate], anchor.to(mean.device)).cpu()
            collection.add_actions(
                pairs,
                step,
                x=torch.cat(starts[step]),
                x_next=x_next,
                state=anchor,
                next_row=candidate,
                old_log_prob=log_prob,
            )
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """The advantage of each action's candidate, over the group's quasi-norm."""
        own = own_advantages(self.advantage, experience)
        scaled = quasi_normed(own, experience.candidates.group, self.quasi_norm)
        return credit_trajectories(experience.actions, experience.candidates, scaled)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        self.advantage.check()
        refuse_separate(self.advantage, "neighbours")
        self.steps.check(num_steps)
        if not 0 < self.perturbation <= 1:
            raise ValueError(f"algorithm.perturbation must be in (0, 1], got {self.perturbation}")
        if not 0 < self.quasi_norm <= 2:
            raise ValueError(f"algorithm.quasi_norm must be in (0, 2], got {self.quasi_norm}")
        if not 1 <= self.anchors <= self.group_size:
            raise ValueError(
                f"algorithm.anchors must be from 1 to group_size = {self.group_size}, got {self.anchors}"
            )

    def _anchors(self, group: Group, random: Random) -> Int[Tensor, " anchors"]:
        """The samples of a group that are anchors, ascending."""
        generator = random.generator("anchors", group.index)
        return torch.randperm(self.group_size, generator=generator)[: self.anchors].sort().values

    def _initial(
        self, policy: Policy, groups: Sequence[Group], samples: Samples, random: Random
    ) -> Float[Tensor, "samples *latent"]:
        """The initial latents of each sample, near to those that its group shares."""
        shared = SampleNoise([random.at("group", g.index) for g in samples.groups])

        def latents(noise: SampleNoise) -> Tensor:
            batches = policy.run(samples.prompts, noise, nodes=[0], decode=False)
            return torch.cat([b.x for b in batches if b.x is not None])

        own = self.perturbation
        return (1 - own**2) ** 0.5 * latents(shared) + own * latents(samples.noise)


def quasi_normed(
    advantage: Float[Tensor, " candidates"], group: Int[Tensor, " candidates"], p: float
) -> Float[Tensor, " candidates"]:
    """``A / (sum |A|^p)^(1/p)`` over each group (eq. 11); zero where all advantages are."""
    result = torch.zeros_like(advantage)
    for g in group.unique():
        rows = group == g
        norm = advantage[rows].double().abs().pow(p).sum().pow(1 / p)
        if norm > 0:
            result[rows] = (advantage[rows] / norm).to(result.dtype)
    return result
