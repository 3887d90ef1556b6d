"""DRaFT (arXiv:2309.17400) and AlignProp (arXiv:2310.03739): the reward's gradient through the sampler.

The sampler is deterministic. All but its last steps run without gradients; the update runs the last
``K`` steps again, decodes, and backpropagates the reward of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.differentiated import Differentiated, add_states, finished
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.endings import Denoise
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class DRaFT(Differentiated):
    """The reward's gradient through the last steps of the sampler.

    DRaFT-K is ``last = K``; DRaFT is ``last`` = all steps; AlignProp is ``last`` = all steps with
    ``truncation = "random"``; DRaFT-LV is ``last = 1`` with ``renoised = 2`` or more.
    """

    kind: Literal["draft"] = "draft"
    group_size: int = 1
    """Samples per prompt, at least 1. They are not compared with each other."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    last: int = 1
    """Steps at the end of the grid that are differentiated (K), from 1 to all of them. Time and memory of
    the update grow with it; ``memory.gradient_checkpointing`` keeps one state per block and step."""
    truncation: Literal["fixed", "random"] = "fixed"
    """``fixed`` differentiates ``last`` steps in every iteration; ``random`` draws their number from 1 to
    ``last`` for each iteration (AlignProp)."""
    renoised: int = 0
    """DRaFT-LV: the last step is differentiated this many times per sample, each time from the sample with
    other noise, which lowers the variance of the gradient at the cost of the last step alone. Needs
    ``last = 1``. 0 differentiates the sampler's own last step."""

    @property
    def differentiated_steps(self) -> int:
        """The last ``last`` steps."""
        return self.last

    def plan(self, num_steps: int, iteration: int, random: Random) -> TrajectoryPlan:
        """Deterministic samples, each from a noise of its own."""
        return TrajectoryPlan(self.group_size, self.transition, [])

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample, score, and record the state before the steps that are differentiated."""
        end = policy.num_steps()
        collection = Collection(policy, groups, scorer, self.transition)
        first = end - self.drawn_last(random)
        plan = self.plan(end, iteration, random)
        for samples, records in sample_trajectories(collection, random, plan, {first, end - 1}):
            state, data = records[0], records[-1].x_next
            if not self.renoised:
                add_states(collection, samples, first, state.x, data)
            interval = policy.scheduler.interval(first, end)
            for number in range(self.renoised):
                streams = [s.at("renoised", number) for s in samples.noise.streams]
                fresh = SampleNoise(streams).at_step(first, data.shape[1:]).to(data.device)
                x = interval.signal * data + interval.noise * interval.noise_scale * fresh
                add_states(collection, samples, first, x, data)
        return finished(collection, Denoise())

    def drawn_last(self, random: Random) -> int:
        """The number of steps that an iteration differentiates, equal in all processes."""
        if self.truncation == "fixed":
            return self.last
        return 1 + random.integer("truncation") % self.last

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        if not 1 <= self.last <= num_steps:
            raise ValueError(
                f"algorithm.last must be from 1 to sampling.num_steps = {num_steps}, got {self.last}"
            )
        if self.renoised < 0 or (self.renoised and self.last != 1):
            raise ValueError(
                f"algorithm.renoised must be at least 0, and needs algorithm.last = 1; got {self.renoised} with "
                f"algorithm.last = {self.last}"
            )
        if self.truncation == "random" and self.last == 1:
            raise ValueError(
                "algorithm.truncation = 'random' draws from 1 to algorithm.last, which is 1; raise algorithm.last"
            )
