"""Changes of a run's configuration: what ``train --resume-with`` does, and the history of configurations.

``sessions.jsonl`` has one line per session. Its table ``changed`` holds the keys that differ from the
session before; ``kept`` those that were given to ``--resume-with``, which stay in force when the run is
resumed without it. ``stopped`` is the number of iterations after which early stopping had ended a run
that this session extends. ``history/NNNNNN.toml`` is the configuration with which the iterations up to N
were trained, for every N at which it changed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowgrpo.config import Config, ConfigError, load
from flowgrpo.config.changes import differences, may_change, why_fixed
from flowgrpo.config.files import CONFIG, absolute
from flowgrpo.config.reader import read
from flowgrpo.config.reference import to_table
from flowgrpo.core.secrets import REDACTED, redact_table

SESSIONS, HISTORY = "sessions.jsonl", "history"
Changes = Mapping[str, tuple[Any, Any]]
"""Keys with their values before and after; None where a key is missing."""


def extend(folder: Path, settings: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration of a run with changes, and the keys that change.

    Args:
        folder: The run directory.
        settings: ``key=value``, as for ``--set``.

    Raises:
        ConfigError: If there is no run, or a key may not change; the message says why, and what to do
            instead.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(
            f"--resume-with changes a run that exists, and {folder} is none; to start one, use --set"
        )
    there, here = load(str(file)), load(str(file), settings)
    if here.run.folder != there.run.folder:
        raise ConfigError(
            "--resume-with run.folder: a run stays in its directory; move the folder itself, and give its "
            "new path to the command"
        )
    changed = differences(absolute(there), absolute(here))
    for key in changed:
        require_changeable(key, there)
    return here, list(changed)


def require_changeable(key: str, there: Config) -> None:
    """Raise ConfigError, with the reason and the remedy, if a key of a run may not change."""
    if not may_change(key):
        raise ConfigError(f"{key} may not change in a run: {why_fixed(key)}. {instead(there)}")


def instead(there: Config) -> str:
    """How to start a new run from the weights of another one, in a sentence."""
    folder = there.run.folder
    if there.model.weights.kind == "lora":
        newest = max((Path(folder) / "checkpoints").glob("[0-9]*"), default=Path(folder))
        begin, start = "Start a new run from its weights", f"model.weights.init={newest}"
        if not there.model.weights.init:  # The reference policy is then that of the run.
            start += " --set model.weights.reference=model"
    elif there.model.weights.kind == "full":
        begin = f"Write its weights (flowgrpo export {folder} --out MODEL) and start a new run from them"
        start = "model.path=MODEL"
    else:
        return "Start a new run with another --set run.folder=..."
    return (
        f"{begin}: flowgrpo train {folder}/{CONFIG} --set run.folder=NEW --set {start}, with the change as "
        "a further --set"
    )


def in_force(config: Config) -> tuple[Config, list[str]]:
    """A configuration with the changes of ``--resume-with`` that its run directory records.

    A key is replaced if the configuration has one of the values that it had before, which is so if the
    command that started the run is given again. Another value is a new change, and is left.

    Returns:
        The configuration, and one sentence for each key that was replaced.
    """
    kept = _kept(Path(config.run.folder) / SESSIONS)
    if not kept:
        return config, []
    table, notes = to_table(config), []
    shown = redact_table(to_table(absolute(config)))
    for key, values in kept.items():
        own, last = _at(shown, key), values[-1]
        if own != last and own in values[:-1] and REDACTED not in json.dumps(last):
            _put(table, key, last)
            notes.append(
                f"{key} = {last!r}, as this run was extended; the configuration that was given has {own!r}. "
                f"To change it: --resume-with {key}=..."
            )
    return (read(Config, table), notes) if notes else (config, [])


def kept_changes(there: Config, here: Config, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The record of the keys that stay in force, with their values before and after.

    A key inside a list of tables stands for the whole list.
    """
    before, after = (redact_table(to_table(absolute(c))) for c in (there, here))
    roots = dict.fromkeys(_root(k) for k in keys)
    return {k: {"from": _at(before, k), "to": _at(after, k)} for k in roots}


def history(folder: Path) -> list[tuple[int, Changes]]:
    """The changes of a run, each after a number of iterations, in order; sessions without one left out."""
    found: list[tuple[int, Changes]] = []
    for line in _lines(folder / SESSIONS):
        pairs = {k: (v.get("from"), v.get("to")) for k, v in line.get("changed", {}).items()}
        if pairs:
            found.append((int(line.get("checkpoint") or 0), pairs))
    return found


def stopped_before(folder: Path) -> int:
    """The iterations after which the run was last stopped early and then extended; 0 if it never was."""
    return max((int(line.get("stopped", 0)) for line in _lines(folder / SESSIONS)), default=0)


def _kept(file: Path) -> dict[str, list[Any]]:
    """All values that each key of ``--resume-with`` has had, in order; the last is in force."""
    found: dict[str, list[Any]] = {}
    for line in _lines(file):
        for key, pair in line.get("kept", {}).items():
            found.setdefault(key, [pair.get("from")]).append(pair.get("to"))
        for key, pair in line.get("changed", {}).items():
            if key in found and pair.get("to") != found[key][-1]:
                found[key].append(pair.get("to"))
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    """The sessions of a run; a line that a killed process left unfinished is skipped."""
    found = []
    for text in file.read_text("utf-8").split("\n") if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _root(key: str) -> str:
    parts = key.split(".")
    numbers = [i for i, p in enumerate(parts) if p.isdecimal()]
    return ".".join(parts[: numbers[0]] if numbers else parts)


def _at(table: Any, key: str) -> Any:
    """The value at a dotted key; None if it is missing."""
    for part in key.split("."):
        table = table.get(part) if isinstance(table, Mapping) else None
    return table


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; None removes it."""
    *parents, last = key.split(".")
    for part in parents:
        table = table.setdefault(part, {})
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value
