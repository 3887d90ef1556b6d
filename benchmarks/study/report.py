"""The study's tables, and the page with tables and plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.study.entries import ALGORITHMS, OVEROPTIMISED, PROMPTS
from benchmarks.study.plots import draw
from benchmarks.study.results import COLOUR, Budgets, Study, difference, interval
from scripts.page_tables import markdown_table, write_marked_text

ITERATIONS = 8
"""Number of iterations at which algorithms are compared iteration by iteration."""


def points(values: Sequence[float]) -> str:
    """The mean of shares in points out of 100, with its confidence interval if there are several."""
    if not values or any(math.isnan(v) for v in values):
        return "not reached"
    half = interval(values)
    return f"{100 * mean(values):+.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def write_report(study: Study, budgets: Budgets, page: Path | None) -> str:
    """The study's tables in Markdown.

    Args:
        study: The finished runs.
        budgets: Budgets at which they are compared.
        page: Page that gets the tables between its markers, and plots in a folder of its name; ``None``
            writes nothing.
    """
    parts = [comparison(study, budgets), overoptimisation(study)]
    text = "\n\n".join(p for p in parts if p)
    if page is not None:
        plots = draw(study, budgets, page.parent / page.stem)
        write_marked_text(page, "study", text)
        print(f"wrote {page}, {', '.join(str(p) for p in plots)}")
    return text


def comparison(study: Study, budgets: Budgets) -> str:
    """Gains of all algorithms at three budgets; the largest gain in equal time comes first."""
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
    words = [f"chance difference of two entries, at most ({common} seeds)", "", "", "", ""]
    words += ["" if math.isnan(half) else f"{100 * half:.1f}" for half in halves]
    shown = [cells for _, cells in sorted(rows, key=_descending)]
    return markdown_table(heads, [*shown, [*words, ""]])


def _descending(row: tuple[float, object]) -> float:
    return math.inf if math.isnan(row[0]) else -row[0]


def overoptimisation(study: Study) -> str:
    """Changes of a flawed reward, of its flaw and of the true scores at the end of training on it."""
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
    return f"### A flawed reward\n\n{markdown_table(heads, rows)}" if rows else ""
