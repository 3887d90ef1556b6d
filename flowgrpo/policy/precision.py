"""Casts tensors to the precision of the model that receives them, and media to [0, 1]."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.loading import autoencoders, helpers

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
) -> Callable[..., Any]:
    """A denoiser's ``forward`` that casts its inputs, and runs under autocast if ``dtype`` is not fp32.

    The rest of the pipeline, above all the scheduler's arithmetic and the decoder, keeps its precision.

    Args:
        forward: The method.
        device: Device of the model.
        dtype: Precision of the arithmetic.
        precision: Returns the precision of the inputs; called in every forward pass.
    """

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        weights = precision()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
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
