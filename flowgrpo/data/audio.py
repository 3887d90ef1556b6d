"""Sound that a pipeline makes along with its videos."""

from collections.abc import Sequence
from dataclasses import dataclass

from flowgrpo.core.tensors import Bool, Float, Tensor, torch


@dataclass(frozen=True)
class Audio:
    """The sound of a batch of samples.

    Attributes:
        waveform: Amplitudes in [-1, 1], fp32.
        rate: Amplitudes per second of each channel.

    Example:
        ``audio[2:4]`` is the sound of two samples.
    """

    waveform: Float[Tensor, "batch channels time"]
    rate: int

    def __len__(self) -> int:
        return len(self.waveform)

    def __getitem__(self, rows: slice) -> "Audio":
        return Audio(self.waveform[rows], self.rate)

    @property
    def is_finite(self) -> Bool[Tensor, " batch"]:
        """Which samples have no NaN and no infinity; on the CPU."""
        return self.waveform.flatten(1).isfinite().all(1).cpu()

    @classmethod
    def concatenate(cls, parts: "Sequence[Audio | None]") -> "Audio | None":
        """The sound of several batches of one length; None if one of them has none."""
        known = [p for p in parts if p is not None]
        if not known or len(known) < len(parts):
            return None
        return cls(torch.cat([p.waveform for p in known]), known[0].rate)
