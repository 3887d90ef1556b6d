"""A diffusers pipeline as a policy: sampling, replay with gradients, branching, decoding, weights.

Everything that touches a diffusers pipeline belongs here: the scheduler that replaces the pipeline's
own, the injection of latents, the caches of encoded prompts, the placement of models on devices, the
trained weights and their export. What to sample, how to score it and what to learn from it do not.
The names below are loaded at first use, so that ``flowgrpo.policy.settings`` can be imported without
torch and diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowgrpo.policy.pipeline import PipelinePolicy
    from flowgrpo.policy.settings import Full, LoRA, Memory, Noise, Sampling
    from flowgrpo.policy.weights import EMA, InitialNoise

_HOMES = {
    "EMA": "weights",
    "Full": "settings",
    "InitialNoise": "weights",
    "LoRA": "settings",
    "Memory": "settings",
    "Noise": "settings",
    "PipelinePolicy": "pipeline",
    "Sampling": "settings",
}

__all__ = ["EMA", "Full", "InitialNoise", "LoRA", "Memory", "Noise", "PipelinePolicy", "Sampling"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowgrpo.policy' has no attribute {name!r}")
    return getattr(import_module(f"flowgrpo.policy.{_HOMES[name]}"), name)
