"""Starts training runs in processes of their own, and reads the files that they write."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(config: str, folder: Path, settings: Sequence[str], processes: int = 1) -> float:
    """Train in a separate process, which resumes an unfinished run and leaves a finished one alone.

    Args:
        config: Name or path of a configuration.
        folder: The run directory.
        settings: Arguments of ``--set``.
        processes: Processes of the run.

    Returns:
        The seconds that the process took.
    """
    began = time.time()
    arguments = [f"--set={s}" for s in (*settings, f"run.folder={folder}")]
    arguments += [f"--nproc={processes}"] if processes > 1 else []
    # Rewards and metrics of the benchmarks are given as "benchmarks.module:name".
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-m", "flowgrpo", "train", config, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
    )
    return time.time() - began


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The held-out evaluations of a run, in order; the first is of the base model."""
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def seconds_per_iteration(folder: Path) -> float:
    """The median time of an iteration in seconds, without evaluations."""
    lines = (folder / "timings.jsonl").read_text().splitlines()
    rows = [json.loads(line)["total"] for line in lines]
    return sorted(rows)[len(rows) // 2]


def percent(value: float, images: int) -> str:
    """A share in per cent with its standard error, that of a proportion of ``images``."""
    error = math.sqrt(max(value * (1 - value), 1e-9) / images)
    return f"{100 * value:.1f} ± {100 * error:.1f}"
