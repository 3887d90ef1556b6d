"""Fixes a pipeline's device and precision, which its class otherwise looks up in every call.

A pipeline of diffusers finds its execution device by walking all modules of all of its models for hooks of
accelerate and of group offloading, and at the end of a call it walks the denoiser for hooks to reset. A
replay is a call, so both walks run between any two forward passes, and the accelerator waits for them:
at the size of Stable Diffusion 3.5 some 4,600 modules and 32 ms. A policy places the models itself and
has no such hooks, so nothing that the walks look for changes after it was set up.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


def fix_device(pipeline: DiffusionPipeline) -> None:
    """Let a pipeline remember its execution device, unless hooks of others place its models.

    The pipeline gets a subclass of its class, of the same name. Hooks of others are those of
    ``enable_model_cpu_offload``, ``enable_sequential_cpu_offload`` and group offloading, and of caches
    that keep a state between steps: a pipeline with any of them is left as it is.

    Args:
        pipeline: Its models are on their devices.
    """
    if _has_hooks(pipeline):
        return
    device = pipeline._execution_device
    members = {
        "_execution_device": property(lambda _: device),
        "maybe_free_model_hooks": lambda _: None,
        "_before": type(pipeline),
    }
    pipeline.__class__ = subclass_with(type(pipeline), members)


def fix_precision(pipeline: DiffusionPipeline, models: Iterable[nn.Module]) -> None:
    """Let denoisers remember their precision, which diffusers finds by walking all of their modules.

    Some pipelines, such as Wan's, ask for it in every call. Nothing changes if hooks of others place the
    pipeline's models.

    Args:
        pipeline: After :func:`fix_device`.
        models: The denoisers, with their adapters and in their final precision.
    """
    if not hasattr(type(pipeline), "_before"):
        return
    for model in models:
        found = property(partial(_constant, model.dtype))
        model.__class__ = subclass_with(type(model), {"dtype": found, "_before": type(model)})


def _constant(value: Any, _: Any) -> Any:
    return value


def restore_class(pipeline: DiffusionPipeline) -> None:
    """Undo :func:`fix_device` and :func:`fix_precision`."""
    models = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
    for changed in (pipeline, *models):
        changed.__class__ = getattr(type(changed), "_before", type(changed))


def subclass_with(cls: type, members: dict[str, Any]) -> type:
    """A subclass with further members, which has the name and the module of its base."""
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), named | members)


def _has_hooks(pipeline: DiffusionPipeline) -> bool:
    """Whether models are placed by hooks of diffusers, or have hooks that keep a state between steps."""
    if getattr(pipeline, "_all_hooks", None):
        return True
    models = [m for m in pipeline.components.values() if isinstance(m, nn.Module)]
    modules = [m for model in models for m in model.modules()]
    registries = [r for m in modules if (r := getattr(m, "_diffusers_hook", None)) is not None]
    # Sequential offloading puts accelerate's hooks below the models; the policy's own offloading puts
    # them on whole encoders and autoencoders, with the policy's device.
    whole = {id(m) for m in models}
    below = any(hasattr(m, "_hf_hook") for m in modules if id(m) not in whole)
    return below or any(registry.hooks for registry in registries)
