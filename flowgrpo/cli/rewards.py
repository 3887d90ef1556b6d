"""The commands about rewards: ``score``, ``serve-reward``, ``learn-rubrics``."""

import argparse
import csv
import json
import logging
import math
import os
import re
import signal
import threading
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.data.prompts import Prompt
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward

DEFAULT_URL = "http://127.0.0.1:8000/v1"
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
FRAME = re.compile(r"(.+)_frame(\d+)")


@dataclass(frozen=True)
class Medium:
    """What is scored: one image, or a video as its frames in order.

    Attributes:
        name: In tables, and in ``index.jsonl``.
        files: The image, or the frames.
        is_video: Whether it has a frame axis, if only of one frame.
    """

    name: str
    files: Sequence[Path]
    is_video: bool


def score(options: argparse.Namespace) -> int:
    """``flowgrpo score``. Fails if a reward gave no score at all."""
    from flowgrpo.cli.commands import quiet
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Failures
    from flowgrpo.training.console import Console

    quiet()
    writers = {".jsonl": _write_jsonl, ".csv": _write_csv}
    out = Path(options.out) if options.out else None
    if out is not None and out.suffix not in writers:
        raise ValueError(f"--out must end in {' or '.join(writers)}, got {options.out!r}")
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    media = find_media(Path(options.images))
    prompts = _prompts_of(media, Path(options.images), options.prompts)
    scorer = RewardScorer(named_rewards(options.reward, options.reward_option), Failures(retries=0))
    console = Console()
    records: list[dict[str, Any]] = []
    starts = range(0, len(media), options.batch)
    for start in console.track(starts, "scoring", total=len(starts)):
        rows = slice(start, start + options.batch)
        records += _score_batch(scorer, media[rows], prompts[rows])
    scorer.close()
    labels = [r.label for r in scorer.rewards]
    shown = records[:20]
    console.table(
        f"{len(records)} images" + (", the first 20" if len(records) > 20 else ""),
        ["image", "prompt", *labels],
        [[r["file"], r["prompt"], *(f"{r[k]:.4f}" for k in labels)] for r in shown],
    )
    useless = False
    for label in labels:
        column = [r[label] for r in records if math.isfinite(r[label])]
        useless = useless or not column
        mean = sum(column) / len(column) if column else math.nan
        failed = len(records) - len(column)
        console.say(f"{label}: mean {mean:.4f}, failed {failed} of {len(records)}")
    if out is not None:
        writers[out.suffix](out, records)
    return int(useless)


def serve_reward(options: argparse.Namespace) -> int:
    """``flowgrpo serve-reward``."""
    from flowgrpo.rewards.loading import load_reward
    from flowgrpo.rewards.protocols import LearningReward
    from flowgrpo.rewards.serving.protocol import Limits
    from flowgrpo.rewards.serving.server import RewardServer
    from flowgrpo.rewards.settings import Reward

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = Reward(model=options.reward, options=dict(map(parse_setting, options.option)))
    reward = load_reward(settings)
    if isinstance(reward, LearningReward):
        raise ValueError(
            f"reward {settings.label!r} learns during a run, and its state belongs to the run: behind "
            "a server it would stay as it was made; use it in the run's own process"
        )
    server = RewardServer(
        reward,
        name=settings.label,
        host=options.host,
        port=options.port,
        token=options.token or os.environ.get("FLOWGRPO_TOKEN", ""),
        limits=Limits(
            num_bytes=int(options.max_megabytes * 2**20),
            num_images=options.max_images,
            num_pixels=options.max_pixels,
        ),
        max_batch=options.max_batch,
        wait=options.wait,
    )
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    guard = "a token" if server.token else "no token"
    print(f"serving {settings.label} at {server.url} ({guard}); Ctrl-C stops", flush=True)
    stopped.wait()
    server.close()
    return 0


