"""How a replay with gradients continues from a recorded state to the data, for rewards with a gradient.

A policy gradient needs the density of a step. A reward with a gradient needs the image instead: the
replay starts from a recorded state, follows an ending to the data, and the reward of the decoded data is
differentiated. An ending says which nodes of the grid the pipeline passes through, how its first step is
taken, and for which texts the image is scored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import ODE, Gaussian, Prediction, Step, Transition

Interval = Callable[[int, int], Step]
"""The signal and noise weights of a step between two nodes of the grid."""


@dataclass(frozen=True)
class JudgedText:
    """A text for which an image is scored.

    Attributes:
        weight: Factor of the score in the reward that is differentiated.
        prefix: Put before the prompt, with a full stop and a space; empty for the prompt as it is.
    """

    weight: float = 1.0
    prefix: str = ""

    def of(self, prompt: str) -> str:
        """The text for a prompt."""
        return f"{self.prefix}. {prompt}" if self.prefix else prompt


@runtime_checkable
class Ending(Protocol):
    """How actions of the kind ``differentiated`` continue to the data."""

    def nodes(self, step: int, num_steps: int) -> Sequence[int]:
        """The nodes from the action's step to the data, ``num_steps``; at least two."""
        ...

    def transition(
        self,
        step: int,
        interval: Interval,
        x: Float[Tensor, "batch *latent"],
        data: Float[Tensor, "batch *latent"],
    ) -> Transition | None:
        """How the first step is taken; None for the ODE.

        Args:
            step: The action's step.
            interval: The weights of a step of the grid.
            x: The states of the actions.
            data: Their ``x_next``.
        """
        ...

    def texts(self, step: int) -> Sequence[JudgedText]:
        """The texts for which the images of a step's actions are scored."""
        ...


class _ToData:
    """Jumps to the predicted data."""

    kind = "to_data"

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        return Gaussian(prediction.x0, 0.0)


@dataclass(frozen=True)
class _Recovery:
    """One deterministic step between two nodes, then the data by the known noise.

    Attributes:
        between: The step that is taken, towards the data or away from it.
        eps: The noise that the state was made with.
    """

    between: Step
    eps: Float[Tensor, "batch *latent"]
    kind: Literal["recovery"] = "recovery"

    def __call__(
        self, x: Float[Tensor, "batch *latent"], prediction: Prediction, step: Step
    ) -> Gaussian:
        landed = ODE()(x, prediction, self.between).mean
        return Gaussian(recovered(landed, self.eps, self.between), 0.0)


def recovered(
    landed: Float[Tensor, "batch *latent"], eps: Float[Tensor, "batch *latent"], step: Step
) -> Float[Tensor, "batch *latent"]:
    """The data of a state whose noise is known, ``(x - noise eps) / signal`` at the end of a step.

    Direct alignment of SRPO (arXiv:2509.06942): on a flow path ``(x - sigma' eps) / (1 - sigma')``.
    """
    return (landed - step.noise_next * eps) / step.signal_next


@dataclass(frozen=True)
class Denoise:
    """All remaining steps of the grid, each with a gradient (DRaFT-K, arXiv:2309.17400)."""

    def nodes(self, step: int, num_steps: int) -> Sequence[int]:
        """Every node from the step to the data."""
        return range(step, num_steps + 1)

    def transition(self, step: int, interval: Interval, x: Tensor, data: Tensor) -> None:
        """The ODE."""
        return

    def texts(self, step: int) -> Sequence[JudgedText]:
        """The prompt."""
        return (JudgedText(),)


@dataclass(frozen=True)
class Predict:
    """The data predicted at the state (ReFL, arXiv:2304.05977)."""

    def nodes(self, step: int, num_steps: int) -> Sequence[int]:
        """The step and the data."""
        return (step, num_steps)

    def transition(self, step: int, interval: Interval, x: Tensor, data: Tensor) -> Transition:
        """To the predicted data."""
        return _ToData()

    def texts(self, step: int) -> Sequence[JudgedText]:
        """The prompt."""
        return (JudgedText(),)


@dataclass(frozen=True)
class DirectAlign:
    """One step to a node, from either side, and the data by the known noise (SRPO, arXiv:2509.06942).

    States before ``landing`` are denoised to it, and states after it are inverted to it. The actions'
    ``x_next`` are the clean samples, so that the noise of a state follows from it.

    Attributes:
        landing: The node at which the steps end.
        denoised: The texts for states that are denoised.
        inverted: The texts for states that are inverted.
    """

    landing: int
    denoised: Sequence[JudgedText]
    inverted: Sequence[JudgedText]

    def nodes(self, step: int, num_steps: int) -> Sequence[int]:
        """The step and the data."""
        return (step, num_steps)

    def transition(self, step: int, interval: Interval, x: Tensor, data: Tensor) -> Transition:
        """The step to the landing node, and the recovery of the data."""
        between = interval(step, self.landing)
        eps = (x - between.signal * data) / between.noise
        return _Recovery(between, eps)

    def texts(self, step: int) -> Sequence[JudgedText]:
        """The texts of the side on which the step is."""
        return self.denoised if step < self.landing else self.inverted
