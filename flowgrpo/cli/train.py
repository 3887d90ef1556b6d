"""``flowgrpo train``."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from flowgrpo.cli.common import CONFIG_HELP, add_set_argument, quiet

if TYPE_CHECKING:
    from flowgrpo.config import Config

SUMMARY = "fine-tune a model, or resume a run"
EXAMPLE = "flowgrpo train quickstart --set run.seed=1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", help=CONFIG_HELP)
    add_set_argument(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without the model, print the plan and the memory "
        "that it takes, stop",
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="N",
        help="with --dry-run: the device's memory to compare with (default: that of the GPU here)",
    )


def run(options: argparse.Namespace) -> int:
    """Check the configuration, then train or print the plan."""
    from flowgrpo.config import load
    from flowgrpo.training.inputs import check_names

    config = load(options.config, options.set)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.dry_run:
        return _dry_run(config, num_processes, options.memory_gb)
    # Before torch and diffusers are imported, which takes seconds.
    check_names(config, num_processes)
    quiet()
    from flowgrpo.training.loop import train

    try:
        result = train(config)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    if result.finished:
        return 0
    from flowgrpo.training.signals import EXIT_STATUS

    _leave(EXIT_STATUS[result.stopped_by])


def _leave(status: int) -> NoReturn:
    """End the process at once: Python's own end would wait for a reward that is still scoring."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _dry_run(config: "Config", num_processes: int, memory_gb: float | None) -> int:
    """Check everything that can be checked without the model, and print the plan."""
    from flowgrpo.training.inputs import check_inputs

    train, held_out = check_inputs(config, num_processes)
    rows = list(config.geometry(num_processes).items())
    for label, prompts, file in (
        ("training prompts", train, config.prompts.train),
        ("held-out prompts", held_out, config.prompts.held_out),
    ):
        classes = f" in {len(prompts.classes())} classes" if config.prompts.balance else ""
        rows.append((label, f"{len(prompts.prompts)}{classes} ({file})"))
    # Reward models are not loaded: they may be large, or need weights that are not here.
    for reward in config.rewards:
        rows.append((f"reward {reward.label}", f"weight {reward.weight:g} ({reward.model})"))
    rows += [("metric", metric) for metric in config.evaluation.metrics]
    rows += _benchmarks(config)
    rows.append(("run directory", config.run.folder))
    quiet()
    from flowgrpo.memory.printing import print_estimate
    from flowgrpo.training.console import Console

    console = Console()
    for name, value in rows:
        console.say(f"{name:>20}  {value}")
    print_estimate(config, num_processes, memory_gb, console)
    console.say("the configuration is valid; nothing was loaded")
    return 0


def _benchmarks(config: "Config") -> list[tuple[str, str]]:
    """The cost of each benchmark of the run."""
    if not config.evaluation.bench:
        return []
    from flowgrpo.training.benchmarks import load_benchmarks

    every, last = config.evaluation.every, config.train.iterations
    during = len(range(every, last, every)) if every else 0
    rows = []
    for one in load_benchmarks(config.evaluation):
        times = {"every": during + 2, "ends": 2, "final": 1}[one.settings.when]
        rows.append(
            (
                f"benchmark {one.settings.tag}",
                f"{len(one.entries)} prompts x {one.benchmark.samples} images, {times} times: "
                f"{times * one.images:,} images; judge: {one.benchmark.about.judge}",
            )
        )
    return rows
