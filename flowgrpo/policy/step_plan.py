"""Where one call of a pipeline is sent on the sampling grid, and what is recorded on the way."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import ODE, Gaussian, Prediction, Step, Transition


@dataclass(frozen=True)
class StepRecord:
    """One step as it happened.

    Attributes:
        step: Index in the grid of the node that the step left.
        interval: The step's signal and noise weights.
        x: The state before, fp32.
        x_next: The state after, fp32.
        prediction: What the model said; carries gradients in a replay.
        gaussian: The distribution of ``x_next``.
    """

    step: int
    interval: Step
    x: Float[Tensor, "batch *latent"]
    x_next: Float[Tensor, "batch *latent"]
    prediction: Prediction
    gaussian: Gaussian


@dataclass
class StepPlan:
    """What the scheduler does in one call of the pipeline.

    Attributes:
        nodes: Indices of the grid to visit, ascending; ``n`` nodes make ``n - 1`` steps, and the
            grid of ``T`` steps has nodes 0 (noise) to T (data). ``None`` visits all.
        stochastic: The steps that follow ``transition``; the others follow the ODE.
        transition: The stochastic step.
        noise: What the stochastic steps inject; without it they return their mean.
        record: The steps to record.
        solver: How the deterministic steps after the last stochastic one are taken.
        hold: Whether steps leave the state as it is, for pipelines whose loop cannot be empty.
        visits: The record.
    """

    nodes: Sequence[int] | None = None
    stochastic: Collection[int] = ()
    transition: Transition = field(default_factory=ODE)
    noise: SampleNoise | None = None
    record: Collection[int] = ()
    solver: Solver = "euler"
    hold: bool = False
    records: list[StepRecord] = field(default_factory=list)


def held(plan: StepPlan, num_steps: int) -> StepPlan:
    """The same for a loop that cannot be empty: one step from or to the only node changes nothing."""
    assert plan.nodes is not None
    (node,) = plan.nodes
    nodes = [node, node + 1] if node < num_steps else [node - 1, node]
    return replace(plan, nodes=nodes, hold=True, records=[])