def learn_rubrics(options: argparse.Namespace) -> int:
    """``flowgrpo learn-rubrics``."""
    import numpy as np
    import torch

    from flowgrpo.data.rubrics import Rubric, fit_rubrics, read_rubrics, write_rubrics
    from flowgrpo.rewards.loading import load_reward
    from flowgrpo.rewards.settings import Reward
    from flowgrpo.training.console import Console

    if options.most < 0 or not options.out.endswith(".jsonl"):
        raise ValueError(
            f"--most must be at least 0 and --out end in .jsonl, got {options.most}, {options.out!r}"
        )
    pairs = _pairs(Path(options.pairs))
    candidates = read_rubrics(options.rubrics)
    settings = {"model": options.model, "base_url": options.base_url or DEFAULT_URL}
    settings |= {"rubrics": [c.text for c in candidates]}
    settings |= dict(map(parse_setting, options.judge_option))
    scorer: Any = load_reward(Reward(model="vlm_judge", options=settings))
    console = Console()
    rows = []
    for prompt, files in console.track(pairs, "judging", total=len(pairs)):
        scores = torch.cat([scorer.by_rubric(_read(f)[None], [prompt]) for f in files])
        rows.append((scores[0] - scores[1]).double().numpy())
    differences = np.stack(rows)
    fit = fit_rubrics(differences, most=options.most)
    kept = []
    for i in np.argsort(-fit.weights):
        if fit.weights[i] > 0:
            column = differences[np.isfinite(differences[:, i]), i]
            agreed = ((column > 0) + 0.5 * (column == 0)).mean()
            note = f"alone agrees with {agreed:.0%} of {len(column)} pairs"
            kept.append(Rubric(candidates[i].text, round(float(fit.weights[i]), 4), note))
    write_rubrics(Path(options.out), kept)
    console.table(
        f"{len(kept)} of {len(candidates)} rubrics kept; together they order {fit.accuracy:.0%} of "
        f"held-out pairs as people did ({fit.pairs} of {len(pairs)} pairs could be used)",
        ["rubric", "weight", ""],
        [[r.text, f"{r.weight:.3f}", r.note] for r in kept],
    )
    return 0


def _pairs(path: Path) -> "list[tuple[Prompt, tuple[Path, Path]]]":
    """Prompts with the preferred picture and the other one."""
    from flowgrpo.data.prompts import Prompt

    if not path.is_file():
        raise FileNotFoundError(f"no file of pairs {path}")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, files = record["prompt"], (record["preferred"], record["other"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with prompt, preferred and other"
            ) from error
        first, second = (path.parent / str(f) for f in files)
        for file in (first, second):
            if not file.is_file():
                raise FileNotFoundError(f"{path}, line {number}: no picture {file}")
        pairs.append((Prompt(str(text)), (first, second)))
    return pairs


def parse_setting(text: str) -> tuple[str, Any]:
    """Key and value of ``key=value``; the value is TOML, or else a string.

    Raises:
        ValueError: If there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def named_rewards(names: Sequence[str], settings: Sequence[str]) -> "list[Reward]":
    """Rewards with the options that ``name.key=value`` settings give them.

    Raises:
        ValueError: If a setting names none of them.
    """
    from flowgrpo.core.imports import suggest

    named = [_named(n) for n in names]
    options: dict[str, dict[str, Any]] = {r.label: {} for r in named}
    for setting in settings:
        key, value = parse_setting(setting)
        name, dot, option = key.rpartition(".")
        if not dot or name not in options:
            known = ", ".join(options)
            raise ValueError(
                f"--reward-option {setting!r}: expected NAME.KEY=VALUE with the name of a --reward "
                f"({known}){suggest(name, options)}"
            )
        options[name][option] = value
    return [replace(r, options=options[r.label]) for r in named]


def _named(text: str) -> "Reward":
    """The reward of ``MODEL`` or ``NAME=MODEL``."""
    from flowgrpo.rewards.settings import Reward

    name, equals, model = text.rpartition("=")
    if equals and (not name or not model):
        raise ValueError(f"--reward {text!r}: expected MODEL or NAME=MODEL")
    return Reward(model=model, name=name)


def find_media(folder: Path) -> list[Medium]:
    """The images of a folder by name; or its videos, as folders of frames or ``NAME_frame000.png``.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is nothing to score, or images and videos are mixed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = _images_in(folder)
    videos: dict[str, list[Path]] = {}
    for file in files:
        match = FRAME.fullmatch(file.stem)
        if match:
            videos.setdefault(match[1] + file.suffix, []).append(file)
    images = [f for f in files if not FRAME.fullmatch(f.stem)]
    for inner in sorted(p for p in folder.iterdir() if p.is_dir()):
        frames = _images_in(inner)
        if frames:
            videos[inner.name] = frames
    if images and videos:
        raise ValueError(
            f"{folder} has images ({images[0].name}, ...) and videos ({next(iter(videos))}, ...); "
            "score them apart"
        )
    found = [Medium(f.name, [f], False) for f in images]
    found += [Medium(name, frames, True) for name, frames in sorted(videos.items())]
    if not found:
        raise ValueError(f"{folder} has no images ({', '.join(IMAGES)}) and no folders of them")
    return found


def _images_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES)


