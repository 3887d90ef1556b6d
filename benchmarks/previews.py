"""Previews that choose samples (Sol-RL), measured on the embedded model.

``spread``: how well previews of few steps predict the rewards of samples of 8 steps, and how much more the
chosen samples differ. ``train``: the quick start with previews, and without them at equal
denoiser evaluations, once with larger groups and once with more iterations.

    python -m benchmarks.previews spread [--steps 2 3 4 6 8] [--number 24]
    python -m benchmarks.previews train [--seeds 0 1] [--iterations 24] [--folder runs/previews]

Prints Markdown tables. ``train`` resumes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import flowgrpo
from flowgrpo.algorithms import Matching
from flowgrpo.algorithms.previews import Previews
from flowgrpo.config import Config
from flowgrpo.core.random import Random
from flowgrpo.data.prompt_files import read_prompts
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.metrics import rollout_metrics

GROUP = 12
ARMS = {
    "12 of 24 previews": (1, ["algorithm.previews={number=24, num_steps=4}"]),
    "more iterations": (2, []),
    "larger groups": (1, ["algorithm.group_size=24"]),
    "as the quick start": (1, []),
}
"""By arm, the factor of the iterations and settings. The first three have equal denoiser evaluations:
24 * 4 + 12 * 8 = 24 * 8 = 192 per prompt in an iteration, and 12 * 8 = 96 in each of twice as many."""
RECIPE = "quickstart"
SHORT = [
    # Rewards alone, without what the guided reference of the quick start teaches.
    "loss={kind='matching'}", "prompts.weights={}",
    "evaluation.regimes=[]", "evaluation.every=0", "evaluation.grid_prompts=1", "evaluation.grid_samples=2",
    "evaluation.inspected_prompts=0", "run.trackers=[]",
]  # fmt: skip


def spread(config: Config, steps: Sequence[int], number: int) -> str:
    """The table of previews of some numbers of steps, on 18 prompts."""
    policy = PipelinePolicy.from_pretrained("shapes", sampling=config.sampling)
    scorer = RewardScorer(config.rewards, config.failures)
    prompts = PromptSet(read_prompts(Path(config.prompts.train)), config.prompts.balance)
    groups = prompts.groups(0, 18, Random(0))
    lines = [
        "| previews | evaluations per prompt | agreement | deviation in the group | groups of equal rewards |",
        "|---|--:|--:|--:|--:|",
    ]
    settings = [Previews(), *(Previews(number=number, num_steps=n) for n in steps)]
    for one in settings:
        algorithm = Matching(group_size=GROUP, num_times=2, previews=one)
        experience = algorithm.collect(policy, groups, scorer, Random(0), 0)
        found, c = rollout_metrics(experience, lambda values: values), experience.candidates
        deviation = sum(float(c.reward[c.group == g.index].std(correction=0)) for g in groups) / 18
        name = f"{one.number} of {one.num_steps} steps" if one.number else "none"
        agreement = found.get("previews/agreement", float("nan"))
        lines.append(
            f"| {name} | {found['nfe_per_prompt']:.0f} | {agreement:.2f} | {deviation:.3f} | {found['group/zero_variance']:.0%} |"
        )
    scorer.close()
    return "\n".join(lines)


def train(seeds: Sequence[int], folder: Path, iterations: int, arms: Sequence[str]) -> str:
    """The table of trained arms: held-out scores before and after."""
    lines = ["| arm | seed | before | after | gain |", "|---|--:|--:|--:|--:|"]
    for seed in seeds:
        for arm in arms:
            factor, settings = ARMS[arm]
            place = folder / f"{arm.replace(' ', '_')}_{seed}"
            given = [*SHORT, *settings, f"run.folder='{place}'", f"run.seed={seed}"]
            given += [f"train.iterations={factor * iterations}", "evaluation.images=480"]
            flowgrpo.train(flowgrpo.load(RECIPE, given))
            text = (place / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
            first, *_, last = (json.loads(line)["scores"]["strict"] for line in text)
            lines.append(
                f"| {arm} | {seed} | {first:.1%} | {last:.1%} | {100 * (last - first):+.1f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["spread", "train"])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--number", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/previews"))
    parser.add_argument("--iterations", type=int, default=24)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    if args.what == "spread":
        print(spread(flowgrpo.load(RECIPE), args.steps, args.number))
    else:
        print(train(args.seeds, args.folder, args.iterations, args.arms))


if __name__ == "__main__":
    main()
