"""The study's curves as pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from study_report import COLOUR, Budgets, Curve, Study, interval
from study_runs import ALGORITHMS, Entry

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 4
INK, REST = "#1f5fa8", "#b8b8b8"


def draw(study: Study, budgets: Budgets, folder: Path) -> list[Path]:
    """Gains over time and accuracy against diversity, a panel per algorithm, as SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {e: study.curves(e) for e in ALGORITHMS}
    runs = {e: curves for e, curves in runs.items() if curves}
    plt.rcParams.update({"svg.hashsalt": "flowgrpo", "svg.fonttype": "none", "font.size": 8})
    return [
        _over_time(study, runs, budgets, folder / "gain.svg"),
        _against_diversity(runs, folder / "diversity.svg"),
    ]


def _panels(number: int) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    rows = -(-number // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(9, 1.9 * rows), sharex=True, sharey=True, squeeze=False
    )
    flat = list(axes.flat)
    for spare in flat[number:]:
        spare.axis("off")
    return figure, flat


def _mean(curves: Sequence[Curve], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Iterations, the mean gain in points and half its 95 % interval."""
    iterations = np.asarray(min((c.iterations for c in curves), key=len))
    gains = np.asarray([[100 * c.gain(name, i) for i in iterations] for c in curves])
    half = np.asarray([interval(list(column)) for column in gains.T])
    return iterations, gains.mean(0), np.nan_to_num(half)


def _over_time(study: Study, runs: dict[Entry, list[Curve]], budgets: Budgets, file: Path) -> Path:
    figure, axes = _panels(len(runs))
    costs = study.costs()
    means = {e: _mean(curves, "strict") for e, curves in runs.items()}
    for axis, (entry, (iterations, gain, half)) in zip(axes, means.items(), strict=False):
        for other, (x, y, _) in means.items():
            axis.plot(x * costs[other.slug].seconds, y, color=REST, linewidth=0.5)
        seconds = iterations * costs[entry.slug].seconds
        axis.fill_between(seconds, gain - half, gain + half, color=INK, alpha=0.2, linewidth=0)
        axis.plot(seconds, gain, color=INK, linewidth=1.5)
        axis.axhline(0, color="black", linewidth=0.4)
        axis.set_title(entry.name, fontsize=8)
        axis.set_xlim(0, budgets.seconds)
        axis.set_ylim(-15, 30)
    figure.supxlabel("seconds of training, one core")
    figure.supylabel("gain in strict accuracy, points")
    return _save(figure, file)


def _against_diversity(runs: dict[Entry, list[Curve]], file: Path) -> Path:
    figure, axes = _panels(len(runs))
    for axis, entry in zip(axes, runs, strict=False):
        for name, mine in runs.items():
            for curve in mine:
                shown = name is entry
                axis.plot(
                    curve.values[COLOUR],
                    [100 * v for v in curve.values["strict"]],
                    color=INK if shown else REST,
                    linewidth=1.2 if shown else 0.4,
                    marker="o" if shown else None,
                    markersize=2,
                    zorder=2 if shown else 1,
                )
        axis.set_title(entry.name, fontsize=8)
    figure.supxlabel("colour entropy where the prompt leaves the colour open")
    figure.supylabel("strict accuracy, %")
    return _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file
