"""The finished runs of the study: what was gained, and at which cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.study.entries import ALGORITHMS, Entry
from benchmarks.study.plan import Kind, Store, reference_seconds
from benchmarks.study.statistics import Gains

COLOR = "diversity/color"
"""Name of the metric of colour entropy in evaluations."""
COLLAPSE = -0.1
"""A run whose strict accuracy changed by less than this has destroyed the model."""
AXES = ("seconds", "images", "evaluations")
"""What runs are compared at equal amounts of."""


@dataclass(frozen=True)
class Point:
    """An evaluation without guidance on the way of a run.

    Attributes:
        spent: Processor seconds, scored images and denoiser evaluations until then, by :data:`AXES`.
            Seconds are those of the machine as it was when the study began.
        values: Scores and metrics by name, with the ``drift``.
    """

    spent: Mapping[str, float]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        seed: Its seed.
        iterations: Its length.
        before: The evaluation of the model before training, with the same seed.
        after: The evaluation at the end, with the same parts: ``plain``, ``guided`` and, but in the second world,
            ``new_kinds``.
        points: All evaluations without guidance, from before training to the end.
    """

    seed: int
    iterations: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    points: Sequence[Point]

    def value(self, part: str, name: str) -> float:
        """A number of the evaluation at the end."""
        return float(self.after[part][name])

    def gain(self, part: str, name: str) -> float:
        """The change of a number from before training to the end."""
        return self.value(part, name) - float(self.before[part][name])

    def gain_at(self, axis: str, amount: float, name: str = "strict") -> float:
        """The change of a number at an amount spent, between evaluations linearly; NaN beyond the end."""
        amounts = [p.spent[axis] for p in self.points]
        values = [p.values[name] for p in self.points]
        return float(np.interp(amount, amounts, values, right=math.nan)) - values[0]


@dataclass(frozen=True)
class Runs:
    """All finished runs of one kind.

    Attributes:
        by_method: The runs of each method that did not diverge, by seed.
        diverged: The number of runs of each method that did.
    """

    by_method: Mapping[str, Mapping[int, Run]]
    diverged: Mapping[str, int]

    def collapsed(self) -> list[str]:
        """The methods that destroyed the model in one of their runs."""
        gains = self.gains("plain", "strict")
        return [m for m, each in gains.items() if min(each.values()) < COLLAPSE]

    def steady(self) -> "Runs":
        """The runs of the other methods.

        Runs that destroy the model differ from each other by tens of points; the deviation that the
        methods are assumed to share is not theirs.
        """
        lost = self.collapsed()
        return Runs({m: r for m, r in self.by_method.items() if m not in lost}, self.diverged)

    def alike(self, method: str) -> "Runs":
        """The runs whose deviation those of a method share: its own, if it destroyed the model, else the steady ones."""
        if method in self.collapsed():
            return Runs({method: self.by_method[method]}, {})
        return self.steady()

    def common(self) -> "Runs":
        """The runs with the seeds that all methods have, if these are at least two; else all."""
        seeds = set.intersection(*(set(r) for r in self.by_method.values())) if self.by_method else set()  # fmt: skip
        if len(seeds) < 2:
            return self
        kept = {m: {s: r[s] for s in sorted(seeds)} for m, r in self.by_method.items()}
        return Runs(kept, self.diverged)

    def gains(self, part: str, name: str) -> Gains:
        """Changes by method and seed."""
        return {
            m: {s: r.gain(part, name) for s, r in runs.items()}
            for m, runs in self.by_method.items()
        }

    def gains_at(self, axis: str, amount: float) -> Gains:
        """Changes of strict accuracy at an amount spent."""
        return {
            m: {s: r.gain_at(axis, amount) for s, r in runs.items()}
            for m, runs in self.by_method.items()
        }

    def least_spent(self, axis: str) -> float:
        """The amount that every run has reached."""
        return min(
            r.points[-1].spent[axis] for runs in self.by_method.values() for r in runs.values()
        )


def read_runs(store: Store, kind: Kind, entries: Sequence[Entry] = ALGORITHMS) -> Runs:
    """The finished runs of a kind of some methods."""
    bases, unit = store.bases(kind), store.unit()
    by_method: dict[str, dict[int, Run]] = {}
    diverged: dict[str, int] = {}
    for entry in entries:
        found = store.runs(kind, entry)
        ok = {s: r for s, r in found.items() if not r["diverged"] and s in bases}
        if found:
            diverged[entry.name] = len([r for r in found.values() if r["diverged"]])
        if ok and unit is not None:
            by_method[entry.name] = {s: _run(r, bases[s]["end"], unit) for s, r in ok.items()}
    return Runs(by_method, diverged)


def _run(found: Mapping[str, Any], before: Mapping[str, Any], unit: float) -> Run:
    speed = unit / reference_seconds(found)
    points = [Point(dict.fromkeys(AXES, 0.0), {**_numbers(before["plain"]), "drift": 0.0})]
    for row in found["curve"]:
        points.append(Point(_spent(row, speed), _numbers(row)))
    after = found["end"]
    last = {**_numbers(after["plain"]), "drift": float(after["drift"])}
    points.append(Point(_spent(found["spent"], speed), last))
    return Run(found["seed"], found["iterations"], before, after, points)


def _spent(row: Mapping[str, Any], speed: float) -> dict[str, float]:
    return {axis: float(row[axis]) * (speed if axis == "seconds" else 1.0) for axis in AXES}


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
