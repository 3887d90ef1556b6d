"""What is measured, in order of importance. Each item is one line of the results."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import flowgrpo
from benchmarks.device.measure import (
    flops,
    in_gb,
    peak_bytes,
    profiled,
    seconds,
    synchronize,
    utilisation,
)
from benchmarks.device.models import (
    FLUX,
    SD35,
    TRANSITION,
    WAN,
    Maker,
    Model,
    prompts,
    refer,
    roll,
    train,
    trained,
)
from flowgrpo.config import Config
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.doctor import checks
from flowgrpo.doctor.subject import Settings, Subject
from flowgrpo.memory.meta_pipeline import build
from flowgrpo.memory.tracer import Tracer
from flowgrpo.policy import EMA, Full, LoRA, Memory, PipelinePolicy, placement
from flowgrpo.policy.compilation import CompiledBlocks
from flowgrpo.policy.loading import DTYPES, denoisers
from flowgrpo.policy.model_files import published_folder
from flowgrpo.policy.weights import Trainable

Result = dict[str, Any]
CLIP_RANGE = 1e-4
WORK: dict[int, int] = {}
"""Floating-point operations of a replay of SD3.5 and its backward pass, by batch size."""
PRESETS = {"24": 24, "48": 48, "80": 80}
"""GB of the devices of the presets of FLUX.1-dev."""


@dataclass(frozen=True)
class Item:
    """One measurement.

    Attributes:
        key: Names it in the results.
        run: Measures.
        limit: Seconds after which it is stopped.
        least: Seconds below which it is not started.
    """

    key: str
    run: Callable[[Maker], Result]
    limit: float = 90.0
    least: float = 20.0


@dataclass(frozen=True)
class Part:
    """Measurements that belong together."""

    number: int
    title: str
    items: Sequence[Item]


def profile_of(what: str) -> Callable[[Maker], Result]:
    """Profile of a rollout of ten steps, five replays, or five evaluations of the reference."""

    def run(maker: Maker) -> Result:
        batch = 2 if maker.tiny else 8
        policy = maker.policy(SD35, batch)
        rollout = roll(policy, batch, decode=False)
        actions: Mapping[str, Callable[[], Any]] = {
            "rollout": lambda: roll(policy, batch, decode=False),
            "replays": lambda: [train(policy, rollout) for _ in range(5)],
            "references": lambda: [refer(policy, rollout) for _ in range(5)],
        }
        return {"batch": batch, **profiled(actions[what])}

    return run


def doctor_of(model: Model, dtype: str, native: bool = False) -> Callable[[Maker], Result]:
    """The doctor's replay checks: noise of the log-probability against the clip range."""

    def run(maker: Maker) -> Result:
        memory = Memory(arithmetic="native" if native else "autocast")
        policy = maker.policy(model, 2, dtype=dtype, memory=memory)
        rollout = roll(policy, 2, decode=False)
        subject = Subject(
            "random weights", policy, Settings(sampling=policy.sampling, dtype=dtype, clip_range=CLIP_RANGE),
            prompts(2), SampleNoise([Random(0).at(i) for i in range(2)]), TRANSITION, rollout,
        )  # fmt: skip
        found = checks.replay(subject, torch.empty(0))
        return {
            "clip_range": CLIP_RANGE,
            **{c.name: {"measured": c.measured, "passed": c.passed} for c in found},
        }

    return run


