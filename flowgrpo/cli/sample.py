"""``flowgrpo sample``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flowgrpo.cli.common import (
    CHECKPOINT_HELP,
    UsageError,
    add_model_arguments,
    checkpoint_or_base,
    is_run,
    load_policy,
    prompts_of,
    quiet,
)
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.data.audio import Audio

SUMMARY = "generate images or videos of prompts with the deterministic sampler"
EXAMPLE = 'flowgrpo sample shapes "a photo of two circles" --out images'
STEPS = 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser, STEPS)
    parser.add_argument(
        "prompts",
        nargs="+",
        help="prompts, prompt files (.txt, .jsonl, .csv, .parquet), or datasets (hf:owner/name:split)",
    )
    parser.add_argument(
        "--out",
        required=True,
        help="new or empty folder for {prompt number}_{sample number}.png, or .mp4, and index.jsonl",
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="images per prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=int,
        help="images in one call of the pipeline (default: 16; of a run: train.rollout_batch)",
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="frames per second of videos (default: as in the pipeline's call, else 16)",
    )
    parser.add_argument(
        "--checkpoint",
        "--weights",
        dest="weights",
        type=checkpoint_or_base,
        metavar="NAME",
        help=CHECKPOINT_HELP,
    )
    parser.add_argument(
        "--base-after",
        type=float,
        metavar="X",
        help="of a run: the model before training takes the steps after this share of them (below 1) or this "
        "number of steps",
    )
    parser.epilog = (
        f"{parser.epilog}\n\nA run directory is sampled as in the run's evaluations: its steps, guidance, size,\n"
        "call, device and dtype, where no option changes them."
    )


def run(options: argparse.Namespace) -> int:
    """Draw the images, and write an index of them for ``flowgrpo score``."""
    from flowgrpo.core.random import Random, SampleNoise
    from flowgrpo.data.videos import frames_per_second, require_video
    from flowgrpo.training.console import Console

    if options.samples < 1:
        raise UsageError(f"--samples must be at least 1, got {options.samples}")
    if options.fps is not None and not options.fps > 0:
        raise UsageError(f"--fps must be above 0, got {options.fps:g}")
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is not an empty folder; choose another one")
    if options.base_after is not None and not is_run(options.model):
        raise UsageError(f"--base-after is for a run directory, and {options.model} is none")
    prompts = prompts_of(options.prompts)
    quiet()
    policy = load_policy(options, STEPS)
    if policy.makes_videos:
        require_video()
    elif options.fps is not None:
        name = type(policy.pipeline).__name__
        raise UsageError(f"--fps is for videos, and {name} makes images")
    fps = options.fps or frames_per_second(policy.sampling.call)
    owners = [(i, s) for i in range(len(prompts)) for s in range(options.samples)]
    noise = SampleNoise([Random(options.seed).at("sample", i, s) for i, s in owners])
    out.mkdir(parents=True, exist_ok=True)
    console, records, broken = Console(), [], []
    rollouts = policy.run([prompts[i] for i, _ in owners], noise)
    for rollout in console.track(rollouts, "sampling", total=-(-len(owners) // policy.batch_size)):
        assert rollout.media is not None
        for place, (row, media) in enumerate(zip(rollout.rows, rollout.media, strict=True)):
            audio = rollout.audio[place : place + 1] if rollout.audio else None
            i, s = owners[row]
            name, prompt = f"{i:05d}_{s}{'.mp4' if media.ndim == 4 else '.png'}", prompts[i]
            if not bool(media.isfinite().all() and (audio is None or audio.is_finite.all())):
                broken.append(name)
                continue
            _save(media, out / name, fps, audio)
            record = {"file": name, "prompt": prompt.text, "metadata": dict(prompt.metadata)}
            records.append(record | {"noise_seed": noise.seeds()[row]})
    (out / "index.jsonl").write_text("".join(strict_json.dumps(r) + "\n" for r in records), "utf-8")
    made = counted(len(records), "video" if policy.makes_videos else "image")
    console.say(f"{made} in {out}")
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        advice = "" if policy.dtype.itemsize == 4 else ", or try --dtype float32"
        raise RuntimeError(
            f"{len(broken)} of {len(owners)} are NaN or infinite and were not written: "
            f"{', '.join(broken[:3])}{more}. The weights are damaged or overflow in {str(policy.dtype)[6:]}; "
            f"run 'flowgrpo doctor' on the model{advice}"
        )
    return 0


def _save(media: "Tensor", path: Path, fps: float, audio: "Audio | None") -> None:
    """Write an image as PNG, a video as MP4 with its sound."""
    from flowgrpo.data.pictures import picture_of
    from flowgrpo.data.videos import write_video

    if media.ndim == 4:
        write_video(path, media, fps, audio)
    else:
        picture_of(media).save(path)
