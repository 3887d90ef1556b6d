"""Which precision tensors have where they enter a model."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from flowgrpo.policy.calling import UnsupportedPipelineError
from flowgrpo.policy.loading import autoencoders, helpers

EXACT = re.compile(r"coords|rope|rotary|freqs|(img|txt|text|image|latent|position|pos)_ids")
"""Arguments of models that say where tokens are. Bfloat16 holds a place of 500 only to the nearest 2;
pipelines give them in fp32, and models compute with them in it."""


def open_others(pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
    """Let the models around the denoisers take the loop's fp32 state, and condition images alike.

    Args:
        pipeline: Whose autoencoders, ControlNets and adapters get doors.
        device: Where the models live.
        dtype: Precision of the denoisers' arithmetic.
    """
    open_decoder(pipeline)
    encode_still(pipeline)
    for model in helpers(pipeline):
        # Some ask for it without having it (Z-Image's ControlNet).
        model.gradient_checkpointing = getattr(model, "gradient_checkpointing", False)
        model.forward = guarded(
            model.forward, device, dtype, functools.partial(getattr, model, "dtype")
        )


def encode_still(pipeline: DiffusionPipeline) -> None:
    """Let the VAE encode a condition image to the mean of its posterior, and so always alike.

    Some pipelines draw a sample of it; a replay would then see another condition than the rollout.
    """
    for vae in autoencoders(pipeline):
        if hasattr(vae, "encode"):
            vae.encode = _without_draw(vae.encode)


def _without_draw(encode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(encode)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        posterior: Any = output[0] if isinstance(output, tuple) else output
        posterior = getattr(posterior, "latent_dist", posterior)
        if hasattr(posterior, "mode") and hasattr(posterior, "sample"):
            posterior.sample = lambda generator=None: posterior.mode()
        return output

    return wrapped


def open_decoder(pipeline: DiffusionPipeline) -> None:
    """Let the VAE take latents of any precision, and compute in its own."""
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
    """A denoiser's ``forward`` behind a door: inputs get its precision, autocast ends with it.

    Everything else of the pipeline, the scheduler's arithmetic and the decoder above all, keeps
    the precision it has.
    """

    @functools.wraps(forward)
    def behind_the_door(*args: Any, **kwargs: Any) -> Any:
        weights = precision()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            # Timesteps and guidance, one number per sample, are embedded in fp32: bfloat16 holds
            # a timestep of 937 only to the nearest 4.
            return forward(
                *(cast(v, weights, 2) for v in args),
                **{k: v if EXACT.search(k) else cast(v, weights, 2) for k, v in kwargs.items()},
            )

    return behind_the_door


def cast(value: Any, dtype: torch.dtype, min_ndim: int = 0) -> Any:
    """A floating-point tensor of at least ``min_ndim`` axes in a precision; all else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= min_ndim:
        return value.to(dtype)
    return value


def as_fp32(prepared: Any) -> Any:
    """Latents in fp32: the loop's state must not be rounded to the model's precision."""
    if isinstance(prepared, Tensor):
        return prepared.float() if prepared.is_floating_point() else prepared
    return tuple(as_fp32(p) if isinstance(p, Tensor) else p for p in prepared)


def as_batch(output: Any) -> Tensor:
    """The media or latents that a pipeline returned, as one tensor.

    Raises:
        ValueError: If they are none.
    """
    # Some pipelines return their output class for latents whatever was asked for (SDXL's adapter).
    media = output[0] if isinstance(output, tuple | BaseOutput) else output
    if isinstance(media, list) and media and all(isinstance(m, Tensor) for m in media):
        media = torch.stack(media)
    if not isinstance(media, Tensor):
        raise ValueError(
            f"the pipeline returned {type(media).__name__} where tensors were asked for"
        )
    return media


def as_media(output: Any, pipeline: DiffusionPipeline) -> Tensor:
    """The images or videos that a pipeline returned, in [0, 1].

    Raises:
        UnsupportedPipelineError: If they are neither.
    """
    media = as_batch(output)
    if media.ndim not in (4, 5):
        raise UnsupportedPipelineError(
            f"{type(pipeline).__name__} cannot be a policy: it makes neither images nor videos, but "
            f"tensors of shape {tuple(media.shape)}"
        )
    return (0.5 * media + 0.5).clamp(0, 1) if is_pixel_space(pipeline) else media


def is_pixel_space(pipeline: DiffusionPipeline) -> bool:
    """Whether there is nothing to decode with: the loop's state is the image, in [-1, 1]."""
    return not any(
        hasattr(m, "decode") for m in pipeline.components.values() if isinstance(m, nn.Module)
    )