class Calls:
    """Notes the arguments of a denoiser's calls, so that they can be repeated alone."""

    def __init__(self, policy: PipelinePolicy):
        (self.model,) = policy.denoisers.values()
        self.arguments: list[tuple[Any, Any]] = []

    @contextmanager
    def noted(self) -> Any:
        """Inside, calls are noted."""
        handle = self.model.register_forward_pre_hook(
            lambda _, args, kwargs: self.arguments.append((args, kwargs)), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    def repeat(self, gradient: bool) -> None:
        """The same calls without a pipeline."""
        with torch.set_grad_enabled(gradient):
            for args, kwargs in self.arguments:
                output = self.model(*args, **kwargs)
                output = output[0] if isinstance(output, tuple) else output.sample
                if gradient:
                    output.float().sum().backward()


def against_denoiser(policy: PipelinePolicy, batch: int) -> Result:
    """Seconds per picture and per action, against the denoiser alone with the same arguments."""
    forward, backward = Calls(policy), Calls(policy)
    with forward.noted():
        rollout = roll(policy, batch, decode=False)
    with backward.noted():
        train(policy, rollout)
    rolled = seconds(lambda: roll(policy, batch, decode=False), repeats=2)
    bare_rolled = seconds(lambda: forward.repeat(False), repeats=2)
    replayed = seconds(lambda: train(policy, rollout))
    bare_replayed = seconds(lambda: backward.repeat(True))
    if not policy.compiled:
        # Compiled code hides its operations from the counter.
        WORK[batch] = flops(lambda: backward.repeat(True))
    work = WORK.get(batch)
    return {
        "batch": batch,
        "seconds_per_picture": round(rolled / batch, 4),
        "rollout_over_denoiser": round(rolled / bare_rolled, 3),
        "seconds_per_action": round(replayed / batch, 4),
        "replay_over_denoiser": round(replayed / bare_replayed, 3),
        "teraflops_per_action": None if work is None else round(work / batch / 1e12, 3),
        "utilisation": None if work is None else utilisation(work, replayed),
        "compiled": {k: str(v) for k, v in policy.compiled.items()},
    }


def speed_of(memory: Memory, package: str = "") -> Callable[[Maker], Result]:
    """Speed of SD3.5 with an attention backend and with or without compilation."""

    def run(maker: Maker) -> Result:
        if package and find_spec(package) is None:
            return {"not_measured": f"{package} is not installed"}
        batch = 2 if maker.tiny else 8
        # A rehearsal need not wait for a compiler.
        backend = {"backend": "eager"} if maker.tiny else {}
        with patch.object(placement, "CompiledBlocks", partial(CompiledBlocks, **backend)):
            policy = maker.policy(SD35, batch, memory=memory)
        return against_denoiser(policy, batch)

    return run


def memory_of(model: Model, native: bool = False) -> Callable[[Maker], Result]:
    """Peak memory of a replay and its backward pass, against the estimate."""

    def run(maker: Maker) -> Result:
        batch = 2
        memory = Memory(arithmetic="native" if native else "autocast")
        policy = maker.policy(model, batch, memory=memory)
        rollout = roll(policy, batch, decode=False)
        train(policy, rollout)
        measured = peak_bytes(lambda: train(policy, rollout))
        folder = maker.folder / model.family if maker.tiny else published_folder(model.hub)
        assert folder is not None
        pipeline = build(folder, DTYPES["bfloat16"])
        lora = LoRA(rank=32, alpha=64)
        Trainable(denoisers(pipeline), lora, seed=0, with_reference=False, native=native)
        tracer = Tracer(pipeline, DTYPES["bfloat16"], native=native)
        arguments = maker.sampling(model).arguments()
        texts = [p.text for p in prompts(batch)]
        estimate = tracer.training({"prompt": texts, **arguments}).peak(False)
        ratio = None if not measured else round(measured / estimate, 3)
        return {
            "batch": batch,
            "measured_gb": in_gb(measured),
            "estimated_gb": in_gb(estimate),
            "measured_over_estimate": ratio,
        }

    return run


@contextmanager
def limited_to(gb: float) -> Any:
    """Inside, the allocator hands out at most this many GB."""
    if not torch.cuda.is_available():
        yield
        return
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 2**30 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def preset_of(gb: str) -> Callable[[Maker], Result]:
    """FLUX.1-dev at 1024x1024 with a preset's batches, precision and [memory] section."""

    def run(maker: Maker) -> Result:
        config = flowgrpo.load(f"flux1_dev_{gb}gb")
        # Building and quantising take more than the run, which loads quantised weights.
        memory = Memory() if maker.tiny else config.memory
        policy = maker.policy(FLUX, config.train.rollout_batch, weights=config.model.weights, memory=memory)  # fmt: skip
        maker.free()
        rolls, acts = config.train.rollout_batch, config.train.train_batch
        with limited_to(PRESETS[gb]):
            rollout = roll(policy, rolls)
            part = roll(policy, acts, decode=False) if acts != rolls else rollout
            optimizer = _optimizer(policy, config.train.optimizer, maker)
            peak = peak_bytes(lambda: (roll(policy, rolls), train(policy, part), optimizer.step()))
            return {
                "rollout_batch": rolls,
                "train_batch": acts,
                "seconds_per_picture": round(seconds(lambda: roll(policy, rolls), 1, 0) / rolls, 3),
                "seconds_per_action": round(seconds(lambda: train(policy, part), 2) / acts, 3),
                "peak_beyond_weights_gb": in_gb(peak),
                "peak_gb": in_gb(torch.cuda.max_memory_allocated() if peak else None),
            }

    return run


def _optimizer(policy: PipelinePolicy, name: str, maker: Maker) -> torch.optim.Optimizer:
    if name == "adamw8bit" and not maker.tiny:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained(policy), lr=1e-5)
    return torch.optim.AdamW(trained(policy), lr=1e-5)


