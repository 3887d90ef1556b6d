"""The study's plots: gain over time, and accuracy against diversity."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from scipy import stats

from benchmarks.study.entries import ALGORITHMS, Entry
from benchmarks.study.results import COLOUR, Budgets, Curve, Study, residual

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 4
INK, REST = "#1f5fa8", "#b8b8b8"


def draw(study: Study, budgets: Budgets, folder: Path) -> list[Path]:
    """Draw gains over time and accuracy against diversity, one panel per algorithm, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {e: study.curves(e) for e in ALGORITHMS}
    runs = {e: curves for e, curves in runs.items() if curves}
    plt.rcParams.update({"font.size": 8})
    return [
        _over_time(study, runs, budgets, folder / "gain.png"),
        _against_diversity(runs, folder / "diversity.png"),
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


def _gains(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Iterations, and the gain of every seed at each of them in points ``(seeds, iterations)``."""
    iterations = np.asarray(min((c.iterations for c in curves), key=len))
    return iterations, np.asarray([[100 * c.gain("strict", i) for i in iterations] for c in curves])


def _halves(gains: Sequence[np.ndarray]) -> np.ndarray:
    """Half of the 95 % confidence interval of one seed along a run, pooled over all algorithms.

    Runs differ by an evaluation, so they are compared at equal shares of their length. 0 for one seed.
    """
    seeds = min(len(by_seed) for by_seed in gains)
    points = min(by_seed.shape[1] for by_seed in gains)
    if seeds < 2 or len(gains) < 2:
        return np.zeros(points)
    alike = np.stack([[_at_share(row, points) for row in by_seed[:seeds]] for by_seed in gains])
    found = [residual(alike[:, :, i]) for i in range(points)]
    return np.asarray([stats.t.ppf(0.975, freedom) * left for left, freedom in found])


def _at_share(values: np.ndarray, points: int) -> np.ndarray:
    """Values interpolated at ``points`` equal shares of their length."""
    places = np.linspace(0, len(values) - 1, points)
    return np.interp(places, np.arange(len(values)), values)


def _over_time(study: Study, runs: dict[Entry, list[Curve]], budgets: Budgets, file: Path) -> Path:
    figure, axes = _panels(len(runs))
    costs = study.costs()
    gains = {e: _gains(curves) for e, curves in runs.items()}
    halves = _halves([by_seed for _, by_seed in gains.values()])
    for axis, (entry, (iterations, by_seed)) in zip(axes, gains.items(), strict=False):
        for other, (x, y) in gains.items():
            axis.plot(x * costs[other.slug].seconds, y.mean(0), color=REST, linewidth=0.5)
        seconds = iterations * costs[entry.slug].seconds
        mean, half = by_seed.mean(0), _at_share(halves, len(iterations)) / len(by_seed) ** 0.5
        axis.fill_between(seconds, mean - half, mean + half, color=INK, alpha=0.2, linewidth=0)
        axis.plot(seconds, by_seed.T, color=INK, linewidth=0.5)
        axis.plot(seconds, mean, color=INK, linewidth=1.8)
        axis.axhline(0, color="black", linewidth=0.4)
        axis.set_title(entry.name, fontsize=8)
        axis.set_xlim(0, budgets.seconds)
        axis.set_ylim(-3, 26)
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
    figure.savefig(file, dpi=110)
    plt.close(figure)
    # Few colours make a small file.
    Image.open(file).convert("RGB").quantize(32).save(file, optimize=True)
    return file
