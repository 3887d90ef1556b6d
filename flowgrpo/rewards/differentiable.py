"""The weighted sum of rewards as a function of media that carries gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.prompt_use import is_declared
from flowgrpo.rewards.protocols import DifferentiableReward, RewardModel, takes_audio
from flowgrpo.rewards.settings import Reward, RewardError, weighted_sum

WITH_GRADIENT = ("aesthetic", "clip_score", "hpsv2", "image_reward", "pick_score")
"""The rewards in ``reward_models`` that have a gradient."""

Scores = Callable[[Tensor, Sequence[Prompt]], Tensor]


class DifferentiableRewards:
    """Rewards with a gradient, summed as the scorer sums them.

    Rewards of weight 0 are left out: they are logged by the scorer and need no gradient.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        models: Sequence[RewardModel],
        iteration: Callable[[], int | None] = lambda: None,
    ):
        """
        Args:
            rewards: The rewards.
            models: Their models, in the same order.
            iteration: The present iteration, which the schedules of weights depend on.

        Raises:
            ConfigError: If a reward with a weight has no gradient.
        """
        pairs = [(r, m) for r, m in zip(rewards, models, strict=True) if r.weight != 0]
        for reward, model in pairs:
            check_gradient(reward, model)
        self.rewards = [r for r, _ in pairs]
        self._models = [cast(DifferentiableReward, m) for _, m in pairs]
        self._iteration = iteration

    def __call__(
        self, media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The reward of each sample, on the device of the media.

        Raises:
            RewardError: If a reward returns another shape, or scores without a gradient.
        """
        raw = {
            r.label: _scores(r.label, partial(m.scores_with_gradient), media, prompts)
            for r, m in zip(self.rewards, self._models, strict=True)
        }
        return weighted_sum(self.rewards, raw, self._iteration())

    @property
    def ignores_prompts(self) -> bool:
        """Whether all of them say that they score media without regard to prompts."""
        return all(
            is_declared(m) or r.ignores_prompt
            for r, m in zip(self.rewards, self._models, strict=True)
        )


def check_gradient(reward: Reward, model: object) -> None:
    """Refuse a reward that has no gradient.

    Args:
        reward: Its settings.
        model: The model, or its class.

    Raises:
        ConfigError: Naming what fits.
    """
    if not hasattr(model, "scores_with_gradient"):
        reason = (
            "runs on a server, which returns numbers"
            if reward.model == "remote"
            else "has no method scores_with_gradient"
        )
        raise ConfigError(
            f"reward {reward.label!r} has no gradient, because it {reason}, and loss.kind = 'reward_gradient' "
            f"differentiates every reward with a weight: set its weight to 0 to log it only, and train on one of "
            f"{', '.join(WITH_GRADIENT)} or on a reward of your own with scores_with_gradient"
        )
    if takes_audio(model):
        raise ConfigError(
            f"reward {reward.label!r} scores sound, which is not differentiated; set its weight to 0"
        )
    if reward.threshold is not None:
        raise ConfigError(
            f"reward {reward.label!r}: threshold = {reward.threshold:g} makes a reward of 0 and 1, whose gradient "
            "is 0; remove it, or use clip"
        )


def _scores(
    label: str, scores: Scores, media: Tensor, prompts: Sequence[Prompt]
) -> Float[Tensor, " batch"]:
    values = scores(media, prompts)
    if values.shape != (len(prompts),):
        raise RewardError(
            f"reward {label!r}: scores_with_gradient returned shape {tuple(values.shape)} for "
            f"{counted(len(prompts), 'sample')}; expected ({len(prompts)},)"
        )
    if not values.requires_grad:
        raise RewardError(
            f"reward {label!r}: scores_with_gradient returned scores without a gradient; compute them from the "
            "media in torch, and not under torch.no_grad"
        )
    return values.float().to(media.device)
