"""SRPO (arXiv:2509.06942): direct alignment at early steps, and a reward relative to control words.

A finished sample is noised with known noise. One step of the model leads to a node of the grid, from the
noisier side (denoising) or from the cleaner side (inversion); as the noise is known, the data follow
exactly from where the step ends, however noisy that is. So early steps can be trained, where a one-step
prediction of the data would be a blur. The reward is the difference of two scores of the same image, with
wanted and with unwanted words before the prompt; on the inverted side their roles are swapped, which
penalises what any image gains by.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.collection import Collection
from flowgrpo.algorithms.differentiated import Differentiated, add_states, finished
from flowgrpo.algorithms.trajectories import TrajectoryPlan, sample_trajectories
from flowgrpo.core.endings import DirectAlign, JudgedText
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import ODE
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class SRPO(Differentiated):
    """The reward's gradient at early steps, by direct alignment.

    Follows the released code for FLUX.1 (Tencent-Hunyuan/SRPO 81e5898, ``fastvideo/SRPO.py``). Differs
    from it: the steps are those of the sampling grid, where the release interpolates a grid of 1,000
    times; the step is drawn for each iteration, there for each process; and each sample has noise of its
    own, where all samples of an iteration share theirs.
    """

    compares_texts: ClassVar[bool] = True
    judged_texts: ClassVar[int] = 2
    kind: Literal["srpo"] = "srpo"
    group_size: int = 1
    """Samples per prompt, at least 1. They are not compared with each other."""
    transition: ODE = field(default_factory=ODE)
    """Nothing is stochastic here."""
    branches: Literal["both", "denoise"] = "both"
    """Whether samples are trained on the inverted side, too. Without it, rewards are hacked sooner."""
    step_range: tuple[float, float] = (0.1, 0.5)
    """The part of the grid, from 0 (noise) to 1 (data), in which the trained steps are. Too early steps
    distort the layout, late ones invite hacking by colours (the authors' advice)."""
    span: int = 1
    """Intervals of the grid that the step spans; the release's are two of 50 steps."""
    wanted: tuple[str, ...] = ("Natural-lighting", "Detail", "Detailed", "Real")
    """Words that the reward should favour, one after the other, an iteration each; put before the prompt
    as in ``Real. a cat``."""
    unwanted: tuple[str, ...] = ("Concept art", "Painting", "Anime", "Flat", "Oil")
    """Words that the reward should disfavour, likewise."""
    denoise_excess: tuple[float, float] = (0.1, 0.25)
    """``k`` in ``(1 + k) r(wanted) - r(unwanted)`` where samples are denoised: at the end and at the
    beginning of ``step_range``, linear between."""
    invert_excess: tuple[float, float] = (0.3, 0.01)
    """``k`` in ``(1 + k) r(unwanted) - r(wanted)`` where samples are inverted, likewise."""

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
        """Sample, score, and record each sample noised with the noise that it began with."""
        end = policy.num_steps()
        collection = Collection(policy, groups, scorer, self.transition)
        landing = self.drawn_landing(end, random)
        plan = self.plan(end, iteration, random)
        for samples, records in sample_trajectories(collection, random, plan, {0, end - 1}):
            eps, data = records[0].x, records[-1].x_next
            for step in self.steps_to(landing):
                interval = policy.scheduler.interval(step, step + 1)
                x = interval.signal * data + interval.noise * eps
                add_states(collection, samples, step, x, data)
        return finished(collection, self.ending(landing, end, iteration))

    def drawn_landing(self, num_steps: int, random: Random) -> int:
        """The node to which the steps of an iteration lead, equal in all processes."""
        nodes = self._landings(num_steps)
        return nodes[random.integer("landing") % len(nodes)]

    def steps_to(self, landing: int) -> list[int]:
        """The nodes of the states that are trained: before the landing node, and after it."""
        both = [landing - self.span, landing + self.span]
        return both if self.branches == "both" else both[:1]

    def ending(self, landing: int, num_steps: int, iteration: int) -> DirectAlign:
        """The step to the landing node, with the texts of an iteration."""
        low, high = self.step_range
        wanted = self.wanted[iteration % len(self.wanted)]
        unwanted = self.unwanted[iteration % len(self.unwanted)]

        def excess(ends: tuple[float, float], node: int) -> float:
            # 0 at the end of the range, 1 at its beginning, where states are noisier.
            share = min(1.0, max(0.0, (high - node / num_steps) / (high - low)))
            return ends[0] + share * (ends[1] - ends[0])

        denoise = excess(self.denoise_excess, landing)
        invert = excess(self.invert_excess, landing + self.span)
        return DirectAlign(
            landing,
            (JudgedText(1 + denoise, wanted), JudgedText(-1.0, unwanted)),
            (JudgedText(1 + invert, unwanted), JudgedText(-1.0, wanted)),
        )

    def check(self, num_steps: int) -> None:
        """Raise ValueError if a setting is out of range."""
        low, high = self.step_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"algorithm.step_range must be two numbers with 0 <= low < high <= 1, got [{low:g}, {high:g}]"
            )
        if self.span < 1:
            raise ValueError(f"algorithm.span must be at least 1, got {self.span}")
        for key in ("denoise_excess", "invert_excess"):
            if not all(math.isfinite(k) for k in getattr(self, key)):
                raise ValueError(
                    f"algorithm.{key} must be two finite numbers, got {[*getattr(self, key)]}"
                )
        if not self.wanted or not self.unwanted:
            raise ValueError(
                "algorithm.wanted and algorithm.unwanted need at least one word each: the reward is their difference"
            )
        if not self._landings(num_steps):
            raise ValueError(
                f"algorithm.step_range = [{low:g}, {high:g}] of {counted(num_steps, 'step')} has no node with "
                f"algorithm.span = {counted(self.span, 'step')} beside it; widen it, or raise sampling.num_steps"
            )

    def _landings(self, num_steps: int) -> list[int]:
        low, high = self.step_range
        inside = [i for i in range(num_steps) if low <= i / num_steps <= high]
        # At node 0 there is no signal to recover the data from.
        return [m for m in range(1, num_steps) if {m - self.span, m + self.span} <= {*inside}]
