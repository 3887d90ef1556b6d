"""Which steps of the sampling grid are stochastic; all others follow the ODE.

The last step, which ends at ``sigma = 0``, is never stochastic: coefficients-preserving and DDIM
steps inject no noise there, and the noise of other transitions would stay in the image.

Each kind has ``check(num_steps)``, which raises ValueError if no iteration can select valid steps,
and ``select(num_steps, iteration, random)``, which returns the steps of an iteration, ascending.
Only the kinds that draw use ``random``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flowgrpo.core.random import Random
from flowgrpo.core.tensors import torch
from flowgrpo.core.text import counted


@dataclass(frozen=True, kw_only=True)
class AllSteps:
    """Every step but the last ``skip_last`` (Flow-GRPO, DanceGRPO)."""

    kind: Literal["all"] = "all"
    skip_last: int = 1
    """How many steps at the end stay deterministic, at least 1."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError if no step of ``num_steps`` is left."""
        _check_skip_last(self.skip_last)
        _check_steps(range(num_steps - self.skip_last), num_steps, self)

    def select(self, num_steps: int, iteration: int, random: Random) -> list[int]:
        """The stochastic steps, ascending."""
        self.check(num_steps)
        return list(range(num_steps - self.skip_last))


@dataclass(frozen=True, kw_only=True)
class Window:
    """A fixed window of consecutive steps."""

    kind: Literal["window"] = "window"
    start: int = 0
    """The first step of the window, counted from 0."""
    size: int = 2
    """Number of steps in the window."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the window does not lie within the steps that can be stochastic."""
        _check_steps(range(self.start, self.start + self.size), num_steps, self)

    def select(self, num_steps: int, iteration: int, random: Random) -> list[int]:
        """The stochastic steps, ascending."""
        self.check(num_steps)
        return list(range(self.start, self.start + self.size))


@dataclass(frozen=True, kw_only=True)
class RandomWindow:
    """A window at a random place in ``[first, last)``, drawn in every iteration (Flow-GRPO-Fast)."""

    kind: Literal["random_window"] = "random_window"
    size: int = 2
    """Number of steps in the window."""
    first: int = 0
    """The earliest step at which the window can start."""
    last: int = 5
    """The window ends before this step."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the window does not fit into the range, or the range into the grid."""
        if self.last - self.size < self.first:
            raise ValueError(
                f"steps: no window of {counted(self.size, 'step')} fits into [{self.first}, {self.last})"
            )
        _check_steps(range(self.first, self.last), num_steps, self)
        _check_steps(range(self.first, self.first + self.size), num_steps, self)

    def select(self, num_steps: int, iteration: int, random: Random) -> list[int]:
        """The stochastic steps, ascending."""
        self.check(num_steps)
        places = self.last - self.size - self.first + 1
        start = self.first + int(torch.randint(places, (1,), generator=random.generator()))
        return list(range(start, start + self.size))


@dataclass(frozen=True, kw_only=True)
class RandomSteps:
    """A random subset of ``count`` steps of ``[first, last)``, drawn in every iteration."""

    kind: Literal["random_steps"] = "random_steps"
    count: int = 3
    """Number of steps drawn."""
    first: int = 0
    """Only steps from this one on are drawn."""
    last: int = 6
    """Only steps before this one are drawn."""
    weights: tuple[float, ...] = ()
    """Relative probabilities of the steps from ``first`` on, one for each, at least 0; empty draws all
    alike."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the range does not fit into the grid, or has fewer than ``count`` steps."""
        pool = range(self.first, self.last)
        _check_steps(pool, num_steps, self)
        if not 1 <= self.count <= len(pool):
            raise ValueError(
                f"steps: cannot draw {self.count} of the {counted(len(pool), 'step')} in [{self.first}, {self.last})"
            )
        if not self.weights:
            return
        if len(self.weights) != len(pool) or not all(0 <= w < math.inf for w in self.weights):
            raise ValueError(
                f"steps: weights must be {len(pool)} numbers of at least 0, one for each step in "
                f"[{self.first}, {self.last}), got {list(self.weights)}"
            )
        if sum(w > 0 for w in self.weights) < self.count:
            raise ValueError(
                f"steps: {counted(self.count, 'step')} cannot be drawn with fewer weights above 0, got "
                f"{list(self.weights)}"
            )

    def select(self, num_steps: int, iteration: int, random: Random) -> list[int]:
        """The stochastic steps, ascending."""
        self.check(num_steps)
        pool = range(self.first, self.last)
        if self.weights:
            chance = torch.tensor(self.weights, dtype=torch.float64)
            drawn = chance.multinomial(self.count, generator=random.generator())
            return sorted(pool[int(i)] for i in drawn)
        order = torch.randperm(len(pool), generator=random.generator())
        return sorted(pool[int(i)] for i in order[: self.count])


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """A window that moves by ``stride`` every ``every`` iterations and then starts over (MixGRPO).

    With ``decay`` above 0 it stays at a place for ``ceil(every * exp(-decay * max(0, start -
    decay_from)))`` iterations: late steps, which have less influence on the image, are trained less.
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
    """What happens after the last place: ``restart`` begins again at step 0, ``stay`` stays there."""

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the window does not fit into the grid, or a setting is out of range."""
        if min(self.size, self.stride, self.every) < 1:
            raise ValueError(f"steps: size, stride and every must be at least 1, got {self}")
        _check_skip_last(self.skip_last)
        if num_steps - self.skip_last - self.size < 0:
            raise ValueError(
                f"steps: a window of {self.size} does not fit into {counted(num_steps, 'step')} without the last {self.skip_last}"
            )
        if self.decay < 0:
            raise ValueError(f"steps: decay must be at least 0, got {self.decay}")

    def select(self, num_steps: int, iteration: int, random: Random) -> list[int]:
        """The stochastic steps, ascending."""
        self.check(num_steps)
        last = num_steps - self.skip_last - self.size
        start = self._start(range(0, last + 1, self.stride), iteration)
        return list(range(start, start + self.size))

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
"""The selections of steps that a configuration can name."""


def _check_skip_last(skip_last: int) -> None:
    if skip_last < 1:
        raise ValueError(
            f"steps: skip_last must be at least 1, as the last step has no noise, got {skip_last}"
        )


def _check_steps(steps: range, num_steps: int, selection: object) -> None:
    """Raise ValueError if there are no steps, or some of them cannot be stochastic."""
    if not steps:
        raise ValueError(f"steps: {selection} selects no step of {num_steps}")
    if steps[0] < 0 or steps[-1] > num_steps - 2:
        raise ValueError(
            f"steps: {selection} asks for steps {steps[0]} to {steps[-1]}, but with num_steps = {num_steps} "
            f"only steps 0 to {num_steps - 2} can be stochastic (the last one ends at sigma 0); kind = 'all' "
            "takes all of these"
        )
