"""Compares diffusers' context parallelism on two processes with one process, rollout and gradients.

    python -m benchmarks.context_parallel --write docs/parallel.md

For each tiny family of the tests whose denoiser has a plan for context parallelism in diffusers, two
processes of gloo run a rollout of two samples and replay one step with gradients, each with half of the
sequence (``parallel.context = 2``). The gradients of both are added. The table has the largest differences
of the states and of the model output, and the norm of the difference of the gradients over their norm, for
LoRA and for full fine-tuning. Families that flowgrpo refuses are tried, too.

``python -m benchmarks.rank_equality --model wan_t2v --set parallel.context=2`` compares whole runs.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, LoRA, PipelinePolicy, context
from flowgrpo.policy.settings import Parallel, Weights
from scripts.page_tables import write_marked_text
from tests.conftest import sampling_of
from tests.processes import ranks
from tests.tiny import FAMILIES, save

WEIGHTS: dict[str, Weights] = {"LoRA": LoRA(rank=2, alpha=4), "full": Full()}
PROMPTS = [Prompt("a red cube"), Prompt("two dogs")]
USUAL = (
    "wan_t2v", "wan22", "wan_i2v", "flux", "flux_kontext", "flux2", "flux2_klein", "qwen_image", "qwen_image_edit", "ltx", "ltx2",
)  # fmt: skip


def compute(model: Path, name: str, weights: Weights, number: int = 1) -> dict[str, Tensor]:
    """States of a rollout, the output of a replayed step, and gradients, by name.

    Args:
        model: The folder of the family.
        name: The family.
        weights: What is trained.
        number: Processes that compute each sample together.
    """
    options: dict[str, Any] = {"sampling": sampling_of(name), "weights": weights}
    policy = PipelinePolicy.from_pretrained(model, **options, parallel=Parallel(context=number))
    assert policy.trainable is not None
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in policy.trainable.parameters.items():
            if "lora_B" in key:  # which is 0 at first, so that the other matrix has no gradient
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    noise = SampleNoise([Random(0).at(i) for i in range(len(PROMPTS))])
    step = {"stochastic": {1}, "transition": CPS(), "record": {1}}
    (rollout,) = policy.run(PROMPTS, noise, decode=False, **step)
    assert rollout.x is not None
    output = policy.replay(PROMPTS, rollout.records[0].x, 1, CPS()).prediction.output
    target = torch.randn(output.shape, generator=random)
    (output * target).mean().backward()
    found = {"x": rollout.x, "output": output.detach()}
    for key, parameter in policy.trainable.parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[f"gradient {key}"] = gradient.contiguous()
    return {k: v.contiguous() for k, v in found.items()}


def work(rank: int, model: Path, name: str, weights: Weights, file: Path) -> int:
    """One of two processes."""
    Accelerator(cpu=True)
    context.check_denoisers = lambda *_: None
    found = compute(model, name, weights, number=2)
    for key, value in found.items():
        if key.startswith("gradient"):
            dist.all_reduce(value)
    if rank == 0:
        save_file(found, file)
    return 0


def compare(name: str, kind: str, temporary: Path) -> Sequence[str]:
    """A row of the table."""
    model, file = temporary / name, temporary / f"{name}-{kind}.safetensors"
    if not model.exists():
        save(name, model)
    one = compute(model, name, WEIGHTS[kind])
    processes = ranks(partial(work, model=model, name=name, weights=WEIGHTS[kind], file=file))  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    if [process.returncode for process in processes] != [0, 0]:
        return name, kind, f"fails: {outputs[0].strip().splitlines()[-1]}", "", ""
    two = load_file(file)
    apart = {k: float((one[k] - two[k]).abs().max()) for k in ("x", "output")}
    both = [[v[k].flatten() for k in one if k.startswith("gradient")] for v in (one, two)]
    first, second = (torch.cat(list(g)) for g in both)
    gradient = float((first - second).norm() / first.norm())
    return name, kind, f"{apart['x']:.1e}", f"{apart['output']:.1e}", f"{gradient:.1e}"


def main() -> None:
    """Compare, print the table, and write it to a page if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=USUAL, metavar="NAME")
    parser.add_argument("--write", type=Path, help="page with the marks of the table")
    options = parser.parse_args()
    rows = ["| family | weights | states | model output | gradient |", "|---|---|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.families:
            for kind in WEIGHTS:
                cells = compare(name, kind, Path(temporary))
                rows.append("| " + " | ".join(cells) + " |")
                print(rows[-1], flush=True)
    if options.write:
        write_marked_text(options.write, "context_parallel", "\n".join(rows))


if __name__ == "__main__":
    main()