def variant_of(memory: Memory, weights: Any = None, optimizer: str = "adamw") -> Callable[[Maker], Result]:  # fmt: skip
    """One update of SD3.5 with other weights, another base or another optimizer."""

    def run(maker: Maker) -> Result:
        batch = 2 if maker.tiny else 4
        policy = maker.policy(SD35, batch, weights=weights, memory=memory)
        rollout, adam = roll(policy, batch, decode=False), _optimizer(policy, optimizer, maker)

        def update() -> None:
            train(policy, rollout)
            adam.step()
            adam.zero_grad()

        update()
        peak = peak_bytes(update)
        return {
            "batch": batch,
            "seconds_per_action": round(seconds(update, 2, 0) / batch, 4),
            "peak_beyond_weights_gb": in_gb(peak),
        }

    return run


def offloading(maker: Maker) -> Result:
    """The time of a visit of the encoders, and of decoding with an offloaded VAE."""
    policy = maker.policy(SD35, 2, memory=Memory(offload_text_encoders=True, offload_vae=True))
    roll(policy, 2)
    found, began = {}, time.perf_counter()
    noise = SampleNoise([Random(1).at(i) for i in range(12)])
    list(policy.run(prompts(24)[12:], noise, nodes=[0, 1], decode=False))
    synchronize()
    found["seconds_for_12_new_prompts"] = round(time.perf_counter() - began, 3)
    rollout = roll(policy, 2, decode=False)
    x = rollout.records[-1].x_next
    found["seconds_to_decode_2"] = round(seconds(lambda: policy.decode(prompts(2), x), 2), 3)
    return found


def moving_average(maker: Maker) -> Result:
    """The time of a step of a moving average: on the device, and with its tensors in main memory."""
    policy = maker.policy(SD35, 2, weights=Full())
    ema = EMA(trained(policy), 0.999)
    on_device = seconds(ema.update, 3)
    parameters = [p.detach() for p in ema.parameters]
    average = [a.cpu() for a in ema.average]

    def in_main_memory() -> None:
        torch._foreach_lerp_(average, [p.cpu() for p in parameters], 1e-3)

    return {
        "parameters": sum(p.numel() for p in parameters),
        "milliseconds_on_device": round(1e3 * on_device, 2),
        "milliseconds_in_main_memory": round(1e3 * seconds(in_main_memory, 1), 2),
    }


def video(maker: Maker) -> Result:
    """Wan 2.1 1.3B: seconds per video and per action."""
    policy = maker.policy(WAN, 1, memory=Memory(gradient_checkpointing=not maker.tiny))
    rollout = roll(policy, 1)
    peak = peak_bytes(lambda: train(policy, rollout))
    steps = policy.num_steps()
    return {
        "steps": steps,
        "seconds_per_video": round(seconds(lambda: roll(policy, 1), 1, 0), 3),
        "seconds_per_action": round(seconds(lambda: train(policy, rollout), 2, 0), 3),
        "peak_of_a_replay_gb": in_gb(peak),
    }


def quick_start(maker: Maker) -> Result:
    """Iterations of the quick start."""
    number = 1 if maker.tiny else 10
    return {"iterations": number, **_train(maker, [], number)}


