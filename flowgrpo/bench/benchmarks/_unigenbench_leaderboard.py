"""UniGenBench's leaderboard: published scores, all by Gemini 2.5 Pro."""

from collections.abc import Sequence

from flowgrpo.bench.base import Reference
from flowgrpo.bench.benchmarks._unigenbench_files import DIMENSIONS

SETS = ("en", "en_long", "zh", "zh_long")
OVERALL: dict[str, tuple[float | None, ...]] = {
    "SDXL": (40.22, 41.48, None, None),
    "BAGEL": (59.91, 71.26, 65.69, 75.75),
    "FLUX.1-dev": (60.97, 69.42, None, None),
    "SD-3.5-Large": (62.89, 64.35, None, None),
    "FLUX.1-Krea-dev": (69.88, 78.45, None, None),
    "HiDream-I1-Full": (71.36, 74.25, 50.65, 50.70),
    "Z-Image-Turbo": (71.40, 80.72, 74.18, 83.69),
    "Wan2.5": (77.87, 84.56, 78.86, 84.36),
    "Z-Image": (78.10, 86.77, 81.69, 89.17),
    "FLUX.2-Klein-9b": (78.28, 85.06, 75.19, 81.74),
    "Qwen-Image": (78.36, 83.94, 81.04, 86.91),
    "FLUX.2-Klein-base-9b": (79.35, 86.45, 73.81, 81.41),
    "FLUX.2-dev": (84.76, 90.31, 81.44, 86.12),
    "GPT-4o": (92.48, 92.63, 91.02, 90.51),
    "GPT-4o-1.5": (95.77, 95.41, 95.62, 96.12),
}
"""The overall score of each model on the four sets."""
ROWS: dict[tuple[str, str], tuple[float, ...]] = {
    ("SDXL", "en"): (87.45, 72.28, 44.66, 35.10, 46.37, 10.34, 48.48, 26.68, 30.80, 0.00),
    ("FLUX.1-dev", "en"): (85.00, 87.50, 67.20, 62.26, 66.88, 29.77, 62.30, 45.75, 70.90, 32.18),
    ("SD-3.5-Large", "en"): (88.60, 89.72, 68.80, 61.98, 67.51, 32.05, 59.89, 58.38, 67.72, 34.20),
    ("Qwen-Image", "en"): (94.70, 94.15, 87.93, 82.60, 80.08, 51.59, 60.96, 72.94, 86.57, 72.13),
    ("FLUX.1-dev", "en_long"): (89.29, 89.45, 79.90, 64.53, 69.40, 54.37, 70.56, 68.46, 77.54, 30.71),
}  # fmt: skip
"""The ten dimensions, in the order of ``DIMENSIONS``, where they are known."""
SOURCE = "UniGenBench leaderboard"


def leaderboard(split: str, overall: str, judge: str) -> Sequence[Reference]:
    """The published scores on a set, by metric name."""
    found = []
    for model, scores in OVERALL.items():
        value = scores[SETS.index(split)]
        if value is not None:
            row = dict(zip(DIMENSIONS, ROWS.get((model, split), ()), strict=False))
            found.append(Reference(model, {overall: value, **row}, SOURCE, {}, judge))
    return found
