"""Injects a state into a pipeline: the call begins with it in place of the pipeline's own latents.

Replaying a step, branching from the middle of the grid and decoding all start from a given state
``x_k``. Pipelines call their method ``prepare_latents`` before the loop; it is wrapped, and the state
replaces the latents in its result. The loop may hold the state in three ways:

1. A prepared tensor is the state, or the state is a box in it (:class:`~flowgrpo.policy.call.Place`).
   The first call shows which: the state that reaches the scheduler is compared with what was prepared.
2. The loop steps the elements in another layout, or a part of them: LTX image-to-video packs latents
   into tokens, then unpacks them in the loop and steps all frames but the first. A :class:`Layout` says
   which element of the prepared tensor each element of the state is. It is found with a second call
   whose prepared elements are replaced by their numbers.
3. Auxiliary latents are stepped along (:mod:`flowgrpo.policy.auxiliary_latents`).
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowgrpo.policy.auxiliary_latents import AuxiliaryLatents
from flowgrpo.policy.call import (
    PREPARE_LATENTS,
    PipelineCall,
    Place,
    UnsupportedPipelineError,
    place_by_shape,
    shapes_of,
)
from flowgrpo.policy.placement import as_fp32
from flowgrpo.policy.scheduler import PolicyScheduler
from flowgrpo.policy.weights import InitialNoise

OTHER_METHODS = re.compile(r"prepare_\w+_latents")
"""Methods that prepare auxiliary latents or conditions."""
MAX_NUMBER = 2**24
"""Integers up to this value are exact in fp32."""


def inject(prepared: Any, state: Tensor, known: Place | None = None, name: str = "it") -> Any:
    """Replace the latents in a prepared value by a state. The state is copied.

    Args:
        prepared: The result of the pipeline's ``prepare_latents``: a tensor or several values.
        state: The first state of the loop, ``(B, *latent)``.
        known: The place where an earlier loop began. Used if the state fits there; otherwise the place
            follows from the shapes.
        name: Class of the pipeline, for the message.

    Raises:
        UnsupportedPipelineError: If no prepared tensor can hold the state.
    """
    parts = _parts_of(prepared)
    place = _fitting(known, parts, state.shape) or place_by_shape(state.shape, shapes_of(parts))
    if place is None:
        raise UnsupportedPipelineError(
            f"{name} cannot begin with this state: it prepares latents of shape "
            f"{[tuple(s) for s in shapes_of(parts) if s]}, and the state has shape {tuple(state.shape)}"
        )
    # A copy, because some loops write into their latents, which must not change the caller's tensor.
    # It has the state's precision, whatever precision was prepared.
    injected = parts[place.index].to(state.dtype, copy=True)
    place.within(injected, state.shape).copy_(state)
    parts[place.index] = injected
    return _as(prepared, parts)


def _fitting(place: Place | None, parts: Sequence[Any], shape: torch.Size) -> Place | None:
    """The place if it can hold a state of the shape."""
    if place is None:
        return None
    try:
        place.within(parts[place.index], shape)
    except IndexError:
        return None
    return place


def _parts_of(prepared: Any) -> list[Any]:
    """The values that a method returned, as a list."""
    return [prepared] if isinstance(prepared, Tensor) else list(prepared)


def _as(prepared: Any, parts: list[Any]) -> Any:
    """``parts`` in the form of the value ``prepared``: a tensor or a tuple."""
    return parts[0] if isinstance(prepared, Tensor) else tuple(parts)


class NoDraws(TorchFunctionMode):
    """Inside, draws of ``torch.randn`` from one generator give zeros, made on the device.

    A pipeline draws initial latents in every call. Where a state is injected they are discarded, and
    drawing them on the CPU and copying them would cost more than everything else between two replays.
    Draws from other generators and other kinds of draws are made.

    Args:
        generator: The generator whose draws are discarded.
        device: Device of the zeros.
    """

    def __init__(self, generator: torch.Generator, device: torch.device):
        super().__init__()
        self._generator, self._device = generator, device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if function is torch.randn and options.get("generator") is self._generator:
            kept = {k: v for k, v in options.items() if k not in ("generator", "device")}
            return torch.zeros(*args, device=self._device, **kept)
        return function(*args, **options)


@dataclass(frozen=True)
class Layout:
    """The elements of a prepared tensor that make up a state.

    Attributes:
        index: Index among the prepared tensors.
        whole: Shape of one sample of that tensor.
        positions: For each element of one sample's state, its position in the flattened sample.
    """

    index: int
    whole: torch.Size
    positions: Tensor

    def fits(self, state: torch.Size, shapes: Sequence[torch.Size | None]) -> bool:
        """Whether a state of this shape belongs to prepared tensors of these shapes."""
        whole = shapes[self.index] if self.index < len(shapes) else None
        return whole is not None and whole[1:] == self.whole and state[1:] == self.positions.shape

    def inject(self, prepared: Any, state: Tensor) -> Any:
        """``prepared`` with the elements of the state at their positions."""
        parts = _parts_of(prepared)
        injected = parts[self.index].to(state.dtype, copy=True).contiguous()
        # (B, *whole) -> (B, N), and one position per element of the state.
        flat, positions = injected.view(len(injected), -1), self.positions.flatten()
        flat[:, positions.to(injected.device)] = state.flatten(1)
        parts[self.index] = injected
        return _as(prepared, parts)


class Layouts:
    """The known layouts of a pipeline, one for each size of its media."""

    def __init__(self) -> None:
        self._known: list[Layout] = []

    def __len__(self) -> int:
        return len(self._known)

    def inject(self, prepared: Any, state: Tensor) -> Any | None:
        """``prepared`` with the state in it; None if no known layout fits."""
        layout = self._find(state.shape, _parts_of(prepared))
        return None if layout is None else layout.inject(prepared, state)

    def learn(
        self,
        state: torch.Size,
        prepared: Sequence[Any],
        numbered: Callable[[int], Tensor],
        name: str,
    ) -> None:
        """Find which elements of the prepared tensors make up states of a shape, unless it is known.

        Args:
            state: Shape of the loop's states, ``(B, *latent)``.
            prepared: The values that the call prepared.
            numbered: Makes the same call with the elements of one prepared tensor, given by its index,
                replaced by their numbers, and returns the first state of the loop.
            name: Class of the pipeline, for the message.

        Raises:
            UnsupportedPipelineError: If the elements of the state are not elements of one tensor.
        """
        if self._find(state, prepared) is not None:
            return
        for index, whole in enumerate(shapes_of(prepared)):
            if whole is None or not state[1:].numel() <= whole[1:].numel() <= MAX_NUMBER:
                continue
            positions = _positions(numbered(index), whole)
            if positions is not None:
                self._known.append(Layout(index, whole[1:], positions))
                return
        shapes = [tuple(s) for s in shapes_of(prepared) if s]
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: the state that it steps, {tuple(state)}, is not a part of the "
            f"tensors that it prepares, {shapes}"
        )

    def _find(self, state: torch.Size, prepared: Sequence[Any]) -> Layout | None:
        shapes = shapes_of(prepared)
        return next((k for k in self._known if k.fits(state, shapes)), None)


def _with_numbers(prepared: Any, index: int) -> Any:
    """``prepared`` with the elements of each sample of one tensor replaced by 0, 1, 2, ..."""
    parts = _parts_of(prepared)
    whole = parts[index]
    numbers = torch.arange(whole[0].numel(), dtype=torch.float32, device=whole.device)
    parts[index] = numbers.view(whole[:1].shape).repeat(len(whole), *(1,) * (whole.ndim - 1))
    return _as(prepared, parts)


def _positions(state: Tensor, whole: torch.Size) -> Tensor | None:
    """The positions that the first state of a numbered call shows; None if its values were changed."""
    positions = state[0].round().long()
    unchanged = torch.equal(state, positions.to(state.dtype).expand_as(state))
    inside = int(positions.min()) >= 0 and int(positions.max()) < whole[1:].numel()
    if not unchanged or not inside or len(positions.unique()) < positions.numel():
        return None
    return positions


@dataclass
class LatentLocations:
    """Where a pipeline's states are in the tensors that it prepares, as far as its calls have shown.

    Attributes:
        place: The place where the last loop with a known place began.
        layouts: The layouts of states that are not a box in a prepared tensor.
        auxiliary: The source and the shapes of auxiliary latents.
    """

    place: Place | None = None
    layouts: Layouts = field(default_factory=Layouts)
    auxiliary: AuxiliaryLatents = field(default_factory=AuxiliaryLatents)

    @property
    def displaced(self) -> bool:
        """Whether the policy's states were seen to be anything but one prepared tensor or a box in it."""
        return len(self.layouts) > 0 or self.auxiliary.exist


