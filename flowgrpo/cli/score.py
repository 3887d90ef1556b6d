"""``flowgrpo score``."""

import argparse
import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import UsageError, parse_setting, quiet, read_image
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.data.audio import Audio
    from flowgrpo.data.prompts import Prompt
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward
    from flowgrpo.training.console import Console

SUMMARY = "score images or videos with reward models"
EXAMPLE = (
    "flowgrpo score images --reward jpeg_size --reward-option jpeg_size.quality=80 --out scores.csv"
)
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4",)
TASKS = ("tag", "task")
"""Metadata that names the task of a prompt, in GenEval's files and in others."""
FRAME = re.compile(r"(.+)_frame(\d+)")


@dataclass(frozen=True)
class Medium:
    """What is scored: an image, a video file, or a video as its frames in order.

    Attributes:
        name: In tables, and in ``index.jsonl``.
        files: The image, the video file, or the frames.
        is_video: Whether it has a frame axis, if only of one frame.
    """

    name: str
    files: Sequence[Path]
    is_video: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "images",
        help="folder of images or of videos (.mp4, or frames as NAME_frame000.png, ...); with "
        "index.jsonl as 'sample' writes it, prompts are known",
    )
    parser.add_argument(
        "--frames",
        action="store_true",
        help="subfolders are videos, with one image for each frame",
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
        "--prompts",
        help="file of prompts, one for each image in the order of file names as people count: 2 before 10",
    )
    parser.add_argument(
        "--by",
        metavar="KEY",
        help="metadata whose values are the rows of the table (default: tag or task, if prompts have it)",
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
    media = find_media(Path(options.images), options.frames)
    prompts = _prompts_of(media, Path(options.images), options.prompts)
    key = task_key(prompts, options.by)
    quiet()
    scorer = RewardScorer(named_rewards(options.reward, options.reward_option), Failures(retries=0))
    console = Console()
    records: list[dict[str, Any]] = []
    starts = range(0, len(media), options.batch)
    for start in console.track(starts, "scoring", total=len(starts)):
        rows = slice(start, start + options.batch)
        records += _score_batch(scorer, media[rows], prompts[rows])
    scorer.close()
    labels = [r.label for r in scorer.rewards]
    _show(console, records, [str(p.metadata.get(key, "")) for p in prompts], key, labels)
    useless = [k for k in labels if not any(math.isfinite(r[k]) for r in records)]
    if out is not None:
        writers[out.suffix](out, records)
    return int(bool(useless))


def task_key(prompts: "Sequence[Prompt]", by: str | None) -> str:
    """The metadata whose values are the rows of the table; empty for none.

    Raises:
        UsageError: If no prompt has the metadata that is asked for.
    """
    from flowgrpo.core.imports import suggest

    known = sorted({k for p in prompts for k in p.metadata})
    if by is None:
        return next((k for k in TASKS if k in known), "")
    if by not in known:
        there = f"the prompts have {', '.join(known)}" if known else "the prompts have no metadata"
        raise UsageError(f"--by {by}: {there}{suggest(by, known)}")
    return by


def _show(
    console: "Console",
    records: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    key: str,
    labels: Sequence[str],
) -> None:
    """Print means with standard errors, by task and over all, and how many scores failed."""
    names = sorted(set(tasks), key=natural) if key else []
    rows = []
    for name in [*names, None]:
        own = [r for r, t in zip(records, tasks, strict=True) if name is None or t == name]
        cells = [_mean_and_error([(r["prompt"], r[k]) for r in own]) for k in labels]
        rows.append(["all" if name is None else name or f"(no {key})", str(len(own)), *cells])
    console.table(
        "mean ± standard error",
        [key or "task", "images", *labels],
        rows,
    )
    for label in labels:
        failed = [r["file"] for r in records if not math.isfinite(r[label])]
        if failed:
            first = f", first {failed[0]}"
            console.say(f"{label}: failed {len(failed)} of {len(records)}{first}")


def _mean_and_error(values: Sequence[tuple[str, float]]) -> str:
    """The mean of finite scores with its standard error, in words.

    Samples of one prompt are a cluster: the squared error is the sum over prompts of the squared sum of
    deviations, over the squared number of samples. With one sample per prompt it is the usual one.

    Args:
        values: Prompt and score of each image.
    """
    finite = [(p, v) for p, v in values if math.isfinite(v)]
    if not finite:
        return "none"
    mean = sum(v for _, v in finite) / len(finite)
    clusters: dict[str, float] = {}
    for index, (prompt, value) in enumerate(finite):
        # Without a text, nothing says which images have one prompt.
        cluster = prompt or str(index)
        clusters[cluster] = clusters.get(cluster, 0.0) + value - mean
    if len(clusters) < 2:
        return f"{mean:.4f}"
    error = math.sqrt(sum(v * v for v in clusters.values())) / len(finite)
    return f"{mean:.4f} ± {error:.4f}"


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


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as people count: ``2.png`` before ``10.png``."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p.casefold()) for p in parts]


def find_media(folder: Path, frames: bool = False) -> list[Medium]:
    """The images or videos of a folder, in natural order of their names.

    Args:
        folder: Has images; or video files, or frames as ``NAME_frame000.png``.
        frames: Whether subfolders are videos, with one image for each frame.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is nothing to score, images and videos are mixed, subfolders with images may
            be videos or not, or two names have no order.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = _files_in(folder, IMAGES)
    parts: dict[str, list[Path]] = {}
    for file in files:
        match = FRAME.fullmatch(file.stem)
        if match:
            parts.setdefault(match[1] + file.suffix, []).append(file)
    images = [Medium(f.name, [f], False) for f in files if not FRAME.fullmatch(f.stem)]
    videos = [Medium(f.name, [f], True) for f in _files_in(folder, VIDEOS)]
    inner = [p for p in folder.iterdir() if p.is_dir() and _files_in(p, IMAGES)]
    if inner and not frames:
        raise ValueError(
            f"{folder} has subfolders with images, such as {min(inner).name}: with --frames each is a "
            "video of its images; otherwise score each subfolder by itself"
        )
    parts |= {p.name: _files_in(p, IMAGES) for p in inner}
    videos += [Medium(name, found, True) for name, found in parts.items()]
    if images and videos:
        raise ValueError(
            f"{folder} has images ({images[0].name}, ...) and videos ({videos[0].name}, ...); "
            "score them apart"
        )
    found = sorted([*images, *videos], key=lambda m: natural(m.name))
    if not found:
        raise ValueError(
            f"{folder} has no images ({', '.join(IMAGES)}), no videos ({', '.join(VIDEOS)}) and no frames"
        )
    _check_order(folder, [m.name for m in found])
    for medium in found:
        _check_order(folder, [f.name for f in medium.files])
    return found


def _check_order(folder: Path, names: Sequence[str]) -> None:
    """Raise ValueError if two neighbours have one place, such as ``1.png`` and ``01.png`` or ``1.jpg``."""
    for one, two in pairwise(names):
        if natural(Path(one).stem) == natural(Path(two).stem):
            raise ValueError(
                f"{folder}: {one} and {two} have the same name or number, so which comes first is unclear; "
                "rename one"
            )


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files with one of the suffixes, in natural order."""
    found = [f for f in folder.iterdir() if f.suffix.lower() in suffixes and f.is_file()]
    # Files whose names begin with a dot are unfinished, or a system's.
    return sorted((f for f in found if not f.name.startswith(".")), key=lambda f: natural(f.name))


def read_medium(medium: Medium) -> "Tensor":
    """``(3, H, W)`` or ``(F, 3, H, W)`` in [0, 1].

    Raises:
        ValueError: If a file is not an image, or frames differ in size.
    """
    import torch

    from flowgrpo.data.videos import read_video

    if medium.files[0].suffix.lower() in VIDEOS:
        return read_video(medium.files[0])
    frames = [read_image(f) for f in medium.files]
    if len({f.shape for f in frames}) != 1:
        raise ValueError(f"the frames of {medium.name} differ in size")
    return torch.stack(frames) if medium.is_video else frames[0]


def read_sound(medium: Medium) -> "Audio":
    """The sound of an MP4 file.

    Raises:
        ValueError: If a medium has none.
    """
    from flowgrpo.data.videos import read_audio

    is_video = medium.files[0].suffix.lower() in VIDEOS
    audio = read_audio(medium.files[0]) if is_video else None
    if audio is None:
        raise ValueError(
            f"{medium.name} has no sound, which a reward needs; give MP4 files with sound, such as those of "
            "'flowgrpo sample' with LTX-2"
        )
    return audio


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
                f"{prompt_file} has {counted(len(prompts), 'prompt')} for {counted(len(media), 'image')} in {folder}"
            )
        return prompts
    index = folder / "index.jsonl"
    if not index.exists():
        return [Prompt("")] * len(media)
    known: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(index.read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            file, _ = record["file"], (record["prompt"], record["metadata"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}, line {number} is not one of 'flowgrpo sample'") from error
        if known.setdefault(file, record) is not record:
            raise ValueError(f"{index}, line {number}: {file} is there twice; give --prompts")
    names = {m.name for m in media}
    absent = [f for f in known if f not in names]
    if absent:
        raise ValueError(
            f"{index} lists {counted(len(absent), 'file')} not found in {folder}, such as {absent[0]}; restore what is "
            "missing, remove its lines, or give --prompts"
        )
    unknown = [m.name for m in media if m.name not in known]
    if unknown:
        raise ValueError(
            f"{index} does not know {unknown[0]} ({counted(len(unknown), 'image')} in all); give --prompts"
        )
    return [Prompt(known[m.name]["prompt"], metadata=known[m.name]["metadata"]) for m in media]


def _score_batch(
    scorer: "RewardScorer", media: Sequence[Medium], prompts: "Sequence[Prompt]"
) -> list[dict[str, Any]]:
    """A record for each medium. Those of one shape, and with sound of one length, share a call."""
    import torch

    from flowgrpo.data.audio import Audio

    tensors = [read_medium(m) for m in media]
    sounds = [read_sound(m) if scorer.audio_rewards else None for m in media]
    rows_by_shape: dict[Any, list[int]] = {}
    for row, (tensor, sound) in enumerate(zip(tensors, sounds, strict=True)):
        shape = tensor.shape, sound and (sound.waveform.shape, sound.rate)
        rows_by_shape.setdefault(shape, []).append(row)
    records: list[dict[str, Any]] = [
        {"file": m.name, "prompt": p.text} for m, p in zip(media, prompts, strict=True)
    ]
    for rows in rows_by_shape.values():
        stacked, own = torch.stack([tensors[r] for r in rows]), [prompts[r] for r in rows]
        audio = Audio.concatenate([sounds[r] for r in rows])
        raw = scorer.score(stacked, own, audio).raw
        for i, row in enumerate(rows):
            records[row] |= {k: float(v[i]) for k, v in raw.items()}
    return records


def _write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One object per line; failed scores are null, as JSON has no NaN."""
    path.write_text("".join(strict_json.dumps(r) + "\n" for r in records), "utf-8")


def _write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A header and a row for each; failed scores are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(strict_json.finite(r) for r in records)
