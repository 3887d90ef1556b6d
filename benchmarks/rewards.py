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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

import flowgrpo
from flowgrpo import observer
from flowgrpo.commands import quiet
from flowgrpo.experience import LearningReward, Prompt
from flowgrpo.judge import Judge, Scores
from flowgrpo.rewards import Reward, load_reward
from reward_models.hpsv2 import HPSv2
from reward_models.remote import Remote
from tests import zoo
from tests.tiny.parts import clip_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "rewards.md"
START, END = "<!-- rewards: begin -->", "<!-- rewards: end -->"
SIZE, VIDEO_SIZE, FRAMES = 256, 64, 8
PRECISIONS = ("float32", "bfloat16")
PROMPT = Prompt('a sign that says "hi"', metadata={
    "reference": "reference.png", "fps": 8.0,
    "tag": "single_object", "include": [{"class": "bench", "count": 1}],
})  # fmt: skip

SAMPLES, BATCHES = 96, (96, 16)
"""Samples of an iteration, and how many of them are drawn at a time."""


class TinyHPSv2(HPSv2):
    """HPS v2.1 with the tiny architecture, which open_clip knows only after this."""

    def __init__(self, model: str, **options: Any):
        open_clip.add_model_config(Path(model))
        super().__init__(model, architecture=zoo.TINY_HPS, **options)


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


@dataclass(frozen=True)
class Case:
    """One reward to measure.

    Attributes:
        model: As a configuration names it.
        options: For its class.
        number: Media in a batch.
        video: Whether they are videos.
        precisions: In which it runs; none for rewards without a model.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    number: int = 16
    video: bool = False
    precisions: Sequence[str] = PRECISIONS


Make = Callable[[Path], Case]


# Folders at tiny size, as the tests make them.
def tiny_pick_score(folder: Path) -> Case:
    """A CLIP model with its processor."""
    zoo.save_clip(folder)
    return Case("pick_score", {"model": str(folder), "processor": clip_processor(folder, 32)})


def clip_processor(folder: Path, side: int) -> str:
    """CLIP's processor for a folder."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    CLIPProcessor(images, clip_tokenizer()).save_pretrained(folder)
    return str(folder)


def tiny_hpsv2(folder: Path) -> Case:
    """HPS v2.1."""
    with zoo.hps_folder(folder):
        return Case("benchmarks.rewards:TinyHPSv2", {"model": str(folder)})


def tiny_geneval(folder: Path) -> Case:
    """A detector, which sees 800x800 pixels at any size of the model, and a CLIP for colours."""
    for part in ("detector", "clip"):
        (folder / part).mkdir()
    detector = str(zoo.save_mask2former(folder / "detector"))
    clip = f"local-dir:{zoo.save_open_clip(folder / 'clip')}"
    return Case("geneval", {"detector": detector, "color_model": clip}, 4)


def with_reference(folder: Path) -> str:
    """The folder with a reference image."""
    zoo.pil(zoo.noise(1, SIZE, SIZE))[0].save(folder / "reference.png")
    return str(folder)


def tiny_hpsv3(folder: Path) -> Case:
    """A Qwen2-VL with a head."""
    base = zoo.save_qwen2_vl(folder / "base")
    save_file(zoo.hpsv3_state(base), folder / "HPSv3.safetensors")
    return Case("hpsv3", {"model": str(folder), "base": str(base)}, 8)


def tiny_video_align(folder: Path) -> Case:
    """A Qwen2-VL with LoRAs and a head."""
    base = zoo.save_qwen2_vl(folder / "base")
    torch.save(zoo.video_align_state(base), folder / "model.pth")
    return Case("video_align", {"model": str(folder), "base": str(base)}, 4, video=True)


def answering(name: str, video: bool) -> Make:
    """A Qwen2.5-VL that says 16 tokens. They mean nothing, so that there is no score: only time."""

    def make(folder: Path) -> Case:
        model = str(zoo.save_qwen25_vl(folder, []))
        return Case(name, {"model": model, "max_new_tokens": 16}, 4, video)

    return make


def frames(folder: Path) -> Case:
    """CLIPScore over the frames of videos."""
    inner = {"model": f"local-dir:{zoo.save_open_clip(folder)}"}
    options = {"model": "clip_score", "options": inner}
    return Case("flowgrpo.frames:FrameScore", options, 4, video=True, precisions=())


