"""Which steps of the grid are stochastic and trained; all others follow the ODE.

The last step, which ends at ``sigma = 0``, is never stochastic: coefficients-preserving and DDIM
steps have no noise there, and what other transitions add stays in the image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class AllSteps:
    """Every step but the last ``skip_last`` (Flow-GRPO, DanceGRPO)."""

    kind: Literal["all"] = "all"
    skip_last: int = 1
    """How many steps at the end stay deterministic, at least 1."""

    def select(self, num_steps: int, iteration: int, generator: torch.Generator) -> list[int]:
        """The stochastic steps, ascending."""
        _check_skip(self.skip_last)
        return _checked(list(range(num_steps - self.skip_last)), num_steps, self)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A fixed window of consecutive steps."""

    kind: Literal["window"] = "window"
    start: int = 0
    """The first step of the window, counted from 0."""
    size: int = 2
    """Number of steps in the window."""

    def select(self, num_steps: int, iteration: int, generator: torch.Generator) -> list[int]:
        """The stochastic steps, ascending."""
        return _checked(list(range(self.start, self.start + self.size)), num_steps, self)


@dataclass(frozen=True, kw_only=True)
class RandomWindow:
    """A window at a random place in ``[first, last)``, new in every iteration (Flow-GRPO-Fast)."""

    kind: Literal["random_window"] = "random_window"
    size: int = 2
    """Number of steps in the window."""
    first: int = 0
    """The earliest step at which the window can start."""
    last: int = 5
    """The window ends before this step."""

    def select(self, num_steps: int, iteration: int, generator: torch.Generator) -> list[int]:
        """The stochastic steps, ascending."""
        places = self.last - self.size - self.first + 1
        if places < 1:
            raise ValueError(
                f"steps: no window of {self.size} steps fits into [{self.first}, {self.last})"
            )
        start = self.first + int(torch.randint(places, (1,), generator=generator))
        _checked(list(range(self.first, self.last)), num_steps, self)
        return _checked(list(range(start, start + self.size)), num_steps, self)


@dataclass(frozen=True, kw_only=True)
class RandomSteps:
    """A random subset of ``count`` steps of ``[first, last)``, new in every iteration."""

    kind: Literal["random_steps"] = "random_steps"
    count: int = 3
    """Number of steps drawn."""
    first: int = 0
    """Only steps from this one on are drawn."""
    last: int = 6
    """Only steps before this one are drawn."""

    def select(self, num_steps: int, iteration: int, generator: torch.Generator) -> list[int]:
        """The stochastic steps, ascending."""
        pool = _checked(list(range(self.first, self.last)), num_steps, self)
        if not 1 <= self.count <= len(pool):
            raise ValueError(
                f"steps: cannot draw {self.count} of the {len(pool)} steps in [{self.first}, {self.last})"
            )
        chosen = torch.randperm(len(pool), generator=generator)[: self.count]
        return sorted(pool[int(i)] for i in chosen)


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """A window that moves on by ``stride`` every ``every`` iterations and starts over (MixGRPO).

    With ``decay`` above 0 it stays ``ceil(every * exp(-decay * max(0, start - decay_from)))``
    iterations at a place: late steps, which decide less, take less of the training.
    """

    kind: Literal["sliding_window"] = "sliding_window"
    size: int = 4
    """Number of steps in the window."""
    stride: int = 1
    """Steps by which the window moves."""
    every: int = 25
    """Iterations between two moves."""
    skip_last: int = 2
    """Steps at the end that the window never reaches, at least 1."""
    decay: float = 0.0
    """How much shorter the window stays at later steps; the paper's decaying schedule has 0.1."""
    decay_from: int = 13
    """The first step of the window from which on it stays shorter."""
    at_end: Literal["restart", "stay"] = "restart"
    """What the window does after its last place."""

    def select(self, num_steps: int, iteration: int, generator: torch.Generator) -> list[int]:
        """The stochastic steps, ascending."""
        if min(self.size, self.stride, self.every) < 1:
            raise ValueError(f"steps: size, stride and every must be at least 1, got {self}")
        _check_skip(self.skip_last)
        last = num_steps - self.skip_last - self.size
        if last < 0:
            raise ValueError(
                f"steps: a window of {self.size} does not fit into {num_steps} steps without the last {self.skip_last}"
            )
        if self.decay < 0:
            raise ValueError(f"steps: decay must be at least 0, got {self.decay}")
        start = self._start(range(0, last + 1, self.stride), iteration)
        return _checked(list(range(start, start + self.size)), num_steps, self)

    def _start(self, places: Sequence[int], iteration: int) -> int:
        """The window's first step in an iteration."""
        stays = [
            math.ceil(self.every * math.exp(-self.decay * max(0, place - self.decay_from)))
            for place in places
        ]
        if self.at_end == "stay" and iteration >= sum(stays):
            return places[-1]
        left = iteration % sum(stays)
        for place, stay in zip(places, stays, strict=True):
            if left < stay:
                return place
            left -= stay
        raise AssertionError("iterations are counted from 0")


StepSelection = AllSteps | Window | RandomWindow | RandomSteps | SlidingWindow


def _check_skip(skip_last: int) -> None:
    if skip_last < 1:
        raise ValueError(
            f"steps: skip_last must be at least 1, as the last step has no noise, got {skip_last}"
        )


def _checked(steps: list[int], num_steps: int, selection: object) -> list[int]:
    if not steps:
        raise ValueError(f"steps: {selection} selects no step of {num_steps}")
    if steps[0] < 0 or steps[-1] > num_steps - 2:
        raise ValueError(
            f"steps: {selection} asks for steps {steps[0]} to {steps[-1]}, but with num_steps = {num_steps} "
            f"only steps 0 to {num_steps - 2} can be stochastic (the last one ends at sigma 0)"
        )
    return steps
