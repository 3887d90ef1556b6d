"""The results of the study's runs: costs, curves, and intervals of mean gains."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev

import numpy as np
from scipy import stats

from benchmarks.study.entries import Entry
from benchmarks.training_runs import evaluations

COLOUR = "diversity/color"
"""Name of the metric of colour entropy in evaluations."""


@dataclass(frozen=True)
class Cost:
    """Cost of one iteration of an algorithm.

    Attributes:
        seconds: Median time in seconds.
        evaluations: Denoiser evaluations of the rollout.
    """

    seconds: float
    evaluations: float


@dataclass(frozen=True)
class Budgets:
    """The budgets at which algorithms are compared.

    Attributes:
        seconds: Training time in seconds, without evaluations.
        evaluations: Denoiser evaluations of all rollouts.
    """

    seconds: float
    evaluations: float

    def iterations(self, cost: Cost) -> tuple[float, float]:
        """Number of iterations that each of the two budgets allows."""
        return self.seconds / cost.seconds, self.evaluations / cost.evaluations


@dataclass(frozen=True)
class Curve:
    """The held-out evaluations of one run.

    Attributes:
        iterations: Iterations of the evaluations, from 0.
        values: Values at these iterations, by name of score or metric.
    """

    iterations: Sequence[float]
    values: Mapping[str, Sequence[float]]

    def at(self, name: str, iteration: float) -> float:
        """A value at an iteration, by linear interpolation; NaN beyond the last evaluation."""
        return float(np.interp(iteration, self.iterations, self.values[name], right=math.nan))

    def gain(self, name: str, iteration: float) -> float:
        """Change of a value since the first evaluation."""
        return self.at(name, iteration) - self.values[name][0]


@dataclass(frozen=True)
class Study:
    """The folder that holds all runs of the study and their costs."""

    folder: Path
    _file: str = field(default="costs.json", repr=False)

    def place(self, entry: Entry, seed: int) -> Path:
        """The run directory of one algorithm and seed."""
        return self.folder / "runs" / entry.slug / str(seed)

    def costs(self) -> dict[str, Cost]:
        """Costs that have been measured, by the entry's slug."""
        file = self.folder / self._file
        found = json.loads(file.read_text()) if file.exists() else {}
        return {slug: Cost(**cost) for slug, cost in found.items()}

    def save_cost(self, entry: Entry, seconds: float, evaluations: float) -> None:
        """Add the cost of an entry to ``costs.json``."""
        costs = {**self.costs(), entry.slug: Cost(seconds, evaluations)}
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = {slug: vars(cost) for slug, cost in costs.items()}
        (self.folder / self._file).write_text(json.dumps(plain, indent=1))

    def curves(self, entry: Entry) -> list[Curve]:
        """One curve per seed, of the finished runs of an entry."""
        places = sorted((self.folder / "runs" / entry.slug).glob("*/report.html"))
        return [_curve(evaluations(p.parent)) for p in places]


def _curve(lines: Sequence[dict]) -> Curve:
    rows = {line["iteration"]: {**line["scores"], **line["metrics"]} for line in lines}
    names = next(iter(rows.values()))
    return Curve(list(rows), {n: [row[n] for row in rows.values()] for n in names})


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean (Student's t); NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def difference(gains: Sequence[Sequence[float]]) -> float:
    """Half of the 95 % confidence interval of the difference between two algorithms' mean gains.

    The residuals of a two-way analysis of variance (algorithm and seed) are assumed to have the same
    variance for all algorithms, which gives more degrees of freedom than the seeds of one algorithm.

    Args:
        gains: Gains ``(algorithms, seeds)``; algorithms with a NaN are left out.

    Returns:
        NaN unless there are at least two algorithms with the same seeds, and at least two seeds.
    """
    table = np.asarray([g for g in gains if not any(math.isnan(v) for v in g)])
    if table.ndim != 2 or min(table.shape) < 2:
        return math.nan
    deviation, freedom = residual(table)
    return float(stats.t.ppf(0.975, freedom)) * deviation * math.sqrt(2 / table.shape[1])


def residual(table: np.ndarray) -> tuple[float, int]:
    """Standard deviation and degrees of freedom of the residuals of gains ``(algorithms, seeds)``."""
    rows, columns = table.shape
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (rows - 1) * (columns - 1)
    return math.sqrt(float((left**2).sum()) / freedom), freedom
