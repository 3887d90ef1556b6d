"""Measures ``memory.arithmetic = "native"`` against ``"autocast"``; the tables of ``docs/device.md``.

    python -m benchmarks.arithmetic traffic --write docs/device.md
    python -m benchmarks.arithmetic doctor --json FILE --write docs/device.md

``traffic`` counts bytes, without weights, for published models at the sizes below. ``doctor`` runs the
doctor in bfloat16 on the tiny families of the tests.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.device.models import FLUX, SD35, Model, prompts
from benchmarks.doctor_families import measured, verdict
from flowgrpo.cli.common import quiet
from flowgrpo.data import strict_json
from flowgrpo.doctor import Settings, examine
from flowgrpo.memory.dispatch_modes import MemoryCounter
from flowgrpo.memory.meta_pipeline import build
from flowgrpo.memory.tracer import Tracer
from flowgrpo.policy import LoRA, Memory
from flowgrpo.policy.loading import denoisers
from flowgrpo.policy.model_files import published_folder
from flowgrpo.policy.weights import Trainable
from scripts.page_tables import markdown_table, write_marked_text
from tests.conftest import sampling_of
from tests.tiny import FAMILIES, save

MODES = ("autocast", "native")
CASES: Sequence[tuple[str, Model, int]] = (
    ("SD3.5 Medium, 512×512, batch 8", SD35, 8),
    ("FLUX.1-dev, 1024×1024, batch 3", FLUX, 3),
)
BF16 = torch.bfloat16


class TrafficCounter(MemoryCounter):
    """Counts also the bytes that operations read and write, and the operations.

    An operation reads every tensor argument and writes every result once, as a kernel of its own does.
    Views and allocations move nothing.

    Attributes:
        moved: Bytes read and written.
        operations: Operations that move bytes.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.moved = self.operations = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        read = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        written = [v for v in tree_leaves(result) if isinstance(v, Tensor)]
        known = {v.untyped_storage()._cdata for v in read}
        is_view = all(v.untyped_storage()._cdata in known for v in written)
        changes = func._schema.is_mutable  # type: ignore[attr-defined]
        if (not is_view or changes) and "empty" not in str(func):
            self.operations += 1
            self.moved += sum(v.numel() * v.element_size() for v in (*read, *written))
        return result


class TrafficTracer(Tracer):
    """A tracer that keeps its counters; the first one is that of the training step."""

    def __init__(self, *arguments: Any, **options: Any):
        self.counters: list[TrafficCounter] = []
        super().__init__(*arguments, **options)

    def _counter(self) -> MemoryCounter:
        self.counters.append(TrafficCounter(self._parameters, self.block))
        return self.counters[-1]


def count(model: Model, batch: int, mode: str) -> dict[str, float]:
    """GB moved by a replay's forward and backward pass, operations, and GB kept for the backward."""
    folder = published_folder(model.hub)
    assert folder is not None
    pipeline = build(folder, BF16)
    native, models = mode == "native", denoisers(pipeline)
    Trainable(models, LoRA(rank=32, alpha=64), seed=0, with_reference=False, native=native)
    tracer = TrafficTracer(pipeline, BF16, native=native)
    texts = [p.text for p in prompts(batch)]
    saved, peak = tracer._forward_backward({"prompt": texts, **model.sampling.arguments()})
    counter = tracer.counters[0]
    return {
        "moved": counter.moved / 1e9,
        "operations": counter.operations,
        "kept": saved / 1e9,
        "peak": peak / 1e9,
    }


def traffic(page: Path | None) -> None:
    """Count all cases, print them, and replace the table of a page."""
    rows = []
    for title, model, batch in CASES:
        found = [count(model, batch, mode) for mode in MODES]
        cells = [
            " → ".join(f"{f[key]:,.{digits}f}" for f in found)
            for key, digits in (
                ("moved", 0),
                ("written", 0),
                ("operations", 0),
                ("kept", 1),
                ("peak", 1),
            )
        ]
        rows.append([title, *cells])
        print(rows[-1], flush=True)
    head = (
        "model",
        "GB read and written",
        "GB written",
        "operations",
        "GB kept for the backward pass",
        "GB at the peak",
    )
    if page:
        write_marked_text(page, "arithmetic-traffic", markdown_table(head, rows))


