"""Compares every algorithm on the embedded model, at equal time, evaluations and iterations.

    python -m benchmarks.study time                                  # alone on the machine
    python -m benchmarks.study run --seeds 0 1 2 --jobs 2
    python -m benchmarks.study report --write docs/study.md

``time`` measures the cost of an iteration of each entry. ``run`` trains each entry for the number of
iterations that both budgets (time and denoiser evaluations) allow by that cost, so the speed of the
machine during the run does not matter. ``report`` interpolates every curve at each budget. Finished
runs are not repeated and unfinished runs are resumed, so a study can be stopped at any time.
"""

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from statistics import mean

from benchmarks.study.entries import ALGORITHMS, IMAGES, OVEROPTIMISED, PROMPTS, Entry
from benchmarks.study.report import write_report
from benchmarks.study.results import Budgets, Study
from benchmarks.training_runs import run, seconds_per_iteration

QUIET = ["run.threads=1", "run.trackers=[]", "evaluation.inspected_prompts=0"]
FEW = ["train.iterations=5", "evaluation.images=12", "evaluation.every=0"]
POINTS = 5
"""Number of evaluations of a run after the first."""
MARGIN = 1.1
"""Factor by which runs are longer than their budgets, since times vary."""


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("command", choices=["time", "run", "report"])
    parser.add_argument("--seconds", type=float, default=120, help="budget of training time")
    parser.add_argument("--evaluations", type=int, default=30_000, help="budget of rollouts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="only entries whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--write", type=Path, help="page that gets the tables; plots go into a folder of its name"
    )
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    budgets = Budgets(options.seconds, options.evaluations)
    wanted = options.only or [""]
    entries = [e for e in (*ALGORITHMS, *OVEROPTIMISED) if any(w in e.name for w in wanted)]
    study = Study(options.folder)
    if options.command == "time":
        for entry in entries:
            measure_cost(study, entry, options.set)
    elif options.command == "run":
        run_all(study, entries, budgets, options.seeds, options.jobs, options.set)
    else:
        print(write_report(study, budgets, options.write))


def measure_cost(study: Study, entry: Entry, settings: Sequence[str]) -> None:
    """Measure the cost of one iteration of an entry, and save it in ``costs.json``."""
    place = study.folder / "probe" / entry.slug
    run("quickstart_flow_grpo", place, [*entry.settings, *QUIET, *FEW, *settings])
    lines = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
    evaluations = PROMPTS * mean(line["nfe_per_prompt"] for line in lines)
    study.save_cost(entry, seconds_per_iteration(place), evaluations)


def run_all(
    study: Study,
    entries: Sequence[Entry],
    budgets: Budgets,
    seeds: Sequence[int],
    jobs: int,
    settings: Sequence[str],
) -> None:
    """Train all entries with one seed before the next seed; finished runs are skipped."""
    costs = study.costs()
    for entry in entries:
        if entry.slug not in costs:
            measure_cost(study, entry, settings)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(train, study, e, budgets, seed, settings) for seed in seeds for e in entries
        ]
        for done in waiting:
            done.result()


def train(study: Study, entry: Entry, budgets: Budgets, seed: int, settings: Sequence[str]) -> None:
    """Train one entry with one seed, with evaluations during training."""
    place = study.place(entry, seed)
    if (place / "report.html").exists():
        return
    iterations = ceil(MARGIN * max(budgets.iterations(study.costs()[entry.slug])))
    if (place / "config.toml").exists():
        # It may have been started with other costs; a run directory belongs to one configuration.
        run(str(place / "config.toml"), place, [])
        return
    chosen = [
        f"train.iterations={iterations}",
        f"run.seed={seed}",
        f"evaluation.every={max(1, round(iterations / POINTS))}",
        f"evaluation.images={IMAGES}",
        f"evaluation.images_during={IMAGES}",
        "evaluation.metrics=['flowgrpo.shapes.rewards:Diversity', 'benchmarks.study.flawed_reward:Ink']",
    ]
    run("quickstart_flow_grpo", place, [*entry.settings, *QUIET, *chosen, *settings])


if __name__ == "__main__":
    main()
