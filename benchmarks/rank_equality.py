"""Every algorithm on 1, 2 and 4 processes: the largest difference between their numbers.

Trains a tiny random model for an iteration with two optimizer steps, in real processes that are connected
by gloo, and compares each run's files with those of one process:

- rollout: metrics of rewards and groups, relative to the larger value;
- losses: the loss, ratios and clip fractions as they are, since their scale is 1 (the mean loss itself is
  near 0); KL, gradient norm and all others relative to the larger value;
- gradient: Adam's first moments after the iteration, as the norm of the difference over their norm;
- weights: the norm of the difference over the norm of the update. AdamW divides a gradient by its size,
  so that parameters whose gradients are rounding errors move as far as all others;
- held out: the scores of the evaluations.

    python -m benchmarks.rank_equality [--algorithms flow_grpo vgpo] [--ranks 2 4] [--set KEY=VALUE ...]

``--set`` is passed on to the configuration of the runs on several processes, for settings that a single
process cannot have. ``--sharded`` is short for ``--set parallel.shard=denoiser``; FIND, which trains no
weights of the denoiser, is then left out.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowgrpo import cli
from flowgrpo.training import checkpoints
from scripts.shape_pictures import write_examples
from tests.conftest import NAMED, sampling_of
from tests.processes import Forked, ranks
from tests.tiny import save

HERE = "benchmarks.rank_equality"
SETTINGS = [
    "model.weights={kind='full'}",
    f"rewards=[{{model='{HERE}:brightness'}}, {{model='{HERE}:redness', weight=0.5}}]",
    "prompts.balance=''", "train.iterations=1", "train.groups=8", "train.rollout_batch=8", "train.train_batch=8",
    "train.updates=2", "train.lr=1e-4", "train.weight_decay=0", "evaluation.images=6", "evaluation.every=0",
    "evaluation.grid_prompts=1", "evaluation.grid_samples=2", "evaluation.num_steps=2",
    "evaluation.inspected_prompts=0", "run.threads=1", "run.device=cpu", "run.trackers=[]",
    "run.checkpoint_every=1", "failures.probe=off",
]  # fmt: skip
SD3 = (
    "sampling={num_steps=4, height=16, width=16, guidance_scale=4.5, call={max_sequence_length=16}}"
)
GIVEN = "GIVEN"
"""Stands for the file of pairs of pictures in settings."""
CLIPPED = "loss={kind='clipped', clip_range=1e-3, kl_coef=0.05}"
CASES: dict[str, Sequence[str]] = {
    "flow_grpo": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED],
    "flow_grpo, EMA": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED, "train.ema_decay=0.9"],
    "flow_grpo, guard": ["algorithm={kind='flow_grpo', group_size=4}", "loss={kind='clipped', clip_range=1e-3, ratio='guard'}"],
    "flow_grpo, kl clip": ["algorithm={kind='flow_grpo', group_size=4}", "loss={kind='clipped', clip='kl'}"],
    "flow_grpo, GDPO": ["algorithm={kind='flow_grpo', group_size=4, advantage={kind='gdpo'}}", CLIPPED],
    "flow_grpo, GARDO": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED, f"rewards=[{{model='{HERE}:brightness'}}, {{model='{HERE}:redness', weight=0}}]", "guard={kl='uncertain', reset_every=1}"],
    "flow_grpo, refill": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED, f"rewards=[{{model='{HERE}:rough'}}]", "train.refill=3"],
    "flow_grpo, dropped": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED, f"rewards=[{{model='{HERE}:rough'}}]", "train.without_advantage='drop'"],
    "flow_grpo, stale": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED, "train.staleness=1", "train.iterations=3"],
    "flow_grpo, Flash": ["algorithm={kind='flow_grpo', group_size=4, steps_per='group', steps={kind='random_window', size=1, last=3}}", "loss={kind='clipped', clip_range=1e-3, step_weight='rectified'}"],
    "flow_grpo, chunks": ["algorithm={kind='flow_grpo', group_size=4}", "loss={kind='clipped', clip_range=1e-3, chunks=[1, 2]}"],
    "flow_grpo, replay": ["algorithm={kind='flow_grpo', group_size=4}", CLIPPED, "train.replay={groups=8, keep='all'}", "train.iterations=2"],
    "flow_grpo, previews": ["algorithm={kind='flow_grpo', group_size=4, previews={number=8, num_steps=2}}", CLIPPED],
    "dance_grpo": ["algorithm={kind='dance_grpo', group_size=4}", CLIPPED, "train.split='samples'"],
    "mix_grpo": ["algorithm={kind='mix_grpo', group_size=4, steps={kind='window', size=2}}", CLIPPED],
    "pref_grpo": ["algorithm={kind='pref_grpo', group_size=4, preference={kind='compared', reward='brightness'}}", CLIPPED],
    "tempflow_grpo": ["algorithm={kind='tempflow_grpo', group_size=4, seeds=2}", CLIPPED],
    "self_opd": ["algorithm={kind='self_opd', group_size=4, seeds=2}", "loss={kind='self_opd'}"],
    "g2rpo": ["algorithm={kind='g2rpo', group_size=4, steps={kind='window', size=2}, granularities=[1, 2]}", CLIPPED, "train.split='steps'"],
    "tp_grpo": ["algorithm={kind='tp_grpo', group_size=4, steps={kind='all', skip_last=2}}", CLIPPED],
    "vgpo": ["algorithm={kind='vgpo', group_size=4}", CLIPPED],
    "branch_grpo": ["algorithm={kind='branch_grpo', group_size=4, splits=[0, 1], steps={kind='all', skip_last=2}}", CLIPPED, "train.split='actions'"],
    "branch_grpo, Tree": ["algorithm={kind='branch_grpo', group_size=4, splits=[0, 1], between='ode', shift_ratio=0.5, rivals='leaves', fusion='path_probability'}", CLIPPED],
    "neighbor_grpo": ["algorithm={kind='neighbor_grpo', group_size=4, anchors=2, steps={kind='window', size=2}}", "loss={kind='neighbor', clip_range=1e-3}"],
    "diffusion_nft": ["algorithm={kind='diffusion_nft', group_size=4}", "loss={kind='nft', kl_coef=0.05}"],
    "matching": ["algorithm={kind='matching', group_size=4, num_times=2}", "loss={kind='matching', kl_coef=0.05}"],
    "distillation": ["algorithm={kind='distillation', group_size=2}", "loss={kind='distillation', teachers=[{guidance_scale=9.0}, {guidance_scale=1.0}], kl_coef=0.05}"],
    "matching, DGPO": ["algorithm={kind='matching', group_size=4, num_times=2}", "loss={kind='dgpo'}"],
    "matching, CRD": ["algorithm={kind='matching', group_size=4, num_times=2}", "loss={kind='crd'}"],
    "dmd": ["algorithm={kind='dmd', group_size=2}", "loss={kind='dmd', fake={updates=2, num_times=2}}", "train.updates=1"],
    "rtdmd": ["algorithm={kind='rtdmd', group_size=4, steps={kind='random_steps', count=2, first=0, last=2}}", "loss={kind='dmd', weight=0.1, fake={num_times=2}, teachers=[{guidance_scale=9.0}]}", "train.updates=1"],
    "draft": ["algorithm={kind='draft', group_size=4, last=2}", "loss={kind='reward_gradient', kl_coef=0.05}"],
    "refl": ["algorithm={kind='refl', group_size=4, stop_range=[0.5, 1.0]}", "loss={kind='reward_gradient', form='hinge', target=2.0}"],
    "srpo": ["algorithm={kind='srpo', group_size=4, step_range=[0.0, 0.5]}", "loss={kind='reward_gradient'}"],
    "pairs": ["algorithm={kind='pairs', distinct_times=2}", "loss={kind='dpo', beta=100.0}", f"prompts.train='{GIVEN}'"],
    "find": ["algorithm={kind='find', group_size=4}", "loss={kind='clipped', clip_range=1e-3}", "model.weights={kind='noise'}", "train.monitor_states=0"],
}  # fmt: skip
"""Every algorithm and every loss, with the settings whose statistics are over all processes."""
OF_SCALE_1 = ("loss/policy", "ratio/", "log_prob/", "step/", "dpo/")
"""Beginnings of the names of metrics whose differences are compared as they are."""
LOSSES = (
    "loss/",
    "ratio/",
    "log_prob/",
    "step/",
    "kl/",
    "grad_norm",
    "distance/",
    "guard/",
    "fake_score/",
    "matching/",
    "dpo/",
)
"""Beginnings of the names of metrics of updates; the others are of rollouts."""


def brightness(media: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Mean of all pixels."""
    return media.flatten(1).mean(1)


