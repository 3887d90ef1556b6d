"""Kills runs at random moments, resumes them, and compares them with an uninterrupted run.

    python -m benchmarks.kill_and_resume --kills 30

A kill is survived if the run resumes after it. A run is identical if its weights, the optimizer's
moments, the metrics and the evaluations equal those of the uninterrupted run bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = [
    "train.iterations=12",
    "train.groups=6",
    "algorithm.group_size=4",
    "train.rollout_batch=24",
    "train.updates=2",
    "train.ema_decay=0.9",
    "loss.kl_coef=0.01",
    "evaluation.images=24",
    "evaluation.every=4",
    "evaluation.images_during=12",
    "evaluation.grid_prompts=2",
    "evaluation.grid_samples=2",
    "run.checkpoint_every=1",
    "run.threads=1",
    "failures.probe=off",
]
COMPARED = ("metrics.jsonl", "evaluations.jsonl")
PARTS = ("weights", "optimizer", "ema")


def command(folder: Path) -> list[str]:
    """The command that starts or resumes a run."""
    settings = [f"--set={s}" for s in (*SMALL, f"run.folder={folder}")]
    return [sys.executable, "-m", "flowgrpo", "train", "quickstart", *settings]


def differences(a: Path, b: Path) -> list[str]:
    """The files in which two finished runs differ."""
    names = [*COMPARED, *(f"checkpoints/000012/{p}.safetensors" for p in PARTS)]
    return [n for n in names if (a / n).read_bytes() != (b / n).read_bytes()]


def main() -> None:
    """Kill and resume runs until the number of kills is reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = survived = identical = finished = 0
    with tempfile.TemporaryDirectory() as temporary:
        straight = Path(temporary) / "straight"
        began = time.time()
        subprocess.run(command(straight), check=True, stdout=subprocess.DEVNULL, env=environment)
        whole = time.time() - began
        print(f"an uninterrupted run takes {whole:.0f} s", flush=True)
        while kills < options.kills:
            folder = Path(temporary) / f"killed-{finished}"
            while True:
                process = subprocess.Popen(
                    command(folder),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=environment,
                    text=True,
                )
                try:
                    # A random moment between the start of the run and shortly after its expected end.
                    _, errors = process.communicate(
                        timeout=chance.uniform(0.15, 1.1) * whole if kills < options.kills else None
                    )
                except subprocess.TimeoutExpired:
                    os.kill(process.pid, signal.SIGKILL)
                    process.communicate()
                    kills += 1
                    lines = folder / "metrics.jsonl"
                    at = len(lines.read_text().splitlines()) if lines.exists() else 0
                    print(f"kill {kills}: at iteration {at}", flush=True)
                    survived += 1
                    continue
                if process.returncode != 0:
                    print(f"was not resumed: {errors[-500:]}", flush=True)
                    survived -= 1
                break
            finished += 1
            wrong = differences(straight, folder) if process.returncode == 0 else ["(failed)"]
            identical += not wrong
            print(
                f"run {finished}: {'identical' if not wrong else 'differs in ' + ', '.join(wrong)}",
                flush=True,
            )
    print(
        json.dumps(
            {"kills": kills, "survived": survived, "runs": finished, "identical_runs": identical}
        )
    )


if __name__ == "__main__":
    main()
