"""Compares the time of an iteration of the quick start with the time of the denoiser alone.

    python -m benchmarks.overhead --iterations 10

The time of the denoiser alone is that of the same forward and backward passes at the same batch sizes,
called in a loop without a pipeline, a scheduler or a reward.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import flowgrpo
from flowgrpo.cli.common import quiet
from flowgrpo.policy import PipelinePolicy


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a function in seconds, after a warm-up call."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"run.folder={folder}/run", f"train.iterations={options.iterations}", "evaluation.every=0",
            "evaluation.images=12", "evaluation.grid_prompts=2", "evaluation.grid_samples=1", "failures.probe=off", *options.set,
        ]  # fmt: skip
        config = flowgrpo.load("quickstart_flow_grpo", settings)
        captured = _capture_shapes()
        flowgrpo.train(config)
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][2:]
    shapes = captured[-1] if captured else {}
    phases = {
        k: statistics.median(r[k] for r in rows) for k in ("rollout", "scoring", "train", "total")
    }
    policy = PipelinePolicy.from_pretrained(
        "shapes", sampling=config.sampling, weights=config.model.weights
    )
    pure = 0.0
    (denoiser,) = policy.denoisers.values()
    for (batch, gradient), number in sorted(shapes.items()):
        seconds = median_seconds(lambda b=batch, g=gradient: _pass(denoiser, b, g))
        pure += seconds * number / options.iterations
        print(
            f"  batch {batch:>4} {'forward + backward' if gradient else 'forward'}: {1e3 * seconds:.0f} ms x {number / options.iterations:.1f} per iteration"
        )
    decode = median_seconds(
        lambda: _decode(policy, config.train.groups * config.algorithm.group_size)
    )
    for name, value in phases.items():
        print(f"{name:>10} {value:.3f} s")
    print(f"pure denoiser {pure:.3f} s, decoding {decode:.3f} s")
    print(f"iteration / denoiser            {phases['total'] / pure:.2f}")
    print(f"iteration / (denoiser + decode) {phases['total'] / (pure + decode):.2f}")


def _capture_shapes() -> list[dict[tuple[int, bool], int]]:
    """Count the denoiser's calls in rollouts and updates, by batch size and whether they need gradients."""
    counts: dict[tuple[int, bool], int] = {}
    found = [counts]
    from flowgrpo.algorithms import FlowGRPO
    from flowgrpo.training.learner import Learner

    original_init = PipelinePolicy.__init__
    active = {"on": False}

    def init(self: PipelinePolicy, *args: object, **kwargs: object) -> None:
        original_init(self, *args, **kwargs)
        for model in self.denoisers.values():
            model.register_forward_pre_hook(count, with_kwargs=True)

    def count(model: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if active["on"]:
            key = (kwargs["hidden_states"].shape[0], torch.is_grad_enabled())
            counts[key] = counts.get(key, 0) + 1

    def around(method: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            active["on"] = True
            try:
                return method(*args, **kwargs)
            finally:
                active["on"] = False

        return wrapped

    PipelinePolicy.__init__ = init
    FlowGRPO.collect = around(FlowGRPO.collect)
    Learner.update = around(Learner.update)
    return found


def _pass(denoiser: torch.nn.Module, batch: int, gradient: bool) -> None:
    size = torch.full((batch, 2), 64.0)
    with torch.set_grad_enabled(gradient):
        output = denoiser(
            hidden_states=torch.randn(batch, 4, 8, 8),
            encoder_hidden_states=torch.randn(batch, 16, 64),
            timestep=torch.full((batch,), 500.0),
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
        if gradient:
            output.square().mean().backward()


@torch.no_grad()
def _decode(policy: PipelinePolicy, batch: int) -> None:
    policy.pipeline.vae.decode(torch.randn(batch, 4, 8, 8))


if __name__ == "__main__":
    main()
