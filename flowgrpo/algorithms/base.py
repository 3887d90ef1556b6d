"""What an algorithm is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import Random
from flowgrpo.core.transitions import Transition
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


@runtime_checkable
class Algorithm(Protocol):
    """A frozen dataclass that is also its configuration.

    Attributes:
        group_size: Samples per prompt.
        transition: The stochastic step.
    """

    @property
    def group_size(self) -> int: ...

    @property
    def transition(self) -> Transition: ...

    def collect(
        self, policy: PipelinePolicy, groups: Sequence[Group], scorer: RewardScorer, random: Random
    ) -> Experience:
        """Sample, and hand each candidate to the judge as soon as it is decoded.

        ``random`` is keyed by the iteration; whatever is drawn for a group must depend only on it,
        the group's index and the sample's, so that ranks and batch sizes change nothing.
        """
        ...

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """One advantage per action; exactly zero where there is nothing to learn."""
        ...

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the algorithm cannot work on a grid of this many steps.

        Those that a configuration file can choose have besides this ``steps``, a choice of stochastic
        steps, and ``cost(num_steps, stochastic)``, the work per prompt that it leads to.
        """
        ...
