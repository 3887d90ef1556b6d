"""Every algorithm on the embedded model, at equal wall-clock or at equal denoiser evaluations.

python benchmarks/study.py --minutes 3 --seeds 0 1 --jobs 2
python benchmarks/study.py --evaluations 400000 --seeds 0 1
python benchmarks/study.py --report docs/study.md

All start from the same weights and use the same reward, transition (coefficients-preserving
sampling), learning rate and prompts; what differs is who judges which steps. A short run of each
tells how long one of its iterations takes. Finished runs are read, unfinished ones go on, so that a
study can be stopped and continued.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from bench_runs import evaluations, run, seconds_per_iteration, table

CPS = "transition={kind='cps', noise_level=0.7}"
EARLY = "steps={kind='random_window', size=1, first=0, last=4}"
THREE = "steps={kind='random_steps', count=3, first=0, last=6}"
ALGORITHMS = {
    "Flow-GRPO-Fast, shared noise (quick start)": [],
    "Flow-GRPO": [f"algorithm={{kind='flow_grpo', group_size=16, {CPS}, {THREE}}}"],
    "Flow-GRPO, Guard": [
        f"algorithm={{kind='flow_grpo', group_size=16, {CPS}, {THREE}}}",
        "loss={ratio='guard', clip_range=1e-3}",
    ],
    "DanceGRPO": [f"algorithm={{kind='dance_grpo', group_size=16, {CPS}}}"],
    "MixGRPO": [
        f"algorithm={{kind='mix_grpo', group_size=16, {CPS}, "
        "steps={kind='sliding_window', size=2, every=10, skip_last=3}}"
    ],
    "Pref-GRPO by graded": [
        f"algorithm={{kind='pref_grpo', group_size=16, {CPS}, {EARLY}, shared_noise=true, "
        "preference={kind='compared', reward='graded', weight=1.0}}"
    ],
    "DiffusionNFT": ["algorithm={kind='diffusion_nft', group_size=16}", "loss={kind='nft'}"],
    "TempFlow-GRPO": [
        f"algorithm={{kind='tempflow_grpo', group_size=16, seeds=2, {CPS}, "
        "steps={kind='window', start=0, size=4}}"
    ],
    "G2RPO": [
        f"algorithm={{kind='g2rpo', group_size=16, granularities=[1, 2], {CPS}, "
        "steps={kind='window', start=0, size=4}}"
    ],
    "TP-GRPO": [f"algorithm={{kind='tp_grpo', group_size=16, {CPS}, {THREE}}}"],
    "VGPO": [f"algorithm={{kind='vgpo', group_size=16, {CPS}}}"],
    "BranchGRPO": [
        f"algorithm={{kind='branch_grpo', group_size=16, splits=[0, 1, 2, 3], children=2, {CPS}}}"
    ],
}
SHORT = ["train.iterations=4", "evaluation.images=12", "evaluation.every=0"]
MEASURED = ("strict", "graded", "diversity/color")


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    name: str
    seed: int
    iterations: int
    each: float
    nfe: float
    before: dict[str, float]
    after: dict[str, float]


def main() -> None:
    """Run what is missing, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="wall-clock of each run's training")
    budget.add_argument(
        "--evaluations", type=int, help="denoiser evaluations of each run's rollouts"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(ALGORITHMS), help="names of algorithms")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", type=Path, help="write the tables of all finished runs there")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    common = ["run.threads=1", "run.trackers=[]", *options.set]
    if options.minutes or options.evaluations:
        kind = "time" if options.minutes else "nfe"
        with ThreadPoolExecutor(options.jobs) as pool:
            # All probes first, under the same load as the runs.
            probes = {n: pool.submit(probe, n, options.folder, common) for n in options.only}
            costs = {n: p.result() for n, p in probes.items()}
            waiting = []
            for seed in options.seeds:
                for name, (each, nfe) in costs.items():
                    left = (
                        options.minutes * 60 / each
                        if options.minutes
                        else options.evaluations / nfe
                    )
                    settings = [
                        *common,
                        f"train.iterations={max(1, int(left))}",
                        f"run.seed={seed}",
                    ]
                    waiting.append(pool.submit(train, name, kind, seed, options.folder, settings))
            for done in waiting:
                done.result()
    text = report(options.folder)
    if options.report:
        write(options.report, text)
    print(text)


