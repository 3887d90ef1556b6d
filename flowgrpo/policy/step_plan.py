"""The step plan of one call of a pipeline, and the record of a step."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import ODE, Gaussian, Prediction, Step, Transition


class StepRecord:
    """One denoising step that was taken.

    A record of a rollout computes the prediction and the distribution when they are asked for, from the
    state and the model's output. Kept for every step, they would take four times the memory of these.

    Attributes:
        step: Index of the grid node at which the step starts.
        interval: The signal and noise weights at both ends of the step.
        x: The state before the step, fp32.
        x_next: The state after the step, fp32.
    """

    def __init__(
        self,
        step: int,
        interval: Step,
        x: Float[Tensor, "batch *latent"],
        x_next: Float[Tensor, "batch *latent"],
        prediction: Prediction | Callable[[], Prediction],
        gaussian: Gaussian | Callable[[Prediction], Gaussian],
        output: Tensor | None = None,
    ):
        """Record a step.

        Args:
            step: As the attribute.
            interval: As the attribute.
            x: As the attribute.
            x_next: As the attribute.
            prediction: The model's prediction at ``x``, or a function that computes it.
            gaussian: The distribution from which ``x_next`` was drawn, or a function that computes it
                from the prediction.
            output: The model's output, where the prediction is computed from it later.
        """
        self.step, self.interval, self.x, self.x_next = step, interval, x, x_next
        self._prediction, self._gaussian = prediction, gaussian
        self._output = output

    def first(self, number: int, cut: dict[int, Tensor]) -> "StepRecord":
        """The record of the first samples of a batch.

        Args:
            number: Number of samples.
            cut: The first rows of tensors that were cut before, by their ids, so that the state after a
                step and before the next stays one tensor.
        """

        def part(whole: Tensor) -> Tensor:
            return cut.setdefault(id(whole), whole[:number])

        def prediction() -> Prediction:
            p = self.prediction
            return Prediction(p.x0[:number], p.x1[:number], p.output[:number])

        def gaussian(_: Prediction) -> Gaussian:
            g = self.gaussian
            std = g.std[:number] if isinstance(g.std, Tensor) and len(g.std) > 1 else g.std
            return Gaussian(g.mean[:number], std, g.normalised)

        eager = isinstance(self._prediction, Prediction)
        whole = prediction() if eager else prediction
        spread = gaussian(whole) if isinstance(whole, Prediction) else gaussian
        return StepRecord(self.step, self.interval, part(self.x), part(self.x_next), whole, spread)

    @property
    def versions(self) -> tuple[int, int]:
        """The version counters of the recorded tensors, which writing into them raises."""
        output = self._output
        return self.x_next._version, 0 if output is None else output._version

    @property
    def prediction(self) -> Prediction:
        """The model's prediction at ``x``. It carries gradients in a replay."""
        known = self._prediction
        return known if isinstance(known, Prediction) else known()

    @property
    def gaussian(self) -> Gaussian:
        """The distribution from which ``x_next`` was drawn."""
        known = self._gaussian
        return known if isinstance(known, Gaussian) else known(self.prediction)


@dataclass(frozen=True)
class StepPlan:
    """The steps that the scheduler takes in one call of the pipeline.

    A grid of ``T`` steps has the nodes 0 (noise) to ``T`` (data); step ``k`` leads from node ``k`` to
    the next node of the plan.

    Attributes:
        nodes: Grid nodes to pass through, ascending; ``n`` nodes make ``n - 1`` steps. ``None`` means
            the whole grid.
        stochastic: Steps that follow ``transition``. The others follow the ODE.
        transition: The stochastic step.
        noise: Random streams of the stochastic steps, one per sample. Without them a stochastic step
            returns its mean.
        record: Steps to record.
        solver: Solver of the deterministic steps after the last stochastic step.
        hold: Whether every step returns its state unchanged (:meth:`held`).
    """

    nodes: Sequence[int] | None = None
    stochastic: Collection[int] = ()
    transition: Transition = field(default_factory=ODE)
    noise: SampleNoise | None = None
    record: Collection[int] = ()
    solver: Solver = "euler"
    hold: bool = False

    def held(self, num_steps: int) -> "StepPlan":
        """A plan of one step that keeps the state, in place of a plan with a single node.

        For pipelines whose loop cannot be empty: the denoiser runs once, and its output is ignored.

        Args:
            num_steps: Number of steps of the whole grid.
        """
        assert self.nodes is not None
        (node,) = self.nodes
        nodes = [node, node + 1] if node < num_steps else [node - 1, node]
        return replace(self, nodes=nodes, hold=True)
