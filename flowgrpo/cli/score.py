"""``flowgrpo score``."""

import argparse
import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import UsageError, parse_setting, quiet, read_image

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.data.prompts import Prompt
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward

SUMMARY = "score images or videos with reward models"
EXAMPLE = (
    "flowgrpo score images --reward jpeg_size --reward-option jpeg_size.quality=80 --out scores.csv"
)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "images",
        help="folder of images, or of videos as folders of frames (or NAME_frame000.png, ...); with "
        "index.jsonl as 'sample' writes it, prompts are known",
    )
    parser.add_argument(
        "--reward",
        required=True,
        action="append",
        metavar="[NAME=]MODEL",
        help="name in reward_models or import path; can be given again, the same one too under "
        "another NAME",
    )
    parser.add_argument(
        "--reward-option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="an option of one of the rewards, by the name in its column; can be given again",
    )
    parser.add_argument(
        "--prompts", help="file of prompts, one for each image in the order of file names"
    )
    parser.add_argument("--out", help="file for a table (.jsonl or .csv)")
    parser.add_argument(
        "--batch", type=int, default=32, help="images scored at a time (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Score the images and write the table. Fails if a reward gave no score at all."""
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Failures
    from flowgrpo.training.console import Console

    writers = {".jsonl": _write_jsonl, ".csv": _write_csv}
    out = Path(options.out) if options.out else None
    if out is not None and out.suffix not in writers:
        raise UsageError(f"--out must end in {' or '.join(writers)}, got {options.out!r}")
    if options.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {options.batch}")
    media = find_media(Path(options.images))
    quiet()
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


def named_rewards(names: Sequence[str], settings: Sequence[str]) -> "list[Reward]":
    """Rewards with the options that ``name.key=value`` settings give them.

    Raises:
        UsageError: If a setting names none of them.
    """
    from flowgrpo.core.imports import suggest

    named = [_named(n) for n in names]
    options: dict[str, dict[str, Any]] = {r.label: {} for r in named}
    for setting in settings:
        key, value = parse_setting(setting, "--reward-option")
        name, dot, option = key.rpartition(".")
        if not dot or name not in options:
            known = ", ".join(options)
            raise UsageError(
                f"--reward-option {setting!r}: expected NAME.KEY=VALUE with the name of a --reward "
                f"({known}){suggest(name, options)}"
            )
        options[name][option] = value
    return [replace(r, options=options[r.label]) for r in named]


def _named(text: str) -> "Reward":
    """The reward of ``MODEL`` or ``NAME=MODEL``."""
    from flowgrpo.config.renamed import old_names
    from flowgrpo.rewards.settings import Reward

    name, equals, model = text.rpartition("=")
    if equals and (not name or not model):
        raise UsageError(f"--reward {text!r}: expected MODEL or NAME=MODEL")
    for _, message in old_names({"model": model}):
        raise UsageError(f"--reward {text!r}: {message}")
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
        ValueError: If a file is not an image, or frames differ in size.
    """
    import torch

    frames = [read_image(f) for f in medium.files]
    if len({f.shape for f in frames}) != 1:
        raise ValueError(f"the frames of {medium.name} differ in size")
    return torch.stack(frames) if medium.is_video else frames[0]


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
