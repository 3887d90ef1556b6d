"""Compares the memory estimate of a sharded run with measured memory, per process.

    python -m benchmarks.sharded_memory [--layers 8] [--heads 16] [--processes 1 2] [--weights full lora]

An SD3 transformer with random weights (300 million with these defaults) is trained in fp32 for two
updates by one process and by several, on the CPU. Measured is the most resident memory of a process
during the second update, less that before the model was loaded. Pages of the model's file that are still
mapped are left out if the denoiser is divided, because the parts are copies and the kernel may drop them.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowgrpo.config import Config, load
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.memory import GB, budget, estimate_footprint, memory_options

# Freed tensors go back to the system at once, so that resident memory is that of live tensors.
SMALL_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # fmt: skip


def enlarged(folder: Path, layers: int, heads: int) -> None:
    """Save the tiny SD3 pipeline with a larger transformer."""
    from diffusers import SD3Transformer2DModel

    from tests.tiny import save

    save("sd3", folder)
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64, "caption_projection_dim": 64 * heads}  # fmt: skip
    small = SD3Transformer2DModel.load_config(folder / "transformer")
    SD3Transformer2DModel.from_config({**small, **sizes}).save_pretrained(folder / "transformer")


def configured(folder: Path, weights: str, processes: int) -> Config:
    """A configuration of the run, of which only what concerns memory matters."""
    from tests.tiny import FAMILIES

    call = FAMILIES["sd3"].call
    changes = [
        f"model.path={folder}", f"model.weights.kind={weights}", "sampling.num_steps=3", "algorithm.steps.last=2",
        "train.groups=2", "algorithm.group_size=2", "train.rollout_batch=2", "train.train_batch=2",
        "train.updates=1", "loss.kl_coef=0", "train.ema_decay=0", f"parallel.shard={'denoiser' if processes > 1 else 'off'}",
    ]  # fmt: skip
    config = load("quickstart_flow_grpo", changes)
    named = {k: v for k, v in call.items() if k in ("height", "width", "guidance_scale")}
    rest = {k: v for k, v in call.items() if k not in named}
    return replace(config, sampling=replace(config.sampling, call=rest, **named))


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process that are resident; with ``VmHWM`` the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def work(folder: Path, weights: str, out: Path) -> None:
    """One process: two updates, and their memory."""
    import torch
    from accelerate import Accelerator

    from flowgrpo.core.random import Random
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward
    from flowgrpo.training.learner import Learner

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    config = configured(folder, weights, accelerator.num_processes)
    before, mapped = resident(), resident("RssFile")
    policy = PipelinePolicy.from_pretrained(
        config.model.source,
        sampling=config.sampling,
        weights=config.model.weights,
        parallel=config.parallel,
        batch_size=2,
    )
    train = replace(config.train, monitor_states=0)
    learner = Learner(policy, train, config.loss, accelerator)
    scorer = RewardScorer([Reward(model="benchmarks.sharded_memory:brightness")])
    groups = [Group(i, Prompt(text)) for i, text in enumerate(("a red cube", "two dogs"))]
    own = groups[accelerator.process_index :: accelerator.num_processes]
    seconds = peak = 0.0
    for iteration in range(2):
        random = Random(0).at(iteration)
        experience = config.algorithm.collect(policy, own, scorer, random, 2)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here.
        began = time.perf_counter()
        learner.update(experience, torch.linspace(-1, 1, len(experience.actions)), random)
        seconds, peak = time.perf_counter() - began, resident("VmHWM") - before
    mapped = resident("RssFile") - mapped if config.parallel.is_sharded else 0
    scorer.close()
    between = resident() - before - mapped
    found = {"peak": peak - mapped, "seconds": seconds, "between": between, "mapped": mapped}
    (out / f"{accelerator.process_index}.json").write_text(strict_json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def brightness(media: Any, prompts: Any) -> Any:
    """A reward."""
    return media.flatten(1).mean(1)


def measure(folder: Path, weights: str, processes: int) -> list[dict[str, float]]:
    """What each process measured."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        task = ["benchmarks.sharded_memory", "--work", str(folder), weights, out]
        command = [sys.executable, "-m", *launcher, *task]
        subprocess.run(command, check=True, env={**os.environ, **SMALL_BLOCKS})
        return [json.loads(f.read_text()) for f in sorted(Path(out).glob("*.json"))]


def main() -> None:
    """Print one line per kind of weights and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", nargs="+", default=["full", "lora"])
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        folder, weights, out = options.work
        work(Path(folder), weights, Path(out))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sd3"
        enlarged(folder, options.layers, options.heads)
        for weights in options.weights:
            for processes in options.processes:
                config = configured(folder, weights, processes)
                parts = estimate_footprint(config, [Prompt("a red cube")], processes, device="cpu")
                total = budget(parts, memory_options(config, processes))
                estimate = sum(total.resident.values()) + total.phases["training"]
                found = measure(folder, weights, processes)
                peaks = [one["peak"] for one in found]
                print(
                    f"{weights:5} {processes} processes: estimate {estimate / GB:.2f} GB, measured "
                    f"{' and '.join(f'{p / GB:.2f}' for p in peaks)} GB "
                    f"({100 * (estimate / max(peaks) - 1):+.1f} %), between updates {found[0]['between'] / GB:.2f} GB, mapped "
                    f"{found[0]['mapped'] / GB:.2f} GB, {found[0]['seconds']:.1f} s per update, {parts.trained / 1e6:.0f} million trained",
                    flush=True,
                )


if __name__ == "__main__":
    main()
