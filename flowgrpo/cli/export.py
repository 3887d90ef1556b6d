"""``flowgrpo export``."""

import argparse
from pathlib import Path

from flowgrpo.cli.common import add_weights_argument, load_run, quiet

SUMMARY = "write a run's weights in another format"
EXAMPLE = "flowgrpo export runs/quickstart --format merged --out model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", help="run directory")
    parser.add_argument(
        "--format",
        choices=("diffusers", "kohya", "merged"),
        help="an adapter for diffusers, or for ComfyUI and similar programs; or a whole pipeline with the "
        "adapter added to its weights (default: an adapter for diffusers, or the whole pipeline where "
        "all weights were trained)",
    )
    parser.add_argument("--out", required=True, help="new or empty folder")
    add_weights_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Load the run's weights and write them."""
    from flowgrpo.policy import Full, InitialNoise
    from flowgrpo.policy import export as formats

    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    quiet()
    policy, iteration = load_run(Path(options.run), options.weights)
    assert policy.trainable is not None
    pipeline, trainable = policy.stock_pipeline(), policy.trainable
    if isinstance(trainable, InitialNoise):
        if options.format not in (None, "diffusers"):
            raise ValueError(
                f"--format {options.format} is for weights; this run trained the initial noise, which "
                "is written without --format"
            )
        print(f"{trainable.export(out)} (noise, after {iteration} iterations)")
        return 0
    whole = isinstance(trainable.weights, Full)
    kind = options.format or ("merged" if whole else "diffusers")
    if kind == "kohya":
        place = formats.export_kohya(trainable, out)
    elif kind == "merged":
        place = formats.export_merged(pipeline, trainable, out)
    else:
        place = formats.export_diffusers(pipeline, trainable, out)
    print(f"{place} ({kind}, after {iteration} iterations)")
    return 0
