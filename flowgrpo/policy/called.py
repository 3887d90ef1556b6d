"""The result of one call of a pipeline, and batches that are completed to a fixed size."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrpo.data.audio import Audio
from flowgrpo.policy.step_plan import StepRecord


class Called(NamedTuple):
    """What a call of the pipeline gave: media or last states, recorded steps, and the media's sound."""

    output: Tensor
    records: Sequence[StepRecord]
    audio: Audio | None

    def first(self, number: int) -> "Called":
        """The part of the first samples."""
        cut: dict[int, Tensor] = {}
        records = [r.first(number, cut) for r in self.records]
        audio = None if self.audio is None else self.audio[:number]
        return Called(self.output[:number], records, audio)


def padded(x: Tensor, extra: int) -> Tensor:
    """A batch with its last sample repeated."""
    return torch.cat([x, x[-1:].expand(extra, *x.shape[1:])]) if extra else x
