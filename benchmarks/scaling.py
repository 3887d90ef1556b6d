"""A model of the time of an iteration on N GPUs: sampling, scoring, training, communication.

``python -m benchmarks.scaling`` prints throughput for 1 to 256 GPUs, and ``--write docs/scaling.md`` puts
the tables there. ``--count`` first counts the floating-point operations of a denoising step and of
decoding, on the published configurations without weights; otherwise they are read from ``scaling.json``.
Everything else is an assumption, which :class:`Cluster` names, and which options change.
``benchmarks.simulated_cluster`` checks the scheduling.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

import flowgrpo
from flowgrpo.config import Config
from flowgrpo.config.plan import size
from flowgrpo.core.random import Random
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.dispatch_modes import MemoryCounter
from flowgrpo.memory.footprint import largest_call, make_trainable
from flowgrpo.memory.meta_pipeline import build, config_folder
from flowgrpo.memory.tracer import Tracer
from flowgrpo.policy.loading import DTYPES, denoisers
from flowgrpo.policy.model_files import published_folder
from flowgrpo.policy.settings import Full
from scripts.page_tables import write_marked_text

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NODE = 8
"""GPUs of a node."""
COUNTED = Path(__file__).with_name("scaling.json")
"""What :func:`count` found for :data:`MODELS`."""
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
"""What differs from the 1.3B model in the configuration that is published with Wan-AI/Wan2.1-T2V-14B."""


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machine.

    Attributes:
        tflops: Dense bf16 TFLOP/s of a GPU, as its data sheet says (989 is NVIDIA's number for an H100 SXM).
        sampling: Share of it that sampling and decoding reach.
        training: Share of it that replays with gradients reach.
        inside: Bytes per second that a GPU sends and receives at once inside a node.
        between: The same between nodes.
        latency: Seconds of each of the ``2 (N - 1)`` steps of a ring.
        spread: Standard deviation of a process's work, relative to its mean: others wait for the slowest.
        score: Seconds that a reward takes for one sample.
        servers: Reward servers, each of which scores one sample at a time; 0 scores on each GPU's host, besides
            its sampling.
    """

    tflops: float = 989.0
    sampling: float = 0.40
    training: float = 0.35
    inside: float = 300e9
    between: float = 40e9
    latency: float = 10e-6
    spread: float = 0.02
    score: float = 0.02
    servers: int = 0


@dataclass(frozen=True)
class Work:
    """The work of an iteration, for all processes, and the size of the model.

    Attributes:
        step: Operations of one denoising step of one sample, with the second pass of guidance if there is one.
        decode: Operations of decoding one sample.
        groups: Groups.
        group_size: Samples of a group.
        nfe: Denoising steps of a group's rollout.
        decodes: Decoded and scored candidates of a group.
        trained_steps: States of one sample that are replayed.
        passes: Operations of a replay, in denoising steps: forward, backward, recomputation, reference.
        updates: Optimizer steps.
        parameters: Parameters of the denoiser.
        trained: Trained parameters.
        calls: Denoiser calls for one sampling batch and one replay, in which sharded weights are gathered, per
            sample.
        rollout_batch: Samples of one call of the pipeline, which are scored together.
        sharded: Whether the weights are sharded over the GPUs of a node.
        staleness: ``train.staleness``.
    """

    step: float
    decode: float
    groups: int
    group_size: int
    nfe: float
    decodes: float
    trained_steps: float
    passes: float
    updates: int
    parameters: int
    trained: int
    calls: float
    rollout_batch: int = 1
    sharded: bool = False
    staleness: int = 0


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration by part, and what follows.

    Attributes:
        gpus: Number of GPUs.
        groups: Groups, at least one per GPU.
        sample: Sampling and decoding.
        score: Waiting for scores that do not overlap with anything.
        train: Replays with gradients.
        network: Sums of gradients, and gathering of sharded weights that compute does not hide.
        wait: Waiting for the slowest process.
        samples: Samples of the iteration.
    """

    gpus: int
    groups: int
    sample: float
    score: float
    train: float
    network: float
    wait: float
    samples: int

    @property
    def total(self) -> float:
        """Seconds of the iteration."""
        return self.sample + self.score + self.train + self.network + self.wait

    @property
    def bound(self) -> str:
        """The part that takes most of the time."""
        return max(("sample", "score", "train", "network", "wait"), key=lambda k: getattr(self, k))


def iteration(work: Work, cluster: Cluster, gpus: int) -> Times:
    """The model. Groups live whole on a GPU, so there is at least one for each."""
    groups = math.ceil(max(work.groups, gpus) / gpus) * gpus
    own = groups // gpus
    per_second = cluster.tflops * 1e12
    steps = own * work.nfe * work.step / (per_second * cluster.sampling)
    decode = own * work.decodes * work.decode / (per_second * cluster.sampling)
    states = own * work.group_size * work.trained_steps
    train = states * work.passes * work.step / (per_second * cluster.training)
    sample = steps + decode
    network = _sum_of_gradients(work, cluster, gpus)
    if work.sharded and gpus > 1:
        network += _gathering(work, cluster, gpus, own, sample + train)
    wait = cluster.spread * largest(gpus) * (sample + train)
    score = exposed(work, cluster, groups, gpus, sample, train + network)
    return Times(gpus, groups, sample, score, train, network, wait, groups * work.group_size)


def largest(number: int) -> float:
    """The expected largest of several standard normal numbers, by Blom's approximation."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25))