def read_medium(medium: Medium) -> "Tensor":
    """``(3, H, W)`` or ``(F, 3, H, W)`` in [0, 1].

    Raises:
        ValueError: If a file is no image, or frames differ in size.
    """
    import torch

    frames = [_read(f) for f in medium.files]
    if len({f.shape for f in frames}) != 1:
        raise ValueError(f"the frames of {medium.name} differ in size")
    return torch.stack(frames) if medium.is_video else frames[0]


def _read(file: Path) -> "Tensor":
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from flowgrpo.data.pictures import as_rgb

    try:
        with Image.open(file) as image:
            return pil_to_tensor(as_rgb(image)).to(torch.float32) / 255
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file} is no image that can be read: {error}") from error


def _prompts_of(
    media: Sequence[Medium], folder: Path, prompt_file: str | None
) -> "Sequence[Prompt]":
    from flowgrpo.config import find
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.data.prompts import Prompt

    if prompt_file is not None:
        prompts = list(PromptSet.load(find(prompt_file)).prompts)
        if len(prompts) != len(media):
            raise ValueError(
                f"{prompt_file} has {len(prompts)} prompts for {len(media)} images in {folder}"
            )
        return prompts
    index = folder / "index.jsonl"
    if not index.exists():
        return [Prompt("")] * len(media)
    known = {r["file"]: r for r in map(json.loads, index.read_text().splitlines())}
    unknown = [m.name for m in media if m.name not in known]
    if unknown:
        raise ValueError(
            f"{index} does not know {unknown[0]} ({len(unknown)} images in all); give --prompts"
        )
    return [Prompt(known[m.name]["prompt"], metadata=known[m.name]["metadata"]) for m in media]


def _score_batch(
    scorer: "RewardScorer", media: Sequence[Medium], prompts: "Sequence[Prompt]"
) -> list[dict[str, Any]]:
    """A record for each medium. Those of one shape share a call."""
    import torch

    tensors = [read_medium(m) for m in media]
    rows_by_shape: dict[torch.Size, list[int]] = {}
    for row, tensor in enumerate(tensors):
        rows_by_shape.setdefault(tensor.shape, []).append(row)
    records: list[dict[str, Any]] = [
        {"file": m.name, "prompt": p.text} for m, p in zip(media, prompts, strict=True)
    ]
    for rows in rows_by_shape.values():
        raw = scorer.score(torch.stack([tensors[r] for r in rows]), [prompts[r] for r in rows]).raw
        for i, row in enumerate(rows):
            records[row] |= {k: float(v[i]) for k, v in raw.items()}
    return records


def _write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One object per line; failed scores are null, as JSON has no NaN."""
    path.write_text("".join(json.dumps(_without_nan(r)) + "\n" for r in records))


def _write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A header and a row for each; failed scores are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(_without_nan(r) for r in records)


def _without_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
