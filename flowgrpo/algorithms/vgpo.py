"""VGPO, value-anchored group policy optimisation (arXiv:2512.12387).

The model's prediction of the data after each step is decoded and scored; its forward pass is that of
the next step, so it costs no evaluation. The value ``Q_k`` of a step is the discounted sum of the
rewards from there on (eq. 10). A step's weight is the share of its value in the trajectory's mean
value (eq. 11), and the anchor, a term proportional to the value itself, keeps a signal where a group
has no variance (eq. 13).

Neither code nor the text of the equations was available: equation 13, the discount and the anchor's
strength are reconstructed from reviews of the paper (``docs/algorithms.md``).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, CreditView, Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.credit import StepTable, check_kind, step_advantages
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.group_statistics import RELATIVE_FLOOR
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import REWARD, GroupAdvantage
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group

SATURATED = 0.05
"""Share of anchored advantages at the clip above which the anchor is too strong."""


@dataclass(frozen=True, kw_only=True)
class VGPO(AlgorithmBase):
    """Step-level credit by discounted values of one-step projections, anchored in their size."""

    kind: Literal["vgpo"] = "vgpo"
    group_size: int = 24
    """Samples per prompt, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps are stochastic and trained."""
    shared_noise: bool = False
    """Whether a group starts from one noise. The steps that its samples share are computed once."""
    discount: float = 0.95
    """Factor by which a reward counts less one step earlier, in (0, 1]. The paper's is not known."""
    anchor: float = 0.03
    """Weight of the values themselves against their standardised differences, at least 0. The paper's
    is not known; this is for rewards up to 1 and ten steps, where a value is below 10."""
    anchor_steps: int = 5
    """Only steps before this one are anchored, counted from 0."""
    negative: Literal["shift", "refuse"] = "shift"
    """Handling of an iteration with a negative reward, for which the weights are not defined:
    ``shift`` adds a constant to all rewards so that the lowest is 0; ``refuse`` ends the run."""
    advantage: Advantage = field(default_factory=GroupAdvantage)
    """From the values of a group, step by step, to advantages; its ``clip`` also bounds the result.
    Multi-reward kinds use the values of each reward; weights and anchor are those of the sum."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> "ProjectedTrajectories":
        """Trajectories with the iteration's stochastic steps, and projections after each step."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return ProjectedTrajectories(self.group_size, self.transition, steps, self.shared_noise)

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample trajectories, and decode the projection of each state after the first stochastic step.

        If the last step ends at zero noise, the projection at its start is the trajectory's image and
        is not decoded again.
        """
        plan, last = self.plan(policy.num_steps(), iteration, random), policy.num_steps() - 1
        collection = Collection(policy, groups, scorer, self.transition)
        after_first = range(plan.steps[0] + 1, last + 1)
        for samples, records in sample_trajectories(collection, random, plan, record=after_first):
            for record in records:
                is_image = record.step == last and record.interval.noise_next == 0
                if record.step in after_first and not is_image:
                    collection.project(samples, record)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """``w ((Q - mean) / std + anchor Q)`` at each step; a failed reward drops its trajectory.

        All tables are ``(trajectories, steps)``, from the first trained step to the last of the grid.
        """
        first = int(experience.actions.step.min())
        relative = step_advantages(
            self.advantage,
            experience,
            lambda n: self._comparable(rewards_after(experience, n, first)),
        )
        # Weights and anchor use the one reward, also where the kind normalises each by itself.
        scores = experience.all_candidates.scores
        reward = self.advantage.inputs(scores).get(REWARD, scores.reward)
        table = rewards_after(experience, reward, first)
        value = values(self._not_negative(table.values, reward), self.discount)
        anchored = torch.tensor([float(s < self.anchor_steps) for s in table.steps])
        found = temporal_weights(value) * (relative.values + self.anchor * anchored * value)
        clipped = found.clamp(-self.advantage.clip, self.advantage.clip).nan_to_num()
        self._warn_of_saturation(clipped[:, anchored > 0], relative.values[:, anchored > 0])
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
        self.steps.check(num_steps)

    def credit_view(self, experience: Experience) -> CreditView:
        """Candidates are the states of one trajectory.

        Without a projection before the last step, the image is shown at the step before it, where
        that projection would be.
        """
        steps = experience.candidates.step
        last = int(steps.max())
        has_projection = bool((steps == last - 1).any())
        column = {} if has_projection else {last: last - 1}
        return CreditView(rivals=self.group_size, candidates="states", column=column)

    def _comparable(self, rewards: StepTable) -> StepTable:
        """The values of rewards.

        For ``virtual_best`` they are divided by the values of rewards of 1, so that the best value is
        the best reward.
        """
        value = values(rewards.values, self.discount)
        if self.advantage.adds_best:
            value = value / values(torch.ones_like(value), self.discount)
        return rewards.with_values(value)

    def _warn_of_saturation(
        self,
        anchored: Float[Tensor, "trajectories steps"],
        relative: Float[Tensor, "trajectories steps"],
    ) -> None:
        """Warn if the anchor puts many advantages at the clip, or leaves none below 0.

        Args:
            anchored: Advantages of the anchored steps.
            relative: The same without weights and anchor.
        """
        if not self.anchor or not anchored.numel():
            return
        clipped = float((anchored >= self.advantage.clip).float().mean())
        if clipped > SATURATED or (bool((relative < 0).any()) and bool((anchored >= 0).all())):
            warnings.warn(
                f"VGPO's anchor saturates: with algorithm.anchor = {self.anchor:g} many advantages are at "
                "the clip or none is below 0, so that differences between rewards have little effect; "
                "scale the rewards to about [0, 1] by their weight (1/26 for PickScore) or lower the anchor",
                stacklevel=2,
            )

    def _not_negative(
        self, rewards: Float[Tensor, "trajectories steps"], all_rewards: Float[Tensor, " _"]
    ) -> Float[Tensor, "trajectories steps"]:
        """The rewards, minus the lowest reward of all processes if that is negative.

        Raises:
            ValueError: If it is negative and ``negative`` is ``refuse``.
        """
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


@dataclass(frozen=True)
class ProjectedTrajectories(TrajectoryPlan):
    """Trajectories, with a projection after each step from the first stochastic one on."""

    def cost(self, num_steps: int) -> Cost:
        """Work per prompt: the evaluations of the trajectories, and for each sample ``T - k - 1``
        candidates, where ``k`` is the first stochastic step; one more on a grid that ends above zero
        noise, as Stable Diffusion's does."""
        candidates = float(self.group_size * (num_steps - self.steps[0] - 1))
        return Cost(super().cost(num_steps).nfe, candidates, candidates)


def rewards_after(
    experience: Experience, numbers: Float[Tensor, " candidates"], first: int
) -> StepTable:
    """The number of the candidate after each step, from ``first`` to the last of the grid.

    A trajectory with a missing number is NaN at all steps, as each of its weights depends on all of
    its rewards.
    """
    c = experience.all_candidates
    last = int(c.step.max())
    table = StepTable.of_candidates(c, numbers, range(first, last + 1))
    found = table.values
    if not bool((c.step == last - 1).any()):
        # The projection before the last step was not decoded, because it equals the image.
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

    Values must be non-negative.
    """
    mean = value.mean(1, keepdim=True)
    return torch.where(mean == 0, torch.ones_like(value), value / mean)
