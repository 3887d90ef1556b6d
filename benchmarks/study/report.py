"""Reads what the study's runs came to: curves, tables, plots."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from bench_runs import between, evaluations, table
from scipy import stats
from study_runs import ALGORITHMS, OVEROPTIMISED, PROMPTS, Entry

ITERATIONS = 8
"""At which algorithms are compared iteration by iteration."""
COLOUR = "diversity/color"


@dataclass(frozen=True)
class Cost:
    """What an iteration of an algorithm takes."""

    seconds: float
    evaluations: float


@dataclass(frozen=True)
class Budgets:
    """What every algorithm may use.

    Attributes:
        seconds: Training time, evaluations aside.
        evaluations: Denoiser evaluations of the rollouts.
    """

    seconds: float
    evaluations: float

    def iterations(self, cost: Cost) -> tuple[float, float]:
        """How many iterations each budget pays for."""
        return self.seconds / cost.seconds, self.evaluations / cost.evaluations


@dataclass(frozen=True)
class Curve:
    """The held-out evaluations of one run.

    Attributes:
        iterations: At which they took place, from 0.
        values: By name of score or measure.
    """

    iterations: Sequence[float]
    values: Mapping[str, Sequence[float]]

    def at(self, name: str, iteration: float) -> float:
        """A value between two evaluations, linearly; NaN beyond the last."""
        return float(np.interp(iteration, self.iterations, self.values[name], right=math.nan))

    def gain(self, name: str, iteration: float) -> float:
        """What changed since the start."""
        return self.at(name, iteration) - self.values[name][0]


@dataclass(frozen=True)
class Study:
    """The folder of all runs."""

    folder: Path
    _file: str = field(default="costs.json", repr=False)

    def place(self, entry: Entry, seed: int) -> Path:
        """The run directory of one algorithm and seed."""
        return self.folder / "runs" / entry.slug / str(seed)

    def costs(self) -> dict[str, Cost]:
        """What was measured, by slug."""
        file = self.folder / self._file
        found = json.loads(file.read_text()) if file.exists() else {}
        return {slug: Cost(**cost) for slug, cost in found.items()}

    def keep_cost(self, entry: Entry, seconds: float, evaluations: float) -> None:
        """Remember what an iteration takes."""
        costs = {**self.costs(), entry.slug: Cost(seconds, evaluations)}
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = {slug: vars(cost) for slug, cost in costs.items()}
        (self.folder / self._file).write_text(json.dumps(plain, indent=1))

    def curves(self, entry: Entry) -> list[Curve]:
        """Of the finished runs of an algorithm, a curve per seed."""
        places = sorted((self.folder / "runs" / entry.slug).glob("*/report.html"))
        return [_curve(evaluations(p.parent)) for p in places]


def _curve(lines: Sequence[dict]) -> Curve:
    rows = {line["iteration"]: {**line["scores"], **line["metrics"]} for line in lines}
    names = next(iter(rows.values()))
    return Curve(list(rows), {n: [row[n] for row in rows.values()] for n in names})


def interval(values: Sequence[float]) -> float:
    """Half of Student's 95 % confidence interval of a mean; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def difference(gains: Sequence[Sequence[float]]) -> float:
    """Half of the 95 % interval of a difference between two algorithms' mean gains.

    What is left of the gains after each algorithm's and each seed's own mean (two-way analysis of
    variance) is taken to vary alike for all algorithms, which gives it many more degrees of freedom
    than three seeds of one algorithm have. NaN unless all have the same two seeds or more.
    """
    table = np.asarray([g for g in gains if not any(math.isnan(v) for v in g)])
    if table.ndim != 2 or min(table.shape) < 2:
        return math.nan
    deviation, freedom = residual(table)
    return float(stats.t.ppf(0.975, freedom)) * deviation * math.sqrt(2 / table.shape[1])


