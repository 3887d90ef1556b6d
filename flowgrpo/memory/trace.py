"""Runs a pipeline's own call without weights, and measures what each of its models would take.

The pipeline's glue runs for real, on small CPU tensors. Where it calls one of its models, the
arguments become fake tensors of the accelerator, the model runs on them, and zeros of the right
shapes come back. So the shapes are those of the pipeline itself, and no model is known by name.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from flowgrpo.memory.backward import again, backward, roots_of
from flowgrpo.memory.live import CUDA_BLOCK, FusedAttention, Live, Values, autocast_as_on
from flowgrpo.policy.loading import denoisers
from flowgrpo.policy.precision import as_fp32, cast
from flowgrpo.policy.scheduler import policy_scheduler
from flowgrpo.policy.step_plan import StepPlan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Activations:
    """What one training step takes from its forward to the end of its backward, in bytes.

    Attributes:
        saved: Saved by autograd, without gradient checkpointing.
        transient: The most that is alive beyond it at any moment, gradients of weights excepted.
        checkpointed: The most that is alive with gradient checkpointing. None where the model cannot
            do it.
    """

    saved: int
    transient: int
    checkpointed: int | None

    def peak(self, checkpointing: bool) -> int:
        """The most that is alive between forward and the end of backward."""
        if checkpointing and self.checkpointed is not None:
            return self.checkpointed
        return self.saved + self.transient


class Tracer:
    """A pipeline whose models run on fake tensors.

    Attributes:
        pipeline: With parameters on the meta device; its models and scheduler are changed.
        peaks: The most bytes alive in calls of each component without gradients, over parameters.
        latents: The shape of one call's latents.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        dtype: torch.dtype,
        *,
        full: bool = False,
        device: str = "cuda",
        block: int = CUDA_BLOCK,
    ):
        """Give the models fake parameters and watch their calls.

        Args:
            pipeline: From :func:`~flowgrpo.memory.blueprint.build`, with adapters if there are.
            dtype: Precision of the denoisers' arithmetic.
            full: Whether the denoisers are trained whole, with weights and inputs in fp32.
            device: Type of the device that is imagined.
            block: Memory is given out in multiples of it.
        """
        self.dtype, self.device, self.block = dtype, device, block
        self.entering = torch.float32 if full else dtype
        self.peaks: dict[str, int] = {}
        self.latents: torch.Size | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._values = Values()
        self._inside = 0
        self._kept: list[tuple[str, Any]] = []
        self._answers: dict[str, Any] = {}
        self._live: Live | None = None
        self._anchor: Tensor | None = None
        self.pipeline = pipeline
        self._call = inspect.unwrap(type(pipeline).__call__)
        self.denoisers = denoisers(pipeline)
        self._parameters: list[Tensor] = []
        self._buffers: dict[str, list[tuple[dict[str, Any], str, Tensor, Tensor]]] = {}
        self.models = {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}
        for name, model in self.models.items():
            self._watch(name, model)
        pipeline.__class__ = _located(type(pipeline), lambda _: CPU, "device", "_execution_device")
        pipeline.scheduler = policy_scheduler(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "prepare_latents"):
            pipeline.prepare_latents = self._prepared(pipeline.prepare_latents)

    def rollout(self, arguments: Mapping[str, Any]) -> None:
        """Encode, take one step and decode, without gradients; :attr:`peaks` has what it took."""
        with torch.no_grad():
            self._run(arguments, "pt")

    def training(self, arguments: Mapping[str, Any]) -> Activations:
        """Take one step with gradients, as in a replay."""
        supported = [
            m for m in self.denoisers.values() if getattr(m, "_supports_gradient_checkpointing", 0)
        ]
        saved, peak = self._there_and_back(arguments)
        if not supported:
            return Activations(saved, peak - saved, None)
        for model in supported:
            model.enable_gradient_checkpointing(self._block)
        try:
            _, checkpointed = self._there_and_back(arguments)
        finally:
            for model in supported:
                model.disable_gradient_checkpointing()
        return Activations(saved, peak - saved, checkpointed)

    def _there_and_back(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """What one forward saves, and the most that is alive until its backward ends."""
        self._live = live = Live(self._parameters, self.block)
        try:
            self._run(arguments, "latent")
            saved = live.live
            with ExitStack() as stack:
                for name in dict.fromkeys(name for name, _ in self._kept):
                    stack.enter_context(self._fake(name, live, autocast=False))
                roots = roots_of([v for _, result in self._kept for v in tree_leaves(result)])
                self._kept.clear()
                backward(roots)
            return saved, live.peak
        finally:
            self._live = None
            self._kept.clear()

    def _run(self, arguments: Mapping[str, Any], output: str) -> None:
        steps = int(arguments.get("num_inference_steps", 1))
        self.pipeline.scheduler.begin(StepPlan(nodes=[0, 1] if steps else None))
        self._call(
            self.pipeline,
            **arguments,
            generator=torch.Generator().manual_seed(0),
            output_type=output,
            return_dict=False,
        )

    def _prepared(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            result = as_fp32(prepare(*args, **kwargs))
            first = result if isinstance(result, Tensor) else result[0]
            self.latents = first.shape
            return result

        return prepared

    def _watch(self, name: str, model: nn.Module) -> None:
        """Make a model's parameters fake and its calls doors into the fake world."""
        self._parameters += _fake_parameters(model, self._mode, self.device)
        self._buffers[name] = _fake_buffers(model, self._mode, self.device)
        self._parameters += [fake for *_, fake in self._buffers[name]]
        inner = torch.device(self.device, 0) if self.device != "cpu" else CPU

        def located(_: Any) -> torch.device:
            return inner if self._inside else CPU

        model.__class__ = _located(type(model), located, "device")
        for module in model.modules():
            module.forward = self._door(name, module.forward)
        for method in ("encode", "decode"):
            if isinstance(model, ModelMixin) and hasattr(model, method):
                setattr(model, method, self._door(name, getattr(model, method)))

    def _door(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def door(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            if name in self.denoisers:
                return self._denoise(name, function, args, kwargs)
            # Encoders are called again and again with the same shapes.
            leaves, spec = tree_flatten((args, kwargs))
            shapes = [(v.shape, v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves]
            key = f"{name} {id(function)} {shapes} {spec}"
            if key not in self._answers:
                live = Live(self._parameters, self.block)
                with torch.no_grad(), self._fake(name, live):
                    result = function(*self._enter(name, args), **self._enter(name, kwargs))
                self.peaks[name] = max(self.peaks.get(name, 0), live.peak)
                self._answers[key] = _real(result)
            return self._answers[key]

        return door

    def _denoise(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        live = self._live or Live(self._parameters, self.block)
        with self._fake(name, live):
            result = function(*self._enter(name, args), **self._enter(name, kwargs))
        if self._live is None:
            self.peaks[name] = max(self.peaks.get(name, 0), live.peak)
        else:
            # Autograd's graph, and with it what was saved, lives as long as its results.
            self._kept.append((name, result))
        return _real(result)

    @contextmanager
    def _fake(self, name: str, live: Live, autocast: bool = True) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(live)
            stack.enter_context(self._values)
            stack.enter_context(FusedAttention())
            if name in self.denoisers and autocast:
                stack.enter_context(autocast_as_on(self.device, self.dtype))
            # Pipelines read some buffers themselves, such as the statistics of latents.
            for held, key, _, fake in self._buffers[name]:
                held[key] = fake
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
                for held, key, real, _ in self._buffers[name]:
                    held[key] = real

    def _enter(self, name: str, values: Any) -> Any:
        """Arguments as fake tensors, in the precision that they have at the model's door."""

        def enter(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
                return value
            fake = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            self._values.tell(fake, value)
            if name in self.denoisers:
                return cast(fake, self.entering, 2)
            return cast(fake, torch.float32) if name == "vae" else fake

        return tree_map(enter, values)

    def _block(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for gradient checkpointing of a block."""
        if self._live is None:
            return module(*args, **kwargs)
        if self._anchor is None:
            with self._mode:
                self._anchor = torch.empty(1, device=self.device, requires_grad=True)
        around = functools.partial(autocast_as_on, self.device, self.dtype)
        return again(around, self._anchor, module, args, kwargs)


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and persistent buffers; shared ones count once."""
    seen = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in seen.values())


def _fake_parameters(model: nn.Module, mode: FakeTensorMode, device: str) -> Sequence[Tensor]:
    """Put fake tensors in place of a model's parameters; ties are kept."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
    return list(made.values())


def _fake_buffers(
    model: nn.Module, mode: FakeTensorMode, device: str
) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Where each buffer is held, its name there, the buffer, and a fake one like it."""
    found = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                with mode:
                    fake = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                found.append((module._buffers, name, buffer, fake))
    return found


def _located(cls: type, where: Callable[[Any], torch.device], *names: str) -> type:
    """A class like another whose properties of these names say where its tensors are."""
    return type(
        cls.__name__, (cls,), {n: property(where) for n in names} | {"__module__": cls.__module__}
    )


def _real(value: Any) -> Any:
    """Zeros on the CPU in place of fake tensors, also inside diffusers' own objects."""

    def leaf(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return torch.zeros(value.shape, dtype=value.dtype)
        if type(value).__module__.startswith("diffusers") and hasattr(value, "__dict__"):
            clone = object.__new__(type(value))
            clone.__dict__ = {k: _real(v) for k, v in vars(value).items()}
            return clone
        return value

    return tree_map(leaf, value)
