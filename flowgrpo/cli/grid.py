"""``flowgrpo grid``."""

import argparse
from dataclasses import replace
from pathlib import Path

from flowgrpo.cli.common import (
    UsageError,
    adapters_of,
    add_lora_argument,
    add_weights_argument,
    load_run,
    quiet,
    run_config,
)

SUMMARY = "draw a comparison grid: base model and trained model, same noise"
EXAMPLE = "flowgrpo grid runs/quickstart --out grid.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", help="run directory")
    parser.add_argument(
        "--out", required=True, help="PNG file; videos are also written as MP4, next to it"
    )
    parser.add_argument("--prompts", help="file of prompts (default: the run's held-out prompts)")
    parser.add_argument("--rows", type=int, default=6, help="prompts (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=4, help="images per prompt and model (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    parser.add_argument(
        "--narrow", action="store_true", help="for a phone: the models below each other"
    )
    add_weights_argument(parser)
    add_lora_argument(parser)
    parser.add_argument(
        "--steps", type=int, help="denoising steps (default: as in the run's evaluations)"
    )
    parser.add_argument(
        "--guidance", type=float, help="guidance scale (default: as in the run's evaluations)"
    )


def run(options: argparse.Namespace) -> int:
    """Generate the images of both models, score them and draw the grid."""

    from flowgrpo.config import find
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.evaluation.comparison_grid import ComparisonGrid
    from flowgrpo.rewards.scorer import RewardScorer

    for name in ("rows", "samples", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if Path(options.out).suffix.lower() != ".png":
        raise UsageError(f"--out must end in .png, got {options.out!r}")
    folder = Path(options.run)
    config = run_config(folder)
    quiet()
    adapters = adapters_of(options)
    prompts = PromptSet.load(find(options.prompts or config.prompts.held_out))
    sampling = config.evaluation_sampling()
    changes = {"num_steps": options.steps, "guidance_scale": options.guidance}
    sampling = replace(sampling, **{k: v for k, v in changes.items() if v is not None})
    grid = ComparisonGrid.of(prompts, options.rows, options.samples, options.seed)
    policy, iteration = load_run(folder, options.weights, base=True, adapters=adapters)
    base = grid.generate(policy, sampling)
    policy, iteration = load_run(folder, options.weights, adapters=adapters)
    tuned = grid.generate(policy, sampling)
    scorer = RewardScorer(config.rewards, config.failures)
    columns = ["base", f"after {iteration} iterations"]
    title = f"{config.model.path}: {folder.name}"
    grid.save(columns, [base, tuned], scorer, sampling, title, Path(options.out), options.narrow)
    scorer.close()
    print(options.out)
    return 0
