"""Types of the doctor: its settings, the policy under examination, and the result of a check."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.transitions import Transition
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Memory, PipelinePolicy, Sampling
from flowgrpo.policy.rollout import Rollout
from flowgrpo.policy.settings import ModelSource, Weights

PROMPTS: Sequence[Prompt] = (
    Prompt("a photo of a red circle"),
    Prompt("two blue squares"),
    Prompt("a photo of a red circle"),
)


@dataclass(frozen=True)
class Check:
    """One property that a policy must have.

    Attributes:
        name: The property, as a statement.
        value: The measured value, as shown in the table.
        passed: Whether the property holds.
        advice: Consequence of a failure, or how to correct it.
        measured: The number that was compared with the tolerance.
        by_step: This number for each trained step, if it was measured by step.
    """

    name: str
    value: str
    passed: bool
    advice: str
    measured: float
    by_step: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the doctor.

    Attributes:
        sampling: Arguments of the pipeline's call.
        weights: The weights to train; ``None`` chooses LoRA if diffusers supports it for the denoiser,
            else all weights.
        dtype: Precision of the denoiser.
        device: Device to run on.
        memory: Settings that trade time for memory. The doctor enables tiling if the VAE requires it.
        clip_range: The clip range with which the numerical noise of log-probabilities is compared.
        tolerance: Largest difference of pixel values in [0, 1] between two images that should be
            equal. In half precision, ten times this value limits the mean difference instead.
    """

    sampling: Sampling
    weights: Weights | None = None
    dtype: str = "float32"
    device: str = "cpu"
    memory: Memory = field(default_factory=Memory)
    clip_range: float = 1e-4
    tolerance: float = 2e-3


@dataclass(frozen=True)
class Subject:
    """The policy under examination.

    Attributes:
        model: Hub id or folder of the pipeline.
        policy: The policy made from it.
        settings: The settings, with every open choice made.
        prompts: The prompts of one batch, as many as the pipeline accepts.
        noise: One stream of noise per prompt.
        transition: The stochastic transition.
        rollout: A rollout in which every trained step is stochastic and recorded.
    """

    model: str | Path | ModelSource
    policy: PipelinePolicy
    settings: Settings
    prompts: Sequence[Prompt]
    noise: SampleNoise
    transition: Transition
    rollout: Rollout


CheckFunction = Callable[[Subject, Tensor], Sequence[Check]]
"""Examines a subject, given also the images of diffusers' own pipeline for the same noise."""