def exposed(
    work: Work, cluster: Cluster, groups: int, gpus: int, sample: float, rest: float
) -> float:
    """Seconds of scoring that nothing hides.

    Scoring overlaps with the sampling of later batches, so that at least the last batch's remains; with
    staleness it overlaps with the whole iteration.

    Args:
        work: The work.
        cluster: The rewards.
        groups: Groups of all processes.
        gpus: Number of GPUs.
        sample: Seconds of sampling.
        rest: Seconds of training and communication.
    """
    scorers = cluster.servers or gpus
    own = groups / gpus * work.decodes
    scoring = own * gpus * cluster.score / scorers
    if work.staleness:
        return max(0.0, scoring - sample - rest)
    # The first batch has to be sampled before scoring begins, and the last one is scored afterwards.
    batches = max(1.0, own / work.rollout_batch)
    last = scoring / batches
    return max(last, scoring - sample * (1 - 1 / batches))


def _sum_of_gradients(work: Work, cluster: Cluster, gpus: int) -> float:
    if gpus == 1:
        return 0.0
    bandwidth = cluster.inside if gpus <= NODE else cluster.between
    sent = 4 * work.trained * 2 * (gpus - 1) / gpus
    return work.updates * (sent / bandwidth + 2 * (gpus - 1) * cluster.latency)


def _gathering(work: Work, cluster: Cluster, gpus: int, own: int, compute: float) -> float:
    """The time of gathering bf16 weights inside a node for every call that compute does not hide."""
    among = min(gpus, NODE)
    each = 2 * work.parameters * (among - 1) / among / cluster.inside
    return max(0.0, own * work.group_size * work.calls * each - compute)


class CountingTracer(Tracer):
    """A tracer that counts the operations of each component.

    Attributes:
        operations: Floating-point operations by component; a multiplication and an addition are two.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self.operations: dict[str, int] = {}
        super().__init__(*arguments, **options)

    @contextmanager
    def _fake(self, name: str, counter: MemoryCounter, autocast: bool = True) -> Iterator[None]:
        with super()._fake(name, counter, autocast), FlopCounterMode(display=False) as flops:
            yield
        self.operations[name] = self.operations.get(name, 0) + flops.get_total_flops()


def count(config: Config, changed: Mapping[str, Any] | None = None) -> Work:
    """The work of a configuration, with the operations counted on its model without weights.

    Args:
        config: A configuration whose model's sizes ship with the package.
        changed: Other values in the configuration of the denoiser.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = config_folder(config.model.source)
        if changed:
            shutil.copytree(
                published_folder(config.model.path) or place, folder, dirs_exist_ok=True
            )
            file = Path(folder, "transformer", "config.json")
            file.write_text(strict_json.dumps(json.loads(file.read_text()) | changed))
            place = Path(folder)
        dtype = DTYPES[config.model.dtype]
        pipeline = build(place, dtype)
    models = denoisers(pipeline)
    parameters = sum(p.numel() for m in models.values() for p in m.parameters())
    trained = make_trainable(models, config.model.weights, native=False)
    tracer = CountingTracer(pipeline, dtype, full=isinstance(config.model.weights, Full))
    tracer.rollout(largest_call(config, [Prompt("a photo of a red cube")], 1))
    random = Random(config.run.seed).at("train", 0)
    steps = config.sampling.num_steps
    cost = config.algorithm.cost(steps, 0, random)
    fraction = getattr(config.algorithm, "timestep_fraction", 1.0)
    trained_steps = len(config.algorithm.trained_steps(steps, 0, random)) * fraction
    full = isinstance(config.model.weights, Full)
    again = config.memory.gradient_checkpointing
    return Work(
        step=sum(tracer.operations[name] for name in models),
        decode=tracer.operations["vae"],
        groups=config.train.groups,
        group_size=config.algorithm.group_size,
        nfe=cost.nfe,
        decodes=cost.decodes,
        trained_steps=trained_steps,
        # Backward: gradients of activations cost a forward, and those of all weights another one.
        passes=1 + (2 if full else 1) + again + (config.loss.kl_coef > 0),
        updates=config.train.optimizer_steps,
        parameters=parameters,
        trained=trained,
        calls=steps / config.train.rollout_batch
        + trained_steps * (2 + again) / config.train.train_batch,
        rollout_batch=config.train.rollout_batch,
        sharded=full,
    )


