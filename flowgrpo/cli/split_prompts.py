"""``flowgrpo split-prompts``."""

import argparse
from pathlib import Path

from flowgrpo.cli.common import UsageError
from flowgrpo.core.text import counted

SUMMARY = "divide a prompt file into training prompts and held-out prompts"
EXAMPLE = "flowgrpo split-prompts prompts.jsonl --held-out 64 --balance tag"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("file", help="prompt file: .txt, .jsonl or .csv")
    parser.add_argument(
        "--held-out",
        type=int,
        required=True,
        metavar="N",
        help="number of different prompts to hold out; equal prompts are never on both sides",
    )
    parser.add_argument(
        "--balance",
        default="",
        metavar="KEY",
        help="hold out equally many prompts of each value of this metadata key, such as tag",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Write NAME_train and NAME_held_out beside the file, and say what is in them."""
    from flowgrpo.data.prompt_split import split_prompts

    if options.held_out < 1:
        raise UsageError(f"--held-out must be at least 1, got {options.held_out}")
    split = split_prompts(Path(options.file), options.held_out, options.balance, options.seed)
    split.write()
    for file, side in zip(split.files, (0, 1), strict=True):
        number = sum(c[side] for c in split.counts.values())
        classes = ", ".join(f"{c[side]} {value}" for value, c in split.counts.items() if value)
        print(f"{file}  {counted(number, 'prompt')}{f' ({classes})' if classes else ''}")
    return 0
