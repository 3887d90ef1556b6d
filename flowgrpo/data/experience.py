"""The result of a rollout: actions, candidates with their scores, and both as experience.

An *action* is one stochastic denoising step ``x -> x_next``. A *candidate* is one decoded image or
video that was scored. An algorithm defines which candidates judge which actions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flowgrpo.core.endings import Ending
from flowgrpo.core.scores import Scores
from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch
from flowgrpo.core.transitions import Transition
from flowgrpo.data.prompts import Group

INITIAL = -1
"""The step index of an action that draws the initial noise, and of candidates decoded from it."""


class Latents:
    """States ``(M, *latent)`` in the tensors in which they were recorded, indexed as one tensor.

    A rollout records a tensor per batch and step. Joined to one tensor they would be held twice while
    they are joined.

    Args:
        blocks: Tensors ``(n, *latent)`` of one shape, precision and device.
    """

    def __init__(self, blocks: Sequence[Float[Tensor, "_ *latent"]]):
        self.blocks = tuple(blocks)
        self._ends = torch.tensor([len(b) for b in self.blocks]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: "int | Tensor | slice") -> Tensor:
        """The states of some rows: of one row, of indices, of a mask, or of a slice."""
        if len(self.blocks) == 1:
            return self.blocks[0][rows]
        # On the CPU, where rows are drawn.
        chosen = torch.arange(len(self))[rows]
        if chosen.ndim == 0:
            return self[chosen[None]][0]
        block_of = torch.bucketize(chosen, self._ends, right=True)
        first = self.blocks[0]
        found = first.new_empty((len(chosen), *first.shape[1:]))
        for index in block_of.unique().tolist():
            here = (block_of == index).nonzero().squeeze(1)
            block = self.blocks[index]
            found[here] = block[chosen[here] - self._ends[index] + len(block)]
        return found

    def joined(self) -> Float[Tensor, "states *latent"]:
        """All states in one new tensor."""
        return torch.cat(self.blocks)

    def keep(self, rows: Int[Tensor, " rows"]) -> "Latents":
        """The states of ascending rows; a block of which all rows are kept is not copied."""
        ends = torch.searchsorted(rows, self._ends).tolist()
        starts = [0, *ends[:-1]]
        blocks = []
        for block, end, i, j in zip(self.blocks, self._ends.tolist(), starts, ends, strict=True):
            if i < j:
                own = rows[i:j] - (end - len(block))
                blocks.append(block if len(own) == len(block) else block[own])
        return Latents(blocks or [self.blocks[0][:0]])

    @staticmethod
    def concatenate(parts: Sequence["Latents"]) -> "Latents":
        """The states of several parts, one after another; nothing is copied."""
        return Latents([block for part in parts for block in part.blocks])


@dataclass(frozen=True)
class Actions:
    """The stochastic steps of one rollout: ``A`` actions between ``M`` states.

    Each state is stored once, although the state after one step is usually the state before the next.

    Attributes:
        states: States before and after the steps, fp32. Actions that start from the same state share
            a row, and one forward pass of the model serves them all.
        state: Row of ``states`` before each action.
        next_state: Row of ``states`` after each action.
        step: Index of the step in the sampling grid, or :data:`INITIAL`.
        old_log_prob: Log-probability under the old policy, which sampled the step: the mean over
            latent elements.
        group: Index of the :class:`Group`.
        sample: Index of the sample in its group.
        old_mean: Means of the steps under the old policy. They are kept only if
            ``policy.keeps_means`` is set, which the learner does when the loss needs them.
        kl_weight: Weight of each action's KL to the reference policy; None for 1. Guards against reward
            hacking set it.
        guidance: Guidance scale with which the model is trained on each action; None for that of
            ``sampling``.
        generated: Which actions lead to data that the model predicts, in place of a denoising step; None for
            none.
    """

    states: Latents
    state: Int[Tensor, " actions"]
    next_state: Int[Tensor, " actions"]
    step: Int[Tensor, " actions"]
    old_log_prob: Float[Tensor, " actions"]
    group: Int[Tensor, " actions"]
    sample: Int[Tensor, " actions"]
    old_mean: Float[Tensor, "actions *latent"] | None = None
    kl_weight: Float[Tensor, " actions"] | None = None
    guidance: Float[Tensor, " actions"] | None = None
    generated: Bool[Tensor, " actions"] | None = None

    def __len__(self) -> int:
        return self.step.shape[0]

    @classmethod
    def between(
        cls,
        x: Float[Tensor, "states *latent"],
        state: Int[Tensor, " actions"],
        x_next: Float[Tensor, "actions *latent"],
        step: Int[Tensor, " actions"],
        old_log_prob: Float[Tensor, " actions"],
        group: Int[Tensor, " actions"],
        sample: Int[Tensor, " actions"],
    ) -> "Actions":
        """Actions from states of their own, ``x[state]``, to states of their own, ``x_next``."""
        next_state = len(x) + torch.arange(len(x_next))
        return cls(Latents([x, x_next]), state, next_state, step, old_log_prob, group, sample)

    @property
    def is_generated(self) -> Bool[Tensor, " actions"]:
        """``generated``, with False where it is None."""
        if self.generated is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.generated

    @property
    def x_next(self) -> Float[Tensor, "actions *latent"]:
        """The state after each action, in a new tensor."""
        return self.states[self.next_state]

    def starts(self) -> tuple[Float[Tensor, "starts *latent"], Int[Tensor, " actions"]]:
        """The distinct states before the actions, and for each action its row among them."""
        used, row = torch.unique(self.state, return_inverse=True)
        return self.states[used], row

    def select(self, rows: Int[Tensor, " rows"]) -> "Actions":
        """The given actions, with only the states that they lead from and to."""
        ends = torch.cat([self.state[rows], self.next_state[rows]])
        used, row = torch.unique(ends, return_inverse=True)
        state, next_state = row.chunk(2)
        return Actions(
            states=self.states.keep(used),
            state=state,
            next_state=next_state,
            step=self.step[rows],
            old_log_prob=self.old_log_prob[rows],
            group=self.group[rows],
            sample=self.sample[rows],
            old_mean=None if self.old_mean is None else self.old_mean[rows],
            kl_weight=None if self.kl_weight is None else self.kl_weight[rows],
            guidance=None if self.guidance is None else self.guidance[rows],
            generated=None if self.generated is None else self.generated[rows],
        )

    @staticmethod
    def concatenate(parts: Sequence["Actions"]) -> "Actions":
        """Join the actions of several batches.

        Raises:
            ValueError: If only some of them have ``old_mean``, ``kl_weight`` or ``guidance``.
        """
        offsets = [0]
        for part in parts:
            offsets.append(offsets[-1] + len(part.states))
        return Actions(
            states=Latents.concatenate([p.states for p in parts]),
            # Rows of ``states`` are counted on over the batches.
            state=torch.cat([p.state + o for p, o in zip(parts, offsets, strict=False)]),
            next_state=torch.cat([p.next_state + o for p, o in zip(parts, offsets, strict=False)]),
            step=torch.cat([p.step for p in parts]),
            old_log_prob=torch.cat([p.old_log_prob for p in parts]),
            group=torch.cat([p.group for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            old_mean=_joined("old_mean", [p.old_mean for p in parts]),
            kl_weight=_joined("kl_weight", [p.kl_weight for p in parts]),
            guidance=_joined("guidance", [p.guidance for p in parts]),
            generated=torch.cat([p.is_generated for p in parts])
            if any(p.generated is not None for p in parts)
            else None,
        )


def _joined(name: str, columns: Sequence[Tensor | None]) -> Tensor | None:
    """A column of several batches of actions, which all of them have, or none.

    Raises:
        ValueError: If only some have it.
    """
    there = [c for c in columns if c is not None]
    if there and len(there) < len(columns):
        raise ValueError(f"only some of these actions have {name}")
    return torch.cat(there) if there else None


@dataclass(frozen=True)
class Candidates:
    """The scored images or videos of one rollout, ``K`` of them.

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
    def none() -> "Candidates":
        """No candidates, of an algorithm that judges nothing."""
        index = torch.zeros(0, dtype=torch.long)
        return Candidates(index, index, index, index, Scores({}, torch.zeros(0)))

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
        diversity: For each group, the mean standard deviation over the group of 8x8 thumbnails; NaN if
            nothing was decoded.
        duplicates: For each group, the number of samples that equal an earlier sample of the group; NaN
            likewise.
        step_std: Standard deviation of the noise that each stochastic step injects, by step.
        gathered: The candidates of all processes; None if there is only one process.
        media: The media of each candidate, if the scorer was asked to keep them.
        expected: The reward that a learned baseline expects of each candidate of this process; None
            if the algorithm needs none.
        by_group: Further metrics by name, with a value for each group; NaN where it is not defined.
        ending: How actions of the kind ``differentiated`` continue to the data; None for other kinds.
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
    by_group: Mapping[str, Float[Tensor, " groups"]] = field(default_factory=dict)
    ending: Ending | None = None

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
