"""FIND (arXiv:2407.19453): the distribution of the initial noise is the policy.

The sampler is deterministic and the model frozen, so a sample has one action: the draw of its initial
noise. No gradient passes through the model, and an update costs almost nothing. The algorithm needs
``model.weights.kind = "noise"``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import AlgorithmBase, Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.credit import credit_trajectories, trajectory_advantages
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.solvers import PlainSolver
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import INITIAL, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.losses.base import ActionKind


@dataclass(frozen=True, kw_only=True)
class FIND(AlgorithmBase):
    """Credit for the initial noise.

    Differs from the paper by default in the baseline that rewards are compared with: here the group's
    own mean; there a value function of distribution and prompt that is trained along with the policy
    (dynamic reward calibration, ``baseline = "learned"``), because the paper draws one sample at a time.
    Its five policy steps per sample are ``train.epochs = 5``.
    """

    action_kind: ClassVar[ActionKind] = "initial_noise"
    kind: Literal["find"] = "find"
    group_size: int = 12
    """Samples per prompt, at least 2."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic after the initial noise."""
    solver: PlainSolver = "euler"
    """How samples are drawn."""
    baseline: Literal["group", "learned"] = "group"
    """Rewards are compared with those of the group, or with the reward that a value function of
    distribution and prompt expects, which is trained along with the policy."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From rewards to advantages. With a learned baseline the advantage is the reward minus the expected
    reward, and only ``clip`` is used."""

    @property
    def needs_baseline(self) -> bool:
        """Whether advantages need ``Experience.expected``."""
        return self.baseline == "learned"

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
        """Sample, and record the noise that each sample began with as its action.

        An action's ``x_next`` is the initial noise; all actions share one empty state.
        """
        collection = Collection(policy, groups, scorer, self.transition)
        plan = self.plan(policy.num_steps(), iteration, random)
        gaussian = policy.replay([], torch.zeros(1), INITIAL, self.transition).gaussian
        nothing: Tensor | None = None
        for samples, records in sample_trajectories(collection, random, plan, record=[0]):
            (first,) = records
            log_prob = gaussian.log_prob(first.x).detach().cpu()
            nothing = torch.zeros_like(first.x[:1]) if nothing is None else nothing
            shared = torch.zeros(len(samples), dtype=torch.long)
            collection.add_actions(
                samples, INITIAL, x=nothing, x_next=first.x, state=shared, old_log_prob=log_prob
            )
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, "actions *rewards"]:
        """The sample's advantage, for its initial noise."""
        if not self.needs_baseline:
            return trajectory_advantages(self.advantage, experience)
        assert experience.expected is not None, "the loop supplies it"
        c, clip = experience.candidates, self.advantage.clip
        above = (c.reward - experience.expected.to(c.reward)).clamp(-clip, clip).nan_to_num()
        return credit_trajectories(experience.actions, c, above)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        self.advantage.check()
        if self.needs_baseline and self.advantage != GroupAdvantage(clip=self.advantage.clip):
            raise ValueError(
                "algorithm.baseline = 'learned' replaces the statistics of a group, so that of "
                "algorithm.advantage only clip has an effect; remove its other keys"
            )
        if self.group_size < 2:
            raise ValueError(f"algorithm.group_size must be at least 2, got {self.group_size}")
