"""Where one call of a pipeline is sent on the sampling grid, and what is recorded on the way."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import ODE, Gaussian, Prediction, Step, Transition


@dataclass(frozen=True)
class Visit:
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
class Itinerary:
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
    visits: list[Visit] = field(default_factory=list)


def held(itinerary: Itinerary, num_steps: int) -> Itinerary:
    """The same for a loop that cannot be empty: one step from or to the only node changes nothing."""
    assert itinerary.nodes is not None
    (node,) = itinerary.nodes
    nodes = [node, node + 1] if node < num_steps else [node - 1, node]
    return replace(itinerary, nodes=nodes, hold=True, visits=[])
