"""``flowgrpo export``."""

import argparse
import math
from pathlib import Path

from flowgrpo.cli.common import UsageError, add_weights_argument, load_run, quiet, run_config
from flowgrpo.core.text import counted

SUMMARY = "write a run's weights in another format"
EXAMPLE = "flowgrpo export runs/quickstart --format merged --out model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", help="run directory")
    parser.add_argument(
        "--format",
        choices=("diffusers", "comfyui", "kohya", "merged", "checkpoint", "denoiser"),
        help="an adapter for diffusers, for ComfyUI, or for sd-scripts and AUTOMATIC1111; or with the "
        "adapter added to the weights, a pipeline folder (merged), the whole model in one file "
        "(checkpoint), or the denoiser in one file (default: every adapter that exists for the "
        "model, or the whole pipeline if all weights were trained)",
    )
    parser.add_argument("--out", required=True, help="new or empty folder")
    add_weights_argument(parser)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="strength of what was learned: 0 is the model before training, 1 the trained one (default: "
        "%(default)g); an adapter is multiplied by it, weights are interpolated",
    )


def run(options: argparse.Namespace) -> int:
    """Load the run's weights and write them."""
    from flowgrpo.policy import InitialNoise
    from flowgrpo.policy import export as formats

    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another --out")
    if not math.isfinite(options.scale):
        raise UsageError(f"--scale must be a finite number, got {options.scale}")
    quiet()
    scaled = options.scale != 1
    policy, iteration = load_run(Path(options.run), options.weights, with_reference=scaled)
    assert policy.trainable is not None
    pipeline, trainable = policy.stock_pipeline(), policy.trainable
    if isinstance(trainable, InitialNoise) and options.format not in (None, "diffusers"):
        raise UsageError(
            f"--format {options.format} is for weights; this run trained the initial noise, which "
            "is written without --format"
        )
    if isinstance(trainable, InitialNoise) and scaled:
        raise UsageError("--scale is for weights; this run trained the initial noise")
    if scaled and not isinstance(trainable, InitialNoise):
        trainable.scale(options.scale)
    if options.format is None or isinstance(trainable, InitialNoise):
        exported = formats.export(pipeline, trainable, out)
    else:
        write = {
            "diffusers": formats.export_diffusers,
            "comfyui": formats.export_comfyui,
            "kohya": formats.export_kohya,
            "merged": formats.export_merged,
            "checkpoint": formats.export_checkpoint,
            "denoiser": formats.export_denoiser,
        }[options.format]
        exported = write(pipeline, trainable, out)
    strength = f", scaled by {options.scale:g}" if scaled else ""
    print(f"weights after {counted(iteration, 'iteration')}{strength}:")
    print("\n".join(exported.lines()))
    note = formats.base_note(run_config(Path(options.run)).model.source, trainable)
    if note and options.format not in ("merged", "checkpoint", "denoiser"):
        print(note)
    return 0
