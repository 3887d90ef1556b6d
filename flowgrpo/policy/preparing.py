"""Puts a pipeline's models where they belong, in their precision, behind doors that keep it."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from flowgrpo.policy.loading import autoencoders, denoisers
from flowgrpo.policy.memory import (
    Encoders,
    Memory,
    is_quantized,
    offload_autoencoder,
    prepare_decoder,
    prepare_denoisers,
)
from flowgrpo.policy.precision import guarded, open_others
from flowgrpo.policy.prompts_cache import remember_encodings


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
    """Freeze and place all models, and watch the doors of those that the loop calls.

    Args:
        pipeline: Whose models they are.
        memory: What trades memory for time.
        device: Where they work.
        dtype: Precision of the denoisers' arithmetic.
        precision: Of what enters a denoiser, asked at every call.
    """
    models, trained = models_of(pipeline), denoisers(pipeline)
    encoders = {k: m for k, m in models.items() if isinstance(m, PreTrainedModel)}
    offload_vae = memory.offload_vae and device.type != "cpu"
    visitors = autoencoders(pipeline) if offload_vae else []
    for name, model in models.items():
        model.eval().requires_grad_(False)
        records = name in encoders or any(model is v for v in visitors)
        if not records and not is_quantized(model):
            model.to(device)
    at_hand = Encoders(encoders, device, memory.offload_text_encoders)
    for model in trained.values():
        if model.dtype != dtype and not is_quantized(model):
            model.to(dtype)
        model.forward = guarded(model.forward, device, dtype, precision)
    prepare_denoisers(trained, memory)
    open_others(pipeline, device, dtype)
    prepare_decoder(pipeline, memory)
    for model in visitors:
        offload_autoencoder(model, device)
    remember_encodings(pipeline, at_hand, memory, device)
