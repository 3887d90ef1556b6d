"""Reward models that return several named scores: one call for all the rewards that use one of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo.core.imports import suggest
from flowgrpo.core.tensors import Tensor
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import load_reward
from flowgrpo.rewards.protocols import LearningReward, RewardModel, takes_audio
from flowgrpo.rewards.settings import Reward, RewardError


def shared_key(reward: Reward) -> str:
    """What two rewards have in common if they share a model; empty for a reward without ``score``."""
    return json.dumps([reward.model, reward.options], sort_keys=True, default=str) if reward.score else ""  # fmt: skip


class SharedModel:
    """A reward model whose result for a batch is kept until every reward that uses it has its score.

    Args:
        reward: The settings of one of these rewards.
        number: How many rewards use the model.
    """

    def __init__(self, reward: Reward, number: int):
        model = load_reward(reward)
        if isinstance(model, LearningReward):
            raise ValueError(
                f"reward {reward.label!r} learns during the run, and has no named scores: remove its key 'score'"
            )
        self.model, self.number = model, number
        self._batch: tuple[Tensor, Sequence[Prompt]] | None = None
        self._result: Any = None
        self._taken: set[str] = set()

    def result(
        self, name: str, media: Tensor, prompts: Sequence[Prompt], sound: Mapping[str, Any]
    ) -> Any:
        """The model's result for a batch, whose score ``name`` is used now.

        A score that is used a second time for the same batch is a retry, for which the model is called
        again.
        """
        same = self._batch is not None and self._batch[0] is media and self._batch[1] is prompts
        if not same or name in self._taken:
            self._batch, self._result, self._taken = None, None, set()
            call = getattr(self.model, "named_scores", self.model)
            self._result = call(media, prompts, **sound)
            self._batch = media, prompts
        result = self._result
        self._taken.add(name)
        if len(self._taken) == self.number:  # nobody else waits for it
            self._batch, self._result, self._taken = None, None, set()
        return result


class NamedScore:
    """One named score of a reward model.

    Attributes:
        takes_audio: Whether the model scores sound, too.
        ignores_prompt: Whether the model declares that it ignores prompts.
    """

    def __init__(self, shared: SharedModel, reward: Reward):
        self._shared, self._name, self._label = shared, reward.score, reward.label
        self.takes_audio = takes_audio(shared.model)
        self.ignores_prompt = getattr(shared.model, "ignores_prompt", False) is True

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the model needs, if it says so. Raises its ValueError."""
        check = getattr(self._shared.model, "check", None)
        if check is not None:
            check(prompts)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt], **sound: Any) -> Any:
        """The score of each sample.

        Raises:
            RewardError: If the model does not return named scores, or none of this name.
        """
        scores = self._shared.result(self._label, media, prompts, sound)
        if not isinstance(scores, Mapping):
            raise RewardError(
                f"reward {self._label!r} has score = {self._name!r}, and its model returned no named scores but "
                f"{type(scores).__name__}; let it return a dictionary from names to scores, or remove 'score'"
            )
        if self._name not in scores:
            raise RewardError(
                f"reward {self._label!r}: its model returned no score {self._name!r}"
                f"{suggest(self._name, map(str, scores))}; it returned {', '.join(map(str, scores))}"
            )
        return scores[self._name]


def load_all(rewards: Sequence[Reward]) -> list[RewardModel]:
    """Load reward models; rewards with a ``score`` of the same model and options share one."""
    keys = [shared_key(r) for r in rewards]
    shared = dict[str, SharedModel]()
    loaded: list[RewardModel] = []
    for reward, key in zip(rewards, keys, strict=True):
        if not key:
            loaded.append(load_reward(reward))
            continue
        if key not in shared:
            shared[key] = SharedModel(reward, keys.count(key))
        loaded.append(NamedScore(shared[key], reward))
    return loaded
