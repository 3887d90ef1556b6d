"""Puts a state where a pipeline prepares its own latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flowgrpo.policy.calling import UnsupportedPipelineError


def parts_of(prepared: Any) -> list[Any]:
    """What ``prepare_latents`` returned, as a list."""
    return [prepared] if isinstance(prepared, Tensor) else list(prepared)


@dataclass(frozen=True)
class Place:
    """Where in what a pipeline prepares the state of its loop is.

    Attributes:
        index: Which of the prepared tensors.
        start: First index along each axis; a state smaller than the tensor is a part of it.
        whole: One sample's shape of that tensor, where it was seen.
    """

    index: int
    start: tuple[int, ...]
    whole: tuple[int, ...] = ()

    def within(self, whole: Tensor, shape: torch.Size) -> Tensor:
        """The part of the tensor, as a view. Raises IndexError if it has no such part."""
        if len(shape) != whole.ndim or any(
            a + n > m for a, n, m in zip(self.start, shape, whole.shape, strict=True)
        ):
            raise IndexError(f"no {tuple(shape)} at {self.start} of {tuple(whole.shape)}")
        return whole[tuple(slice(a, a + n) for a, n in zip(self.start, shape, strict=True))]


def locate(state: Tensor, prepared: Sequence[Any]) -> Place | None:
    """Where the first state of a loop is in what was prepared for it, by its values.

    Along an axis where the tensor is longer, the state is at one of its ends: some pipelines keep a
    condition behind the latents, or a first frame before them (Kandinsky 5).
    """
    for i, whole in enumerate(prepared):
        if shapes_of([whole])[0] is None or whole.ndim != state.ndim or state.numel() == 0:
            continue
        longer = [m - n for n, m in zip(state.shape, whole.shape, strict=True)]
        if min(longer) < 0:
            continue
        for start in product(*({0, d} for d in longer)):
            found = Place(i, start, tuple(whole.shape[1:]))
            if torch.equal(found.within(whole, state.shape).to(state), state):
                return found
    return None


def place(state: torch.Size, shapes: Sequence[torch.Size | None]) -> Place | None:
    """The same by shapes alone: the whole tensor, or the first part of it along one axis.

    Args:
        state: Shape of what the scheduler steps.
        shapes: Shape of each prepared tensor; None for anything else.
    """
    start = (0,) * len(state)
    if state in shapes:
        return Place(shapes.index(state), start)
    found = []
    for i, shape in enumerate(shapes):
        if shape is None or len(shape) != len(state):
            continue
        other = [axis for axis, (a, b) in enumerate(zip(state, shape, strict=True)) if a != b]
        if len(other) == 1 and state[other[0]] < shape[other[0]]:
            found.append(Place(i, start))
    return found[0] if len(found) == 1 else None


def shapes_of(parts: Sequence[Any]) -> list[torch.Size | None]:
    """The shapes of those that are tensors of real numbers."""
    return [p.shape if isinstance(p, Tensor) and p.is_floating_point() else None for p in parts]


def sought(parts: Sequence[Any], shape: torch.Size, known: Place | None = None) -> Place | None:
    """Where a state of a shape goes: where an earlier loop began, if that was seen and fits."""
    if known is not None:
        try:
            known.within(parts[known.index], shape)
            return known
        except IndexError:
            pass
    return place(shape, shapes_of(parts))


def enter(prepared: Any, state: Tensor, known: Place | None = None, name: str = "it") -> Any:
    """``prepared`` with the state in its place. The state is copied.

    Args:
        prepared: What the pipeline's ``prepare_latents`` returned.
        state: What its loop is to begin with.
        known: Where an earlier loop began, if that was seen.
        name: Of the pipeline, for the message.

    Raises:
        UnsupportedPipelineError: If there is no place for it.
    """
    parts = parts_of(prepared)
    found = sought(parts, state.shape, known)
    if found is None:
        raise UnsupportedPipelineError(
            f"{name} cannot be entered: it prepares latents of shape "
            f"{[tuple(s) for s in shapes_of(parts) if s]}, its loop holds {tuple(state.shape)}"
        )
    # Some loops write into their latents, which must not be the caller's; and the state's precision
    # is kept, whatever was prepared.
    entered = parts[found.index].to(state.dtype, copy=True)
    found.within(entered, state.shape).copy_(state)
    parts[found.index] = entered
    return entered if isinstance(prepared, Tensor) else tuple(parts)
