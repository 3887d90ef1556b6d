"""``flowgrpo doctor``."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import (
    UsageError,
    add_model_arguments,
    device_of,
    is_run,
    quiet,
    run_config,
    sampling_of,
    source_of,
)
from flowgrpo.data import strict_json

if TYPE_CHECKING:
    from PIL.Image import Image

SUMMARY = "check that a model can be trained"
EXAMPLE = "flowgrpo doctor stabilityai/stable-diffusion-3.5-medium --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_model_arguments(parser, steps=4)
    parser.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA")
    parser.add_argument(
        "--clip-range",
        type=float,
        default=1e-4,
        help="compared with the numerical noise of ratios (default: %(default)s)",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="condition image for editing and image-to-video (default: a generated gradient if the call needs an image)",
    )
    parser.add_argument("--json", metavar="FILE", help="file for the result")


def run(options: argparse.Namespace) -> int:
    """Examine the model and print the checks. Fails if a check fails."""
    from flowgrpo.doctor import Settings, examine, show
    from flowgrpo.policy import Full
    from flowgrpo.training.console import Console

    if is_run(options.model):
        path = run_config(Path(options.model)).model.path
        raise UsageError(
            f"{options.model} is a run directory; check its model: flowgrpo doctor {path}"
        )
    quiet()
    sampling = sampling_of(options, 4)
    if options.image:
        sampling = replace(sampling, call=sampling.call | {"image": _open(options.image)})
    settings = Settings(
        sampling=sampling,
        weights=Full() if options.full else None,
        dtype=options.dtype or "float32",
        device=device_of(options.device or "auto"),
        clip_range=options.clip_range,
    )
    try:
        diagnosis = examine(source_of(options), settings)
    except ValueError as error:
        _write_json(options.json, {"model": options.model, "passed": False, "refused": str(error)})
        raise
    show(diagnosis, Console())
    _write_json(options.json, diagnosis.to_json())
    return 0 if diagnosis.passed else 1


def _write_json(file: str | None, table: dict[str, Any]) -> None:
    if file:
        Path(file).write_text(strict_json.dumps(table, indent=1) + "\n")


def _open(file: str) -> "Image":
    """An image in RGB."""
    from PIL import Image

    from flowgrpo.data.pictures import UNREADABLE

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{file} is not an image that can be read") from error