def pretraining(maker: Maker) -> Result:
    """Optimizer steps of the embedded model on random latents, as in its pre-training."""
    policy = PipelinePolicy.from_pretrained(
        "shapes",
        sampling=flowgrpo.load("quickstart_flow_grpo").sampling,
        weights=Full(),
        device=maker.device,
    )
    (model,) = policy.denoisers.values()
    batch = 8 if maker.tiny else 256
    calls = Calls(policy)
    with calls.noted():
        roll(policy, batch, decode=False)
    calls.arguments = calls.arguments[:1]
    adam = torch.optim.AdamW(trained(policy), lr=1e-4)

    def step() -> None:
        calls.repeat(True)
        adam.step()
        adam.zero_grad()

    milliseconds = 1e3 * seconds(step, 3)
    return {"batch": batch, "model": type(model).__name__, "milliseconds": round(milliseconds, 2)}


def _train(maker: Maker, extra: Sequence[str], iterations: int, processes: int = 1) -> Result:
    """Train the quick start in processes of its own; seconds per iteration."""
    small = ["train.groups=2", "train.rollout_batch=32", "train.train_batch=16"]
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.folder={folder}/run", f"run.device={'cpu' if maker.device == 'cpu' else 'cuda'}", f"train.iterations={iterations}",
            "evaluation.every=0", "evaluation.images=12", "evaluation.grid_prompts=2",
            "evaluation.grid_samples=1", *(small if maker.tiny else []), *extra,
        ]  # fmt: skip
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]  # fmt: skip
        command = [*start, "-m", "flowgrpo", "train", "quickstart_flow_grpo"]
        command += [word for s in settings for word in ("--set", s)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {k: round(last[k], 3) for k in ("rollout", "train", "total") if k in last}


def processes_of(extra: Sequence[str]) -> Callable[[Maker], Result]:
    """The quick start on two processes."""

    def run(maker: Maker) -> Result:
        found = torch.cuda.device_count() if maker.device != "cpu" else 0
        return {"devices": found, **_train(maker, extra, 1 if maker.tiny else 5, processes=2)}

    return run


def sharded() -> list[Item]:
    """Sharded training, once the configuration has the table [parallel]."""
    if not any(f.name == "parallel" for f in fields(Config)):
        return []
    return [Item("two processes, sharded", processes_of(["parallel.shard=denoiser"]), 120, 40)]


def parts() -> list[Part]:
    """All parts, most important first."""
    dtypes = ("bfloat16", "float16")
    models = {"sd35_medium": SD35, "flux1_dev": FLUX}
    attention = {"native": "", "flash": "flash_attn", "xformers": "xformers"}
    return [
        Part(0, "Profile of SD3.5-M, batch 8", [Item(w, profile_of(w)) for w in ("rollout", "replays", "references")]),
        Part(1, "Numerical noise in half precision", [
            *[Item(f"{n} {d}", doctor_of(m, d)) for n, m in models.items() for d in dtypes],
            *[Item(f"{n} bfloat16, native", doctor_of(m, "bfloat16", True)) for n, m in models.items()],
        ]),
        Part(2, "SD3.5-M, LoRA, 512x512", [
            Item("default attention", speed_of(Memory())),
            Item("native arithmetic", speed_of(Memory(arithmetic="native"))),
            Item("memory", memory_of(SD35)),
            Item("memory, native arithmetic", memory_of(SD35, native=True)),
            *[Item(f"{a} attention", speed_of(Memory(attention=a), p)) for a, p in attention.items()],
            Item("compiled", speed_of(Memory(compile="regional")), 150, 60),
        ]),
        Part(3, "FLUX.1-dev, LoRA, 1024x1024", [
            Item(f"preset of {gb} GB", preset_of(gb), 120, 40) for gb in PRESETS
        ]),
        Part(4, "SD3.5-M, other ways to train", [
            Item("full", variant_of(Memory(gradient_checkpointing=True), Full())),
            Item("full, 8-bit AdamW", variant_of(Memory(gradient_checkpointing=True), Full(), "adamw8bit")),
            *[Item(f"{q} base", variant_of(Memory(quantize=q))) for q in ("nf4", "int8", "torchao_int8")],
            Item("offloading", offloading),
            Item("moving average", moving_average),
        ]),
        Part(5, "Wan 2.1 1.3B, 480p, 33 frames", [Item("rollout and replay", video, 120, 40)]),
        Part(6, "The embedded model", [Item("quick start", quick_start, 180, 30), Item("pre-training", pretraining)]),
        Part(7, "Two processes", [Item("data parallel", processes_of([]), 120, 40), *sharded()]),
    ]  # fmt: skip
