"""The outputs of another policy for a batch of states, kept until a loss needs them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.transitions import Gaussian, Prediction
from flowgrpo.losses.base import PolicyOutputs
from flowgrpo.policy.step_plan import StepRecord


@dataclass(frozen=True)
class StoredOutputs:
    """The outputs of a policy for a batch of states, on its device or in main memory.

    Attributes:
        output: The model's output.
        mean: Mean of ``x_next``.
        std: Standard deviation of ``x_next``.
        prediction: The whole prediction, only where it does not follow from state and output (a
            scheduler that clamps the predicted data): it would double the memory.
    """

    output: Float[Tensor, "states *latent"]
    mean: Float[Tensor, "states *latent"]
    std: float | Float[Tensor, "#states *latent"]
    prediction: Prediction | None

    @classmethod
    def of(cls, record: StepRecord) -> "StoredOutputs":
        p, std = record.prediction, record.gaussian.std
        implied = Prediction.from_output(record.x, p.output, record.interval)
        follows = torch.equal(implied.x0, p.x0) and torch.equal(implied.x1, p.x1)
        return cls(p.output, record.gaussian.mean, std, None if follows else p)

    def in_main_memory(self) -> "StoredOutputs":
        """A copy in main memory.

        From a CUDA device the copies go to pinned memory and the host does not wait for them. They may
        be read only after a synchronisation, or by a copy back to the device (:meth:`restored`).
        """
        p = self.prediction
        return StoredOutputs(
            _to_main_memory(self.output),
            _to_main_memory(self.mean),
            _to_main_memory(self.std) if isinstance(self.std, Tensor) else self.std,
            None if p is None else Prediction(*map(_to_main_memory, (p.x0, p.x1, p.output))),
        )

    def restored(self, record: StepRecord) -> PolicyOutputs:
        """The outputs on the device of another policy's record of the same states."""
        device, p = record.x.device, self.prediction
        if p is None:
            output = _to_device(self.output, device)
            prediction = Prediction.from_output(record.x, output, record.interval)
        else:
            prediction = Prediction(*(_to_device(t, device) for t in (p.x0, p.x1, p.output)))
        std = _to_device(self.std, device) if isinstance(self.std, Tensor) else self.std
        gaussian = Gaussian(_to_device(self.mean, device), std, record.gaussian.normalised)
        return PolicyOutputs(prediction, gaussian)


def _to_main_memory(tensor: Tensor) -> Tensor:
    # PyTorch allocates the destination of such a copy in pinned memory.
    return tensor.to("cpu", non_blocking=tensor.is_cuda)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
