"""Compares methods on the embedded model: tuned alike, at equal time, images and evaluations.

    python -m benchmarks.study run --folder runs/study
    python -m benchmarks.study report --folder runs/study --write docs/study.md

``run`` does one piece of work after the other and keeps the result of each in a file, so it can be
stopped at any time and continued by the same command; several processes with the same folder share the
work. ``report`` makes tables and plots of what is done.
"""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.entries import ALGORITHMS, FURTHER, Entry
from benchmarks.study.plan import SHORT, Plan, Store


def main(arguments: list[str] | None = None) -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--start",
        type=Path,
        help="packed results that are not done again (docs/study/results.jsonl)",
    )
    parser.add_argument("--only", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin nothing after this")
    parser.add_argument("--short", action="store_true", help="try the code; results say nothing")
    parser.add_argument("--set", action="append", default=[], help="settings of all runs")
    parser.add_argument(
        "--write",
        type=Path,
        help="page that gets the tables; plots and packed results go into a folder of its name",
    )
    options = parser.parse_args(arguments)
    entries = None
    if options.only:
        entries = [e for e in (*ALGORITHMS, *FURTHER) if any(w in e.name for w in options.only)]
        if not entries:
            names = ", ".join(e.name for e in (*ALGORITHMS, *FURTHER))
            parser.error(f"--only {' '.join(options.only)} names no method; there are: {names}")
    store, plan = Store(options.folder), SHORT if options.short else Plan()
    if options.command == "report" and (options.only or options.set or options.hours != math.inf):
        parser.error("--only, --set and --hours belong to run")
    try:
        _work(options, store, plan, entries)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _work(
    options: argparse.Namespace, store: Store, plan: Plan, entries: Sequence[Entry] | None
) -> None:
    """Run or report."""
    if options.start:
        store.unpack(options.start)
    if options.command == "run":
        os.environ["OMP_NUM_THREADS"] = "1"
        from benchmarks.study.work import work
        from flowgrpo.cli.common import quiet

        quiet()
        work(store, plan, entries, options.set, options.hours, lambda line: print(line, flush=True))
    else:
        from benchmarks.study.report import write_report

        print(write_report(store, plan, options.write))


if __name__ == "__main__":
    main()
