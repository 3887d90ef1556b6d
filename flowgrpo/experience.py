"""The types that flow through the system: prompts, actions, candidates, experience.

An *action* is one stochastic denoising step ``x -> x_next``; a *candidate* is one decoded image or
video that was scored. An algorithm says which candidates judge which actions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from flowgrpo.core.transitions import Transition
from flowgrpo.pictures import as_rgb


def _in_memory(value: Any) -> Any:
    """A picture as RGB, from its file or as it is; anything else as it is."""
    if isinstance(value, Image.Image):
        return as_rgb(value)
    return _open(value) if isinstance(value, Path) else value


@lru_cache(maxsize=64)
def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return as_rgb(image)


@dataclass(frozen=True)
class Prompt:
    """What to generate.

    Attributes:
        text: The caption.
        negative: What to guide away from; ``None`` leaves it to the pipeline.
        metadata: Anything a reward needs, such as GenEval's ``tag``, ``include`` and ``exclude``.
        images: What an editing or image-to-video pipeline starts from: files, or pictures in memory.
        height: Pixels; ``None`` leaves it to the configuration. Likewise ``width``.
        num_frames: Frames of a video; ``None`` leaves it to the configuration.
        call: Further arguments of the pipeline's call for this prompt, by their names there; pictures
            (``control_image``, ``mask_image``, ``last_image``) as files or in memory.

    Example:
        ``Prompt("a photo of two circles", metadata={"tag": "counting", "include": [...]})``
    """

    text: str
    negative: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Path | Image.Image] = ()
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int | None, int | None, int | None]:
        """Height, width and number of frames; prompts of one size can share a tensor."""
        return self.height, self.width, self.num_frames

    def open_images(self) -> list[Image.Image]:
        """The condition images in memory, as RGB."""
        return [_in_memory(i) for i in self.images]

    def open_call(self) -> dict[str, Any]:
        """The further arguments with their pictures in memory, as RGB."""
        return {k: _in_memory(v) for k, v in self.call.items()}


@dataclass(frozen=True)
class Group:
    """One prompt of an iteration, sampled several times.

    Attributes:
        index: Place in the iteration over all ranks. Equal prompts are different groups.
        prompt: What to generate.
    """

    index: int
    prompt: Prompt


@runtime_checkable
class RewardModel(Protocol):
    """Anything that scores media: a class with ``__call__`` or a plain function.

    ``media`` holds images ``(B, C, H, W)`` or videos ``(B, F, C, H, W)`` in [0, 1], fp32; the result
    holds one finite score per sample, higher is better.
    """

    def __call__(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]: ...


@runtime_checkable
class LearningReward(RewardModel, Protocol):
    """A reward that learns during the run, such as a discriminator; its state goes with the run's."""

    def update(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Mapping[str, float]:
        """Learn from an iteration's media, after they were scored; returns what to log."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """All that learning changes."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        ...


@runtime_checkable
class PairwiseJudge(Protocol):
    """Anything that says which of two media fits a prompt better.

    ``first`` and ``second`` hold media as for :class:`RewardModel`. The result holds, per pair, how
    surely the first one is better: 1 it is, 0 the second is, 0.5 neither; NaN where no verdict came.
    """

    def compare(
        self,
        first: Float[Tensor, "batch *frames channels height width"],
        second: Float[Tensor, "batch *frames channels height width"],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, " batch"]: ...


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
