"""``flowgrpo runs``."""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import UsageError
from flowgrpo.core.imports import suggest
from flowgrpo.data import strict_json

if TYPE_CHECKING:
    from flowgrpo.training.run_list import HeldOut, RunSummary

SUMMARY = "list runs with their state, progress and held-out reward"
EXAMPLE = """\
flowgrpo runs runs
  flowgrpo runs runs/sweep --key train.lr --key run.seed --csv > sweep.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folder",
        nargs="?",
        default="runs",
        metavar="DIR",
        help="folder that is searched for run directories (default: %(default)s)",
    )
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="KEY",
        help="a column with this key of the configurations, such as train.lr; can be given again",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print JSON instead of a table")
    forms.add_argument(
        "--csv",
        action="store_true",
        help="print comma-separated values, with the held-out scores of the last evaluation",
    )


def run(options: argparse.Namespace) -> int:
    """Print the runs, the newest last."""
    from flowgrpo.training.run_list import find_runs, summarise

    root = Path(options.folder)
    runs = sorted(map(summarise, find_runs(root)), key=lambda r: (r.updated, r.folder))
    keys = _columns(runs, options.key)
    if options.json:
        print(strict_json.dumps([_record(r, keys[r.folder]) for r in runs], indent=1))
        return 0
    if options.csv:
        _write_csv(runs, keys, options.key, root)
        return 0
    if not runs:
        print(f"there are no run directories in {root}")
        return 0
    from flowgrpo.core.text import tag_words
    from flowgrpo.training.console import Console

    console = Console()
    columns = ["run", "state", "iteration", "last", "best", "algorithm", "model", "date"]
    rows = [[*_row(r, root), *map(_text, keys[r.folder].values())] for r in runs]
    console.table("", [*columns, *options.key], rows)
    for one in runs:
        for tag, found in one.regimes.items():
            if found:
                name, last = tag_words(tag), found[-1]
                first = f"{found[0].reward:.4g} → " if len(found) > 1 else ""
                console.say(
                    f"{_name(one, root)}, {name}: {first}{last.reward:.4g}@{last.iteration}"
                )
        if one.problem:
            console.say(f"{_name(one, root)} is damaged: {one.problem}")
    if any(r.evaluations for r in runs):
        console.say(
            "last, best: held-out reward of the last and of the best evaluation, @ its iteration"
        )
    return 0


def _columns(runs: "Sequence[RunSummary]", keys: Sequence[str]) -> dict[Path, dict[str, Any]]:
    """The values of some keys in the configuration of each run; None where one has no such key.

    Raises:
        UsageError: If no run has a key.
    """
    found = {r.folder: {k: _value(r.config, k.split(".")) for k in keys} for r in runs}
    known = {k: None for r in runs for k in _leaves(r.config, "")}
    for key in keys:
        if runs and all(values[key] is None for values in found.values()):
            raise UsageError(f"--key: no run has the key {key!r}{suggest(key, known)}")
    return found


def _value(table: Any, parts: Sequence[str]) -> Any:
    """The value at a dotted key; lists are indexed from 0."""
    for part in parts:
        if isinstance(table, list) and part.isdigit() and int(part) < len(table):
            table = table[int(part)]
        else:
            table = table.get(part) if isinstance(table, Mapping) else None
    return table


def _leaves(value: Any, path: str) -> list[str]:
    """The dotted keys of all values that are no tables."""
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return [path]
    return [leaf for k, v in items for leaf in _leaves(v, f"{path}.{k}".lstrip("."))]


def _text(value: Any) -> str:
    """The value of a key in a table or in CSV."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _write_csv(
    runs: "Sequence[RunSummary]",
    columns: Mapping[Path, Mapping[str, Any]],
    keys: Sequence[str],
    root: Path,
) -> None:
    """Print one row per run; cells of what is not known are empty."""
    scores = list(dict.fromkeys(s for r in runs if r.last is not None for s in r.last.scores))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    head = ["run", "state", "iteration", "iterations", *keys, "evaluated", "reward"]
    writer.writerow([*head, *(f"score/{s}" for s in scores)])
    for one in runs:
        last = one.last
        writer.writerow(
            [
                _name(one, root),
                one.state,
                one.iteration,
                one.iterations,
                *columns[one.folder].values(),
                *((last.iteration, last.reward) if last is not None else (None, None)),
                *(last.scores.get(s) if last is not None else None for s in scores),
            ]
        )


def _name(one: "RunSummary", root: Path) -> str:
    relative = one.folder.relative_to(root)
    return str(relative) if relative.parts else one.folder.resolve().name


def _row(one: "RunSummary", root: Path) -> tuple[str, ...]:
    of = "?" if one.iterations is None else str(one.iterations)
    last, best = _reward(one.last), _reward(one.best)
    if one.best is not None:
        best += f"@{one.best.iteration}"
    model = Path(one.model).name if Path(one.model).is_absolute() else one.model
    return (
        _name(one, root),
        one.state,
        f"{one.iteration}/{of}",
        last,
        best,
        one.algorithm,
        model,
        one.updated[:10],
    )


def _reward(found: "HeldOut | None") -> str:
    return "–" if found is None else f"{found.reward:.4g}"


def _record(one: "RunSummary", keys: Mapping[str, Any]) -> dict[str, Any]:
    """A run as JSON."""
    ends = {"first": one.first, "last": one.last, "best": one.best}
    return {
        "folder": str(one.folder),
        "state": one.state,
        "problem": one.problem,
        "iteration": one.iteration,
        "iterations": one.iterations,
        "held_out_reward": {
            k: None
            if e is None
            else {"iteration": e.iteration, "reward": e.reward, "scores": e.scores}
            for k, e in ends.items()
        },
        "regimes": {
            tag: [{"iteration": e.iteration, "reward": e.reward} for e in found]
            for tag, found in one.regimes.items()
        },
        "algorithm": one.algorithm,
        "model": one.model,
        "seed": one.seed,
        "keys": keys,
        "started": one.started,
        "updated": one.updated,
    }