TINY: Mapping[str, Make] = {
    "clip_score": lambda f: Case("clip_score", {"model": f"local-dir:{zoo.save_open_clip(f)}"}),
    "pick_score": tiny_pick_score,
    "hpsv2": tiny_hpsv2,
    "hpsv3": tiny_hpsv3,
    "image_reward": lambda f: Case(
        "image_reward", {"model": str(zoo.save_image_reward(f)), "tokenizer": str(f)}
    ),
    "aesthetic": lambda f: Case("aesthetic", {"model": str(zoo.save_aesthetic(f)), "head": str(f)}),
    "unified_reward": answering("unified_reward", video=False),
    "dino": lambda f: Case("dino", {"model": str(zoo.save_dino(f)), "root": with_reference(f)}),
    "adversarial": lambda f: Case(
        "adversarial", {"model": str(zoo.save_dino(f)), "root": with_reference(f), "side": 28}
    ),
    "geneval": tiny_geneval,
    "ocr": lambda _: Case("ocr", {"threads": 1}, 4, precisions=()),
    "jpeg_size": lambda _: Case("jpeg_size", precisions=()),
    "FrameScore of clip_score": frames,
    "video_align": tiny_video_align,
    "video_score2": answering("video_score2", video=True),
    "motion": lambda _: Case("motion", video=True, precisions=()),
    "consistency": lambda _: Case("consistency", video=True, precisions=()),
}


# Real configurations with random weights. What is built on Qwen-VL has no row: its vocabulary comes
# with a tokenizer from the hub.
def open_clip_file(folder: Path, name: str) -> str:
    """Random weights of one of open_clip's architectures."""
    torch.save(open_clip.create_model(name).state_dict(), folder / "HPS_v2.1_compressed.pt")
    return str(folder / "HPS_v2.1_compressed.pt")


def clip_model(folder: Path, text: Mapping[str, int], vision: Mapping[str, int], to: int) -> str:
    """Random weights of a ``CLIPModel`` that sees 224x224 pixels."""
    tokenizer = clip_tokenizer()
    ids = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    config = CLIPConfig(text_config={**text, **ids}, vision_config={**vision}, projection_dim=to)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def sizes(width: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    """Of a transformer whose inner width is four times the outer one."""
    inner = {"hidden_size": width, "intermediate_size": 4 * width}
    return inner | {"num_hidden_layers": layers, "num_attention_heads": heads} | more


def real_pick_score(folder: Path) -> Case:
    """ViT-H/14, 986 million weights."""
    model = clip_model(folder, sizes(1024, 24, 16), sizes(1280, 32, 16, patch_size=14), 1024)
    return Case("pick_score", {"model": model, "processor": clip_processor(folder, 224)})


def real_aesthetic(folder: Path) -> Case:
    """ViT-L/14 and the head of 768-1024-128-64-16-1."""
    model = clip_model(folder, sizes(768, 12, 12), sizes(1024, 24, 16, patch_size=14), 768)
    widths, state = (768, 1024, 128, 64, 16, 1), {}
    for n, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{n}.weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        state[f"layers.{n}.bias"] = torch.zeros(outputs)
    torch.save(state, folder / "aesthetic-model.pth")
    return Case("aesthetic", {"model": model, "head": model})


def real_dino(folder: Path) -> str:
    """DINOv2 base."""
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).save_pretrained(folder)
    return str(folder)


REAL: Mapping[str, Make] = {
    "clip_score": lambda f: Case(
        "clip_score", {"model": "ViT-L-14", "pretrained": open_clip_file(f, "ViT-L-14")}
    ),
    "pick_score": real_pick_score,
    "hpsv2": lambda f: Case("hpsv2", {"model": open_clip_file(f, "ViT-H-14")}),
    "aesthetic": real_aesthetic,
    "dino": lambda f: Case("dino", {"model": real_dino(f), "root": with_reference(f)}),
    "adversarial": lambda f: Case(
        "adversarial", {"model": real_dino(f), "root": with_reference(f)}
    ),
    "ocr": TINY["ocr"],
    "jpeg_size": TINY["jpeg_size"],
}


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


class Watch(Judge):
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
    observer.Judge = Watch  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        model = f"benchmarks.rewards:{kind}"
        settings = [
            f"rewards=[{{model='{model}', options={{{option}={cost}}}}}]",
            f"run.folder={folder}/run", f"train.iterations={iterations}", "train.groups=6",
            "train.train_batch=48", f"train.rollout_batch={batch}", "evaluation.every=0",
            "evaluation.images=6", "evaluation.measures=[]", "evaluation.grid_prompts=2",
            "evaluation.grid_samples=1", "failures.probe=off", "run.checkpoint_every=100",
        ]  # fmt: skip
        flowgrpo.train(flowgrpo.load("quickstart", settings))
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    observer.Judge = Judge  # type: ignore[misc]
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
        write(PAGE, results)
    print(tables(results))


def write(page: Path, results: Mapping[str, Any]) -> None:
    """Put the tables between the markers of a page. Raises ValueError if it has none."""
    before, start, rest = page.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{page} has no {START} ... {END}")
    page.write_text(f"{before}{start}\n{tables(results)}\n{end}{after}")


if __name__ == "__main__":
    main()
