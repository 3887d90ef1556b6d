"""What the doctor examines, with what settings, and what a check says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.transitions import Transition
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Memory, PipelinePolicy, Sampling
from flowgrpo.policy.pipeline import Rollout
from flowgrpo.policy.settings import Weights

PROMPTS: Sequence[Prompt] = (
    Prompt("a photo of a red circle"),
    Prompt("two blue squares"),
    Prompt("a photo of a red circle"),
)


@dataclass(frozen=True)
class Check:
    """One property that a policy must have.

    Attributes:
        name: What is checked.
        value: What was measured, in words.
        passed: Whether it holds.
        advice: What a failure means.
        measured: The number that was compared.
        by_step: The same for each trained step, where it was measured step by step.
    """

    name: str
    value: str
    passed: bool
    advice: str
    measured: float
    by_step: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the doctor does.

    Attributes:
        sampling: How the pipeline is called.
        weights: What is made trainable; None takes adapters where diffusers has them, else all.
        dtype: Precision of the denoiser.
        device: Where.
        memory: What trades memory for time; the doctor adds tiling where a VAE cannot do without.
        clip_range: The clip range that the noise floor is compared with.
        tolerance: Largest difference of pixel values in [0, 1] between two ways to one image; in half
            precision ten times this is the largest mean difference.
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
    """What is examined.

    Attributes:
        model: Hub id or folder.
        policy: The policy that was made of it.
        settings: What the doctor does, with nothing left open.
        prompts: As many as the pipeline takes at once.
        noise: One stream for each.
        transition: The stochastic step.
        rollout: A trajectory on which every trained step was stochastic and recorded.
    """

    model: str | Path
    policy: PipelinePolicy
    settings: Settings
    prompts: Sequence[Prompt]
    noise: SampleNoise
    transition: Transition
    rollout: Rollout


Measure = Callable[[Subject, Tensor], Sequence[Check]]
"""Makes checks of a subject and of the images that the stock pipeline draws."""
