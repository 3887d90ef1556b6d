"""Latents that a pipeline steps along with its main latents: the audio of a video.

LTX-2 steps the video with its scheduler and the audio with a copy of it. Each is an input of the
other's prediction, so the policy's state is the pair: both are flattened per sample and concatenated,
``(B, N_main + N_auxiliary)``, and one transition draws both on the same grid.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo.core.transitions import Prediction
from flowgrpo.policy.call import PipelineCall, Place, UnsupportedPipelineError
from flowgrpo.policy.step_plan import StepRecord


@dataclass(frozen=True)
class _Source:
    """The method that prepares the auxiliary latents, and their place in its result."""

    method: str
    place: Place


class AuxiliaryLatents:
    """Joins main and auxiliary latents to one state, and splits such states to inject them.

    It learns from the first call of the pipeline which method prepares the auxiliary latents, and from
    every call the shapes of both parts.
    """

    def __init__(self) -> None:
        self._source: _Source | None = None
        self._shapes: dict[int, tuple[torch.Size, torch.Size]] = {}
        """Shapes of one sample's main and auxiliary latents, by the size of the joint state."""

    @property
    def exist(self) -> bool:
        """Whether a call has stepped auxiliary latents."""
        return self._source is not None

    def split(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The main latents of a state, and the auxiliary ones if the pipeline has them."""
        if self._source is None:
            return state, None
        main, auxiliary = self._shapes[state.shape[1:].numel()]
        first, second = state.split([main.numel(), auxiliary.numel()], dim=1)
        return first.unflatten(1, main), second.unflatten(1, auxiliary)

    def join(self, main: Tensor, auxiliary: Tensor) -> Tensor:
        """One tensor ``(B, N)`` with the elements of both."""
        shapes = main.shape[1:], auxiliary.shape[1:]
        self._shapes[sum(s.numel() for s in shapes)] = shapes
        return torch.cat([main.flatten(1), auxiliary.flatten(1)], 1)

    def inject(self, call: PipelineCall, method: str, parts: list[Any]) -> bool:
        """Replace the auxiliary latents if ``method`` has prepared them and the call has a state.

        Args:
            call: The current call.
            method: The pipeline's method that was called.
            parts: The values that it returned; changed in place.

        Returns:
            Whether they were replaced.
        """
        state = call.inject_auxiliary
        if state is None or self._source is None or self._source.method != method:
            return False
        call.inject_auxiliary, place = None, self._source.place
        # In the state's precision, whatever precision was prepared.
        injected = parts[place.index].to(state.dtype, copy=True)
        place.within(injected, state.shape).copy_(state)
        parts[place.index] = injected
        return True

    def learn(self, call: PipelineCall, name: str) -> None:
        """Join the records of both loops of a call that ended, and note where its latents came from.

        Args:
            call: A call that stepped auxiliary latents.
            name: Class of the pipeline, for the message.

        Raises:
            UnsupportedPipelineError: If the auxiliary latents were not stepped along with the main
                ones, or are not among the prepared tensors.
        """
        main, auxiliary = call.main, call.auxiliary
        assert auxiliary is not None
        if auxiliary.taken != main.taken or len(auxiliary.records) != len(main.records):
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: it steps auxiliary latents at other steps than its main "
                "latents"
            )
        if self._source is None and auxiliary.taken > 0:
            if auxiliary.start_place is None:
                raise UnsupportedPipelineError(
                    f"{name} cannot be a policy: the auxiliary latents that it steps are not among the "
                    "tensors that it prepares"
                )
            # The place counts the values of all methods; the source counts those of its own method.
            origins = [(m, i) for m, parts in call.prepared for i in range(len(parts))]
            method, index = origins[auxiliary.start_place.index]
            self._source = _Source(method, replace(auxiliary.start_place, index=index))
        pairs = zip(main.records, auxiliary.records, strict=True)
        main.records = [self._joint(a, b) for a, b in pairs]

    def _joint(self, a: StepRecord, b: StepRecord) -> StepRecord:
        p, q = a.prediction, b.prediction
        output = self.join(p.output, q.output)
        prediction = Prediction(self.join(p.x0, q.x0), self.join(p.x1, q.x1), output)
        mean = self.join(a.gaussian.mean, b.gaussian.mean)
        x, x_next = self.join(a.x, b.x), self.join(a.x_next, b.x_next)
        # Both steps have the same interval, and so the same standard deviation.
        gaussian = replace(a.gaussian, mean=mean)
        return StepRecord(a.step, a.interval, x, x_next, prediction, gaussian)
