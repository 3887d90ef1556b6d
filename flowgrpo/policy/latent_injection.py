"""Where states go into a pipeline: the methods that prepare its latents, watched and answered for."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowgrpo.policy.auxiliary_latents import AuxiliaryLatents
from flowgrpo.policy.calling import UnsupportedPipelineError
from flowgrpo.policy.entering import Place, enter, parts_of
from flowgrpo.policy.initial_noise import InitialNoise
from flowgrpo.policy.layouts import Layouts
from flowgrpo.policy.precision import as_fp32
from flowgrpo.policy.scheduler import PolicyScheduler
from flowgrpo.policy.step_plan import StepPlan

MAIN = "prepare_latents"
OTHERS = re.compile(r"prepare_\w+_latents")
"""Methods that prepare what is stepped beside the latents (sound), or conditions."""


class LatentInjection:
    """Puts a state where a pipeline prepares its own.

    Attributes:
        initial: What the initial noise is drawn from, where that is trained.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, scheduler: PolicyScheduler, device: torch.device
    ):
        """Watch the pipeline's methods, until :meth:`leave`."""
        self._pipeline, self._scheduler, self._device = pipeline, scheduler, device
        self._name = type(pipeline).__name__
        self.initial: InitialNoise | None = None
        self._entering: Tensor | None = None
        self._place: Place | None = None
        self._layouts, self._auxiliary = Layouts(), AuxiliaryLatents()
        self._methods: dict[str, Callable[..., Any]] = {}
        for name in dir(type(pipeline)):
            if name == MAIN or OTHERS.fullmatch(name):
                self._methods[name] = getattr(pipeline, name)
                setattr(pipeline, name, partial(self._prepare, name))

    def leave(self) -> None:
        """Give the pipeline its own methods back."""
        for name in self._methods:
            self._pipeline.__dict__.pop(name, None)

    @property
    def displaces(self) -> bool:
        """Whether a state was seen to be more or other than one prepared tensor as it is."""
        return len(self._layouts) > 0 or self._auxiliary.is_there

    def expect(self, state: Tensor | None, arguments: dict[str, Any]) -> dict[str, Any]:
        """Have the next call begin with a state, or as it would. Returns the call's arguments."""
        first = self._auxiliary.expect(state)
        self._entering = None if first is None else first.to(self._device)
        if first is not None and MAIN not in self._methods:
            arguments, self._entering = arguments | {"latents": self._entering}, None
        return arguments

    def check(self) -> None:
        """Raise UnsupportedPipelineError if the call that just ended took no state, where one was expected."""
        if self._entering is not None or self._auxiliary.is_expected:
            raise UnsupportedPipelineError(
                f"{self._name} cannot be entered: its call prepares no latents"
            )

    def learn(self, plan: StepPlan, again: Callable[[StepPlan], object]) -> None:
        """Keep what the call that just ended showed of its states, and join those beside each other.

        Args:
            itinerary: That of the call; its visits become those of joint states.
            again: Makes the same call with another itinerary.

        Raises:
            UnsupportedPipelineError: If its states could not be entered.
        """
        scheduler = self._scheduler
        displaced = scheduler.check_walk(self._name)
        self._place = scheduler.entered_at or self._place
        if scheduler.auxiliary is not None:
            self._auxiliary.learn(scheduler, scheduler.auxiliary, plan, self._name)
        if displaced is not None:
            self._layouts.learn(displaced, scheduler.prepared, again, self._name)

    def arrived(self) -> Tensor | None:
        """The last state of the call that just ended."""
        state, auxiliary = self._scheduler.arrived, self._scheduler.auxiliary
        if state is None or auxiliary is None or auxiliary.arrived is None:
            return state
        return self._auxiliary.join(state, auxiliary.arrived)

    def _prepare(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the method prepares; with a state to enter, that in its place."""
        prepared, scheduler = self._methods[method](*args, **kwargs), self._scheduler
        if method == MAIN:
            prepared = self._main(prepared)
        prepared = self._auxiliary.enter(method, prepared)
        # Conditions are prepared by such methods too, and may be none.
        if isinstance(prepared, Tensor | tuple | list):
            scheduler.prepared_by.append((method, parts_of(prepared)))
        return prepared

    def _main(self, prepared: Any) -> Any:
        numbered = self._layouts.numbered(prepared)
        if numbered is not None:
            return numbered
        if self._entering is None:
            prepared = as_fp32(prepared)
            if self.initial is not None:
                return self.initial.place_in(prepared, self._place, self._scheduler)
            return prepared
        state, self._entering = self._entering, None
        entered = self._layouts.enter(prepared, state)
        return enter(prepared, state, self._place, self._name) if entered is None else entered
