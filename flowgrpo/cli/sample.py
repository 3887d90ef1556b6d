"""``flowgrpo sample``."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from flowgrpo.cli.common import UsageError, add_model_arguments, load_policy, prompts_of, quiet

if TYPE_CHECKING:
    from torch import Tensor

SUMMARY = "generate images of prompts with the deterministic sampler"
EXAMPLE = 'flowgrpo sample shapes "a photo of two circles" --out images'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser)
    parser.add_argument(
        "prompts",
        nargs="+",
        help="prompts, prompt files (.txt, .jsonl, .csv, .parquet), or datasets (hf:owner/name:split)",
    )
    parser.add_argument(
        "--out",
        required=True,
        help="folder for the images, as {prompt number}_{sample number}.png, and index.jsonl",
    )
    parser.add_argument(
        "--samples", type=int, default=4, help="images per prompt (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Draw the images, and write an index of them for ``flowgrpo score``."""
    from flowgrpo.core.random import Random, SampleNoise
    from flowgrpo.training.console import Console

    if options.samples < 1:
        raise UsageError(f"--samples must be at least 1, got {options.samples}")
    prompts = prompts_of(options.prompts)
    quiet()
    policy = load_policy(options, steps=28)
    owners = [(i, s) for i in range(len(prompts)) for s in range(options.samples)]
    noise = SampleNoise([Random(options.seed).at("sample", i, s) for i, s in owners])
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    console, records = Console(), []
    rollouts = policy.run([prompts[i] for i, _ in owners], noise)
    for rollout in console.track(rollouts, "sampling", total=-(-len(owners) // options.batch)):
        assert rollout.media is not None
        for row, media in zip(rollout.rows, rollout.media, strict=True):
            i, s = owners[row]
            name = f"{i:05d}_{s}.png"
            _save(media, out / name)
            prompt = prompts[i]
            records.append({"file": name, "prompt": prompt.text, "metadata": dict(prompt.metadata)})
    (out / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    console.say(f"{len(records)} images in {out}")
    return 0


def _save(media: "Tensor", path: Path) -> None:
    """Write an image as PNG, a video as one PNG per frame."""
    from torchvision.transforms.functional import to_pil_image

    if media.ndim == 4:
        for i, frame in enumerate(media):
            to_pil_image(frame).save(path.with_stem(f"{path.stem}_frame{i:03d}"))
    else:
        to_pil_image(media).save(path)
