"""What a rollout yields: actions, candidates and their scores.

An *action* is one stochastic denoising step ``x -> x_next``; a *candidate* is one decoded image or
video that was scored. An algorithm says which candidates judge which actions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flowgrpo.core.transitions import Transition
from flowgrpo.data.prompts import Group


@dataclass(frozen=True)
class Actions:
    """The stochastic steps of one rollout, ``A`` of them on ``S`` distinct states.

    Attributes:
        states: States before the steps, fp32. Actions that start in the same state share a row,
            and one forward pass of the model serves them all.
        state: Row of ``states`` for each action.
        x_next: States after the steps, fp32.
        step: Index of the step in the sampling grid.
        old_log_prob: Log-probability under the policy that acted: the mean over latent elements.
        group: Index of the :class:`Group`.
        sample: Index of the sample in its group.
        old_mean: Means of the steps under the policy that acted, kept only where
            ``policy.keeps_means`` says that the loss needs them.
    """

    states: Float[Tensor, "states *latent"]
    state: Int[Tensor, " actions"]
    x_next: Float[Tensor, "actions *latent"]
    step: Int[Tensor, " actions"]
    old_log_prob: Float[Tensor, " actions"]
    group: Int[Tensor, " actions"]
    sample: Int[Tensor, " actions"]
    old_mean: Float[Tensor, "actions *latent"] | None = None

    def __len__(self) -> int:
        return self.step.shape[0]

    def select(self, rows: Int[Tensor, " rows"]) -> "Actions":
        """The given actions, with only the states that they start in."""
        used, state = torch.unique(self.state[rows], return_inverse=True)
        return Actions(
            states=self.states[used],
            state=state,
            x_next=self.x_next[rows],
            step=self.step[rows],
            old_log_prob=self.old_log_prob[rows],
            group=self.group[rows],
            sample=self.sample[rows],
            old_mean=None if self.old_mean is None else self.old_mean[rows],
        )

    @staticmethod
    def concatenate(parts: Sequence["Actions"]) -> "Actions":
        """Join the actions of several batches."""
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.states.shape[0])
        means = [p.old_mean for p in parts if p.old_mean is not None]
        if means and len(means) < len(parts):
            raise ValueError("some of these actions keep their old_mean, and some do not")
        return Actions(
            states=torch.cat([p.states for p in parts]),
            state=torch.cat([p.state + o for p, o in zip(parts, offsets, strict=False)]),
            x_next=torch.cat([p.x_next for p in parts]),
            step=torch.cat([p.step for p in parts]),
            old_log_prob=torch.cat([p.old_log_prob for p in parts]),
            group=torch.cat([p.group for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            old_mean=torch.cat(means) if means else None,
        )


@dataclass(frozen=True)
class Candidates:
    """The scored images or videos of one rollout, ``N`` of them.

    Attributes:
        group: Index of the :class:`Group`.
        sample: Index of the sample in its group.
        step: The step after which the candidate was completed; the last one for a whole trajectory,
            -1 for the initial noise.
        granularity: Grid intervals that each step of the completion spans; 1 for a whole trajectory,
            0 for a jump to the data that the model predicts.
        scores: Raw score of each reward model; NaN where it failed.
        reward: The weighted sum that is trained on; NaN where a trained reward failed.
    """

    group: Int[Tensor, " candidates"]
    sample: Int[Tensor, " candidates"]
    step: Int[Tensor, " candidates"]
    granularity: Int[Tensor, " candidates"]
    scores: Mapping[str, Float[Tensor, " candidates"]]
    reward: Float[Tensor, " candidates"]

    def __len__(self) -> int:
        return self.reward.shape[0]

    @property
    def valid(self) -> Bool[Tensor, " candidates"]:
        """Which candidates have a reward; the others take no part in training."""
        return self.reward.isfinite()


@dataclass(frozen=True)
class Cost:
    """What a rollout costs per prompt.

    Attributes:
        nfe: Denoiser evaluations, one for each sample and step.
        decodes: Decoded images or videos.
        rewards: Calls of each reward model, one for each candidate that was judged.
    """

    nfe: float
    decodes: float
    rewards: float


@dataclass(frozen=True)
class Experience:
    """What one rank collected in one iteration.

    Attributes:
        groups: The prompts.
        transition: What the actions are steps of.
        actions: The steps taken.
        candidates: What came out, scored.
        cost: Work per prompt.
        all_rewards: The rewards of all candidates of all ranks, for statistics over the batch.
        diversity: Of each group: how far its images are apart (mean standard deviation over the
            group of 8x8 thumbnails).
        duplicates: Of each group: samples that equal an earlier one of the group.
        step_std: Of each stochastic step: the standard deviation of the noise that it injects.
        everyone: The candidates of all ranks; None means that there is only one.
        weights: Weight of each reward by its name in ``scores``, in this iteration.
        media: Of each candidate, if the judge was asked to keep it.
        shapes: From a reward's raw score to what its weight multiplies, where it is not the score.
    """

    groups: Sequence[Group]
    transition: Transition
    actions: Actions
    candidates: Candidates
    cost: Cost
    all_rewards: Float[Tensor, " all_candidates"]
    diversity: Float[Tensor, " groups"]
    duplicates: Float[Tensor, " groups"]
    step_std: Mapping[int, float]
    everyone: Candidates | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    media: Float[Tensor, "candidates *media"] | None = None
    shapes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
