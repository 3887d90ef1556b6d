"""Which methods keep a model of few steps sharp, on the embedded model.

``distil`` makes it a model of few steps by distribution matching (``dmd``), without rewards, from its own
guided distribution. ``train`` trains the result with methods that are said to suit such models, and with
some that are warned about, all on equally many samples, and compares how the pictures are drawn.

    python -m benchmarks.few_step_methods distil [--num-steps 4] [--iterations 75] [--groups 24]
    python -m benchmarks.few_step_methods train [--num-steps 4] [--iterations 16] [--arms ...] [--seeds 0]

Prints Markdown tables. Both resume. ``strict`` is held-out accuracy in the model's steps without guidance;
``palette`` the share of pixels near a colour of the world, which smears and soft edges lower; ``high
frequency`` the share of the spectrum at more than a quarter of a cycle per pixel.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flowgrpo

EVALUATED = [
    "evaluation.metrics=['benchmarks.study.held_out_reward:Palette', 'flowgrpo.shapes.rewards:Diversity']",
    "evaluation.regimes=[]", "evaluation.images=240", "evaluation.images_during=120", "evaluation.grid_prompts=6",
    "evaluation.grid_samples=5", "evaluation.inspected_prompts=0", "run.trackers=[]", "failures.probe='warn'",
]  # fmt: skip
POLICY_GRADIENT = [
    "algorithm={kind='flow_grpo', group_size=12, transition={kind='cps', noise_level=0.7}}",
]
ARMS: dict[str, list[str]] = {
    "rtdmd": [
        "algorithm={kind='rtdmd', group_size=12, transition={kind='cps', noise_level=0.7}, steps={kind='all'}}",
        "loss={kind='dmd', weight=0.01, fake={lr=3e-4, updates=2, num_times=2, weight_cap=0.0}, teachers=[{path='base', guidance_scale=1.0}]}",
    ],
    "flow_grpo, cps, KL": [*POLICY_GRADIENT, "loss={kind='clipped', kl='velocity', kl_coef=0.1}"],
    "flow_grpo, cps": [*POLICY_GRADIENT, "loss={kind='clipped'}"],
    "diffusion_nft": ["algorithm={kind='diffusion_nft', group_size=12}", "loss={kind='nft'}"],
    "matching": ["algorithm={kind='matching', group_size=12, num_times=2}", "loss={kind='matching'}"],
}  # fmt: skip


def distil(folder: Path, num_steps: int, iterations: int, groups: int = 24) -> str:
    """Distil the embedded model, and return the table of its evaluations."""
    given = [
        *EVALUATED, *grid(num_steps), "algorithm={kind='dmd'}", "train.spike_factor=0",
        "loss={kind='dmd', teachers=[{guidance_scale=3.0}], fake={lr=3e-4, updates=4, num_times=2, weight_cap=0.0}}",
        f"train.iterations={iterations}", f"train.groups={groups}", "train.lr=5e-5", f"evaluation.every={iterations // 3}",
        f"run.folder='{folder / 'distilled'}'",
    ]  # fmt: skip
    flowgrpo.train(flowgrpo.load("quickstart", given))
    rows = [f"| {e['iteration']} | {measured(e)} |" for e in evaluations_of(folder / "distilled")]
    return "\n".join([f"| iterations | {HEAD} |", "|--:|--:|--:|--:|--:|", *rows])


def grid(num_steps: int) -> list[str]:
    """Equal steps from noise to data; the pipeline's own grid ends nearly one step early."""
    return [
        f"sampling.num_steps={num_steps}",
        f"sampling.sigmas={[1 - i / num_steps for i in range(num_steps)]}",
    ]


HEAD = "strict | palette | high frequency | variety of colours"


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, by iteration; of equal iterations, the last."""
    lines = (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    return list({e["iteration"]: e for e in map(json.loads, lines)}.values())


def measured(e: Mapping[str, Any]) -> str:
    """The cells of one evaluation."""
    strict, error = e["scores"]["strict"], e["errors"]["strict"]
    return (
        f"{strict:.1%} ({100 * error:.1f}) | {e['metrics']['palette']:.3f} | "
        f"{e['artefacts']['high_frequency']:.4f} | {e['metrics']['diversity/color']:.2f}"
    )


def train(
    folder: Path, num_steps: int, iterations: int, arms: Sequence[str], seeds: Sequence[int]
) -> str:
    """The table of trained arms, after the model before them."""
    lines = [f"| method | seed | {HEAD} | from before |", "|---|--:|--:|--:|--:|--:|--:|"]
    for seed in seeds:
        for arm in arms:
            place = folder / f"{arm.replace(', ', '_')}_{seed}"
            given = [
                *EVALUATED, f"model.path='{folder / 'distilled' / 'export'}'", *grid(num_steps), *ARMS[arm], f"train.iterations={iterations}", "evaluation.every=0", f"run.seed={seed}",
                f"run.folder='{place}'", "train.groups=8", "train.warmup=0", "train.schedule='constant'",
            ]  # fmt: skip
            flowgrpo.train(flowgrpo.load("quickstart", given))
            first, *_, last = evaluations_of(place)
            moved = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
            lines.append(f"| {arm} | {seed} | {measured(last)} | {moved[-1]['kl/velocity']:.4f} |")
            if len(lines) == 3:
                lines.insert(2, f"| before | | {measured(first)} | 0 |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=["distil", "train"])
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/few_steps"))
    args = parser.parse_args()
    if args.what == "distil":
        print(distil(args.folder, args.num_steps, args.iterations or 75, args.groups))
    else:
        print(train(args.folder, args.num_steps, args.iterations or 16, args.arms, args.seeds))


if __name__ == "__main__":
    main()
