"""``flowgrpo runs``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.data import strict_json

if TYPE_CHECKING:
    from flowgrpo.training.run_list import HeldOut, RunSummary

SUMMARY = "list runs with their state, progress and held-out reward"
EXAMPLE = "flowgrpo runs runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "folder",
        nargs="?",
        default="runs",
        metavar="DIR",
        help="folder that is searched for run directories (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Print the runs, the newest last."""
    from flowgrpo.training.run_list import find_runs, summarise

    root = Path(options.folder)
    runs = sorted(map(summarise, find_runs(root)), key=lambda r: (r.updated, r.folder))
    if options.json:
        print(strict_json.dumps([_record(r) for r in runs], indent=1))
        return 0
    if not runs:
        print(f"there are no run directories in {root}")
        return 0
    from flowgrpo.core.text import tag_words
    from flowgrpo.training.console import Console

    console = Console()
    columns = ("run", "state", "iteration", "last", "best", "algorithm", "model", "date")
    console.table("", columns, [_row(r, root) for r in runs])
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


def _record(one: "RunSummary") -> dict[str, Any]:
    """A run as JSON."""
    ends = {"first": one.first, "last": one.last, "best": one.best}
    return {
        "folder": str(one.folder),
        "state": one.state,
        "problem": one.problem,
        "iteration": one.iteration,
        "iterations": one.iterations,
        "held_out_reward": {
            k: None if e is None else {"iteration": e.iteration, "reward": e.reward}
            for k, e in ends.items()
        },
        "regimes": {
            tag: [{"iteration": e.iteration, "reward": e.reward} for e in found]
            for tag, found in one.regimes.items()
        },
        "algorithm": one.algorithm,
        "model": one.model,
        "seed": one.seed,
        "started": one.started,
        "updated": one.updated,
    }