def table(work: Work, cluster: Cluster, gpus: Sequence[int] = GPUS) -> list[str]:
    """The lines of a table of a model's throughput."""
    one = iteration(work, cluster, gpus[0])
    lines = [
        "| GPUs | groups | s per iteration | sampling | scoring | training | network | waiting | samples/s | efficiency | bound |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for number in gpus:
        t = iteration(work, cluster, number)
        rate = t.samples / t.total
        efficiency = rate / number / (one.samples / one.total / gpus[0])
        parts = " | ".join(
            f"{v / t.total:.0%}" for v in (t.sample, t.score, t.train, t.network, t.wait)
        )
        lines.append(
            f"| {number} | {t.groups} | {t.total:,.1f} | {parts} | {rate:.3g} | {efficiency:.0%} | {t.bound} |"
        )
    return lines


MODELS: Mapping[str, tuple[str, Sequence[str], Mapping[str, Any], int]] = {
    "SD3.5 Medium, LoRA, 512 x 512": ("sd35_medium_pickscore", [], {}, 1),
    "FLUX.1-dev, LoRA, 720 x 720": ("flux_dance", ["model.weights={kind='lora'}"], {}, 1),
    "FLUX.1-dev, all weights, 720 x 720": ("flux_dance", [], {}, 8),
    "Wan 2.1 14B, LoRA, 832 x 480, 81 frames": (
        "wan21_t2v",
        ["sampling.width=832", "sampling.height=480", "sampling.num_frames=81"],
        WAN_14B,
        1,
    ),
}
"""Configuration, changes, changes to the denoiser, and the fewest GPUs that hold the weights."""


def works(recount: bool = False) -> dict[str, Work]:
    """The work of :data:`MODELS`, from the file that holds what was counted.

    Args:
        recount: Count it again, which takes minutes, and write the file.
    """
    if recount:
        found = {
            title: asdict(count(flowgrpo.load(recipe, list(settings)), changed))
            for title, (recipe, settings, changed, _) in MODELS.items()
        }
        COUNTED.write_text(strict_json.dumps(found, indent=1) + "\n")
    return {title: Work(**values) for title, values in json.loads(COUNTED.read_text()).items()}


def slow_judge(work: Work, cluster: Cluster, seconds: float = 1.0) -> list[str]:
    """The lines of a table: a slow judge, by servers and staleness, on 8 and 64 GPUs."""
    lines = [
        "| GPUs | servers | s per iteration | with `train.staleness = 1` | waiting for scores | with it |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for gpus in (8, 64):
        for servers in (8, 16, 32, 64):
            one = replace(cluster, score=seconds, servers=servers)
            now, ahead = (iteration(replace(work, staleness=s), one, gpus) for s in (0, 1))
            lines.append(
                f"| {gpus} | {servers} | {now.total:.1f} | {ahead.total:.1f} | {now.score / now.total:.0%} | "
                f"{ahead.score / ahead.total:.0%} |"
            )
    return lines


def report(found: Mapping[str, Work], cluster: Cluster) -> str:
    """The tables of the page."""
    lines: list[str] = []
    for title, (recipe, settings, changed, least) in MODELS.items():
        work = found[title]
        named = [f"`{s}`" for s in settings] + (
            ["the denoiser of the 14B model"] if changed else []
        )
        lines += [
            f"### {title}",
            "",
            f"`{recipe}`{' with ' + ', '.join(named) if named else ''}: {work.parameters / 1e9:.2f} billion "
            f"parameters, {work.trained / 1e6:,.0f} million trained. Counted: {work.step / 1e12:,.2f} TFLOP for a "
            f"denoising step of one sample, {work.decode / 1e12:,.2f} for decoding it. Per group of "
            f"{work.group_size}: {work.nfe:,.0f} denoising steps, "
            f"{work.group_size * work.trained_steps:,.0f} replays of {work.passes:g} steps each. Per iteration: "
            f"{work.groups} groups, {work.updates} sums of {size(4 * work.trained)} of gradients.",
            "",
            *table(work, cluster, [n for n in GPUS if n >= least]),
            "",
        ]
    first = next(iter(MODELS))
    lines += [f"### A slow judge: {first}, 1 s per image", "", *slow_judge(found[first], cluster)]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="count the operations again; minutes")
    parser.add_argument("--write", type=Path, help="page with the marks of the tables")
    for field in fields(Cluster):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    cluster = Cluster(**{f.name: getattr(options, f.name) for f in fields(Cluster)})
    text = report(works(options.count), cluster)
    if options.write:
        write_marked_text(options.write, "scaling", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