IN_FP32 = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.pow, Tensor.pow,
    torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.sum, Tensor.sum, F.softplus,
    torch.log, Tensor.log, torch.reciprocal, Tensor.reciprocal, torch.cumsum, Tensor.cumsum,
}  # fmt: skip
"""Operations that autocast runs in fp32 on CUDA, according to PyTorch's list of them
(https://docs.pytorch.org/docs/stable/amp.html), and in the precision of their inputs on CPUs."""


class RulesOfCuda(TorchFunctionMode):
    """Gives autocast on the CPU the rules that it has on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_up, (args, kwargs))
        return func(*args, **kwargs)


def _up(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == BF16 else value


@contextmanager
def rules(mode: str) -> Iterator[None]:
    """The rules of CUDA for autocast; nothing for native arithmetic."""
    with RulesOfCuda() if mode == "autocast" else nullcontext():
        yield


def diagnose(name: str, mode: str) -> dict[str, Any]:
    """The doctor's result of a family, or the reason why there is none."""
    with tempfile.TemporaryDirectory() as folder, rules(mode):
        save(name, folder)
        settings = Settings(
            sampling=sampling_of(name), dtype="bfloat16", memory=Memory(arithmetic=mode)
        )  # type: ignore[arg-type]
        try:
            return examine(folder, settings).to_json()
        except ValueError as error:
            return {"refused": str(error)}


def doctor(file: Path, names: Sequence[str], page: Path | None) -> None:
    """Examine the families that the file does not have, and replace the table of a page."""
    results: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for name in names or FAMILIES:
        for mode in MODES:
            if mode in results.setdefault(name, {}):
                continue
            began = time.perf_counter()
            results[name][mode] = found = diagnose(name, mode)
            file.write_text(strict_json.dumps(results, indent=1) + "\n")
            seconds = time.perf_counter() - began
            print(f"{name}, {mode}: {seconds:.0f} s, {outcome(found)}", flush=True)
    if page:
        write_marked_text(page, "arithmetic-doctor", summary(results))


def outcome(found: Mapping[str, Any]) -> str:
    """The failed checks of a family, the reason of a refusal, or the number of checks."""
    return f"refused: {found['refused']}" if "refused" in found else verdict(found)


def summary(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table: for each mode, families that pass, the largest deviations, and what fails."""
    rows = []
    adapted = {k: v for k, v in results.items() if v["autocast"].get("weights") == "lora"}
    for mode in MODES:
        found = {k: v[mode] for k, v in adapted.items()}
        ran = [v for v in found.values() if "refused" not in v]
        passed = sum(all(c["passed"] for c in v["checks"]) for v in ran)
        failed = [f"`{k}`: {outcome(v)}" for k, v in found.items() if not outcome(v)[0].isdigit()]
        rows.append([
            mode,
            f"{passed} of {len(found)}",
            *(
                _spread([measured(v, check) for v in ran])
                for check in (
                    "replay equals rollout (same batch)",
                    "ratio is 1 before an update (same batch)",
                    "ratio is 1 before an update (batch of 1)",
                    "noise level 0 equals the stock sampler",
                )
            ),
            "; ".join(failed) or "none",
        ])  # fmt: skip
    head = (
        "arithmetic", "families that pass every check", "replay, same batch", "log-ratio, same batch",
        "log-ratio, batch of 1", "pixels against the stock sampler", "what fails",
    )  # fmt: skip
    return markdown_table(head, rows)


def _spread(values: Sequence[float]) -> str:
    """Median and largest of the finite values."""
    finite = sorted(v for v in values if math.isfinite(v))
    return f"{finite[len(finite) // 2]:.0e}, at most {finite[-1]:.0e}" if finite else "none"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("traffic", "doctor"))
    parser.add_argument("families", nargs="*", help="families of the tests; all if none is named")
    parser.add_argument("--json", default="arithmetic.json", help="file of the doctor's results")
    parser.add_argument("--write", metavar="PAGE", help="page whose table is replaced")
    options = parser.parse_args()
    quiet()
    page = Path(options.write) if options.write else None
    if options.part == "traffic":
        traffic(page)
    else:
        doctor(Path(options.json), options.families, page)


if __name__ == "__main__":
    main()
