"""Every algorithm on the embedded model, several seeds, by time, by evaluations and by iterations.

python benchmarks/study.py time                                  # alone on the machine
python benchmarks/study.py run --seeds 0 1 2 --jobs 2
python benchmarks/study.py report --write docs/study.md

``time`` measures an iteration of each algorithm. ``run`` trains each until it has used both budgets,
the time and the denoiser evaluations, and evaluates it on the way; how fast the machine is just then
changes nothing. ``report`` reads off every curve what a budget bought. Finished runs are read,
unfinished ones go on, so that a study can be stopped and continued.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from statistics import mean

from bench_runs import run, seconds_per_iteration
from study_report import Budgets, Study, write_report
from study_runs import ALGORITHMS, IMAGES, OVEROPTIMISED, PROMPTS, Entry

QUIET = ["run.threads=1", "run.trackers=[]", "evaluation.inspected_prompts=0"]
FEW = ["train.iterations=5", "evaluation.images=12", "evaluation.every=0"]
POINTS = 5
"""Evaluations of a run after the first."""
MARGIN = 1.1
"""How much longer a run is than its budgets, since times vary."""


def main() -> None:
    """Time, run or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["time", "run", "report"])
    parser.add_argument("--seconds", type=float, default=120, help="budget of training time")
    parser.add_argument("--evaluations", type=int, default=30_000, help="budget of rollouts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="parts of names of algorithms")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--write", type=Path, help="page that gets the tables, plots beside it")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    budgets = Budgets(options.seconds, options.evaluations)
    wanted = options.only or [""]
    entries = [e for e in (*ALGORITHMS, *OVEROPTIMISED) if any(w in e.name for w in wanted)]
    study = Study(options.folder)
    if options.command == "time":
        for entry in entries:
            measure(study, entry, options.set)
    elif options.command == "run":
        run_all(study, entries, budgets, options.seeds, options.jobs, options.set)
    else:
        print(write_report(study, budgets, options.write))


def measure(study: Study, entry: Entry, settings: Sequence[str]) -> None:
    """Seconds and denoiser evaluations of one iteration, into ``costs.json``."""
    place = study.folder / "probe" / entry.slug
    run("quickstart", place, [*entry.settings, *QUIET, *FEW, *settings])
    lines = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
    evaluations = PROMPTS * mean(line["nfe_per_prompt"] for line in lines)
    study.keep_cost(entry, seconds_per_iteration(place), evaluations)


def run_all(
    study: Study,
    entries: Sequence[Entry],
    budgets: Budgets,
    seeds: Sequence[int],
    jobs: int,
    settings: Sequence[str],
) -> None:
    """Train what is not trained yet, all algorithms with one seed before the next seed."""
    costs = study.costs()
    for entry in entries:
        if entry.slug not in costs:
            measure(study, entry, settings)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(train, study, e, budgets, seed, settings) for seed in seeds for e in entries
        ]
        for done in waiting:
            done.result()


def train(study: Study, entry: Entry, budgets: Budgets, seed: int, settings: Sequence[str]) -> None:
    """One run, evaluated on the way."""
    place = study.place(entry, seed)
    if (place / "report.html").exists():
        return
    iterations = ceil(MARGIN * max(budgets.iterations(study.costs()[entry.slug])))
    if (place / "config.toml").exists():
        # Begun with other costs; a run directory belongs to one configuration.
        run(str(place / "config.toml"), place, [])
        return
    chosen = [
        f"train.iterations={iterations}",
        f"run.seed={seed}",
        f"evaluation.every={max(1, round(iterations / POINTS))}",
        f"evaluation.images={IMAGES}",
        f"evaluation.images_during={IMAGES}",
        "evaluation.metrics=['flowgrpo.shapes.rewards:Diversity', 'inked:Ink']",
    ]
    run("quickstart", place, [*entry.settings, *QUIET, *chosen, *settings])


if __name__ == "__main__":
    main()
