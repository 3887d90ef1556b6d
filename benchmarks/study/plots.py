"""The study's plots: gains side by side, over time, and against diversity, drift and a held-out reward."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
from PIL import Image

from benchmarks.study.results import COLOR, Point, Run, Runs
from benchmarks.study.statistics import half_width

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = 5
INK, OTHER_INK, REST = "#1f5fa8", "#c2571a", "#b8b8b8"


AGAINST: Sequence[tuple[str, str, Callable[[Point], float]]] = (
    ("gain", "processor seconds of training", lambda p: p.spent["seconds"]),
    ("diversity", "colour entropy where the prompt leaves the colour open", lambda p: p.values[COLOR]),
    ("drift", "squared change of the model's outputs on fixed states", lambda p: p.values["drift"]),
    ("palette", "share of pixels with colours of the world (not trained on)", lambda p: p.values["palette"]),
)  # fmt: skip
"""File name, words and value of what accuracy is shown against."""


def draw(runs: Runs, folder: Path) -> dict[Path, str]:
    """Draw all plots of the main runs as PNG files. Returns their paths with what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 8})
    shown = {_side_by_side(runs, folder / "methods.png"): "Gains of all methods in both regimes"}
    for name, words, across in AGAINST:
        file = _panels(runs, folder / f"{name}.png", words, across)
        shown[file] = f"Accuracy against {words}"
    return shown


def _side_by_side(runs: Runs, file: Path) -> Path:
    """Gains of all methods in both regimes, with the seeds and the intervals of the means."""
    plain, guided = runs.gains("plain", "strict"), runs.gains("guided", "strict")
    order = sorted(plain, key=lambda m: mean(plain[m].values()))
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(order) + 1.2))
    for shift, gains, ink, words in (
        (0.15, plain, INK, "8 steps without guidance"),
        (-0.15, guided, OTHER_INK, "8 steps with guidance 3"),
    ):
        for row, method in enumerate(order):
            values = [100 * v for v in gains[method].values()]
            half = 100 * half_width(gains, len(values))
            label = words if row == 0 else None
            axis.plot(values, [row + shift] * len(values), ".", color=ink, alpha=0.45, markersize=4)
            axis.plot([mean(values)], [row + shift], "|", color=ink, markersize=11, label=label)
            if np.isfinite(half):
                ends = [mean(values) - half, mean(values) + half]
                axis.plot(ends, [row + shift] * 2, color=ink, linewidth=1.4)
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_yticks(range(len(order)), order)
    axis.set_xlabel("gain in strict accuracy, points")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _save(figure, file)


def _panels(runs: Runs, file: Path, words: str, across: Callable[[Point], float]) -> Path:
    """Accuracy without guidance against something, a panel per method.

    Thin lines are seeds, the thick line is their mean, and grey lines are the means of the others.
    """
    methods = runs.by_method
    rows = -(-len(methods) // COLUMNS)
    size = 9, 1.9 * rows + 0.3
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    lines = {m: [_line(r, across) for r in found.values()] for m, found in methods.items()}
    means = {m: np.mean([*each], axis=0) for m, each in lines.items()}
    for axis, method in zip(axes.flat, methods, strict=False):
        for x, y in means.values():
            axis.plot(x, y, color=REST, linewidth=0.6)
        for x, y in lines[method]:
            axis.plot(x, y, color=INK, linewidth=0.5, alpha=0.7)
        axis.plot(*means[method], color=INK, linewidth=1.8, marker="o", markersize=2.5)
        axis.set_title(method, fontsize=8)
    for number, spare in enumerate(axes.flat):
        if number >= len(methods):
            spare.axis("off")
            # The panel above is the lowest of its column.
            axes.flat[number - COLUMNS].tick_params(labelbottom=True)
    figure.supxlabel(words)
    figure.supylabel("strict accuracy, %")
    return _save(figure, file)


def _line(run: Run, across: Callable[[Point], float]) -> tuple[Sequence[float], Sequence[float]]:
    return [across(p) for p in run.points], [100 * p.values["strict"] for p in run.points]


def _save(figure: plt.Figure, file: Path) -> Path:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    # Few colours make a small file.
    Image.open(file).convert("RGB").quantize(32).save(file, optimize=True)
    return file
