"""Starting runs and reading what they wrote; shared by the benchmarks."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(config: str, folder: Path, settings: Sequence[str]) -> float:
    """Train in a process of its own, if it has not finished before. Returns the seconds it took."""
    began = time.time()
    arguments = [f"--set={s}" for s in (*settings, f"run.folder={folder}")]
    # Rewards and measures of the benchmarks' own lie beside this file.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, "-m", "flowgrpo", "train", config, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
    )
    return time.time() - began


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The held-out evaluations of a run, the first before training."""
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def seconds_per_iteration(folder: Path) -> float:
    """The median time of an iteration, evaluations aside."""
    rows = [
        json.loads(line)["total"] for line in (folder / "timings.jsonl").read_text().splitlines()
    ]
    return sorted(rows)[len(rows) // 2]


def percent(value: float, images: int) -> str:
    """A share in per cent with its standard error."""
    error = math.sqrt(max(value * (1 - value), 1e-9) / images)
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def between(path: Path, name: str, text: str) -> None:
    """Put a text between a page's markers. Raises ValueError if it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, start, rest = path.read_text().partition(begin)
    _, stop, after = rest.partition(end)
    if not start or not stop:
        raise ValueError(f"{path} has no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
