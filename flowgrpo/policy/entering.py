"""Puts a state where a pipeline prepares its own latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def parts_of(prepared: Any) -> list[Any]:
    """What ``prepare_latents`` returned, as a list."""
    return [prepared] if isinstance(prepared, Tensor) else list(prepared)


def place(state: torch.Size, shapes: Sequence[torch.Size | None]) -> tuple[int, int] | None:
    """Which prepared tensor the loop steps, and along which axis only the first part of it.

    Some pipelines keep a condition behind the latents in one tensor (Kandinsky 5).

    Args:
        state: Shape of what the scheduler steps.
        shapes: Shape of each prepared tensor; None for anything else.

    Returns:
        Index and axis (-1 for the whole tensor), or None if there is no such tensor.
    """
    if state in shapes:
        return shapes.index(state), -1
    found = []
    for i, shape in enumerate(shapes):
        if shape is None or len(shape) != len(state):
            continue
        other = [axis for axis, (a, b) in enumerate(zip(state, shape, strict=True)) if a != b]
        if len(other) == 1 and state[other[0]] < shape[other[0]]:
            found.append((i, other[0]))
    return found[0] if len(found) == 1 else None


def shapes_of(parts: Sequence[Any]) -> list[torch.Size | None]:
    """The shapes of those that are tensors of real numbers."""
    return [p.shape if isinstance(p, Tensor) and p.is_floating_point() else None for p in parts]


def enter(prepared: Any, state: Tensor) -> Any:
    """``prepared`` with the state in its place; None if it has none. The state is copied."""
    parts = parts_of(prepared)
    found = place(state.shape, shapes_of(parts))
    if found is None:
        return None
    index, axis = found
    # Some loops write into their latents, which must not be the caller's.
    entered = state.to(parts[index].device, copy=True)
    if axis >= 0:
        behind = parts[index].narrow(axis, state.shape[axis], parts[index].shape[axis] - state.shape[axis])  # fmt: skip
        entered = torch.cat([entered, behind.to(entered)], dim=axis)
    parts[index] = entered
    return entered if isinstance(prepared, Tensor) else tuple(parts)
