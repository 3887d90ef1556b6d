"""``flowgrpo inspect``."""

import argparse
from html import escape
from pathlib import Path

from flowgrpo.cli.common import (
    UsageError,
    add_weights_argument,
    load_run,
    prompts_of,
    quiet,
    run_config,
)
from flowgrpo.core.text import counted

SUMMARY = "show which denoising steps a run's algorithm rewards, trajectory by trajectory"
EXAMPLE = "flowgrpo inspect runs/quickstart --number 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", help="run directory")
    parser.add_argument(
        "--prompts",
        nargs="+",
        help="prompts, prompt files or datasets, as 'sample' takes them (default: training prompts)",
    )
    parser.add_argument(
        "--number", type=int, default=2, help="training prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=3, help="trajectories per prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    add_weights_argument(parser)
    parser.add_argument("--base", action="store_true", help="show the model before training")
    parser.add_argument("--out", help="HTML file (default: inspect.html in the run directory)")


def run(options: argparse.Namespace) -> int:
    """Sample trajectories, compute their advantages and write the page."""
    from flowgrpo.config import find
    from flowgrpo.core.random import Random
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.evaluation import inspection
    from flowgrpo.evaluation.report import write_page
    from flowgrpo.rewards.scorer import RewardScorer

    for name in ("number", "samples"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    folder = Path(options.run)
    config = run_config(folder)
    if config.algorithm.num_targets:
        raise UsageError(
            f"{folder} was trained on given pictures, which have no candidates and no credit to inspect; its report "
            "shows the curves"
        )
    if options.prompts:
        prompts = prompts_of(options.prompts)
    else:
        known = PromptSet.load(find(config.prompts.train), config.prompts.balance)
        prompts = [g.prompt for g in known.groups(0, options.number, Random(options.seed))]
    quiet()
    policy, iteration = load_run(
        folder, options.weights, base=options.base, sampling=config.sampling
    )
    scorer = RewardScorer(config.rewards, config.failures, config.memory.score_batch)
    strips = inspection.inspect(
        policy, config.algorithm, scorer, prompts, options.samples, options.seed
    )
    scorer.close()
    out = Path(options.out) if options.out else folder / "inspect.html"
    after = "the base model" if options.base else f"after {counted(iteration, 'iteration')}"
    title = f"{folder.resolve().name} · what {config.algorithm.__class__.__name__} rewards, {after}"
    print(
        write_page(
            out, title, f"<header><h1>{escape(title)}</h1></header>{inspection.fragment(strips)}"
        )
    )
    return 0