def redness(media: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Mean of the red channel."""
    return media[..., 0, :, :].flatten(1).mean(1)


# Both are differentiable as they are.
for _reward in (brightness, redness):
    _reward.scores_with_gradient = _reward  # type: ignore[attr-defined]


def rough(media: Tensor, prompts: Sequence[Any]) -> Tensor:
    """The brightness for every other prompt, a constant for the rest."""
    rough = torch.tensor([len(p.text) % 2 == 0 for p in prompts])
    return torch.where(rough, media.flatten(1).mean(1), 0.5)


def sampling(family: str) -> list[str]:
    """The settings of the sampling of a tiny family: four steps of its smallest call."""
    if family == "sd3":
        return [SD3]
    own = sampling_of(family, num_steps=4)
    named = {k: v for k in NAMED if (v := getattr(own, k)) is not None}
    parts = [f"{k}={json.dumps(v, allow_nan=False)}" for k, v in named.items()]
    call = ", ".join(f"{k}={json.dumps(v, allow_nan=False)}" for k, v in own.call.items())
    # The metric of the configuration is for images.
    return [
        f"sampling={{num_steps=4, {', '.join(parts)}, call={{{call}}}}}",
        "evaluation.metrics=[]",
    ]


def train(folder: Path, model: Path, number: int, settings: Sequence[str]) -> None:
    """A run on a number of processes.

    Raises:
        RuntimeError: If one of them fails, with its output.
    """
    every = [
        *SETTINGS,
        *sampling(model.name),
        f"model.path='{model}'",
        f"run.folder='{folder}'",
        *settings,
    ]
    if any(GIVEN in s for s in settings):
        pairs = write_examples(model.parent / "given", "pairs", 24)
        every = [s.replace(GIVEN, str(pairs)) for s in every]
    arguments = ["train", "quickstart_flow_grpo", *(f"--set={s}" for s in every)]
    alone = number == 1
    processes = [Forked(lambda: cli.main(arguments))] if alone else ranks(lambda _: cli.main(arguments), number)  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=1800)
        if process.returncode:
            raise RuntimeError(f"{folder.name} failed:\n{output[-3000:]}")


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a log."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def difference(name: str, one: float | None, other: float | None) -> float:
    """The difference of a metric, over the larger value unless its scale is 1; infinite if one has none."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    size = 1.0 if name.startswith(OF_SCALE_1) else max(abs(one), abs(other))
    return abs(one - other) / size if size > 0 else 0.0


def compared(one: Path, other: Path, model: Path) -> dict[str, float]:
    """The largest differences between the files of two runs.

    Raises:
        AssertionError: If they have not the same metrics.
    """
    found: dict[str, float] = dict.fromkeys(("rollout", "losses", "held out"), 0.0)
    for a, b in zip(lines(one / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        for name in a:
            part = "losses" if name.startswith(LOSSES) else "rollout"
            found[part] = max(found[part], difference(name, a[name], b[name]))
    files = (one / "evaluations.jsonl", other / "evaluations.jsonl")
    for a, b in zip(*map(lines, files), strict=True):
        assert a["images"] == b["images"]
        for name in a["scores"]:
            found["held out"] = max(
                found["held out"], difference(name, a["scores"][name], b["scores"][name])
            )
    parts = [load(folder, "optimizer") for folder in (one, other)]
    moments = [{k: v for k, v in part.items() if k.endswith("/exp_avg")} for part in parts]
    found["gradient"] = distance(moments[0], moments[1]) / distance(moments[0], None)
    weights = [load(folder, "weights") for folder in (one, other)]
    # The second matrices of adapters are 0 at first; the first ones are random.
    added = {k: v for k, v in weights[0].items() if "lora_B" in k}
    moved = distance(added, None) if added else distance(weights[0], start(model, weights[0]))
    found["weights"] = distance(weights[0], weights[1]) / moved
    return found


def load(folder: Path, part: str) -> dict[str, Tensor]:
    """A part of the last checkpoint, which may be of a sharded run."""
    last = max((folder / "checkpoints").glob("[0-9]*"))
    return checkpoints.load(last)[0][part]


def start(model: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights before training; None if they were 0, as those of a distribution of noise."""
    if not any(k.startswith("transformer.") for k in weights):
        return None
    (file,) = (model / "transformer").glob("*.safetensors")
    return {f"transformer.{k}": v for k, v in load_file(file).items()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor] | None) -> float:
    """The norm of the difference of tensors by name; of the first ones if there are no others."""
    squares = [
        float((v.double() - (0.0 if other is None else other[k].double())).square().sum())
        for k, v in one.items()
    ]
    return math.sqrt(sum(squares))


COLUMNS = ("rollout", "losses", "gradient", "weights", "held out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each algorithm and number of processes, as it is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--model", default="sd3", help="a tiny family of the tests")
    parser.add_argument(
        "--set", action="append", default=[], help="KEY=VALUE, for several processes"
    )
    parser.add_argument("--lora", action="store_true", help="adapters in place of all weights")
    parser.add_argument("--sharded", action="store_true", help="--set parallel.shard=denoiser")
    options = parser.parse_args(arguments)
    more = [*options.set, *(["parallel.shard=denoiser"] if options.sharded else [])]
    own = ["model.weights={kind='lora', rank=2, alpha=4}"] if options.lora else []
    print("| algorithm | processes | " + " | ".join(COLUMNS) + " |")
    print("|---|--:|" + "--:|" * len(COLUMNS), flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        model = save(options.model, Path(place) / options.model)
        names = [n for n in options.algorithms if n != "find" or not options.sharded]
        for name in names:
            folders = {n: Path(place) / f"{name}-{n}" for n in (1, *options.ranks)}
            try:
                train(folders[1], model, 1, [*CASES[name], *own])
                for number in options.ranks:
                    train(folders[number], model, number, [*CASES[name], *own, *more])
                    found = compared(folders[1], folders[number], model)
                    cells = " | ".join(f"{found[c]:.1e}" for c in COLUMNS)
                    print(f"| {name} | {number} | {cells} |", flush=True)
            except (RuntimeError, AssertionError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
