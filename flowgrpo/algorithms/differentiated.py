"""What algorithms share that differentiate a reward: one action per sample, no comparison in groups.

An action of the kind ``differentiated`` is a state. The update continues from it to the data with
gradients, as the experience's ending says (:mod:`flowgrpo.core.endings`), and the loss
``reward_gradient`` gets the reward of the decoded image. The rollout scores its images as any other does:
these scores are logged, may come from rewards without a gradient, and decide which samples are trained on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from flowgrpo.algorithms.base import AlgorithmBase
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.core.endings import Ending
from flowgrpo.core.random import Random
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data.experience import Experience
from flowgrpo.losses.base import ActionKind


class Differentiated(AlgorithmBase):
    """Defaults of algorithms that differentiate a reward."""

    action_kind: ClassVar[ActionKind] = "differentiated"
    least_group_size: ClassVar[int] = 1
    judged_texts: ClassVar[int] = 1
    """Texts for which each image of an update is scored."""

    @property
    def differentiated_steps(self) -> int:
        """Most steps of an update that the gradient passes through."""
        return 1

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """1 for every action, 0 where the sample's reward failed."""
        return experience.has_reward(experience.actions).float()

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """None: no density is trained."""
        return []


def add_states(
    collection: Collection,
    samples: Samples,
    step: int,
    x: Float[Tensor, "samples *latent"],
    data: Float[Tensor, "samples *latent"],
) -> None:
    """Record an action of each sample that starts from a state of its own.

    Args:
        collection: Receives the actions.
        samples: The samples.
        step: The node of the states.
        x: The states.
        data: What becomes ``x_next``.
    """
    collection.add_actions(samples, step, x=x, x_next=data)


def finished(collection: Collection, ending: Ending) -> Experience:
    """The whole experience, with an ending for its actions."""
    return replace(collection.experience(), ending=ending)
