"""Compares the memory estimate with measured memory, at larger sizes than the tests.

    python -m benchmarks.memory_estimate [--family NAME ...] [--gpu CONFIG ...]

Without a GPU, denoisers of the tiny families are made wider and deeper, and the bytes of one training
step are counted tensor by tensor. With ``--gpu sd35_medium`` or ``flux1_dev``, the transformer of the
published size gets random weights on the GPU, and PyTorch's count of allocated memory is compared.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from flowgrpo.memory import GB
from flowgrpo.memory.dispatch_modes import MemoryCounter
from flowgrpo.memory.meta_pipeline import build
from flowgrpo.memory.tracer import Tracer, bytes_of
from flowgrpo.policy import LoRA
from flowgrpo.policy.loading import denoisers, load_pipeline
from flowgrpo.policy.weights import Trainable
from tests.tiny import FAMILIES, save

PUBLISHED = Path(__file__).parents[1] / "tests" / "published_configs"
LORA = LoRA(rank=32, alpha=64)
WIDER: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 8,
            "caption_projection_dim": 256, "pos_embed_max_size": 64},
    "flux": {"num_layers": 3, "num_single_layers": 6, "attention_head_dim": 32,
             "num_attention_heads": 8, "axes_dims_rope": (8, 12, 12)},
    "wan_t2v": {"num_layers": 6, "attention_head_dim": 24, "num_attention_heads": 8,
                "ffn_dim": 768},
    "sdxl": {"block_out_channels": (64, 128), "cross_attention_dim": 64},
}  # fmt: skip


class Inputs:
    """Records the arguments of a denoiser's calls, so that its forward can be repeated alone."""

    def __init__(self, model: nn.Module):
        self.calls: list[tuple[Any, Any]] = []
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def widened(name: str, folder: Path) -> Path:
    """Save a family with a larger denoiser. Returns the folder."""
    save(name, folder)
    pipeline = load_pipeline(folder)
    for part, model in denoisers(pipeline).items():
        larger = type(model).from_config({**model.config, **WIDER[name]})
        larger.save_pretrained(folder / part)
    return folder


def on_cpu(name: str) -> None:
    """Compare the estimate for a training step of a widened family with counted bytes, in fp32."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = widened(name, Path(temporary))
        call = {**FAMILIES[name].call, "height": 128, "width": 128}
        arguments = {"prompt": ["a red cube"] * 2, "num_inference_steps": 4, **call}
        pipeline = build(folder, torch.float32)
        Trainable(denoisers(pipeline), LORA, seed=0, with_reference=False)
        found = Tracer(pipeline, torch.float32, device="cpu", block=1).training(arguments)
        real = load_pipeline(folder)
        real.set_progress_bar_config(disable=True)
        for model in (m for m in real.components.values() if isinstance(m, nn.Module)):
            model.eval().requires_grad_(False)
        ((part, model),) = denoisers(real).items()
        inputs = Inputs(model)
        real(**{**arguments, "num_inference_steps": 1}, output_type="latent")
        trainable = Trainable({part: model}, LORA, seed=0, with_reference=False)
        inputs.handle.remove()
        for parameter in trainable.parameters.values():
            # The estimate counts gradients of weights separately, so they are dropped here.
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            with MemoryCounter([*model.parameters(), *model.buffers()]) as live:
                # All calls of one step; some pipelines call the model twice for guidance.
                outputs = [model(*args, **kwargs)[0] for args, kwargs in inputs.calls]
                sum(o.square().mean() for o in outputs).backward()
            report(f"{name}, cpu", checkpointing, found.peak(checkpointing), live.peak)
            model.zero_grad(set_to_none=True)


def on_gpu(name: str, side: int, batch: int) -> None:
    """Compare the estimate for a published transformer with PyTorch's count on a GPU, in bf16."""
    call = {"height": side, "width": side, "max_sequence_length": 256}
    arguments = {"prompt": ["a red cube"] * batch, "num_inference_steps": 4, **call}
    pipeline = build(PUBLISHED / name, torch.bfloat16)
    Trainable(denoisers(pipeline), LORA, seed=0, with_reference=False)
    tracer = Tracer(pipeline, torch.bfloat16)
    calls: list[tuple[Any, Any]] = []
    inner = tracer._to_fake

    def noting(part: str, values: Any) -> Any:
        entered = inner(part, values)
        if part in tracer.denoisers:
            calls.append(entered)
        return entered

    tracer._to_fake = noting  # type: ignore[method-assign]
    found = tracer.training(arguments)
    args, kwargs = (_on_gpu(v) for v in calls[:2])
    config = pipeline.transformer.config
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = getattr(diffusers, config["_class_name"]).from_config(config)
        torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    trainable = Trainable({"transformer": model}, LORA, seed=0, with_reference=False)
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            (output, *_) = model(*args, **kwargs)
        output.float().square().mean().backward()
        gradients = 4 * sum(p.numel() for p in trainable.parameters.values())
        peak = torch.cuda.max_memory_allocated() - before - gradients
        report(f"{name}, {side}x{side}, {batch}", checkpointing, found.peak(checkpointing), peak)
        model.zero_grad(set_to_none=True)
    weights = bytes_of(model)
    print(f"{name}: weights {weights / GB:.2f} GB, allocated {before / GB:.2f} GB")


def _on_gpu(values: Any) -> Any:
    from torch.utils._pytree import tree_map

    def make(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.zeros(value.shape, dtype=value.dtype, device="cuda")

    return tree_map(make, values)


def report(name: str, checkpointing: bool, estimate: int, measured: int) -> None:
    """Print one line."""
    how = "with checkpointing" if checkpointing else "without checkpointing"
    print(
        f"{name:<28} {how:<22} estimate {estimate / 2**20:10.1f} MB  measured "
        f"{measured / 2**20:10.1f} MB  {estimate / measured - 1:+.1%}",
        flush=True,
    )


def main() -> None:
    """Compare the families or models of the arguments."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--family", nargs="*", default=list(WIDER), choices=list(WIDER))
    options.add_argument("--gpu", nargs="*", default=[], choices=["sd35_medium", "flux1_dev"])
    options.add_argument("--side", type=int, default=512)
    options.add_argument("--batch", type=int, default=1)
    chosen = options.parse_args()
    for name in chosen.gpu:
        on_gpu(name, chosen.side, chosen.batch)
    for name in [] if chosen.gpu else chosen.family:
        on_cpu(name)


if __name__ == "__main__":
    main()
