"""Replays actions of the kind ``differentiated`` to decoded media, and scores them with gradients."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.endings import JudgedText
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.media_replay import (
    check_differentiable,
    probe_media_gradient,
    replay_to_media,
)
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.rewards.differentiable import DifferentiableRewards


class RewardReplay:
    """Makes the media of actions with gradients, and their rewards.

    Args:
        policy: The policy that is trained.
        rewards: The rewards.
    """

    def __init__(self, policy: PipelinePolicy, rewards: DifferentiableRewards):
        self.policy, self.rewards = policy, rewards

    def __call__(
        self, experience: Experience, actions: Actions, prompts: Sequence[Prompt]
    ) -> tuple[StepRecord, Float[Tensor, " states"]]:
        """The record of the first step, and the reward of each state's media, with gradients.

        Args:
            experience: Says how the actions end.
            actions: Actions of one step.
            prompts: The prompt of each of their distinct states.

        Raises:
            ValueError: If the algorithm has not said how its actions end.
        """
        ending, policy = experience.ending, self.policy
        if ending is None:
            raise ValueError(
                "the loss RewardGradientLoss needs Experience.ending, and the algorithm has not set it"
            )
        x, row = actions.starts()
        data = torch.empty_like(x)
        data[row] = actions.x_next
        x, data = x.to(policy.device), data.to(policy.device)
        step = int(actions.step[0])
        record, media = replay_to_media(
            policy,
            prompts,
            x,
            ending.nodes(step, policy.num_steps()),
            ending.transition(step, policy.scheduler.interval, x, data),
        )
        return record, self._reward(media, prompts, ending.texts(step))

    def _reward(
        self, media: Tensor, prompts: Sequence[Prompt], texts: Sequence[JudgedText]
    ) -> Float[Tensor, " states"]:
        """The weighted sum of the rewards for several texts."""
        parts = []
        for text in texts:
            shown = [replace(p, text=text.of(p.text)) if text.prefix else p for p in prompts]
            parts.append(text.weight * self.rewards(media, shown))
        return torch.stack(parts).sum(0)

    def probe(self, prompt: Prompt) -> None:
        """Differentiate the reward of one sample before training starts.

        Raises:
            UnsupportedPipelineError: If the pipeline or its decoder has no gradient.
            RewardError: If a reward has none.
        """
        check_differentiable(self.policy)
        end = self.policy.num_steps()
        noise = SampleNoise([Random(0).at("probe")])
        # With a single step, the state before it is the initial noise.
        nodes = sorted({0, end - 1})
        (rollout,) = self.policy.run([prompt], noise, nodes=nodes, decode=False)
        assert rollout.x is not None
        media = probe_media_gradient(self.policy, prompt, rollout.x)
        self.rewards(media, [prompt]).sum().backward()
        assert self.policy.trainable is not None
        for parameter in self.policy.trainable.parameters.values():
            parameter.grad = None
