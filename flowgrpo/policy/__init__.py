"""A diffusers pipeline as a policy: sampling, replay, branching, decoding, trainable weights."""

from flowgrpo.policy.pipeline import PipelinePolicy, Sampling
from flowgrpo.policy.weights import EMA, Full, LoRA

__all__ = ["EMA", "Full", "LoRA", "PipelinePolicy", "Sampling"]