def slug(name: str) -> str:
    """A file name for an algorithm's name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def probe(name: str, folder: Path, common: Sequence[str]) -> tuple[float, float]:
    """Seconds and denoiser evaluations of one iteration."""
    place = folder / "probe" / slug(name)
    run("quickstart", place, [*ALGORITHMS[name], *common, *SHORT])
    return seconds_per_iteration(place), evaluations_per_iteration(place)


def evaluations_per_iteration(place: Path) -> float:
    """Denoiser evaluations of a run's rollouts, over all prompts of an iteration."""
    lines = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
    return 18 * mean(line["nfe_per_prompt"] for line in lines)


def train(name: str, kind: str, seed: int, folder: Path, settings: Sequence[str]) -> None:
    """One run, evaluated before and after."""
    place = folder / kind / slug(name) / str(seed)
    run("quickstart", place, [*ALGORITHMS[name], *settings, "evaluation.every=0"])


def outcome(name: str, place: Path) -> Outcome | None:
    """What a finished run came to."""
    if not (place / "report.html").exists():
        return None
    first, last = evaluations(place)[0], evaluations(place)[-1]
    if first["iteration"] == last["iteration"]:
        return None

    def numbers(result: dict) -> dict[str, float]:
        found = {**result["scores"], **result["measures"]}
        return {key: found[key] for key in MEASURED}

    return Outcome(
        name,
        int(place.name),
        last["iteration"],
        seconds_per_iteration(place),
        evaluations_per_iteration(place),
        numbers(first),
        numbers(last),
    )


def report(folder: Path) -> str:
    """A table for each kind of budget, best gain first."""
    parts = []
    for kind, title in (("time", "Equal wall-clock"), ("nfe", "Equal denoiser evaluations")):
        rows = []
        for name in ALGORITHMS:
            found = [outcome(name, p) for p in sorted((folder / kind / slug(name)).glob("*"))]
            done = [o for o in found if o is not None]
            if done:
                rows.append(
                    (mean(o.after["strict"] - o.before["strict"] for o in done), name, done)
                )
        cells = [row(name, done) for _, name, done in sorted(rows, reverse=True)]
        if cells:
            heads = [
                "algorithm", "seeds", "s / iteration", "iterations", "evaluations / prompt",
                "strict before, %", "after, %", "gain, points", "graded gain", "colour entropy",
            ]  # fmt: skip
            parts.append(f"## {title}\n\n{table(heads, cells)}")
    return "\n\n".join(parts)


def row(name: str, done: Sequence[Outcome]) -> list[str]:
    """Means over seeds; behind ± the 95 % confidence interval, from seeds if there are several."""
    gains = [100 * (o.after["strict"] - o.before["strict"]) for o in done]
    if len(gains) > 1:
        # Student's t for few seeds.
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(gains), 2.2)
        interval = t * stdev(gains) / math.sqrt(len(gains))
    else:
        interval = 196 * math.sqrt(sum(v["strict"] * (1 - v["strict"]) for v in (done[0].before, done[0].after)) / 480)  # fmt: skip

    def both(key: str) -> tuple[float, float]:
        return mean(o.before[key] for o in done), mean(o.after[key] for o in done)

    strict, graded, colour = both("strict"), both("graded"), both("diversity/color")
    return [
        name,
        str(len(done)),
        f"{mean(o.each for o in done):.2f}",
        f"{mean(o.iterations for o in done):.0f}",
        f"{mean(o.nfe for o in done) / 18:.0f}",
        f"{100 * strict[0]:.1f}",
        f"{100 * strict[1]:.1f}",
        f"{mean(gains):+.1f} ± {interval:.1f}",
        f"{graded[1] - graded[0]:+.3f}",
        f"{colour[0]:.2f} → {colour[1]:.2f}",
    ]


def write(path: Path, text: str) -> None:
    """Put the tables between the page's markers."""
    begin, end = "<!-- study: begin -->", "<!-- study: end -->"
    page = path.read_text()
    path.write_text(f"{page.split(begin)[0]}{begin}\n{text}\n{end}{page.split(end)[1]}")


if __name__ == "__main__":
    main()
