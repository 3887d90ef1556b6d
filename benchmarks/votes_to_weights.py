"""From votes to weights: a scripted voter with a known taste votes, and the embedded model learns it.

The voter prefers large shapes, which no prompt mentions, and errs at random in some of its votes. It sees
pictures only, through the HTTP interface of the page. A head is fitted to its votes; runs train on the
rewards of the quick start and the head, with several weights of the head. Afterwards the voter votes on
held-out pictures of each run before and after training.

python -m benchmarks.votes_to_weights --folder runs/votes
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from benchmarks.training_runs import ROOT, evaluations, run
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt
from flowgrpo.data.votes import read_votes
from flowgrpo.evaluation.vote_statistics import agreement, win_rates
from flowgrpo.shapes.rewards import detections
from flowgrpo.shapes.verifier import detect
from flowgrpo.shapes.world import IMAGE_SIZE
from scripts.page_tables import markdown_table

PROMPTS, SAMPLES = 60, 4
HELD_OUT = 156
CLOSE = 1 / IMAGE_SIZE
"""Differences of size up to one pixel are a tie."""


class Size:
    """The taste: mean of the longer sides of the objects, as a share of the picture; 0 without objects."""

    ignores_prompt = True

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        return torch.tensor([size_of(found) for found in detections(media)])


def size_of(found: Sequence[Any]) -> float:
    """Mean of the longer sides of detected objects, as a share of the picture."""
    sides = [max(d.box[2] - d.box[0], d.box[3] - d.box[1]) for d in found]
    return sum(sides) / len(sides) / IMAGE_SIZE if sides else 0.0


def vote(folder: Path, sources: Sequence[str], voters: Sequence[str], error: float) -> int:
    """Run ``flowgrpo vote``, and vote through its page until all pairs are done.

    Args:
        folder: The folder of the votes.
        sources: Arguments of the command.
        voters: Names of the voters.
        error: Share of votes for the picture that the voter does not prefer.

    Returns:
        The number of votes cast now.
    """
    command = [sys.executable, "-m", "flowgrpo", "vote", *sources, "--out", str(folder)]
    command += ["--port", "0", "--no-browser"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            address = next(line.split()[-1] for line in process.stdout if "http://" in line)
            return sum(_all(address, voter, error, seed) for seed, voter in enumerate(voters))
        finally:
            process.terminate()


def _all(address: str, voter: str, error: float, seed: int) -> int:
    random, cast = np.random.default_rng(seed), 0
    query = f"?voter={urllib.parse.quote(voter)}"
    state = json.loads(_get(f"{address}state{query}"))
    while state["pair"] is not None:
        left, right = (
            _size(_get(f"{address}picture/{state['pair']}/{s}{query}")) for s in ("left", "right")
        )
        choice = "left" if left > right else "right"
        if random.random() < error:
            choice = "right" if choice == "left" else "left"
        if abs(left - right) <= CLOSE:
            choice = "tie"
        body = {"voter": voter, "pair": state["pair"], "choice": choice}
        request = urllib.request.Request(f"{address}vote", strict_json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            state = json.load(answer)
        cast += 1
    return cast


def _get(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as answer:
        found: bytes = answer.read()
        return found


def _size(png: bytes) -> float:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32) / 255
    return size_of(detect(pixels))


def flowgrpo(*arguments: str) -> str:
    """Run a command; returns what it prints."""
    command = [sys.executable, "-m", "flowgrpo", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def change(folder: Path, reward: str, factor: float) -> str:
    """A held-out score before and after training, and the 95 % interval of the paired difference."""
    both = [evaluations(folder)[i]["per_image"]["scores"][reward] for i in (0, -1)]
    before, after = (factor * np.array(scores, float) for scores in both)
    half = 1.96 * (after - before).std(ddof=1) / len(before) ** 0.5
    difference = (after - before).mean()
    return f"{before.mean():.1f} → {after.mean():.1f} ({difference:+.1f} ± {half:.1f})"


def main() -> None:
    """Do all parts; those that are done already are not repeated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/votes"))
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--error", type=float, default=0.1)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.0], help="of the head")
    parser.add_argument("--groups", type=int, default=6, help="prompts of an iteration")
    options = parser.parse_args()
    folder, began = options.folder, time.time()
    folder.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "prompts" / "shapes_train.jsonl").read_text().splitlines()
    chosen = lines[:: max(1, len(lines) // PROMPTS)][:PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(chosen) + "\n")
    if not (folder / "samples").is_dir():
        sampling = ["--samples", str(SAMPLES), "--steps", "8", "--guidance", "1"]
        flowgrpo("sample", "shapes", str(folder / "prompts.jsonl"), "--out", str(folder / "samples"), *sampling)  # fmt: skip
    votes, head = folder / "ballot", folder / "head.safetensors"
    vote(votes, [str(folder / "samples")], ["first", "second"], options.error)
    print(flowgrpo("learn-reward", str(votes), "--features", "embedded", "--out", str(head)))
    found = agreement(read_votes(votes)[1])
    print(f"agreement of the two voters: {found}")
    size = 'name = "size", model = "benchmarks.votes_to_weights:Size", weight = 0.0'
    quick = '{name = "strict", model = "flowgrpo.shapes.rewards:Strict", weight = 0.25}, {name = "graded", model = "flowgrpo.shapes.rewards:Graded", weight = 0.75}'
    learned = (
        f'{{name = "votes", model = "vote_head", weight = WEIGHT, options = {{file = "{head}"}}}}'
    )
    common = [f"train.groups={options.groups}", f"train.rollout_batch={16 * options.groups}", f"train.iterations={options.iterations}", f"evaluation.every={options.iterations}", "evaluation.images=240", "evaluation.regimes=[]", "evaluation.inspected_prompts=0"]  # fmt: skip
    rows = []
    for weight in options.weights:
        name, rewards = f"{weight:g}", f"{quick}, {learned.replace('WEIGHT', str(weight))}"
        place = folder / f"run_{name}"
        run(
            "quickstart_flow_grpo",
            place,
            [*common, f"rewards=[{rewards if weight else quick}, {{{size}}}]"],
        )
        vote(folder / f"after_{name}", [str(place), "--images", str(HELD_OUT)], ["first"], 0.0)
        (rate,) = win_rates(*read_votes(folder / f"after_{name}"))
        rows.append(
            [
                name,
                f"{100 * rate.share:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})",
                change(place, "size", IMAGE_SIZE),
                change(place, "strict", 100),
            ]
        )
    head_line = [
        "weight of the head",
        "trained picture preferred, %",
        "mean size, pixels",
        "strict, %",
    ]
    print(markdown_table(head_line, rows))
    print(f"{(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
