"""The result of a rollout: actions, candidates with their scores, and both as experience.

An *action* is one stochastic denoising step ``x -> x_next``. A *candidate* is one decoded image or
video that was scored. An algorithm defines which candidates judge which actions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch
from flowgrpo.core.transitions import Transition
from flowgrpo.data.prompts import Group

INITIAL = -1
"""The step index of an action that draws the initial noise, and of candidates decoded from it."""


@dataclass(frozen=True)
class Actions:
    """The stochastic steps of one rollout: ``A`` actions that start from ``S`` distinct states.

    Attributes:
        states: States before the steps, fp32. Actions that start from the same state share a row,
            and one forward pass of the model serves them all.
        state: Row of ``states`` for each action.
        x_next: States after the steps, fp32.
        step: Index of the step in the sampling grid, or :data:`INITIAL`.
        old_log_prob: Log-probability under the old policy, which sampled the step: the mean over
            latent elements.
        group: Index of the :class:`Group`.
        sample: Index of the sample in its group.
        old_mean: Means of the steps under the old policy. They are kept only if
            ``policy.keeps_means`` is set, which the learner does when the loss needs them.
        kl_weight: Weight of each action's KL to the reference policy; None for 1. Guards against reward
            hacking set it.
    """

    states: Float[Tensor, "states *latent"]
    state: Int[Tensor, " actions"]
    x_next: Float[Tensor, "actions *latent"]
    step: Int[Tensor, " actions"]
    old_log_prob: Float[Tensor, " actions"]
    group: Int[Tensor, " actions"]
    sample: Int[Tensor, " actions"]
    old_mean: Float[Tensor, "actions *latent"] | None = None
    kl_weight: Float[Tensor, " actions"] | None = None

    def __len__(self) -> int:
        return self.step.shape[0]

    def select(self, rows: Int[Tensor, " rows"]) -> "Actions":
        """The given actions, with only the states that they start from."""
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
            kl_weight=None if self.kl_weight is None else self.kl_weight[rows],
        )

    @staticmethod
    def concatenate(parts: Sequence["Actions"]) -> "Actions":
        """Join the actions of several batches.

        Raises:
            ValueError: If only some of them have ``old_mean``.
        """
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + part.states.shape[0])
        means = [p.old_mean for p in parts if p.old_mean is not None]
        if means and len(means) < len(parts):
            raise ValueError("only some of these actions have old_mean")
        return Actions(
            states=torch.cat([p.states for p in parts]),
            # Rows of ``states`` are counted on over the batches.
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
        step: The step after which the candidate was completed: the last step for a whole trajectory,
            :data:`INITIAL` for a completion of the initial noise.
        granularity: Grid intervals that each step of the completion spans: 1 for a whole trajectory,
            0 for a candidate decoded from the model's prediction of the data.
        scores: The scores, with the reward that is trained on.
    """

    group: Int[Tensor, " candidates"]
    sample: Int[Tensor, " candidates"]
    step: Int[Tensor, " candidates"]
    granularity: Int[Tensor, " candidates"]
    scores: Scores

    def __len__(self) -> int:
        return self.group.shape[0]

    @property
    def reward(self) -> Float[Tensor, " candidates"]:
        """The weighted sum of scores; NaN where a trained reward failed."""
        return self.scores.reward

    @property
    def valid(self) -> Bool[Tensor, " candidates"]:
        """Which candidates have a reward. The others take no part in training."""
        return self.scores.valid

    def map(self, function: Callable[[Tensor], Tensor]) -> "Candidates":
        """Apply a function to each tensor, such as one that gathers it from all processes."""
        return Candidates(
            group=function(self.group),
            sample=function(self.sample),
            step=function(self.step),
            granularity=function(self.granularity),
            scores=self.scores.map(function),
        )

    def select(self, rows: Int[Tensor, " rows"] | Bool[Tensor, " candidates"]) -> "Candidates":
        """Some candidates, by their indices or by a mask."""
        return self.map(lambda values: values[rows])

    @staticmethod
    def concatenate(parts: Sequence["Candidates"]) -> "Candidates":
        """Join the candidates of several batches of one iteration."""
        return Candidates(
            group=torch.cat([p.group for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            step=torch.cat([p.step for p in parts]),
            granularity=torch.cat([p.granularity for p in parts]),
            scores=Scores.concatenate([p.scores for p in parts]),
        )


@dataclass(frozen=True)
class Cost:
    """The work of a rollout per prompt.

    Attributes:
        nfe: Denoiser evaluations, counted per sample and step.
        decodes: Decoded images or videos.
        rewards: Calls of each reward model, counted per scored candidate.
    """

    nfe: float
    decodes: float
    rewards: float


@dataclass(frozen=True)
class Experience:
    """The actions and candidates that one process collected in one iteration.

    Attributes:
        groups: The prompts.
        transition: The transition of the actions.
        actions: The stochastic steps.
        candidates: The scored candidates of this process.
        cost: Work per prompt.
        diversity: For each group, the mean standard deviation over the group of 8x8 thumbnails.
        duplicates: For each group, the number of samples that equal an earlier sample of the group.
        step_std: Standard deviation of the noise that each stochastic step injects, by step.
        gathered: The candidates of all processes; None if there is only one process.
        media: The media of each candidate, if the scorer was asked to keep them.
        expected: The reward that a learned baseline expects of each candidate of this process; None
            if the algorithm needs none.
    """

    groups: Sequence[Group]
    transition: Transition
    actions: Actions
    candidates: Candidates
    cost: Cost
    diversity: Float[Tensor, " groups"]
    duplicates: Float[Tensor, " groups"]
    step_std: Mapping[int, float]
    gathered: Candidates | None = None
    media: Float[Tensor, "candidates *media"] | None = None
    expected: Float[Tensor, " candidates"] | None = None

    @property
    def all_candidates(self) -> Candidates:
        """The candidates of all processes, over which advantages take their statistics."""
        return self.candidates if self.gathered is None else self.gathered

    def has_reward(self, actions: Actions) -> Bool[Tensor, " actions"]:
        """Whether all candidates of each action's sample have a reward."""
        c = self.candidates
        failed = set(zip(c.group[~c.valid].tolist(), c.sample[~c.valid].tolist(), strict=True))
        keys = zip(actions.group.tolist(), actions.sample.tolist(), strict=True)
        return torch.tensor([key not in failed for key in keys], dtype=torch.bool)
