"""Prepares the models of a pipeline: device, precision, offloading, quantisation, decoding in parts.

:func:`prepare` applies the ``[memory]`` settings (:class:`flowgrpo.policy.settings.Memory`).

The second half of the file casts tensors to the precision of the model that receives them, and media to
[0, 1].
"""

import functools
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from flowgrpo.core.text import counted
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.compilation import CompiledBlocks, repeated_blocks
from flowgrpo.policy.encoder_lockstep import EncoderLockstep, divide_encoders
from flowgrpo.policy.fixed_device import fix_device
from flowgrpo.policy.loading import autoencoders, denoisers, helpers
from flowgrpo.policy.native import refusing_mixed
from flowgrpo.policy.offloading import Encoders, offload_autoencoder
from flowgrpo.policy.prompt_cache import cache_encodings
from flowgrpo.policy.settings import Memory, Parallel


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
            f"{name!r} is one device, but there are {counted(num_processes, 'process')}; use {device.type!r}"
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
    parallel: Parallel | None = None,
    encoding: EncoderLockstep | None = None,
) -> dict[str, CompiledBlocks]:
    """Freeze the models of a pipeline, move them to their devices, and wrap the methods that it calls.

    The pipeline remembers its device from then on.

    Args:
        pipeline: The pipeline; its models are changed.
        memory: Settings that trade memory for time.
        device: Device on which the models compute.
        dtype: Precision of the denoisers' arithmetic.
        precision: Returns the precision of the denoisers' inputs; called in every forward pass.
        parallel: How the processes divide the models; None if each has whole ones. The denoisers then
            stay in main memory, from which sharding moves their parts.
        encoding: Makes the passes of text encoders equal on all processes, if they are divided.

    Returns:
        The compiled blocks of each denoiser, by its name; none if nothing is compiled.
    """
    models, trained = models_of(pipeline), denoisers(pipeline)
    encoders = {k: m for k, m in models.items() if isinstance(m, PreTrainedModel)}
    offload_vae = memory.offload_vae and device.type != "cpu"
    offloaded = autoencoders(pipeline) if offload_vae else []
    for name, model in models.items():
        model.eval().requires_grad_(False)
        placed_elsewhere = name in encoders or any(model is o for o in offloaded)
        placed_elsewhere |= name in trained and parallel is not None
        if not placed_elsewhere and not is_quantized(model):
            model.to(device)
    offload, may_rewrite = memory.offload_text_encoders, True
    if parallel is not None and parallel.divides_encoders and encoding is not None:
        encoding.watch(divide_encoders(pipeline, parallel, device, offload))
        encoders = {k: m for k, m in encoders.items() if k not in encoding.models}
        may_rewrite = False
    placed = Encoders(encoders, device, offload)
    for model in trained.values():
        if model.dtype != dtype and not is_quantized(model):
            model.to(dtype)
        forward, is_native = model.forward, memory.arithmetic == "native"
        if is_native:
            forward = refusing_mixed(forward, model)
        model.forward = guarded(forward, device, dtype, precision, not is_native)
    compiled = prepare_denoisers(trained, memory)
    wrap_helpers(pipeline, device, dtype)
    prepare_decoder(pipeline, memory)
    for model in offloaded:
        offload_autoencoder(model, device)
    cache_encodings(pipeline, placed.loaded, memory, device, may_rewrite)
    fix_device(pipeline)
    return compiled


def is_quantized(model: ModelMixin) -> bool:
    """Whether a model was loaded quantised, and must keep its precision and its device."""
    return getattr(model, "hf_quantizer", None) is not None


def prepare_denoisers(
    denoisers: Mapping[str, ModelMixin], memory: Memory
) -> dict[str, CompiledBlocks]:
    """Apply gradient checkpointing, the attention backend and compilation to the denoisers.

    Returns:
        The compiled blocks of each denoiser, by its name; none if nothing is compiled.

    Raises:
        ValueError: If a denoiser does not support a setting.
    """
    compiled: dict[str, CompiledBlocks] = {}
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
            compiled[name] = CompiledBlocks(repeated_blocks(model))
    return compiled


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
    if memory.gradient_checkpointing and vae is not None:
        _recompute_decoder(vae)
    if memory.decode_batch and vae is not None:
        vae.decode = split_decode(vae.decode, memory.decode_batch)


