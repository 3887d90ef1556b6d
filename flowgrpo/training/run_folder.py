"""The run directory: whose it is, which configuration it has, and whether its run has finished."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo import config as configuration
from flowgrpo.config import Config, ConfigError
from flowgrpo.config.changes import differences, may_change
from flowgrpo.config.files import CONFIG, INPUTS, absolute
from flowgrpo.config.reference import to_table
from flowgrpo.config.training_data import training_source
from flowgrpo.core.text import counted
from flowgrpo.data import files, strict_json
from flowgrpo.training import checkpoints, lock
from flowgrpo.training.run_changes import HISTORY, SESSIONS, kept_changes

FINISHED, STOPPED = "finished.json", "early_stop.json"
NOTES = "notes.json"
"""Warnings about the prompts, for the report."""
EARLY = {lock.NAME, SESSIONS, "config" + files.TEMPORARY}
"""Files that may exist before the configuration is written, if a process was killed that early."""
PROMPTS = ("prompts.train", "prompts.held_out")


def claim(
    config: Config,
    processes: int,
    environment: Mapping[str, Any],
    kept: Sequence[str] = (),
) -> tuple[lock.RunLock, str]:
    """Lock the run directory and write the configuration into it.

    Args:
        config: The configuration of this session.
        processes: Number of processes, for the record in ``sessions.jsonl``.
        environment: Versions and devices, for ``environment.json``.
        kept: Keys whose change stays in force when the run is resumed without it.

    Returns:
        The lock, and the changed keys in words; empty if none changed.

    Raises:
        ConfigError: If another process uses the directory, it belongs to another configuration, or it
            is not a run directory.
    """
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / CONFIG
    if not file.exists() and {p.name for p in folder.iterdir()} - EARLY:
        raise ConfigError(
            f"{folder} is not empty and not a run directory; choose another --set run.folder=..."
        )
    held = lock.RunLock(folder)
    try:
        inputs = _digests(config)
        changed = _changes(folder, config, inputs) if file.exists() else {}
        if is_finished(config):
            return held, ""
        there = configuration.load(str(file)) if file.exists() else config
        stopped = early_stop(folder) if (folder / FINISHED).exists() else None
        _record(folder, processes, changed, kept_changes(there, config, kept), stopped)
        if changed:
            _keep_configuration(folder)
        files.write_whole(file, configuration.dump(absolute(config)))
        files.write_whole(folder / INPUTS, strict_json.dumps(inputs, indent=1))
        files.write_whole(folder / "environment.json", strict_json.dumps(environment, indent=1))
        if (folder / FINISHED).exists():
            files.delete(folder / FINISHED)
        if stopped is not None:
            files.delete(folder / STOPPED)
    except BaseException:
        held.release()
        raise
    return held, ", ".join(f"{k} {old!r} -> {new!r}" for k, (old, new) in changed.items())


def preview(config: Config) -> str:
    """What a session would do with the run directory, in words. Nothing is written.

    Raises:
        ConfigError: If it belongs to another configuration, or is not a run directory.
    """
    folder = Path(config.run.folder)
    if not folder.is_dir() or not {p.name for p in folder.iterdir()} - EARLY:
        return "a new run"
    if not (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder} is not empty and not a run directory; choose another --set run.folder=..."
        )
    changed = _changes(folder, config, _digests(config), dry=True)
    if is_finished(config):
        return (
            "finished: the run would do nothing; --resume-with train.iterations=... trains further"
        )
    newest = checkpoints.newest(folder / "checkpoints")
    words = (
        "starts again"
        if newest is None
        else f"resumes after {counted(int(newest.name), 'iteration')}"
    )
    changes = ", ".join(f"{k} {old!r} -> {new!r}" for k, (old, new) in changed.items())
    return f"{words}, with {changes}" if changes else words


def is_finished(config: Config) -> bool:
    """Whether the run of a configuration has finished, its export and report included.

    A run that was stopped early has finished until the number of its iterations or the settings of early
    stopping change.
    """
    folder = Path(config.run.folder)
    try:
        found = json.loads((folder / FINISHED).read_text())
        stopped = early_stop(folder)
        same = stopped is None or stopped["settings"] == to_table(config.train.early_stopping)
        return bool(found["iterations"] == config.train.iterations) and same
    except (OSError, ValueError, KeyError, TypeError):
        return False


def early_stop(folder: Path) -> dict[str, Any] | None:
    """The record of :func:`mark_stopped`; None if the run was not stopped early."""
    try:
        found = json.loads((folder / STOPPED).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "after" in found else None


def mark_stopped(config: Config, after: int, checkpoint: str, best: int, value: float) -> None:
    """Note that early stopping has ended the run, and which weights are exported.

    Args:
        config: The configuration.
        after: Iterations trained.
        checkpoint: The folder of the exported weights among the checkpoints.
        best: Iterations after which the exported weights were saved.
        value: Their value of the number that is watched.
    """
    settings = to_table(config.train.early_stopping)
    found = {
        "after": after,
        "checkpoint": checkpoint,
        "best": best,
        "value": value,
        "settings": settings,
    }
    files.write_whole(Path(config.run.folder) / STOPPED, strict_json.dumps(found, indent=1))


def mark_finished(config: Config) -> None:
    """Note that the run has finished."""
    done = {"iterations": config.train.iterations, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    files.write_whole(Path(config.run.folder) / FINISHED, strict_json.dumps(done))


def _changes(
    folder: Path, config: Config, inputs: Mapping[str, str], dry: bool = False
) -> dict[str, tuple[Any, Any]]:
    """The keys that this session changes. If ``dry``, nothing is deleted.

    Raises:
        ConfigError: If one of them may not change, and there are results that would be mixed up.
    """
    there = configuration.load(str(folder / CONFIG))
    changed = differences(absolute(there), absolute(config))
    newest = checkpoints.newest(folder / "checkpoints")
    if not (folder / "metrics.jsonl").exists() and newest is None:
        # A run that stopped before its first iteration has no results; its base images are drawn again.
        if changed and not dry:
            files.delete(folder / "grids" / "base.safetensors")
        return {}
    known = _known_inputs(folder)
    refused = [k for k in changed if not may_change(k)]
    refused += [k for k in PROMPTS if k in changed and not (known.get(k) and known[k] == inputs[k])]
    if refused:
        old, new = changed[refused[0]]
        raise ConfigError(
            f"{folder} belongs to another configuration: {refused[0]} is {old!r} there and {new!r} now. "
            "Choose another --set run.folder=..., or delete that one"
        )
    for key in PROMPTS:
        if key not in changed and known.get(key, inputs[key]) != inputs[key]:
            raise ConfigError(
                f"the contents of {key} have changed since {folder} was started: restore the file, or "
                "choose another --set run.folder=..."
            )
    trained = int(newest.name) if newest is not None and newest.name.isdigit() else 0
    if trained > config.train.iterations:
        raise ConfigError(
            f"{folder} has already trained {counted(trained, 'iteration')}, more than train.iterations = "
            f"{config.train.iterations}"
        )
    return changed


def _keep_configuration(folder: Path) -> None:
    """Copy the configuration that is about to be replaced into the history, by the iterations trained.

    If there is one for this iteration already, nothing was trained with the later one.
    """
    newest = checkpoints.newest(folder / "checkpoints")
    place = folder / HISTORY / f"{newest.name if newest is not None else '000000'}.toml"
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        files.write_whole(place, (folder / CONFIG).read_text("utf-8"))


def _record(
    folder: Path,
    processes: int,
    changed: Mapping[str, tuple[Any, Any]],
    kept: Mapping[str, Mapping[str, Any]],
    stopped: Mapping[str, Any] | None,
) -> None:
    """Append a line about this session to ``sessions.jsonl``."""
    newest = checkpoints.newest(folder / "checkpoints")
    files.append(
        folder / SESSIONS,
        {
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "checkpoint": newest.name if newest is not None else None,
            "processes": processes,
            "changed": {k: {"from": old, "to": new} for k, (old, new) in changed.items()},
            **({"kept": dict(kept)} if kept else {}),
            **({"stopped": stopped["after"]} if stopped else {}),
        },
    )


def _known_inputs(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / INPUTS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digests(config: Config) -> dict[str, str]:
    """The SHA-256 of the prompt files; of a folder, that of its files' names and sizes; empty for a
    dataset that is neither."""
    sources = training_source(config), Path(configuration.find(config.prompts.held_out))
    return dict(zip(PROMPTS, map(_digest, sources), strict=True))


def _digest(path: Path) -> str:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        listing = [[str(p.relative_to(path)), p.stat().st_size] for p in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
