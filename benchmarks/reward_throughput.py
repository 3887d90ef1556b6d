"""Measures images per second of every reward, served and in process, and how well scoring overlaps.

    python -m benchmarks.reward_throughput --json rewards.json

Each reward model is loaded from a folder of the published layout with random weights, at tiny size or,
with ``--size real``, at the published size if that needs no download. The overlap of scoring and
sampling is measured on the quick start. Results that are in the file are not measured again. At tiny
size the tables are written into docs/rewards.md; they are always printed.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowgrpo
from benchmarks.reward_cases import REAL, SIZE, TINY, Make
from flowgrpo.cli.common import quiet
from flowgrpo.core.scores import Scores
from flowgrpo.data import strict_json
from flowgrpo.data.audio import Audio
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.protocols import LearningReward
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training import setup
from reward_models.remote import Remote
from scripts.page_tables import markdown_table, write_marked_text
from tests import zoo

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rewards.md"
VIDEO_SIZE, FRAMES = 64, 8
PROMPT = Prompt('a sign that says "hi"', metadata={
    "reference": "reference.png", "fps": 8.0,
    "subjects": [{"name": "sign", "reference": "reference.png"}],
    "tag": "single_object", "include": [{"class": "bench", "count": 1}],
})  # fmt: skip

SAMPLES, BATCHES = 96, (96, 16)
"""Samples per iteration, and the sizes of rollout batches."""


class Paused:
    """Brightness, after a pause without CPU work, like a reward model on another device."""

    def __init__(self, seconds_per_sample: float):
        self.seconds = seconds_per_sample

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(self.seconds * len(prompts))
        return media.flatten(1).mean(1)


class Busy:
    """Brightness, after CPU work that competes with sampling."""

    def __init__(self, products_per_sample: float):
        self.products = products_per_sample

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        matrix = torch.full((256, 256), 1e-3)
        for _ in range(round(self.products * len(prompts))):
            matrix @ matrix
        return media.flatten(1).mean(1)


def rates(make: Make, device: str, repeats: int) -> dict[str, Any]:
    """Media per second of one reward, in each precision and served."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case = make(folder)
        media = (
            zoo.films(case.number, FRAMES, VIDEO_SIZE, VIDEO_SIZE)
            if case.video
            else zoo.noise(case.number, SIZE, SIZE)
        )
        prompts = [PROMPT] * case.number
        placed = {"device": device} if case.precisions else {}
        found: dict[str, Any] = {"number": case.number, "video": case.video}
        for precision in case.precisions or ("float32",):
            options = {**case.options, **placed}
            options |= {"dtype": precision} if case.precisions else {}
            reward = load_reward(Reward(model=case.model, options=options))
            found[precision] = rate(lambda r=reward: r(media, prompts), case.number, repeats)
            # Rewards that are trained during a run are not served.
            if precision == "float32" and not isinstance(reward, LearningReward):
                with served(case.model, options, folder) as url:
                    client = Remote(url, timeout=600.0, part=case.number, token_env="")
                    found["served"] = rate(lambda c=client: c(media, prompts), case.number, repeats)
                # Measured again, because the load of the machine may have changed meanwhile.
                again = rate(lambda r=reward: r(media, prompts), case.number, repeats)
                found[precision] = max(found[precision], again)
        return found


def rate(call: Callable[[], object], number: int, repeats: int) -> float:
    """Media per second, by the shortest time after a warm-up call, as other work only adds time."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return number / min(times)


@contextmanager
def served(model: str, options: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Run ``flowgrpo serve-reward`` in a separate process; yields its address."""
    command = [sys.executable, "-m", "flowgrpo", "serve-reward", model, "--port", "0"]
    command += [f"--option={key}={_toml(value)}" for key, value in options.items()]
    with (folder / "server.log").open("w") as log, ExitStack() as after:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLOWGRPO_TOKEN": ""}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
        )
        after.callback(process.wait)
        after.callback(process.terminate)
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at " not in line:
            raise RuntimeError((folder / "server.log").read_text()[-2000:])
        yield line.split(" at ")[1].split()[0]


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


class TimedScorer(RewardScorer):
    """Sums the seconds of scoring in training, and the seconds that training waits for scores."""

    waited, scored_for = 0.0, 0.0

    def submit(
        self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None
    ) -> "Future[Scores]":
        """Score in the background, and time the wait for the result."""
        pending = super().submit(media, prompts, audio)
        if self.iteration is not None:
            result = pending.result

            def watched(timeout: float | None = None) -> Scores:
                began = time.perf_counter()
                scores = result(timeout)
                TimedScorer.waited += time.perf_counter() - began
                return scores

            pending.result = watched  # type: ignore[method-assign]
        return pending

    def score(self, media: Tensor, prompts: Sequence[Prompt], audio: Audio | None = None) -> Scores:
        """Score, and time it."""
        began = time.perf_counter()
        scores = super().score(media, prompts, audio)
        if self.iteration is not None:
            TimedScorer.scored_for += time.perf_counter() - began
        return scores


