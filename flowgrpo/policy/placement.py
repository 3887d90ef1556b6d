"""Prepares the models of a pipeline: device, precision, offloading, quantisation, decoding in parts.

:func:`prepare` applies the ``[memory]`` settings (:class:`flowgrpo.policy.settings.Memory`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowgrpo.policy.loading import autoencoders, denoisers
from flowgrpo.policy.precision import guarded, wrap_helpers
from flowgrpo.policy.prompt_cache import cache_encodings
from flowgrpo.policy.settings import Memory


def resolve_device(name: str, num_processes: int = 1) -> str:
    """The device that a name means here; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: If there is no such device, or one device is named for several processes.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"there is no device {name!r}; use 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from None
    if device.type == "cpu":
        return name
    backend = torch.get_device_module(device) if hasattr(torch, device.type) else None
    if backend is None or not backend.is_available():
        raise ValueError(
            f"{name!r} is not available here; use 'auto' or 'cpu', or install a torch for it"
        )
    if device.index is not None and device.index >= backend.device_count():
        raise ValueError(f"{name!r} is not available here: there are {backend.device_count()}")
    if device.index is not None and num_processes > 1:
        raise ValueError(
            f"{name!r} is one device, but there are {num_processes} processes; use {device.type!r}"
        )
    return name


def models_of(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Every model of a pipeline, by its name there."""
    return {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}


def prepare(
    pipeline: DiffusionPipeline,
    memory: Memory,
    device: torch.device,
    dtype: torch.dtype,
    precision: Callable[[], torch.dtype],
) -> None:
    """Freeze the models of a pipeline, move them to their devices, and wrap the methods that it calls.

    Args:
        pipeline: The pipeline; its models are changed.
        memory: Settings that trade memory for time.
        device: Device on which the models compute.
        dtype: Precision of the denoisers' arithmetic.
        precision: Returns the precision of the denoisers' inputs; called in every forward pass.
    """
    models, trained = models_of(pipeline), denoisers(pipeline)
    encoders = {k: m for k, m in models.items() if isinstance(m, PreTrainedModel)}
    offload_vae = memory.offload_vae and device.type != "cpu"
    offloaded = autoencoders(pipeline) if offload_vae else []
    for name, model in models.items():
        model.eval().requires_grad_(False)
        placed_elsewhere = name in encoders or any(model is o for o in offloaded)
        if not placed_elsewhere and not is_quantized(model):
            model.to(device)
    placed = Encoders(encoders, device, memory.offload_text_encoders)
    for model in trained.values():
        if model.dtype != dtype and not is_quantized(model):
            model.to(dtype)
        model.forward = guarded(model.forward, device, dtype, precision)
    prepare_denoisers(trained, memory)
    wrap_helpers(pipeline, device, dtype)
    prepare_decoder(pipeline, memory)
    for model in offloaded:
        offload_autoencoder(model, device)
    cache_encodings(pipeline, placed.loaded, memory, device)


def is_quantized(model: ModelMixin) -> bool:
    """Whether a model was loaded quantised, and must keep its precision and its device."""
    return getattr(model, "hf_quantizer", None) is not None


def prepare_denoisers(denoisers: Mapping[str, ModelMixin], memory: Memory) -> None:
    """Apply gradient checkpointing, the attention backend and compilation to the denoisers.

    Raises:
        ValueError: If a denoiser does not support a setting.
    """
    for name, model in denoisers.items():
        kind = type(model).__name__
        if memory.gradient_checkpointing:
            if not getattr(model, "_supports_gradient_checkpointing", False):
                raise ValueError(
                    f"memory.gradient_checkpointing: {kind} ({name}) does not support it"
                )
            model.enable_gradient_checkpointing()
        if memory.attention:
            try:
                model.set_attention_backend(memory.attention)
            except (ImportError, RuntimeError, ValueError) as error:
                raise ValueError(f"memory.attention = {memory.attention!r}: {error}") from error
        if memory.compile == "regional":
            for block in repeated_blocks(model):
                block.compile(dynamic=False)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats: members of its module lists whose class occurs more than once.

    Blocks inside such blocks are left out. Found by structure, because not all models of diffusers name
    their repeated blocks (SD3 and UNets do not).
    """
    listed = [m for stack in model.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    counts = Counter(type(m) for m in listed)
    chosen = [m for m in listed if counts[type(m)] > 1 and list(m.parameters())]
    inner = {id(n) for m in chosen for n in m.modules() if n is not m}
    return [m for m in chosen if id(m) not in inner]


def prepare_decoder(pipeline: DiffusionPipeline, memory: Memory) -> None:
    """Let the VAE decode in tiles, one sample at a time, or a few samples at a time.

    Raises:
        ValueError: If the VAE does not support a setting.
    """
    vae = getattr(pipeline, "vae", None)
    for wanted, method in (
        (memory.vae_tiling, "enable_tiling"),
        (memory.vae_slicing, "enable_slicing"),
    ):
        if wanted and not hasattr(vae, method):
            raise ValueError(f"memory: {type(vae).__name__} cannot {method.replace('_', ' ')}")
        if wanted:
            getattr(vae, method)()
    if memory.decode_batch and vae is not None:
        vae.decode = _split(vae.decode, memory.decode_batch)


def _split(decode: Callable[..., Any], size: int) -> Callable[..., Any]:
    """``decode`` applied to at most ``size`` samples at a time."""

    @wraps(decode)
    def split(z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def part(value: Any, rows: slice) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(z)
            return value[rows] if whole else value

        if len(z) <= size:
            return decode(z, *args, return_dict=return_dict, **kwargs)
        outputs = []
        for start in range(0, len(z), size):
            rows = slice(start, start + size)
            rest = {k: part(v, rows) for k, v in kwargs.items()}
            outputs.append(
                decode(z[rows], *(part(a, rows) for a in args), return_dict=return_dict, **rest)
            )
        if return_dict:
            return type(outputs[0])(sample=torch.cat([o.sample for o in outputs]))
        return (torch.cat([o[0] for o in outputs]),)

    return split


def offload_autoencoder(model: nn.Module, device: torch.device) -> None:
    """Keep a VAE in main memory, and move it to the device while it encodes or decodes."""
    # A pipeline takes its execution device from such hooks.
    _, hook = cpu_offload_with_hook(model, device)
    for name in ("encode", "decode"):
        if hasattr(model, name):
            setattr(model, name, _on_device(model, getattr(model, name), hook))


def _on_device(model: nn.Module, method: Callable[..., Any], hook: Any) -> Callable[..., Any]:
    """The method, called with the model on the hook's device."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hook.hook.pre_forward(model)
        try:
            return method(*args, **kwargs)
        finally:
            hook.offload()

    return wrapped


class Encoders:
    """The text and image encoders of a pipeline, offloaded to main memory if requested."""

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device, offload: bool):
        """Move the models to the device, or to main memory if they are offloaded.

        Args:
            models: The encoders, by their names in the pipeline.
            device: Device on which they compute.
            offload: Whether they are on the device only inside :meth:`loaded`.
        """
        self._hooks = []
        for model in models.values():
            if offload and device.type != "cpu":
                # accelerate's hook moves a model to the device when it is called. A pipeline takes its
                # execution device from the hook.
                model.to("cpu")
                _, hook = cpu_offload_with_hook(model, device)
                self._hooks.append(hook)
            else:
                model.to(device)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """A context in which encoders may be on the device; at its end they are offloaded again."""
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.offload()