class LatentInjection:
    """Wraps the methods of a pipeline that prepare latents, until :meth:`remove`.

    Attributes:
        initial: The trained distribution of the initial noise, if that is trained.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        scheduler: PolicyScheduler,
        locations: LatentLocations,
        device: torch.device,
    ):
        """Wrap the pipeline's methods.

        Args:
            pipeline: The pipeline.
            scheduler: Its policy scheduler, which holds the current call.
            locations: Filled by :meth:`end`.
            device: The device of injected states.
        """
        self._pipeline, self._scheduler, self._device = pipeline, scheduler, device
        self._locations, self._name = locations, type(pipeline).__name__
        self.initial: InitialNoise | None = None
        self._methods: dict[str, Callable[..., Any]] = {}
        for name in dir(type(pipeline)):
            if name == PREPARE_LATENTS or OTHER_METHODS.fullmatch(name):
                self._methods[name] = getattr(pipeline, name)
                setattr(pipeline, name, partial(self._prepare, name))

    def remove(self) -> None:
        """Restore the pipeline's own methods."""
        for name in self._methods:
            self._pipeline.__dict__.pop(name, None)

    def begin(
        self, call: PipelineCall, state: Tensor | None, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Let a call begin with a state, or with the pipeline's own latents if there is none.

        Returns:
            The arguments of the call. A pipeline without ``prepare_latents`` gets the state there.
        """
        if state is None:
            return arguments
        main, call.inject_auxiliary = self._locations.auxiliary.split(state)
        main = main.to(self._device)
        if PREPARE_LATENTS not in self._methods:
            return arguments | {"latents": main}
        call.inject = main
        return arguments

    def end(self, call: PipelineCall, numbered: Callable[[int], Tensor]) -> None:
        """Check a call that ended, and learn where its states came from.

        The records of auxiliary latents are joined to those of the main latents.

        Args:
            call: The call.
            numbered: As for :meth:`Layouts.learn`.

        Raises:
            UnsupportedPipelineError: If the call did not take its state or its steps, or if a state
                could not be injected into the next call.
        """
        if call.inject is not None or call.inject_auxiliary is not None:
            raise UnsupportedPipelineError(
                f"{self._name} cannot begin with a given state: its call prepares no latents"
            )
        loop, known = call.main, self._locations
        loop.check_complete(self._name)
        known.place = loop.start_place or known.place
        if call.auxiliary is not None:
            known.auxiliary.learn(call, self._name)
        prepared = call.prepared_for(loop)
        if loop.x is None or not prepared or loop.start_place is not None:
            return
        if place_by_shape(loop.x.shape, shapes_of(prepared)) is None:
            known.layouts.learn(loop.x.shape, prepared, numbered, self._name)

    def last_state(self, call: PipelineCall) -> Tensor | None:
        """The last state of a call, auxiliary latents included; None before all its steps are taken."""
        main = call.main.last
        if main is None or call.auxiliary is None or call.auxiliary.last is None:
            return main
        return self._locations.auxiliary.join(main, call.auxiliary.last)

    def _prepare(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of one of the pipeline's methods, with the call's state injected."""
        call = self._scheduler.call
        with NoDraws(call.discarded, self._device) if call.discarded is not None else nullcontext():
            prepared = self._methods[method](*args, **kwargs)
        if method == PREPARE_LATENTS:
            prepared = self._main(prepared, call)
        # Methods that prepare conditions may return None.
        if isinstance(prepared, Tensor | tuple | list):
            parts = _parts_of(prepared)
            if self._locations.auxiliary.inject(call, method, parts):
                prepared = _as(prepared, parts)
            call.prepared.append((method, parts))
        return prepared

    def _main(self, prepared: Any, call: PipelineCall) -> Any:
        """The result of ``prepare_latents`` with the state in it, or with the trained initial noise."""
        if call.number is not None:
            return _with_numbers(prepared, call.number)
        if call.inject is None:
            # The loop's state is fp32, so it must not be rounded to the model's precision.
            prepared = as_fp32(prepared)
            return prepared if self.initial is None else self._draw(prepared, call, self.initial)
        state, call.inject = call.inject, None
        injected = self._locations.layouts.inject(prepared, state)
        if injected is not None:
            return injected
        return inject(prepared, state, self._locations.place, self._name)

    def _draw(self, prepared: Any, call: PipelineCall, initial: InitialNoise) -> Any:
        """``prepared`` with its standard normal noise turned into a draw of the trained distribution.

        Raises:
            ValueError: If the latents have another shape than the trained noise.
        """
        if initial.shape is None:
            return prepared
        parts, known = _parts_of(prepared), self._locations.place
        shape = torch.Size((len(call.plan.noise or ()), *initial.shape))
        sizes = shapes_of(parts)
        place = place_by_shape(shape, [s if s == shape else None for s in sizes])
        if place is None and known is not None and sizes[known.index] is not None:
            # The noise is a part of a tensor, and an earlier loop showed which.
            place = known if tuple(parts[known.index].shape[1:]) == known.whole else None
        if place is None:
            shapes = [tuple(s)[1:] for s in sizes if s is not None]
            raise ValueError(
                f"the initial noise was trained for latents of shape {tuple(initial.shape)}, and this "
                f"call prepares {shapes}: with model.weights.kind = 'noise' all prompts must have one size"
            )
        scale = self._scheduler.initial_std
        drawn = place.within(parts[place.index], shape).float()
        return inject(prepared, initial.gaussian(scale).sample(drawn / scale), place)
