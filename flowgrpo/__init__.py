"""flowgrpo: reinforcement learning for image and video generators.

Examples:
    >>> import flowgrpo
    >>> config = flowgrpo.load("quickstart", ["run.folder=runs/mine"])
    >>> flowgrpo.train(config)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowgrpo.config import Config, load
    from flowgrpo.core.random import Random, SampleNoise
    from flowgrpo.data.prompts import Prompt
    from flowgrpo.policy import EMA, Full, LoRA, PipelinePolicy, Sampling
    from flowgrpo.rewards.protocols import RewardModel
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward
    from flowgrpo.training.loop import Result, train

_HOMES = {
    "Config": "flowgrpo.config",
    "load": "flowgrpo.config",
    "Random": "flowgrpo.core.random",
    "SampleNoise": "flowgrpo.core.random",
    "Prompt": "flowgrpo.data.prompts",
    "RewardModel": "flowgrpo.rewards.protocols",
    "RewardScorer": "flowgrpo.rewards.scorer",
    "Reward": "flowgrpo.rewards.settings",
    "EMA": "flowgrpo.policy",
    "Full": "flowgrpo.policy",
    "LoRA": "flowgrpo.policy",
    "PipelinePolicy": "flowgrpo.policy",
    "Sampling": "flowgrpo.policy",
    "Result": "flowgrpo.training.loop",
    "train": "flowgrpo.training.loop",
}

__all__ = [
    "EMA",
    "Config",
    "Full",
    "LoRA",
    "PipelinePolicy",
    "Prompt",
    "Random",
    "Result",
    "Reward",
    "RewardModel",
    "RewardScorer",
    "SampleNoise",
    "Sampling",
    "load",
    "train",
]  # fmt: skip

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, and most commands and mistakes need neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'flowgrpo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
