"""``flowgrpo verify``."""

import argparse
import tempfile
from pathlib import Path

from flowgrpo.cli.common import CONFIG_HELP, UsageError, quiet

SUMMARY = "show that a recipe works: run the next level of evidence on this machine"
EXAMPLE = "flowgrpo verify sd35_medium_ocr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument(
        "--level",
        choices=("tiny", "device", "rises"),
        help="tiny: one iteration on tiny parts of the model's classes, on the CPU; device: one iteration "
        "at real size on a device, with random weights (the disk must hold them); rises: the recipe on "
        "the model's weights, whose reward must rise (default: the level above the recorded one)",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="iterations of the level rises, at least 8 (default: 40)",
    )
    parser.add_argument("--device", default="auto", help="device of the levels device and rises")
    parser.add_argument(
        "--folder", metavar="DIR", help="new folder for the model and the run, which is kept (default: a temporary one)"
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="file for the result (default: RECIPE.LEVEL.json)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Verify the recipe, print the checks and write the result. Fails if a check fails."""
    from flowgrpo.config.evidence import LEVELS, evidence, next_level
    from flowgrpo.config.files import find

    name = find(options.config).stem
    level = options.level or next_level(evidence(name))
    iterations = 40 if options.iterations is None else options.iterations
    if options.iterations is not None and level != "rises":
        raise UsageError(f"--iterations is for the level rises, and this verifies {level}")
    if iterations < 8:
        raise UsageError(f"--iterations must be at least 8 to see a rise, got {iterations}")
    out = Path(options.out or f"{name}.{level}.json")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}")
    if options.folder and Path(options.folder).exists():
        raise UsageError(f"--folder: {options.folder} exists; name a new folder")
    quiet()
    from flowgrpo.doctor.verify import verify

    print(f"{name}: verifying that it {LEVELS[level]}" if level != "rises" else f"{name}: verifying that {LEVELS[level]}")  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        record = verify(options.config, level, folder, iterations=iterations, device=options.device)
    for text in record.replaced:
        print(f"replaced: {text}")
    for check in record.checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name} {check.value:.4g} (must be {check.required})")  # fmt: skip
    out.write_text(record.to_json(), encoding="utf-8")
    print(f"result: {out}; to contribute it, put it into configs/evidence in a pull request")
    return 0 if record.passed else 1
