"""States that are stepped beside a pipeline's latents: the sound of a video.

LTX-2 steps a video with its scheduler and the sound with a copy of it. The model lets one see the other,
so a state is both: the policy's is the two flattened and joined, stepped by one transition on one grid.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo.core.transitions import Prediction
from flowgrpo.policy.calling import UnsupportedPipelineError
from flowgrpo.policy.entering import Place, parts_of
from flowgrpo.policy.scheduler import PolicyScheduler
from flowgrpo.policy.step_plan import StepPlan, StepRecord


@dataclass(frozen=True)
class _Source:
    """Where the second state of a loop is prepared."""

    method: str
    place: Place


class AuxiliaryLatents:
    """Joins the two states of a loop, and takes joint states apart to enter them."""

    def __init__(self) -> None:
        self._source: _Source | None = None
        self._shapes: dict[int, tuple[torch.Size, torch.Size]] = {}
        self._entering: Tensor | None = None

    @property
    def is_there(self) -> bool:
        """Whether a second state has been seen."""
        return self._source is not None

    @property
    def is_expected(self) -> bool:
        """Whether a second state was to be entered and was not."""
        return self._entering is not None

    def expect(self, state: Tensor | None) -> Tensor | None:
        """Keep the second part of a joint state for :meth:`enter`. Returns the first."""
        # What a call that failed did not take must not enter another.
        self._entering = None
        if self._source is None or state is None:
            return state
        first, second = self._shapes[state.shape[1:].numel()]
        one, other = state.split([first.numel(), second.numel()], dim=1)
        self._entering = other.unflatten(1, second)
        return one.unflatten(1, first)

    def enter(self, method: str, prepared: Any) -> Any:
        """What a method prepared, with the second state in it if that is where it comes from."""
        if self._entering is None or self._source is None or self._source.method != method:
            return prepared
        state, self._entering = self._entering, None
        parts, place = parts_of(prepared), self._source.place
        # In the state's precision, whatever was prepared.
        entered = parts[place.index].to(state.dtype, copy=True)
        place.within(entered, state.shape).copy_(state)
        parts[place.index] = entered
        return entered if isinstance(prepared, Tensor) else tuple(parts)

    def learn(
        self, scheduler: PolicyScheduler, auxiliary: PolicyScheduler, walk: StepPlan, name: str
    ) -> None:
        """Note where a second state came from, and join its visits to those of the first.

        Raises:
            UnsupportedPipelineError: If it was not stepped along with the first, or is nowhere in what was prepared.
        """
        second = auxiliary.plan.records
        if auxiliary.taken != scheduler.taken or len(second) != len(walk.records):
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: it steps a second state at other steps than its latents"
            )
        if self._source is None and auxiliary.taken > 0:
            places = [(m, i) for m, parts in scheduler.prepared_by for i in range(len(parts))]
            if auxiliary.entered_at is None:
                raise UnsupportedPipelineError(
                    f"{name} cannot be a policy: the state that it steps beside its latents is nowhere "
                    "in what it prepares"
                )
            method, index = places[auxiliary.entered_at.index]
            self._source = _Source(method, replace(auxiliary.entered_at, index=index))
        walk.records[:] = [self._joint(a, b) for a, b in zip(walk.records, second, strict=True)]

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """One tensor ``(B, N)`` of two."""
        shapes = first.shape[1:], second.shape[1:]
        self._shapes[sum(s.numel() for s in shapes)] = shapes
        return torch.cat([first.flatten(1), second.flatten(1)], 1)

    def _joint(self, a: StepRecord, b: StepRecord) -> StepRecord:
        p, q = a.prediction, b.prediction
        output = self.join(p.output, q.output)
        prediction = Prediction(self.join(p.x0, q.x0), self.join(p.x1, q.x1), output)
        mean = self.join(a.gaussian.mean, b.gaussian.mean)
        x, x_next = self.join(a.x, b.x), self.join(a.x_next, b.x_next)
        gaussian = replace(a.gaussian, mean=mean)
        return StepRecord(a.step, a.interval, x, x_next, prediction, gaussian)
