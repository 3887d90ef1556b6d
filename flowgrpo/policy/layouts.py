"""Pipelines whose loop steps a part of what they prepared, or steps it in another layout.

LTX image-to-video packs its latents into tokens before the loop, and in the loop unpacks them, steps
all frames but the first, and packs them again. Where each element of the state comes from is found out
by a call whose latents are numbered.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrpo.policy.calling import UnsupportedPipelineError
from flowgrpo.policy.entering import parts_of, shapes_of
from flowgrpo.policy.step_plan import StepPlan

MAX_NUMBER = 2**24
"""The whole numbers up to this are exact in fp32."""


@dataclass(frozen=True)
class Layout:
    """Where the elements of a state are in a prepared tensor.

    Attributes:
        index: Which of the prepared tensors.
        whole: One sample's shape of it.
        positions: For each element of one sample's state its place in the flattened tensor.
    """

    index: int
    whole: torch.Size
    positions: Tensor

    def fits(self, state: torch.Size, shapes: Sequence[torch.Size | None]) -> bool:
        """Whether a state of this shape goes into tensors of these shapes."""
        whole = shapes[self.index] if self.index < len(shapes) else None
        return whole is not None and whole[1:] == self.whole and state[1:] == self.positions.shape

    def enter(self, prepared: Any, state: Tensor) -> Any:
        """``prepared`` with the elements of the state in their places."""
        parts = parts_of(prepared)
        entered = parts[self.index].to(state.dtype, copy=True).contiguous()
        flat, places = entered.view(len(entered), -1), self.positions.flatten().to(entered.device)
        flat[:, places] = state.flatten(1)
        parts[self.index] = entered
        return entered if isinstance(prepared, Tensor) else tuple(parts)


class Layouts:
    """The layouts of a pipeline, as far as its calls have shown them: one for each size of what it makes."""

    def __init__(self) -> None:
        self._known: list[Layout] = []
        self._numbering: int | None = None

    def __len__(self) -> int:
        return len(self._known)

    def enter(self, prepared: Any, state: Tensor) -> Any | None:
        """``prepared`` with the state in it; None if no known layout fits."""
        layout = self._find(state.shape, parts_of(prepared))
        return None if layout is None else layout.enter(prepared, state)

    def numbered(self, prepared: Any) -> Any | None:
        """In a call that is made to learn: what was prepared, with one tensor's elements numbered."""
        if self._numbering is None:
            return None
        parts = parts_of(prepared)
        whole = parts[self._numbering]
        numbers = torch.arange(whole[0].numel(), dtype=torch.float32, device=whole.device)
        parts[self._numbering] = numbers.view(whole[:1].shape).repeat(
            len(whole), *(1,) * (whole.ndim - 1)
        )
        return parts[0] if isinstance(prepared, Tensor) else tuple(parts)

    def learn(
        self,
        state: torch.Size,
        prepared: Sequence[Any],
        call: Callable[[StepPlan], object],
        name: str,
    ) -> None:
        """Find out where states of a shape are in what a call prepares, unless that is known.

        Args:
            state: Shape of the loop's states.
            prepared: What the call prepared.
            call: Makes the same call with another itinerary.
            name: Of the pipeline, for the message.

        Raises:
            UnsupportedPipelineError: If the elements of a state are not elements of what was prepared.
        """
        if self._find(state, prepared) is not None:
            return
        for index, whole in enumerate(shapes_of(prepared)):
            if whole is None or not state[1:].numel() <= whole[1:].numel() <= MAX_NUMBER:
                continue
            plan = StepPlan(nodes=[0, 1], hold=True, record=[0])
            self._numbering = index
            try:
                call(plan)
            finally:
                self._numbering = None
            positions = _positions(plan.records[0].x, whole)
            if positions is not None:
                self._known.append(Layout(index, whole[1:], positions))
                return
        shapes = [tuple(s) for s in shapes_of(prepared) if s]
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: what it steps, {tuple(state)}, is no part of what it prepares, "
            f"{shapes}"
        )

    def _find(self, state: torch.Size, prepared: Sequence[Any]) -> Layout | None:
        shapes = shapes_of(prepared)
        return next((k for k in self._known if k.fits(state, shapes)), None)


def _positions(state: Tensor, whole: torch.Size) -> Tensor | None:
    """Where the elements of the first state of a numbered call come from; None if they were changed."""
    positions = state[0].round().long()
    untouched = torch.equal(state, positions.to(state.dtype).expand_as(state))
    inside = int(positions.min()) >= 0 and int(positions.max()) < whole[1:].numel()
    if not untouched or not inside or len(positions.unique()) < positions.numel():
        return None
    return positions
