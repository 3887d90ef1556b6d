"""Random streams keyed by their purpose; global random state is never used.

A draw depends only on ``(seed, iteration, group, sample, stream)``: the same images come out for any
batch size and any number of processes, and after a resume.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flowgrpo.core.tensors import Float, Tensor, torch


@dataclass(frozen=True)
class Random:
    """A node in the tree of random streams; :meth:`at` returns a child.

    Attributes:
        seed: The seed of the whole tree.
        path: The keys from the root to this node.

    Example:
        ``Random(seed=0).at("train", 12).generator("noise", 3)``
    """

    seed: int
    path: tuple[int | str, ...] = ()

    def at(self, *keys: int | str) -> "Random":
        """The stream below this one for some keys."""
        return Random(self.seed, (*self.path, *keys))

    def integer(self, *keys: int | str) -> int:
        """A number in [0, 2**63) that depends only on the seed, the path and the keys."""
        text = "/".join(f"{type(k).__name__}:{k}" for k in (self.seed, *self.path, *keys))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1

    def generator(self, *keys: int | str) -> "torch.Generator":
        """A new CPU generator for some keys."""
        return torch.Generator().manual_seed(self.integer(*keys))


@dataclass(frozen=True)
class SampleNoise:
    """The noise of a batch of samples: one random stream per sample.

    Attributes:
        streams: The stream of each sample. Two samples with the same stream get the same noise.
        initial_streams: The streams of the initial latents, if they differ from ``streams``: samples
            with the same initial stream start from the same latents and differ from the first
            stochastic step on.
    """

    streams: Sequence[Random]
    initial_streams: Sequence[Random] | None = None

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, rows: slice) -> "SampleNoise":
        initial = None if self.initial_streams is None else self.initial_streams[rows]
        return SampleNoise(self.streams[rows], initial)

    def padded(self, extra: int) -> "SampleNoise":
        """The noise of a batch whose last sample is repeated."""
        if not extra:
            return self
        initial = self.initial_streams
        return SampleNoise(
            [*self.streams, *[self.streams[-1]] * extra],
            None if initial is None else [*initial, *[initial[-1]] * extra],
        )

    def seeds(self) -> list[int]:
        """The seeds of :meth:`initial`: ``torch.Generator().manual_seed(seed)`` makes the same draws."""
        return [stream.integer("initial") for stream in self.initial_streams or self.streams]

    def initial(self) -> "list[torch.Generator]":
        """Generators for the pipeline's own draws (the initial latents), one per sample."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds()]

    def at_step(self, step: int, shape: Sequence[int]) -> Float[Tensor, "batch *latent"]:
        """The noise that each sample's stochastic step injects; ``shape`` is that of one sample."""
        draws = [torch.randn(*shape, generator=s.generator("step", step)) for s in self.streams]
        return torch.stack(draws)