def _recompute_decoder(vae: Any) -> None:
    """Let a VAE recompute its activations in the backward pass, if rewards are differentiated.

    Each decode is recomputed by itself, and in it each block where the VAE supports it, so that the
    activations of one block of one part of the batch are kept. Without gradients nothing changes.
    """
    if getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()
        # Condition images are encoded without gradients.
        vae.encoder.gradient_checkpointing = False
    decode = vae.decode

    @wraps(decode)
    def recomputed(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and z.requires_grad:
            return checkpoint(decode, z, *args, use_reentrant=False, **kwargs)
        return decode(z, *args, **kwargs)

    vae.decode = recomputed


def split_decode(decode: Callable[..., Any], size: int) -> Callable[..., Any]:
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


EXACT = re.compile(r"coords|rope|rotary|freqs|(img|txt|text|image|latent|position|pos)_ids")
"""Arguments of models that hold positions of tokens. They stay in fp32, in which pipelines pass them and
models compute with them: bfloat16 rounds a position of 500 to a multiple of 2."""


def wrap_helpers(pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
    """Let autoencoders, ControlNets and adapters accept fp32 states, and encode images deterministically.

    Args:
        pipeline: The pipeline; methods of its models are wrapped.
        device: Device of the models.
        dtype: Precision of the denoisers' arithmetic.
    """
    cast_for_autoencoders(pipeline)
    encode_deterministically(pipeline)
    for model in helpers(pipeline):
        # Some read this attribute without defining it (Z-Image's ControlNet).
        model.gradient_checkpointing = getattr(model, "gradient_checkpointing", False)
        model.forward = guarded(
            model.forward, device, dtype, functools.partial(getattr, model, "dtype")
        )


def encode_deterministically(pipeline: DiffusionPipeline) -> None:
    """Let autoencoders encode a condition image to the mode of its posterior.

    Some pipelines draw a sample of the posterior; a replay would have another condition than its rollout.
    """
    for vae in autoencoders(pipeline):
        if hasattr(vae, "encode"):
            vae.encode = _without_sampling(vae.encode)


def _without_sampling(encode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(encode)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        posterior: Any = output[0] if isinstance(output, tuple) else output
        posterior = getattr(posterior, "latent_dist", posterior)
        if hasattr(posterior, "mode") and hasattr(posterior, "sample"):
            posterior.sample = lambda generator=None: posterior.mode()
        return output

    return wrapped


def cast_for_autoencoders(pipeline: DiffusionPipeline) -> None:
    """Let autoencoders accept inputs of any precision, and compute in their own."""
    for vae in autoencoders(pipeline):
        for name in ("encode", "decode"):
            if hasattr(vae, name):
                setattr(vae, name, _in_precision_of(vae, getattr(vae, name)))


def _in_precision_of(model: ModelMixin, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        dtype = model.dtype
        return method(
            *(cast(v, dtype) for v in args), **{k: cast(v, dtype) for k, v in kwargs.items()}
        )

    return wrapped


def guarded(
    forward: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    precision: Callable[[], torch.dtype],
    autocast: bool = True,
) -> Callable[..., Any]:
    """A denoiser's ``forward`` that casts its inputs, and runs under autocast if ``dtype`` is not fp32.

    The rest of the pipeline, above all the scheduler's arithmetic and the decoder, keeps its precision.

    Args:
        forward: The method.
        device: Device of the model.
        dtype: Precision of the arithmetic.
        precision: Returns the precision of the inputs; called in every forward pass.
        autocast: Whether PyTorch chooses the precision of each operation, unless ``dtype`` is fp32.
    """
    enabled = autocast and dtype != torch.float32

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        weights = precision()
        with torch.autocast(device.type, dtype, enabled=enabled):
            # Timesteps and guidance scales, which have one axis, stay in fp32 until they are embedded:
            # bfloat16 rounds a timestep of 937 to a multiple of 4.
            return forward(
                *(cast(v, weights, 2) for v in args),
                **{k: v if EXACT.search(k) else cast(v, weights, 2) for k, v in kwargs.items()},
            )

    return wrapped


def cast(value: Any, dtype: torch.dtype, min_ndim: int = 0) -> Any:
    """Cast a floating-point tensor of at least ``min_ndim`` axes; return any other value as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= min_ndim:
        return value.to(dtype)
    return value


def as_fp32(prepared: Any) -> Any:
    """Prepared latents in fp32, so that the loop's state is not rounded to the model's precision."""
    if isinstance(prepared, Tensor):
        return prepared.float() if prepared.is_floating_point() else prepared
    return tuple(as_fp32(p) if isinstance(p, Tensor) else p for p in prepared)


def as_batch(output: Any) -> Tensor:
    """The media or latents that a pipeline returned, as one tensor.

    Raises:
        ValueError: If the pipeline returned something else.
    """
    # Some pipelines return latents in their output class in spite of return_dict=False (SDXL's adapter).
    media = output[0] if isinstance(output, tuple | BaseOutput) else output
    if isinstance(media, list) and media and all(isinstance(m, Tensor) for m in media):
        media = torch.stack(media)
    if not isinstance(media, Tensor):
        raise ValueError(f"the pipeline returned {type(media).__name__} in place of tensors")
    return media


def as_media(output: Any, pipeline: DiffusionPipeline) -> Tensor:
    """The images or videos that a pipeline returned, in [0, 1].

    Raises:
        UnsupportedPipelineError: If the pipeline returned neither.
    """
    media = as_batch(output)
    if media.ndim not in (4, 5):
        raise UnsupportedPipelineError(
            f"{type(pipeline).__name__} cannot be a policy: it returns neither images nor videos, but "
            f"tensors of shape {tuple(media.shape)}"
        )
    return (0.5 * media + 0.5).clamp(0, 1) if is_pixel_space(pipeline) else media


def is_pixel_space(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline has no decoder: its loop's state is the image itself, in [-1, 1]."""
    return not any(
        hasattr(m, "decode") for m in pipeline.components.values() if isinstance(m, nn.Module)
    )
