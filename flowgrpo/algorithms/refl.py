"""ReFL, reward feedback learning (arXiv:2304.05977): the reward of the data predicted at a late step.

Sampling stops at a random late step. The update predicts the data there with gradients, decodes the
prediction, and backpropagates its reward. One step is differentiated, and the steps after it are saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.algorithms.differentiated import Differentiated, add_states, finished
from flowgrpo.core.endings import Predict
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class ReFL(Differentiated):
    """The reward's gradient through the data predicted at a random late step.

    Differs from the paper in the loss on pre-training data, which its released code leaves out, too.
    """

    kind: Literal["refl"] = "refl"
    group_size: int = 1
    """Samples per prompt, at least 1. They are not compared with each other."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    stop_range: tuple[float, float] = (0.75, 1.0)
    """The part of the grid, from 0 (noise) to 1 (data), in which sampling stops. The step is drawn anew in
    each iteration. The paper has steps 30 to 39 of 40: before, predictions are too blurred to score."""

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample up to the stop, score the predicted data there, and record the state."""
        collection = Collection(policy, groups, scorer, self.transition)
        stop = self.drawn_stop(policy.num_steps(), random)
        samples = Samples.of(groups, self.group_size, random)
        for rollout in policy.run(
            samples.prompts, samples.noise, nodes=range(stop + 2), record={stop}, decode=False
        ):
            part = samples[rollout.rows.start : rollout.rows.stop]
            (record,) = rollout.records
            collection.project(part, record, compare=True)
            add_states(collection, part, stop, record.x, record.x_next)
        return finished(collection, Predict())

    def drawn_stop(self, num_steps: int, random: Random) -> int:
        """The step of an iteration, equal in all processes."""
        stops = self._stops(num_steps)
        return stops[random.integer("stop") % len(stops)]

    def cost(self, num_steps: int, iteration: int, random: Random) -> Cost:
        """``G (stop + 1)`` evaluations, and ``G`` decodes and rewards."""
        size = float(self.group_size)
        return Cost(size * (self.drawn_stop(num_steps, random) + 1), size, size)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        low, high = self.stop_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"algorithm.stop_range must be two numbers with 0 <= low < high <= 1, got [{low:g}, {high:g}]"
            )
        if not self._stops(num_steps):
            raise ValueError(
                f"algorithm.stop_range = [{low:g}, {high:g}] has no step of a grid of {counted(num_steps, 'step')}; widen it, or "
                "raise sampling.num_steps"
            )

    def _stops(self, num_steps: int) -> list[int]:
        low, high = self.stop_range
        return [i for i in range(num_steps) if low <= i / num_steps < high]
