"""Finds run directories and says in which state each of them is, without loading a model."""

import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowgrpo.config.files import CONFIG, INPUTS
from flowgrpo.training import checkpoints, lock
from flowgrpo.training.checkpoints import CheckpointError
from flowgrpo.training.logs import LogError, Logs
from flowgrpo.training.run_changes import SESSIONS
from flowgrpo.training.run_folder import FINISHED

MARKS = (SESSIONS, INPUTS, FINISHED, "metrics.jsonl", "evaluations.jsonl", "checkpoints")
"""A folder with a configuration and at least one of these is a run directory."""
State = Literal["running", "finished", "stopped", "damaged"]


@dataclass(frozen=True)
class HeldOut:
    """The held-out reward of one evaluation.

    Attributes:
        iteration: Iterations trained before it.
        reward: Mean of the reward on held-out prompts.
        scores: Mean of each reward model's own score there, by its name; None where it is not finite.
    """

    iteration: int
    reward: float
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSummary:
    """What is known about a run directory without loading its model.

    Attributes:
        folder: The run directory.
        state: ``running`` if a process holds its lock; ``finished`` if its export and report are
            written; ``damaged`` if it cannot be resumed as it is; else ``stopped``.
        problem: For damaged runs, a sentence that names the file and the remedy.
        iteration: Iterations trained.
        iterations: Iterations of the whole run; None if unknown.
        evaluations: Held-out rewards in order; those that are not finite are left out.
        regimes: Likewise for each further way to sample, by its name.
        algorithm: Kind of the algorithm, or its import path.
        model: Path of the model.
        seed: Seed of the run; None if unknown.
        started: When the run was first started, local time, as ``YYYY-MM-DD HH:MM:SS``.
        updated: When its newest log line was written, likewise.
        config: The tables of its configuration; empty if the file cannot be read.
    """

    folder: Path
    state: State
    problem: str
    iteration: int
    iterations: int | None
    evaluations: Sequence[HeldOut]
    regimes: Mapping[str, Sequence[HeldOut]]
    algorithm: str
    model: str
    seed: int | None
    started: str
    updated: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> HeldOut | None:
        """The first evaluation."""
        return self.evaluations[0] if self.evaluations else None

    @property
    def last(self) -> HeldOut | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def best(self) -> HeldOut | None:
        """The evaluation with the highest held-out reward; of equal ones the first."""
        return max(self.evaluations, key=lambda e: e.reward, default=None)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in a folder and its subfolders, or the folder itself if it is one.

    Hidden folders, and folders inside a run directory, are not searched.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    for place, inside, names in os.walk(folder):
        inside[:] = sorted(n for n in inside if not n.startswith("."))
        if CONFIG in names and {*inside, *names} & {*MARKS}:
            inside.clear()
            yield Path(place)


def summarise(folder: Path) -> RunSummary:
    """Read the state of a run directory. Tensors are not read, so damage in them is not found."""
    problem = _problem(folder)
    try:
        config = tomllib.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        config, problem = {}, f"{folder / CONFIG} cannot be read ({error}); restore the file"
    metrics = list(_lines(folder / "metrics.jsonl"))
    found = {e["iteration"]: e for e in _lines(folder / "evaluations.jsonl")}
    tags = dict.fromkeys(t for e in found.values() for t in e.get("regimes", {}))
    total = _setting(config, "train", "iterations")
    state: State = "stopped"
    if lock.holder(folder) is not None:
        state, problem = "running", ""
    elif problem:
        state = "damaged"
    elif _is_finished(folder, total):
        state = "finished"
    return RunSummary(
        folder=folder,
        state=state,
        problem=problem,
        iteration=max((int(m["iteration"]) + 1 for m in metrics), default=0),
        iterations=total,
        evaluations=_rewards(found),
        regimes={
            tag: _rewards({i: e.get("regimes", {}).get(tag, {}) for i, e in found.items()})
            for tag in tags
        },
        algorithm=str(_setting(config, "algorithm", "kind") or ""),
        model=str(_setting(config, "model", "path") or ""),
        seed=_setting(config, "run", "seed"),
        started=_started(folder),
        updated=_time(
            [folder / n for n in ("metrics.jsonl", "evaluations.jsonl", FINISHED, CONFIG)]
        ),
        config=config,
    )


def _rewards(evaluations: Mapping[int, Mapping[str, Any]]) -> list[HeldOut]:
    """The finite rewards of evaluations, by iteration."""
    known = [(i, e) for i, e in sorted(evaluations.items()) if e.get("reward") is not None]
    found = [HeldOut(i, float(e["reward"]), e.get("scores") or {}) for i, e in known]
    return [r for r in found if math.isfinite(r.reward)]


def _problem(folder: Path) -> str:
    """Why a run cannot be resumed as it is; empty if nothing was found."""
    numbered = checkpoints.numbered(folder / "checkpoints")
    if not numbered:
        return ""
    try:
        state = checkpoints.peek(numbered[-1])
        Logs(folder).check(state["lines"], state.get("lines_sha256", {}), str(numbered[-1]))
    except (CheckpointError, LogError) as error:
        return str(error)
    except (KeyError, TypeError, AttributeError):
        return f"{numbered[-1]} is a checkpoint of another version; start the run again"
    return ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log that have an iteration.

    Broken ones are left out: a process that was killed may have left half a line, which is cut off
    when the run resumes.
    """
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("iteration"), int):
            yield found


def _setting(config: Mapping[str, Any], table: str, key: str) -> Any:
    inside = config.get(table)
    return inside.get(key) if isinstance(inside, dict) else None


def _is_finished(folder: Path, total: int | None) -> bool:
    try:
        return bool(json.loads((folder / FINISHED).read_text())["iterations"] == total)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _started(folder: Path) -> str:
    """When the first session began; the age of the configuration if there is no record."""
    try:
        with (folder / SESSIONS).open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return _time([folder / CONFIG])


def _time(paths: Sequence[Path]) -> str:
    """The time at which the newest of some files was written; empty if none exists."""
    times = [p.stat().st_mtime for p in paths if p.exists()]
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(times))) if times else ""
