"""Images per second of every reward, served and in process, and how much of scoring is hidden.

python -m benchmarks.rewards --json rewards.json

Each reward is loaded from a folder of the published layout with random weights: at tiny size, or
with --size real at the real configuration, where that can be written down without a model hub. The
overlap is measured on the quick start. Results in the file are not measured again. The tables go
into docs/rewards.md (at tiny size; else they are printed).
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
from benchmarks.bench_runs import between
from torch import Tensor

import flowgrpo
from benchmarks.reward_cases import REAL, SIZE, TINY, Make
from flowgrpo.cli.commands import quiet
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import Reward, load_reward
from flowgrpo.rewards.protocols import LearningReward
from flowgrpo.rewards.scorer import RewardScorer, Scores
from flowgrpo.training import observer
from reward_models.remote import Remote
from tests import zoo

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rewards.md"
VIDEO_SIZE, FRAMES = 64, 8
PROMPT = Prompt('a sign that says "hi"', metadata={
    "reference": "reference.png", "fps": 8.0,
    "tag": "single_object", "include": [{"class": "bench", "count": 1}],
})  # fmt: skip

SAMPLES, BATCHES = 96, (96, 16)
"""Samples of an iteration, and how many of them are drawn at a time."""


class Paused:
    """The brightness, after a pause that takes no processor: a reward on another device."""

    def __init__(self, seconds_per_sample: float):
        self.seconds = seconds_per_sample

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(self.seconds * len(prompts))
        return media.flatten(1).mean(1)


class Busy:
    """The brightness, after work that shares the processor with the sampling."""

    def __init__(self, products_per_sample: float):
        self.products = products_per_sample

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        matrix = torch.full((256, 256), 1e-3)
        for _ in range(round(self.products * len(prompts))):
            matrix @ matrix
        return media.flatten(1).mean(1)


def rates(make: Make, device: str, repeats: int) -> dict[str, Any]:
    """Media per second in each precision and served, of one reward."""
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
            # What learns during a run is not served.
            if precision == "float32" and not isinstance(reward, LearningReward):
                with served(case.model, options, folder) as url:
                    client = Remote(url, timeout=600.0, part=case.number, token_env="")
                    found["served"] = rate(lambda c=client: c(media, prompts), case.number, repeats)
                # Again, since the load of the machine may have changed meanwhile.
                again = rate(lambda r=reward: r(media, prompts), case.number, repeats)
                found[precision] = max(found[precision], again)
        return found


def rate(call: Callable[[], object], number: int, repeats: int) -> float:
    """Media per second, by the shortest time after a call to warm up: other work only adds to it."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return number / min(times)


@contextmanager
def served(model: str, options: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """``flowgrpo serve-reward`` in a process of its own; its address."""
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


class Watch(RewardScorer):
    """A judge that knows how long it scored in training, and how long it was waited for."""

    waited, scored_for = 0.0, 0.0

    def submit(self, media: Tensor, prompts: Sequence[Prompt]) -> "Future[Scores]":
        """Score in the background, and watch who waits."""
        pending = super().submit(media, prompts)
        if self.iteration is not None:
            result = pending.result

            def watched(timeout: float | None = None) -> Scores:
                began = time.perf_counter()
                scores = result(timeout)
                Watch.waited += time.perf_counter() - began
                return scores

            pending.result = watched  # type: ignore[method-assign]
        return pending

    def score(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score now, and count the time of it."""
        began = time.perf_counter()
        scores = super().score(media, prompts)
        if self.iteration is not None:
            Watch.scored_for += time.perf_counter() - began
        return scores


def overlap(kind: str, batch: int, iterations: int = 2) -> dict[str, float]:
    """Per iteration of a shortened quick start: seconds of scoring, and of waiting for scores.

    What is waited for is not hidden. Other work on the machine slows both alike, so that the share
    holds on a busy machine too, where the length of two runs could not be compared.
    """
    option, cost = {
        "Paused": ("seconds_per_sample", 0.01), "Busy": ("products_per_sample", 10.0),
    }[kind]  # fmt: skip
    Watch.waited = Watch.scored_for = 0.0
    observer.RewardScorer = Watch  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        model = f"benchmarks.rewards:{kind}"
        settings = [
            f"rewards=[{{model='{model}', options={{{option}={cost}}}}}]",
            f"run.folder={folder}/run", f"train.iterations={iterations}", "train.groups=6",
            "train.train_batch=48", f"train.rollout_batch={batch}", "evaluation.every=0",
            "evaluation.images=6", "evaluation.metrics=[]", "evaluation.grid_prompts=2",
            "evaluation.grid_samples=1", "failures.probe=off", "run.checkpoint_every=100",
        ]  # fmt: skip
        flowgrpo.train(flowgrpo.load("quickstart", settings))
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    observer.RewardScorer = RewardScorer  # type: ignore[misc]
    return {
        "batches": SAMPLES / batch,
        "rollout": statistics.mean(json.loads(line)["rollout"] for line in lines),
        "scoring": Watch.scored_for / iterations,
        "waited": Watch.waited / iterations,
    }


def tables(results: Mapping[str, Any]) -> str:
    """Both tables, in Markdown."""
    lines = [
        "| reward | batch | fp32 | bf16 | fp32, served | served against in process |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results["rates"].items():
        what = f"{r['number']} {'videos' if r['video'] else 'images'}"
        half = _digits(r["bfloat16"]) if "bfloat16" in r else ""
        served = ("", "")
        if "served" in r:
            served = (_digits(r["served"]), f"{r['served'] / r['float32']:.0%}")
        cells = (f"`{name}`", what, _digits(r["float32"]), half, *served)
        lines.append(f"| {' | '.join(cells)} |")
    if not results["overlap"]:
        return "\n".join(lines)
    lines += [
        "",
        "| reward | batches per iteration | rollout | scoring | waited for scores | scoring hidden |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results["overlap"].items():
        seconds = (f"{r[k]:.2f} s" for k in ("rollout", "scoring", "waited"))
        hidden = f"{max(0.0, 1 - r['waited'] / r['scoring']):.0%}"
        lines.append(
            f"| {name.split('/')[0]} | {r['batches']:.0f} | {' | '.join(seconds)} | {hidden} |"
        )
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measure what is not in the file yet; write the tables."""
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
        file.write_text(json.dumps(results, indent=1) + "\n")
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
        between(PAGE, "rewards", tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
