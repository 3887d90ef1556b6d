"""The results of calls of a pipeline, and what the calls show about the pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.audio import Audio
from flowgrpo.policy.arguments import Calling
from flowgrpo.policy.latent_injection import LatentLocations
from flowgrpo.policy.step_plan import StepRecord


class CallResult(NamedTuple):
    """The result of one call of the pipeline.

    Attributes:
        output: Media ``(B, C, H, W)`` or ``(B, F, C, H, W)`` in [0, 1], or the last states ``(B, *latent)``.
        records: The recorded steps, in order.
        audio: The sound of the media, if the pipeline makes any.
    """

    output: Tensor
    records: Sequence[StepRecord]
    audio: Audio | None

    def first(self, number: int) -> "CallResult":
        """The part of the first samples."""
        cut: dict[int, Tensor] = {}
        records = [r.first(number, cut) for r in self.records]
        audio = None if self.audio is None else self.audio[:number]
        return CallResult(self.output[:number], records, audio)


def padded(x: Tensor, extra: int) -> Tensor:
    """A batch with its last sample repeated."""
    return torch.cat([x, x[-1:].expand(extra, *x.shape[1:])]) if extra else x


@dataclass(frozen=True)
class Rollout:
    """One batch that was run through the pipeline.

    Attributes:
        rows: Indices of the batch among the requested samples.
        x: The last states, in the layout of the denoising loop; None if media were decoded.
        media: Decoded images ``(B, C, H, W)`` or videos ``(B, F, C, H, W)`` in [0, 1]; None if only
            states were requested.
        records: The recorded steps, in order.
        audio: The sound of the decoded videos; None if the pipeline makes none, or nothing was
            decoded.
    """

    rows: range
    x: Float[Tensor, "batch *latent"] | None
    media: Float[Tensor, "batch *frames channels height width"] | None
    records: Sequence[StepRecord]
    audio: Audio | None = None


@dataclass
class Learned:
    """Facts about a pipeline that its calls have shown, and that later calls rely on.

    Attributes:
        calling: The form of the arguments that the pipeline takes.
        latents: Where the states of its loop are in the tensors that it prepares.
        empty_loop: Whether the loop may be empty. False once a call failed with an empty loop and
            succeeded with a step that keeps its state.
        enumerates: Whether the loop enumerates its steps, so that it can be given the whole grid.
    """

    calling: Calling = field(default_factory=Calling)
    latents: LatentLocations = field(default_factory=LatentLocations)
    empty_loop: bool = True
    enumerates: bool = False
