"""VGPO, value-anchored group policy optimisation (arXiv:2512.12387).

The data that the model predicts after each step is decoded and judged; the forward pass is that of
the next step, so this costs no evaluation. Discounted sums of these rewards are the values of the
steps. Their share of the trajectory's mean value weighs each step, and their size keeps a signal
where a group has no variance.

Neither code nor the text of the equations could be had: equation 13, the discount and the anchor's
strength are reconstructed from what reviews of the paper say of them (``docs/algorithms.md``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.credit import (
    StepTable,
    candidates_of,
    check_kind,
    scored_of,
    standings,
)
from flowgrpo.algorithms.trajectories import TrajectoryPlan, walk
from flowgrpo.core.advantages import RELATIVE_FLOOR, Advantage, GroupAdvantage, VirtualBest, numbers
from flowgrpo.core.random import Random
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@dataclass(frozen=True, kw_only=True)
class VGPO:
    """Step-level credit by discounted values of one-step projections, anchored in their size."""

    kind: Literal["vgpo"] = "vgpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    shared_noise: bool = False
    """Whether a group starts from one noise. What its samples share is then computed once."""
    discount: float = 0.95
    """What a reward counts one step earlier, in (0, 1]. The paper's is not known."""
    anchor: float = 0.03
    """Strength of the values' own size against their place in the group, at least 0. The paper's is
    not known; this is for rewards up to 1 and ten steps, where a value is below 10."""
    anchor_steps: int = 5
    """Only steps before this one are anchored, counted from 0."""
    negative: Literal["shift", "refuse"] = "shift"
    """What happens when an iteration has a negative reward, for which the weights are not defined:
    ``shift`` adds to all rewards what makes the lowest of them 0; ``refuse`` ends the run."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From the values of a group, step by step, to advantages; also clips what comes out. Kinds that
    look at each reward have the values of each; weights and anchor are those of the sum."""

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Trajectories, and the projection of each state after the first stochastic step.

        Where the last step ends without noise, the projection before it is the trajectory's image
        and is not decoded again.
        """
        iteration = random.path[-1]
        assert isinstance(iteration, int)
        last = policy.num_steps() - 1
        stochastic = self.steps.select(policy.num_steps(), iteration, random.generator("steps"))
        collection = Collection(policy, groups, scorer, self.transition)
        inside = range(stochastic[0] + 1, last + 1)
        for samples, records in walk(collection, random, self._plan(stochastic), record=inside):
            for record in records:
                is_image = record.step == last and record.interval.noise_next == 0
                if record.step in inside and not is_image:
                    collection.project(samples, record)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """``w ((Q - mean) / std + anchor Q)`` at each step; a failed reward drops its trajectory."""
        first = int(experience.actions.step.min())
        relative = standings(
            self.advantage,
            experience,
            lambda n: self._comparable(rewards_after(experience, n, first)),
        )
        scored = scored_of(experience)
        reward = numbers(self.advantage, scored).get("", scored.reward)
        table = rewards_after(experience, reward, first)
        value = values(self._not_negative(table.values, reward), self.discount)
        anchored = torch.tensor([float(s < self.anchor_steps) for s in table.steps])
        worth = temporal_weights(value) * (relative.values + self.anchor * anchored * value)
        clipped = worth.clamp(-self.advantage.clip, self.advantage.clip).nan_to_num()
        return table.with_values(clipped).of(experience.actions)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        check_kind(self.advantage, "values")
        if self.group_size < 2:
            raise ValueError(f"algorithm.group_size must be at least 2, got {self.group_size}")
        if not 0 < self.discount <= 1:
            raise ValueError(f"algorithm.discount must be in (0, 1], got {self.discount}")
        for key in ("anchor", "anchor_steps"):
            if getattr(self, key) < 0:
                raise ValueError(f"algorithm.{key} must be at least 0, got {getattr(self, key)}")
        self.steps.select(num_steps, 0, Random(0).generator())

    def cost(self, num_steps: int, stochastic: Sequence[int]) -> Cost:
        """Work per prompt: the evaluations of the trajectories, and for each sample ``T - k - 1``
        candidates, ``k`` being the first stochastic step; one more on a grid that ends above zero
        noise, as Stable Diffusion's does."""
        plain = self._plan(stochastic).cost(num_steps)
        candidates = float(self.group_size * (num_steps - stochastic[0] - 1))
        return Cost(plain.nfe, candidates, candidates)

    def _comparable(self, rewards: StepTable) -> StepTable:
        """The values of rewards; for ``virtual_best`` on the scale of rewards, to know the best one."""
        value = values(rewards.values, self.discount)
        if isinstance(self.advantage, VirtualBest):
            value = value / values(torch.ones_like(value), self.discount)
        return rewards.with_values(value)

    def _not_negative(
        self, rewards: Float[Tensor, "trajectories steps"], all_rewards: Float[Tensor, " _"]
    ) -> Float[Tensor, "trajectories steps"]:
        """The rewards, less the lowest of all ranks if that is negative."""
        finite = all_rewards[all_rewards.isfinite()].double()
        lowest = float(finite.min()) if len(finite) else 0.0
        if lowest >= 0:
            return rewards
        if self.negative == "refuse":
            raise ValueError(
                f"algorithm.negative = 'refuse', and the lowest reward of this iteration is {lowest:.4g}: "
                "VGPO weighs steps by their share of the mean value, which must be positive. Make the "
                "rewards non-negative, or set algorithm.negative = 'shift'"
            )
        shifted = rewards - lowest
        rounding = RELATIVE_FLOOR * float(finite.abs().max())
        return torch.where(shifted <= rounding, 0.0, shifted)

    def _plan(self, stochastic: Sequence[int]) -> TrajectoryPlan:
        return TrajectoryPlan(self.group_size, self.transition, stochastic, self.shared_noise)


def rewards_after(
    experience: Experience, numbers: Float[Tensor, " candidates"], first: int
) -> StepTable:
    """A number of the candidate after each step from ``first`` to the last.

    A failed one drops its trajectory, as every weight of it depends on every reward.
    """
    c = candidates_of(experience)
    last = int(c.step.max())
    table = StepTable.of_candidates(c, numbers, range(first, last + 1))
    found = table.values
    if not bool((c.step == last - 1).any()):
        # The projection before a last step to the data is the image.
        found[:, -2] = found[:, -1]
    found[~found.isfinite().all(1)] = torch.nan
    return table


def values(
    rewards: Float[Tensor, "trajectories steps"], discount: float
) -> Float[Tensor, "trajectories steps"]:
    """``Q_k = R_k + discount Q_{k+1}``: the discounted rewards from each step to the end (eq. 10)."""
    columns = [rewards[:, -1]]
    for reward in rewards.flip(1).unbind(1)[1:]:
        columns.append(reward + discount * columns[-1])
    return torch.stack(columns[::-1], 1)


def temporal_weights(
    value: Float[Tensor, "trajectories steps"],
) -> Float[Tensor, "trajectories steps"]:
    """``w_k = Q_k / mean_k(Q_k)`` within each trajectory (eq. 11); 1 where all values are zero.

    Values are non-negative.
    """
    mean = value.mean(1, keepdim=True)
    return torch.where(mean == 0, torch.ones_like(value), value / mean)
