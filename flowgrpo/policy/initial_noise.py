"""The initial noise as the policy: what is trained is its distribution, the model stays as it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowgrpo.core.transitions import Gaussian, Prediction, Step
from flowgrpo.data.experience import INITIAL as INITIAL
from flowgrpo.policy.entering import Place, enter, parts_of, place, shapes_of
from flowgrpo.policy.scheduler import PolicyScheduler
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.policy.weights import require_same

FILE = "initial_noise.safetensors"
MEAN, LOG_STD = "initial_noise.mean", "initial_noise.log_std"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The mean and the deviation of the initial noise (FIND, arXiv:2407.19453); no model is changed."""

    kind: Literal["noise"] = "noise"

    def bounds(self) -> Sequence[tuple[str, int, int]]:
        """Nothing to check."""
        return []


class InitialNoise:
    """Independent normals, one per latent element, from which every sample starts.

    One distribution serves all prompts: the paper trains it for a single one. Before training it is
    the standard normal, and the images are the pipeline's own to the last bit. The latents' shape is
    known after :meth:`fit`; before it there are no parameters.

    Differs from the released code in holding the logarithm of the deviation, which cannot become
    negative; the code cuts the deviation off at 1e-4.

    Attributes:
        parameters: ``mean`` and ``log_std``, both ``(1, *latent)`` in fp32.
    """

    def __init__(self, weights: Noise) -> None:
        self.weights = weights
        self.parameters: dict[str, nn.Parameter] = {}
        self._is_reference = False

    def fit(self, shape: Sequence[int], device: torch.device) -> None:
        """Begin as a standard normal of one sample's ``shape``."""
        self.parameters = {
            name: nn.Parameter(torch.zeros(1, *shape, device=device)) for name in (MEAN, LOG_STD)
        }

    def gaussian(self, scale: float = 1.0) -> Gaussian:
        """The distribution of one sample's initial state, for noise of deviation ``scale``."""
        mean: Tensor = self.parameters[MEAN]
        log_std: Tensor = self.parameters[LOG_STD]
        if self._is_reference:
            mean, log_std = torch.zeros_like(mean), torch.zeros_like(log_std)
        return Gaussian(scale * mean, scale * log_std.exp())

    def record(self, number: int, scale: float) -> StepRecord:
        """The draw of the initial noise as a step, ``number`` times; what it predicts is the mean."""
        one = self.gaussian(scale)
        mean = one.mean.expand(number, *one.mean.shape[1:])
        gaussian = Gaussian(mean, one.std)
        nowhere, interval = torch.zeros_like(mean), Step.flow(1.0, 1.0)
        return StepRecord(INITIAL, interval, nowhere, mean, Prediction(mean, mean, mean), gaussian)

    def place_in(self, prepared: Any, known: Place | None, scheduler: PolicyScheduler) -> Any:
        """What a pipeline prepared, with its standard noise moved into this distribution.

        Before :meth:`fit` nothing is changed.

        Raises:
            ValueError: If its latents have another shape than those that this was fitted to.
        """
        if not self.parameters:
            return prepared
        parts, noise = parts_of(prepared), scheduler.plan.noise
        shape = torch.Size((len(noise or ()), *self.parameters[MEAN].shape[1:]))
        sizes = shapes_of(parts)
        found = place(shape, [s if s == shape else None for s in sizes])
        if found is None and known is not None and sizes[known.index] is not None:
            # A part of a tensor, where the loop was seen to begin.
            found = known if tuple(parts[known.index].shape[1:]) == known.whole else None
        if found is None:
            shapes = [tuple(s)[1:] for s in sizes if s is not None]
            raise ValueError(
                f"the initial noise was trained for latents of shape {tuple(shape)[1:]}, and this call "
                f"prepares {shapes}: with model.weights.kind = 'noise' all prompts must have one size"
            )
        drawn = found.within(parts[found.index], shape).float()
        gaussian = self.gaussian(scheduler.initial_std)
        return enter(prepared, gaussian.sample(drawn / scheduler.initial_std), found)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the noise is standard."""
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters. Raises ValueError unless names and shapes are exactly ours."""
        if not self.parameters and MEAN in tensors:
            self.fit(tensors[MEAN].shape[1:], tensors[MEAN].device)
        require_same(self.parameters, tensors)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def export(self, folder: Path) -> Path:
        """Write ``mean`` and ``std``, each of one sample's shape, as ``initial_noise.safetensors``.

        ``latents = mean + std * torch.randn(batch, *mean.shape)`` is what the pipeline's call takes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            gaussian = self.gaussian()
            assert isinstance(gaussian.std, Tensor)
            tensors = {"mean": gaussian.mean[0], "std": gaussian.std[0]}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / FILE)
        return folder
