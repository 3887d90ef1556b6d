"""The state of one call of a pipeline: the latents that it prepared and the steps that it took.

A :class:`PipelineCall` exists from the beginning of a call of the pipeline to its end. The scheduler
takes its steps in it, the latent injection reads and replaces prepared latents through it, and nothing
of it outlives the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import SecondOrder
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import ODE, Prediction, Step, Transition
from flowgrpo.policy.step_plan import StepPlan, StepRecord

PREPARE_LATENTS = "prepare_latents"
"""The method with which pipelines prepare the first state of their loop."""


class UnsupportedPipelineError(ValueError):
    """A pipeline cannot be a policy; the message gives the reason."""


@dataclass(frozen=True)
class Place:
    """The part of a prepared tensor that holds a state: a box at one of its corners.

    Attributes:
        index: Index among the prepared tensors.
        start: First index of the box along each axis. A state that fills the tensor starts at 0.
        whole: Shape of one sample of the tensor; empty if the place was derived from shapes only.
    """

    index: int
    start: tuple[int, ...]
    whole: tuple[int, ...] = ()

    def within(self, whole: Tensor, shape: torch.Size) -> Tensor:
        """The part of the tensor ``whole`` that has the given shape, as a view.

        Raises:
            IndexError: If the tensor is too small for it.
        """
        if len(shape) != whole.ndim or any(
            a + n > m for a, n, m in zip(self.start, shape, whole.shape, strict=True)
        ):
            raise IndexError(f"no {tuple(shape)} at {self.start} of {tuple(whole.shape)}")
        return whole[tuple(slice(a, a + n) for a, n in zip(self.start, shape, strict=True))]


def shapes_of(parts: Sequence[Any]) -> list[torch.Size | None]:
    """The shape of each floating-point tensor; None for everything else."""
    return [p.shape if isinstance(p, Tensor) and p.is_floating_point() else None for p in parts]


def place_by_value(state: Tensor, prepared: Sequence[Any]) -> Place | None:
    """Find the first state of a loop in the tensors that were prepared for it.

    Along an axis where the prepared tensor is longer, the state may be at either end: some pipelines
    keep a condition after the latents, others a first frame before them (Kandinsky 5).

    Returns:
        The place, or None if no prepared tensor contains the state's values.
    """
    for i, whole in enumerate(prepared):
        if shapes_of([whole])[0] is None or whole.ndim != state.ndim or state.numel() == 0:
            continue
        longer = [m - n for n, m in zip(state.shape, whole.shape, strict=True)]
        if min(longer) < 0:
            continue
        for start in product(*({0, d} for d in longer)):
            found = Place(i, start, tuple(whole.shape[1:]))
            if torch.equal(found.within(whole, state.shape).to(state), state):
                return found
    return None


def place_by_shape(state: torch.Size, shapes: Sequence[torch.Size | None]) -> Place | None:
    """Find the prepared tensor that holds states of a shape, by shapes alone.

    Returns:
        The tensor of exactly this shape or, without one, the beginning of the only tensor that is
        longer along one axis and equal along the others; None if there is neither.
    """
    start = (0,) * len(state)
    if state in shapes:
        return Place(shapes.index(state), start)
    found = []
    for i, shape in enumerate(shapes):
        if shape is None or len(shape) != len(state):
            continue
        other = [axis for axis, (a, b) in enumerate(zip(state, shape, strict=True)) if a != b]
        if len(other) == 1 and state[other[0]] < shape[other[0]]:
            found.append(Place(i, start))
    return found[0] if len(found) == 1 else None


class Loop:
    """The steps of one scheduler in a call.

    Attributes:
        plan: The step plan.
        nodes: Grid nodes of the plan. Set by :meth:`start`.
        taken: Number of steps taken.
        x: The state after the last step, fp32; None before the first step.
        records: The recorded steps, in order.
        start_place: The place of the first state among the prepared tensors. Set by the scheduler at the
            first step; None if no prepared tensor contains the state.
    """

    def __init__(self, plan: StepPlan, nodes: Sequence[int] = ()):
        self.plan, self.nodes = plan, list(nodes)
        self.taken = 0
        self.x: Tensor | None = None
        self.records: list[StepRecord] = []
        self.start_place: Place | None = None
        self._started = False
        self._version = 0
        self._versions: list[tuple[int, int]] = []
        self._solver = None if plan.solver == "euler" else SecondOrder()

    @property
    def num_steps(self) -> int:
        """Number of steps of the plan."""
        return len(self.nodes) - 1

    @property
    def last(self) -> Tensor | None:
        """The last state, once all steps of the plan were taken."""
        return self.x if self._started and self.taken == self.num_steps else None

    def start(self, num_steps: int) -> None:
        """Fix the nodes of the plan on a grid of ``num_steps`` steps.

        Raises:
            ValueError: If the nodes are not an ascending part of the grid.
        """
        nodes = range(num_steps + 1) if self.plan.nodes is None else self.plan.nodes
        self.nodes, self._started = list(nodes), True
        ascending = self.nodes == sorted(set(self.nodes))
        if not ascending or not 0 <= self.nodes[0] <= self.nodes[-1] <= num_steps:
            raise ValueError(f"nodes {self.nodes} are not an ascending part of 0 to {num_steps}")

    def check_next(self, sample: Tensor, unknown: Sequence[str]) -> None:
        """Check that the pipeline's next step continues from the state that the last step returned.

        Args:
            sample: The state ``(B, *latent)`` that the pipeline passes to the scheduler.
            unknown: Names of further arguments that it passes.

        Raises:
            UnsupportedPipelineError: If the log-probability of a step would not cover the pipeline's
                changes of the state.
        """
        if unknown:
            raise UnsupportedPipelineError(
                f"the pipeline cannot be a policy: it steps with {', '.join(unknown)}, so that parts of "
                "its state are at different noise levels"
            )
        if self.taken >= self.num_steps:
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: one call denoises several times (segments of a long "
                "video, or stages)"
            )
        noise = self.plan.noise
        if noise and len(noise) != len(sample):
            raise UnsupportedPipelineError(
                f"the pipeline cannot be a policy: it steps {counted(len(sample), 'state')} for {counted(len(noise), 'prompt')} "
                "(the frames of a video one by one)"
            )
        if self.x is None:
            return
        # Most loops pass the very tensor that the last step returned. The comparison of values, which
        # waits for the accelerator, is only needed for the others. In-place changes raise the version.
        unchanged = self.x._version == self._version
        if not unchanged or (
            sample is not self.x
            and (self.x.shape != sample.shape or not torch.equal(self.x.to(sample.dtype), sample))
        ):
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: it changes its state between two steps, and the "
                "log-probability does not cover that (inpainting does so if the denoiser takes no mask)"
            )

    def current(self, sample: Tensor) -> Tensor:
        """The state before the next step, fp32.

        After the first step it is the state that the last step returned, even if the pipeline has
        rounded it since (CogVideoX).
        """
        return sample.float() if self.x is None else self.x

    def transition(self, node: int) -> Transition | SecondOrder:
        """How to step from a node."""
        if node in self.plan.stochastic:
            return self.plan.transition
        after_all = node > max(self.plan.stochastic, default=-1)
        return self._solver if self._solver is not None and after_all else ODE()

    def observe(self, node: int, prediction: Prediction, interval: Step) -> None:
        """Show a stochastic step to a solver that continues from it."""
        if self.plan.solver == "dpm_2m_continued" and node in self.plan.stochastic:
            assert self._solver is not None
            self._solver.observe(prediction, interval)

    def advance(self, x_next: Tensor) -> None:
        """Count a step that led to ``x_next``."""
        self.x, self._version = x_next, x_next._version
        self.taken += 1

    def record(self, record: StepRecord) -> None:
        """Keep the record of the step that was taken last."""
        self.records.append(record)
        self._versions.append(record.versions)

    def check_complete(self, name: str) -> None:
        """Check that all steps of the plan were taken, and that no recorded state was changed since.

        Args:
            name: Class of the pipeline, for the message.

        Raises:
            UnsupportedPipelineError: If the pipeline took fewer steps, or wrote into a recorded state.
        """
        if [r.versions for r in self.records] != self._versions:
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: it writes into the tensors of its scheduler's steps"
            )
        if not self._started:
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: its call does not use its scheduler's timesteps"
            )
        if self.taken != self.num_steps:
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: it took {self.taken} of {counted(self.num_steps, 'denoising step')}, "
                "because an argument such as strength cuts its schedule or because it samples in its own "
                "way"
            )


class PipelineCall:
    """One call of the pipeline.

    Attributes:
        plan: The step plan.
        whole_grid: Whether ``scheduler.timesteps`` has the whole grid, because the pipeline's loop
            enumerates its steps with their index on the grid; otherwise it has the plan's steps only.
        main: The loop of the pipeline's latents.
        auxiliary: The loop of latents that are stepped with a copy of the scheduler (LTX-2's audio).
        prepared: The results of the pipeline's ``prepare_*latents`` methods before its loop: the name
            of the method and the returned values, in the order of the calls.
        inject: The state that replaces the prepared latents; None once it was injected.
        inject_auxiliary: The same for the auxiliary latents.
        discarded: The generator of the call's initial latents, if a state is injected in their place.
        number: Index of the prepared tensor whose elements are replaced by their numbers, in calls
            that find the layout of a state.
        enumerates: Whether the loop was seen to enumerate its steps with their index on the grid.
    """

    def __init__(self, plan: StepPlan, whole_grid: bool = False):
        self.plan, self.whole_grid = plan, whole_grid
        self.main = Loop(plan)
        self.auxiliary: Loop | None = None
        self.prepared: list[tuple[str, list[Any]]] = []
        self.inject: Tensor | None = None
        self.inject_auxiliary: Tensor | None = None
        self.discarded: torch.Generator | None = None
        self.number: int | None = None
        self.enumerates = False

    def add_auxiliary(self) -> Loop:
        """Begin the loop of auxiliary latents: the same steps, with random streams of their own."""
        noise = self.plan.noise
        # "beside" is a key of the random streams; another key would draw other samples.
        own = SampleNoise([s.at("beside") for s in noise.streams]) if noise else noise
        self.auxiliary = Loop(replace(self.plan, noise=own), self.main.nodes)
        return self.auxiliary

    def prepared_for(self, loop: Loop) -> list[Any]:
        """The values among which the first state of a loop is looked for.

        For the main loop the result of the first ``prepare_latents``; for auxiliary latents the
        results of all methods, in order.
        """
        if loop is self.main:
            return next((parts for name, parts in self.prepared if name == PREPARE_LATENTS), [])
        return [part for _, parts in self.prepared for part in parts]
