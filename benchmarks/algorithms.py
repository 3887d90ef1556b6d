"""Algorithms on the embedded model at equal wall-clock.

python benchmarks/algorithms.py --minutes 5 --seeds 0

Each algorithm runs a few iterations to learn how long one takes, then as many as fit into the time.
"""

import argparse
from pathlib import Path

from runs import evaluations, percent, run, seconds_per_iteration, table

ALGORITHMS = {
    "Flow-GRPO-Fast, shared noise, one step (quick start)": [],
    "Flow-GRPO, 3 random steps of the first 6": [
        "algorithm.shared_noise=false",
        "algorithm.steps={kind='random_steps', count=3, first=0, last=6}",
    ],
    "DanceGRPO, CPS, shared noise, 0.6 of 7 steps": [
        "algorithm={kind='dance_grpo', group_size=16, transition={kind='cps', noise_level=0.7}}",
    ],
    "DanceGRPO, Dance-SDE 0.3, shared noise, 0.6 of 7 steps": [
        "algorithm={kind='dance_grpo', group_size=16, transition={kind='dance_sde', noise_level=0.3}}",
    ],
}


def main() -> None:
    """Run it; finished runs are read, unfinished ones go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    rows = []
    for number, (name, settings) in enumerate(ALGORITHMS.items()):
        probe = options.folder / f"{number}-probe"
        small = ["train.iterations=6", "evaluation.images=12", "evaluation.every=0"]
        run("quickstart", probe, [*settings, *options.set, *small])
        each = seconds_per_iteration(probe)
        iterations = max(1, int(60 * options.minutes / each))
        for seed in options.seeds:
            folder = options.folder / f"{number}-{seed}"
            length = [f"train.iterations={iterations}", f"run.seed={seed}", "evaluation.every=0"]
            run("quickstart", folder, [*settings, *options.set, *length])
            first, last = evaluations(folder)[0], evaluations(folder)[-1]
            rows.append(
                [
                    name,
                    str(seed),
                    f"{each:.2f}",
                    str(iterations),
                    percent(first["scores"]["strict"], first["images"]),
                    percent(last["scores"]["strict"], last["images"]),
                    f"{first['measures']['diversity/color']:.2f} → {last['measures']['diversity/color']:.2f}",
                ]
            )
    print(
        table(
            [
                "algorithm",
                "seed",
                "s / iteration",
                "iterations",
                "before",
                "after",
                "colour entropy",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main()
