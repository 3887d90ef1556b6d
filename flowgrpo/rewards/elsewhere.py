"""Reward models that one of several processes with the same candidates loads, and the others do not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flowgrpo.core.tensors import Tensor
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.named import load_all
from flowgrpo.rewards.protocols import LearningReward, RewardModel, takes_audio
from flowgrpo.rewards.settings import Reward


@dataclass(frozen=True)
class LoadedElsewhere:
    """Stands for a reward model that another process has loaded.

    Attributes:
        takes_audio: Whether the model scores sound, too.
        ignores_prompt: Whether it declares that it ignores prompts.
    """

    takes_audio: bool
    ignores_prompt: bool

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Raise RuntimeError: the process that loaded the model tells the scores."""
        raise RuntimeError("this reward model is loaded in the first process of the set only")


def load_once(
    rewards: Sequence[Reward], once: Callable[[Callable[[], Any]], Any]
) -> list[RewardModel]:
    """Load reward models in one of several processes; those that learn are loaded in all of them.

    Args:
        rewards: The rewards, equal in all processes.
        once: Does work in one of the processes, and tells the others its result or its error.

    Raises:
        ValueError: If a reward is unknown or its options are wrong, in all processes.
    """
    loaded: list[RewardModel] = []

    def work() -> list[tuple[bool, bool, bool]]:
        loaded.extend(load_all(rewards))
        return [
            (isinstance(m, LearningReward), takes_audio(m), getattr(m, "ignores_prompt", False) is True)
            for m in loaded
        ]  # fmt: skip

    known = once(work)
    return loaded or [
        load_reward(reward) if learns else LoadedElsewhere(hears, ignores)
        for reward, (learns, hears, ignores) in zip(rewards, known, strict=True)
    ]
