"""A diffusers pipeline as a policy: sampling, replay, branching, decoding, trainable weights."""

from flowgrpo.policy.calls import Sampling
from flowgrpo.policy.initial_noise import InitialNoise, Noise
from flowgrpo.policy.memory import Memory
from flowgrpo.policy.pipeline import PipelinePolicy
from flowgrpo.policy.weights import EMA, Full, LoRA

__all__ = ["EMA", "Full", "InitialNoise", "LoRA", "Memory", "Noise", "PipelinePolicy", "Sampling"]
