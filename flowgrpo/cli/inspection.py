"""``flowgrpo inspect``."""

import argparse
from pathlib import Path


def inspect(options: argparse.Namespace) -> int:
    """``flowgrpo inspect``."""
    from flowgrpo import config as configuration
    from flowgrpo.cli.commands import load_run, prompts_of, quiet, run_config
    from flowgrpo.core.random import Random
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.evaluation import inspection
    from flowgrpo.evaluation.report import write_page
    from flowgrpo.rewards.scorer import RewardScorer

    quiet()
    run = Path(options.run)
    config = run_config(run)
    if options.prompts:
        prompts = prompts_of(options.prompts)
    else:
        known = PromptSet.load(configuration.find(config.prompts.train), config.prompts.balance)
        prompts = [g.prompt for g in known.groups(0, options.number, Random(options.seed))]
    policy, iteration = load_run(run, options.weights, base=options.base, sampling=config.sampling)
    scorer = RewardScorer(config.rewards, config.failures, config.memory.score_batch)
    strips = inspection.inspect(
        policy, config.algorithm, scorer, prompts, options.samples, options.seed
    )
    scorer.close()
    out = Path(options.out) if options.out else run / "inspect.html"
    after = "the base model" if options.base else f"after {iteration} iterations"
    title = f"{run.resolve().name} · what {config.algorithm.__class__.__name__} rewards, {after}"
    print(write_page(out, title, f"<header><h1>{title}</h1></header>{inspection.fragment(strips)}"))
    return 0