def residual(table: np.ndarray) -> tuple[float, int]:
    """What is left of gains ``(algorithms, seeds)`` after the means of both, and its degrees of freedom."""
    rows, columns = table.shape
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (rows - 1) * (columns - 1)
    return math.sqrt(float((left**2).sum()) / freedom), freedom


def points(values: Sequence[float]) -> str:
    """A mean of shares as points, with its interval if there are several."""
    if not values or any(math.isnan(v) for v in values):
        return "not reached"
    half = interval(values)
    return f"{100 * mean(values):+.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def write_report(study: Study, budgets: Budgets, page: Path | None) -> str:
    """The tables as Markdown; also into a page, with the plots beside it."""
    parts = [comparison(study, budgets), overoptimisation(study)]
    text = "\n\n".join(p for p in parts if p)
    if page is not None:
        from study_plots import draw

        plots = draw(study, budgets, page.parent / page.stem)
        between(page, "study", text)
        print(f"wrote {page}, {', '.join(str(p) for p in plots)}")
    return text


def comparison(study: Study, budgets: Budgets) -> str:
    """All algorithms by the three budgets, the largest gain in equal time first."""
    costs, rows = study.costs(), []
    every: list[list[list[float]]] = []
    for entry in ALGORITHMS:
        curves = study.curves(entry)
        if not curves:
            continue
        cost = costs[entry.slug]
        by_time, by_evaluations = budgets.iterations(cost)
        gains = [
            [c.gain("strict", at) for c in curves] for at in (by_time, by_evaluations, ITERATIONS)
        ]
        every.append(gains)
        colour = [c.gain(COLOUR, by_time) / c.values[COLOUR][0] for c in curves]
        cells = [
            entry.name, str(len(curves)), f"{cost.seconds:.2f}",
            f"{cost.evaluations / PROMPTS:.0f}", f"{by_time:.0f}",
            *map(points, gains), f"{100 * mean(colour):+.0f} %",
        ]  # fmt: skip
        rows.append((mean(gains[0]), cells))
    heads = [
        "algorithm", "seeds", "s / iteration", "evaluations / prompt",
        f"iterations in {budgets.seconds:.0f} s", f"gain in {budgets.seconds:.0f} s",
        f"in {budgets.evaluations:,.0f} evaluations", f"in {ITERATIONS} iterations",
        "colour entropy",
    ]  # fmt: skip
    if not rows:
        return ""
    common = min(len(gains[0]) for gains in every)
    halves = [difference([gains[budget][:common] for gains in every]) for budget in range(3)]
    words = [f"two differ by chance by less than ({common} seeds)", "", "", "", ""]
    words += ["" if math.isnan(half) else f"{100 * half:.1f}" for half in halves]
    shown = [cells for _, cells in sorted(rows, key=_descending)]
    return table(heads, [*shown, [*words, ""]])


def _descending(row: tuple[float, object]) -> float:
    return math.inf if math.isnan(row[0]) else -row[0]


def overoptimisation(study: Study) -> str:
    """What training on a flawed reward did to it, to its flaw and to the true ones, at the end."""
    rows = []
    for entry in OVEROPTIMISED:
        curves = study.curves(entry)
        if curves:
            last = min(c.iterations[-1] for c in curves)
            cells = [
                points([c.gain(n, last) for c in curves]) for n in ("inked", "graded", "strict")
            ]
            ink = [f"{mean(c.values['ink'][0] for c in curves):.3f}", f"{mean(c.at('ink', last) for c in curves):.3f}"]  # fmt: skip
            colour = [c.at(COLOUR, last) / c.values[COLOUR][0] - 1 for c in curves]
            cells += [" → ".join(ink), f"{100 * mean(colour):+.0f} %"]
            rows.append([entry.name, str(len(curves)), f"{last:.0f}", *cells])
    heads = [
        "advantage", "seeds", "iterations", "flawed reward", "graded", "strict", "ink",
        "colour entropy",
    ]  # fmt: skip
    return f"### A flawed reward\n\n{table(heads, rows)}" if rows else ""
