"""Context parallelism: several processes compute each sample together, each with a part of its tokens.

diffusers does the work (``enable_parallelism`` with a ``ContextParallelConfig``). Hooks of the denoiser keep
a process's part of the tokens before its blocks, attention exchanges tokens for heads (Ulysses,
arXiv:2309.14509), and the output is gathered, so that every process has the whole output. The gradient of
a gathered output is that of the process's own tokens, so each process has the part of a parameter's gradient
that comes through its tokens: the whole gradient is the sum over the processes, without a factor.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers import ContextParallelConfig, ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flowgrpo.policy.settings import Parallel

MEASURED = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
)
"""Classes of denoisers whose samples, replays and gradients were measured to be those of one process
(``benchmarks/context_parallel.py``). Other classes either have no plan in diffusers or fail with it."""
UNDIVIDED = "divisible by mesh size"
"""Part of diffusers' message about tokens that cannot be divided."""


def check_denoisers(denoisers: Mapping[str, ModelMixin], number: int) -> None:
    """Check that the tokens of denoisers can be divided.

    Args:
        denoisers: By component name.
        number: Processes that share a sample.

    Raises:
        ValueError: If one of them is of another class than those measured, or its attention heads cannot be
            divided.
    """
    for name, model in denoisers.items():
        kind = _kind(model)
        if kind not in MEASURED:
            raise ValueError(
                f"parallel.context = {number} is not supported for {kind}; the denoisers that it was measured for are "
                f"{', '.join(MEASURED)}. Use 1, and memory.gradient_checkpointing or parallel.shard to save memory"
            )
        if any("KV" in type(getattr(m, "processor", None)).__name__ for m in model.modules()):
            raise ValueError(
                f"parallel.context = {number} is not supported for a {kind} that caches keys and values (FLUX.2 klein "
                "KV), for which it was not measured; use 1"
            )
        heads = int(model.config["num_attention_heads"])
        if heads % number:
            sizes = [n for n in range(2, heads + 1) if heads % n == 0]
            raise ValueError(
                f"parallel.context = {number} does not divide the {heads} attention heads of the {name}; use "
                f"one of {', '.join(map(str, sizes))}, or 1"
            )


def divide_tokens(
    denoisers: Mapping[str, ModelMixin], number: int, device: torch.device
) -> "list[AttentionCount]":
    """Divide the tokens of each sample among ``number`` consecutive processes. All processes call this.

    Args:
        denoisers: With their adapters.
        number: Processes that share a sample; divides their number.
        device: Device of this process.

    Returns:
        Counts of the attentions of each denoiser.
    """
    check_denoisers(denoisers, number)
    mesh = _mesh(number, device)
    for model in denoisers.values():
        config = ContextParallelConfig(ulysses_degree=number, mesh=mesh)
        with _countable():
            model.enable_parallelism(config=config)
        if _kind(model) == "QwenImageTransformer2DModel":
            model.forward = _with_even_text(model.forward, number)
    return [AttentionCount(model, number) for model in denoisers.values()]


def share_samples(
    denoisers: Mapping[str, ModelMixin],
    parallel: Parallel | None,
    device: torch.device,
    call: Callable[..., Any],
) -> "tuple[list[AttentionCount], Callable[..., Any]]":
    """Let processes compute each sample together, if so configured.

    Args:
        denoisers: With their adapters.
        parallel: The settings.
        device: Device of this process.
        call: The pipeline's call.

    Returns:
        Counts of the attentions of each denoiser, none if samples are not shared; and the call to use.
    """
    if parallel is None or parallel.context == 1:
        return [], call
    counts = divide_tokens(denoisers, parallel.context, device)
    return counts, explained(call, parallel.context)


def _kind(model: nn.Module) -> str:
    """The name of a denoiser's class; sharding makes a subclass of it."""
    names = [c.__name__ for c in type(model).__mro__]
    return next((n for n in names if n in MEASURED), names[0])


def _mesh(number: int, device: torch.device) -> DeviceMesh:
    """The processes by data and by context; diffusers wants an axis for ring attention as well."""
    shape = (torch.distributed.get_world_size() // number, 1, number)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))


@contextmanager
def _countable() -> Iterator[None]:
    """Inside there is an accelerator, by whose number diffusers 0.42 divides; a CPU has none."""
    count = torch.accelerator.device_count
    if count() == 0:
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _with_even_text(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The forward of a denoiser whose text has as many tokens as the longest prompt of a batch.

    Masked tokens are added until their number can be divided, which changes nothing but rounding.
    """

    @wraps(forward)
    def padded(*args: Any, **kwargs: Any) -> Any:
        text: Tensor = kwargs["encoder_hidden_states"]
        mask: Tensor | None = kwargs.get("encoder_hidden_states_mask")
        missing = -text.shape[1] % number
        if missing:
            if mask is None:
                mask = text.new_ones(text.shape[:2], dtype=torch.bool)
            kwargs["encoder_hidden_states"] = nn.functional.pad(text, (0, 0, 0, missing))
            kwargs["encoder_hidden_states_mask"] = nn.functional.pad(mask, (0, missing))
        return forward(*args, **kwargs)

    return padded


def explained(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A pipeline's call whose error about tokens that cannot be divided names the key."""

    @wraps(call)
    def calling(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except AssertionError as error:
            if UNDIVIDED not in str(error):
                raise
            raise ValueError(
                f"parallel.context = {number} does not divide the tokens of this size; choose a height, width and number "
                "of frames whose number of tokens it divides, and a sampling.call.max_sequence_length that it divides"
            ) from error

    return calling


class AttentionCount:
    """Counts the numbers in the queries of a denoiser's divided attentions.

    Attributes:
        most: The most that a pass has had so far, for one sample and all of its tokens.
        number: Processes that share a sample.
    """

    def __init__(self, model: nn.Module, number: int = 1):
        """
        Args:
            model: The denoiser.
            number: Processes that share a sample, if its tokens are divided already.
        """
        self.most = self._now = 0
        self._is_inside = False
        self.number = number
        crosses = _kind(model) == "WanTransformer3DModel"
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)
        for module in model.modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.register_forward_pre_hook(
                    lambda m, args, kwargs: self._add(m, args, kwargs, crosses), with_kwargs=True
                )

    def _begin(self, *_: Any) -> None:
        self._now, self._is_inside = 0, True

    def _end(self, *_: Any) -> None:
        # With gradient checkpointing, the backward pass calls attentions as well.
        self._is_inside = False

    def _add(self, module: Any, args: Any, kwargs: Any, crosses: bool) -> None:
        """Count one attention. Texts are attended to by an attention of its own, which is not divided
        (``crosses``), or are a part of the sequence."""
        names = ("hidden_states", "encoder_hidden_states")
        tokens = [*args[:2], *(kwargs[n] for n in names[len(args) :] if n in kwargs)]
        found = [t for t in tokens if isinstance(t, Tensor)]
        if not self._is_inside or (crosses and len(found) > 1):
            return
        width = module.inner_dim
        self._now += self.number * width * sum(t.shape[1] for t in found)
        self.most = max(self.most, self._now)
