"""Measures what ``train.staleness = 1`` saves when scoring is slow: the embedded model, a reward that sleeps.

``python -m benchmarks.staleness --seconds 0.5 1 2`` trains short runs with ``train.staleness`` 0 and 1, at
the same time in two processes, so that what else the machine does slows both down alike. It prints the
median seconds per iteration, without the first two and the last, in which nothing overlaps or nothing is
sampled ahead. The reward sleeps, so it takes no time from the sampler, as a reward server on another
machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from torch import Tensor

import flowgrpo
from flowgrpo.data.prompts import Prompt


class Sleeping:
    """Darkness, after a pause.

    Args:
        seconds: Length of the pause in each call.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score a batch."""
        time.sleep(self.seconds)
        return 1 - media.mean((1, 2, 3))


def iteration_seconds(
    staleness: int, seconds: float, iterations: int
) -> tuple[float, float, float]:
    """Median seconds of an iteration, of its scoring, and mean ratio deviation of a short run.

    Args:
        staleness: ``train.staleness``.
        seconds: Pause of the reward; there is one call per iteration.
        iterations: Iterations of the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.folder={folder}/run", f"train.staleness={staleness}", f"train.iterations={iterations}",
            "train.groups=6", "algorithm.group_size=8", "train.rollout_batch=48", "train.updates=1",
            f"rewards=[{{model='benchmarks.staleness:Sleeping', options={{seconds={seconds}}}}}]",
            "evaluation.images=2", "evaluation.every=0", "evaluation.inspected_prompts=0",
            "evaluation.grid_prompts=1", "evaluation.grid_samples=1", "run.trackers=[]", "run.device=cpu",
            "run.checkpoint_every=1000", "failures.probe=off", "run.threads=1",
        ]  # fmt: skip
        flowgrpo.train(flowgrpo.load("quickstart_flow_grpo", settings))
        lines = {
            name: [
                json.loads(t) for t in Path(folder, "run", f"{name}.jsonl").read_text().splitlines()
            ]
            for name in ("timings", "metrics")
        }
    times, metrics = lines["timings"][2:-1], lines["metrics"][2:-1]
    return (
        median(t["total"] for t in times),
        median(t["scoring"] for t in times),
        sum(m["ratio/deviation"] for m in metrics) / len(metrics),
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    print("scoring s | staleness 0: s | staleness 1: s | faster | ratio deviation 0 | 1")
    for seconds in options.seconds:
        with ProcessPoolExecutor(2) as pool:
            both = [pool.submit(iteration_seconds, s, seconds, options.iterations) for s in (0, 1)]
        now, ahead = (one.result() for one in both)
        print(
            f"{now[1]:.2f} | {now[0]:.2f} | {ahead[0]:.2f} | {now[0] / ahead[0]:.2f} | {now[2]:.1e} | {ahead[2]:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
