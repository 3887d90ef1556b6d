"""Which precision tensors have where they enter a model."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor


def open_decoder(pipeline: DiffusionPipeline) -> None:
    """Let the VAE take latents of any precision, and compute in its own."""
    vae = getattr(pipeline, "vae", None)
    for name in ("encode", "decode"):
        if isinstance(vae, ModelMixin) and hasattr(vae, name):
            setattr(vae, name, _in_precision_of(vae, getattr(vae, name)))


def _in_precision_of(model: ModelMixin, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        dtype = model.dtype
        return method(
            *(cast(v, dtype) for v in args), **{k: cast(v, dtype) for k, v in kwargs.items()}
        )

    return wrapped


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