def overlap(kind: str, batch: int, iterations: int = 2) -> dict[str, float]:
    """Seconds per iteration of scoring and of waiting for scores, in a shortened quick start.

    Scoring is hidden as far as nothing waits for it. Other work on the machine slows both times alike,
    so their quotient is meaningful on a busy machine, unlike the lengths of two runs.
    """
    option, cost = {
        "Paused": ("seconds_per_sample", 0.01), "Busy": ("products_per_sample", 10.0),
    }[kind]  # fmt: skip
    TimedScorer.waited = TimedScorer.scored_for = 0.0
    setup.RewardScorer = TimedScorer  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        model = f"benchmarks.reward_throughput:{kind}"
        settings = [
            f"rewards=[{{model='{model}', options={{{option}={cost}}}}}]",
            f"run.folder={folder}/run", f"train.iterations={iterations}", "train.groups=6",
            "train.train_batch=48", f"train.rollout_batch={batch}", "evaluation.every=0",
            "evaluation.images=6", "evaluation.metrics=[]", "evaluation.grid_prompts=2",
            "evaluation.grid_samples=1", "failures.probe=off", "run.checkpoint_every=100",
        ]  # fmt: skip
        flowgrpo.train(flowgrpo.load("quickstart_flow_grpo", settings))
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    setup.RewardScorer = RewardScorer  # type: ignore[misc]
    return {
        "batches": SAMPLES / batch,
        "rollout": statistics.mean(json.loads(line)["rollout"] for line in lines),
        "scoring": TimedScorer.scored_for / iterations,
        "waited": TimedScorer.waited / iterations,
    }


def tables(results: Mapping[str, Any]) -> str:
    """Both tables, in Markdown."""
    rows = []
    for name, r in results["rates"].items():
        batch = f"{r['number']} {'videos' if r['video'] else 'images'}"
        half = _digits(r["bfloat16"]) if "bfloat16" in r else ""
        served = ("", "")
        if "served" in r:
            served = (_digits(r["served"]), f"{r['served'] / r['float32']:.0%}")
        rows.append((f"`{name}`", batch, _digits(r["float32"]), half, *served))
    heads = ("reward", "batch", "fp32", "bf16", "fp32, served", "served against in process")
    rates_table = markdown_table(heads, rows)
    if not results["overlap"]:
        return rates_table
    rows = []
    for name, r in results["overlap"].items():
        seconds = (f"{r[k]:.2f} s" for k in ("rollout", "scoring", "waited"))
        hidden = f"{max(0.0, 1 - r['waited'] / r['scoring']):.0%}"
        rows.append((name.split("/")[0], f"{r['batches']:.0f}", *seconds, hidden))
    heads = (
        "reward", "batches per iteration", "rollout", "scoring", "waited for scores", "scoring hidden",
    )  # fmt: skip
    return f"{rates_table}\n\n{markdown_table(heads, rows)}"


def _digits(value: float) -> str:
    """Format with three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure the rewards that are not in the file yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="file for the results")
    parser.add_argument("--size", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of rewards; default all, and the overlap")
    options = parser.parse_args()
    quiet()
    logging.getLogger("reward_models").setLevel(logging.ERROR)  # answers without a score
    file = Path(options.json)
    results: dict[str, Any] = {"rates": {}, "overlap": {}}
    if file.exists():
        results = json.loads(file.read_text())

    def keep(kind: str, name: str, value: Mapping[str, Any]) -> None:
        results[kind][name] = value
        file.write_text(strict_json.dumps(results, indent=1) + "\n")
        print(name, value, flush=True)

    makes = {"tiny": TINY, "real": REAL}[options.size]
    if options.size == "tiny" and options.only is None:
        for kind in ("Paused", "Busy"):
            for batch in BATCHES:
                name = f"{kind}/{batch}"
                if name not in results["overlap"]:
                    keep("overlap", name, overlap(kind, batch))
    for name in makes if options.only is None else options.only:
        if name not in results["rates"]:
            keep("rates", name, rates(makes[name], options.device, options.repeats))
    if options.size == "tiny":
        write_marked_text(PAGE, "rewards", tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
