"""Lets a pipeline's loop count its steps from where it was entered.

A loop ``for i, t in enumerate(timesteps)`` that is entered at step 20 of 28 counts from 0. Pipelines do
things by that count: ControlNets and skipped layers work in a window of the steps, Lumina cuts its
guidance, Ideogram has a guidance scale for each step. A replay would do them at the wrong step.
"""

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor

from flowgrpo.policy.scheduler import PolicyScheduler


class _Count(int):
    """The index of a loop's first step, which also equals 0.

    Some loops set up in ``if i == 0`` what their other steps use: keys and values of condition images
    (FLUX.2 klein KV, Qwen-Image 2.1), embeddings for another guidance (LTX-2). What they do at the
    first step of the grid alone they ask by ``i < n``.
    """

    def __eq__(self, other: object) -> bool:
        return other == 0 or int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def counted(call: Callable[..., Any], scheduler: PolicyScheduler) -> Callable[..., Any]:
    """A pipeline's ``__call__`` in which ``enumerate`` knows where on the grid a step is.

    It is a copy of the function, with its own globals; the pipeline's class keeps its own. Where
    ``timesteps`` are enumerated, those that the itinerary visits come with their index on the grid, and
    from the next call on ``timesteps`` has the whole grid's length. All else is enumerated as ever.
    """
    if not isinstance(call, FunctionType):
        return call

    def enumerate_steps(iterable: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
        # A progress bar holds what it goes through.
        steps, timesteps = getattr(iterable, "iterable", iterable), scheduler.timesteps
        if not isinstance(steps, Tensor) or start != 0 or not _same(steps, timesteps):
            return enumerate(iterable, start)
        return _counted(scheduler, timesteps)

    copy = FunctionType(
        call.__code__,
        {**call.__globals__, "enumerate": enumerate_steps},
        call.__name__,
        call.__defaults__,
        call.__closure__,
    )
    copy.__kwdefaults__ = call.__kwdefaults__
    return copy


def _counted(scheduler: PolicyScheduler, timesteps: Tensor) -> Iterator[tuple[int, Any]]:
    """The timesteps that the itinerary visits, with their index on the grid."""
    for number, (i, at) in enumerate(scheduler.ahead()):
        taken = scheduler.taken
        yield (_Count(i) if number == 0 else i), timesteps[at]
        # Only a loop that denoises, and not one that looks at the timesteps beforehand.
        scheduler.counted = scheduler.counted or scheduler.taken == taken + 1


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
