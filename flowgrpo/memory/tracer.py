"""Runs a pipeline's ``__call__`` without weights, and counts the memory that each model would take.

The pipeline's own code runs on real CPU tensors, which are small. When it calls one of its models, the
arguments are converted to fake tensors on the accelerator, the model runs on them, and real zeros of
the output's shape are returned to the pipeline. Shapes therefore come from the pipeline itself, and no
code here is specific to a model.
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
from flowgrpo.memory.dispatch_modes import (
    CUDA_BLOCK,
    FusedAttention,
    KnownValues,
    MemoryCounter,
    autocast_as_on,
)
from flowgrpo.memory.links import enter, leave
from flowgrpo.policy.arguments import keep_size
from flowgrpo.policy.fixed_device import subclass_with
from flowgrpo.policy.loading import denoisers
from flowgrpo.policy.placement import as_fp32, cast
from flowgrpo.policy.scheduler import policy_scheduler
from flowgrpo.policy.step_plan import StepPlan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Activations:
    """Activation memory of one training step, from its forward to the end of its backward, in bytes.

    Gradients of weights are not included.

    Attributes:
        saved: Tensors saved by autograd without gradient checkpointing.
        transient: Most bytes alive beyond ``saved`` at any time.
        checkpointed: Most bytes alive with gradient checkpointing; ``None`` if no model supports it.
        decoder: Bytes of ``checkpointed`` that the VAE takes while it recomputes a whole batch. They shrink
            with the number of latents that are decoded at a time.
    """

    saved: int
    transient: int
    checkpointed: int | None
    decoder: int = 0

    def peak(self, checkpointing: bool, decoded: float = 1.0) -> int:
        """Most bytes alive at any time, with or without gradient checkpointing.

        Args:
            checkpointing: Whether blocks are recomputed.
            decoded: Share of the batch that the VAE decodes at a time.
        """
        if checkpointing and self.checkpointed is not None:
            return self.checkpointed - round(self.decoder * (1 - decoded))
        return self.saved + self.transient


class Tracer:
    """A pipeline whose models run on fake tensors.

    Attributes:
        pipeline: The pipeline, with parameters on the meta device. Its models and its scheduler are
            modified.
        peaks: Most bytes alive, besides parameters, in calls of each component without gradients.
        latents: Shape of the latents of the last call; ``None`` before the first.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        dtype: torch.dtype,
        *,
        full: bool = False,
        native: bool = False,
        device: str = "cuda",
        block: int = CUDA_BLOCK,
    ):
        """Give the models fake parameters and wrap their methods.

        Args:
            pipeline: From :func:`~flowgrpo.memory.meta_pipeline.build`, with adapters if configured.
            dtype: Precision of the denoisers' arithmetic.
            full: Whether all weights of the denoisers are trained; weights and inputs are then fp32.
            native: Whether the denoisers compute without autocast.
            device: Device type to estimate for; no such device has to be present.
            block: Granularity of the device's allocator in bytes.
        """
        self.device, self.block = device, block
        # fp32 disables autocast.
        self.autocast_dtype = torch.float32 if native else dtype
        self.input_dtype = torch.float32 if full else dtype
        self.peaks: dict[str, int] = {}
        self.latents: torch.Size | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._values = KnownValues()
        # Nesting depth of model calls that run on fake tensors.
        self._depth = 0
        # Component and result of each denoiser call of a training step.
        self._outputs: list[tuple[str, Any]] = []
        # Results of encoders and autoencoders by method and argument shapes.
        self._cache: dict[str, Any] = {}
        # The counter of a training step; None during a rollout.
        self._training: MemoryCounter | None = None
        # Whether gradients pass from one model to another.
        self._linked = False
        self._dummy: Tensor | None = None
        self.pipeline = pipeline
        self._call = inspect.unwrap(type(pipeline).__call__)
        self.denoisers = denoisers(pipeline)
        self._parameters: list[Tensor] = []
        self._buffers: dict[str, list[tuple[dict[str, Any], str, Tensor, Tensor]]] = {}
        self.models = {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}
        for name, model in self.models.items():
            self._wrap_model(name, model)
        pipeline.__class__ = _with_device(
            type(pipeline), lambda _: CPU, "device", "_execution_device"
        )
        pipeline.scheduler = policy_scheduler(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        if hasattr(pipeline, "prepare_latents"):
            pipeline.prepare_latents = self._wrap_prepare_latents(pipeline.prepare_latents)

    def rollout(self, arguments: Mapping[str, Any]) -> None:
        """Encode the prompts, take one step and decode, without gradients. Updates :attr:`peaks`."""
        with torch.no_grad():
            self._run(arguments, "pt")

    def training(self, arguments: Mapping[str, Any]) -> Activations:
        """Take one step with gradients, as in a replay, without and with gradient checkpointing."""
        supported = [
            m for m in self.denoisers.values() if getattr(m, "_supports_gradient_checkpointing", 0)
        ]
        saved, peak = self._forward_backward(arguments)
        if not supported:
            return Activations(saved, peak - saved, None)
        for model in supported:
            model.enable_gradient_checkpointing(self._checkpoint)
        try:
            _, checkpointed = self._forward_backward(arguments)
        finally:
            for model in supported:
                model.disable_gradient_checkpointing()
        return Activations(saved, peak - saved, checkpointed)

    def _counter(self) -> MemoryCounter:
        """A counter of one call of a model, or of one training step."""
        return MemoryCounter(self._parameters, self.block)

    def _forward_backward(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Bytes saved by one forward, and most bytes alive until its backward ends."""
        self._training = counter = self._counter()
        try:
            self._run(arguments, "latent")
            saved = counter.live
            with ExitStack() as stack:
                for name in dict.fromkeys(name for name, _ in self._outputs):
                    stack.enter_context(self._fake(name, counter, autocast=False))
                roots = roots_of([v for _, result in self._outputs for v in tree_leaves(result)])
                self._outputs.clear()
                backward(roots)
            return saved, counter.peak
        finally:
            self._training = None
            self._outputs.clear()

    def _run(
        self, arguments: Mapping[str, Any], output: str, nodes: Sequence[int] | None = None
    ) -> Any:
        """Call the pipeline for some nodes of its schedule, by default for the first step."""
        steps = int(arguments.get("num_inference_steps", 1))
        first = [0, 1] if steps else None
        record = set(nodes[:1]) if nodes else ()
        self.pipeline.scheduler.begin(StepPlan(nodes=nodes or first, record=record))
        return self._call(
            self.pipeline,
            **keep_size(dict(arguments), inspect.signature(self._call).parameters),
            generator=torch.Generator().manual_seed(0),
            output_type=output,
            return_dict=False,
        )

    def _wrap_prepare_latents(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``prepare_latents`` to return fp32, as a policy does, and to note the latents' shape."""

        @functools.wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            result = as_fp32(prepare(*args, **kwargs))
            first = result if isinstance(result, Tensor) else result[0]
            self.latents = first.shape
            return result

        return prepared

    def _wrap_model(self, name: str, model: nn.Module) -> None:
        """Replace a model's parameters by fake tensors, and make its methods convert their arguments.

        The ``forward`` of every submodule is wrapped, since pipelines also call parts of a model; of
        diffusers' models, ``encode`` and ``decode`` as well.
        """
        self._parameters += fake_parameters(model, self._mode, self.device)
        self._buffers[name] = fake_buffers(model, self._mode, self.device)
        self._parameters += [fake for *_, fake in self._buffers[name]]
        inner = torch.device(self.device, 0) if self.device != "cpu" else CPU

        def current_device(_: Any) -> torch.device:
            return inner if self._depth else CPU

        model.__class__ = _with_device(type(model), current_device, "device")
        for module in model.modules():
            module.forward = self._wrap_method(name, module.forward)
        for method in ("encode", "decode"):
            if isinstance(model, ModelMixin) and hasattr(model, method):
                setattr(model, method, self._wrap_method(name, getattr(model, method)))

    def _wrap_method(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method of a component so that a call from the pipeline runs on fake tensors."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                # Called by another method of a model, with fake tensors already.
                return function(*args, **kwargs)
            if name in self.denoisers:
                return self._differentiated(name, function, args, kwargs)
            # Pipelines call encoders many times with arguments of the same shapes.
            leaves, spec = tree_flatten((args, kwargs))
            if any(isinstance(v, Tensor) and v.requires_grad for v in leaves):
                return self._differentiated(name, function, args, kwargs)
            shapes = [(v.shape, v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves]
            key = f"{name} {id(function)} {shapes} {spec}"
            if key not in self._cache:
                counter = self._counter()
                with torch.no_grad(), self._fake(name, counter):
                    result = function(*self._to_fake(name, args), **self._to_fake(name, kwargs))
                self.peaks[name] = max(self.peaks.get(name, 0), counter.peak)
                self._cache[key] = _to_real(result)
            return self._cache[key]

        return wrapped

    def _differentiated(
        self, name: str, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a component on fake tensors, with gradients in a training step."""
        counter = self._training or self._counter()
        with self._fake(name, counter):
            result = function(*self._to_fake(name, args), **self._to_fake(name, kwargs))
        if self._training is None:
            self.peaks[name] = max(self.peaks.get(name, 0), counter.peak)
        else:
            # Holding the results keeps autograd's graph and its saved tensors alive. If gradients pass to
            # other models, their results do.
            self._outputs.append((name, None if self._linked else result))
        return _to_real(result, self._linked)

    @contextmanager
    def _fake(self, name: str, counter: MemoryCounter, autocast: bool = True) -> Iterator[None]:
        """Enter all modes under which a component runs on fake tensors."""
        with ExitStack() as stack:
            stack.enter_context(self._mode)
            stack.enter_context(counter)
            stack.enter_context(self._values)
            stack.enter_context(FusedAttention())
            if name in self.denoisers and autocast:
                stack.enter_context(autocast_as_on(self.device, self.autocast_dtype))
            # Buffers are fake only inside, because pipelines read some of them, such as the mean and
            # standard deviation of a VAE's latents.
            for holder, key, _, fake in self._buffers[name]:
                holder[key] = fake
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                for holder, key, real, _ in self._buffers[name]:
                    holder[key] = real

    def _to_fake(self, name: str, values: Any) -> Any:
        """Convert arguments to fake tensors, in the dtype to which a policy casts a model's inputs."""

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
                return value
            if value.requires_grad:
                fake = enter(value, self.device)
            else:
                fake = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            self._values.tell(fake, value)
            if name in self.denoisers:
                return cast(fake, self.input_dtype, 2)
            return cast(fake, torch.float32) if name == "vae" else fake

        return tree_map(convert, values)

    def _checkpoint(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing of a block, in place of ``torch.utils.checkpoint.checkpoint``."""
        around = functools.partial(autocast_as_on, self.device, self.autocast_dtype)
        return self._recomputed(around, module, args, kwargs)

    def _recomputed(
        self, around: Callable[[], Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a block, and in training save its arguments alone."""
        if self._training is None:
            return module(*args, **kwargs)
        if self._dummy is None:
            with self._mode:
                self._dummy = torch.empty(1, device=self.device, requires_grad=True)
        return again(around, self._dummy, module, args, kwargs)


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; shared tensors count once."""
    seen = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in seen.values())


def fake_parameters(model: nn.Module, mode: FakeTensorMode, device: str) -> Sequence[Tensor]:
    """Replace a model's parameters by fake tensors; shared parameters stay shared."""
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


def fake_buffers(
    model: nn.Module, mode: FakeTensorMode, device: str
) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """Of each buffer: the table that holds it, its key there, the buffer, and a fake copy."""
    found = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                with mode:
                    fake = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                found.append((module._buffers, name, buffer, fake))
    return found


def _with_device(cls: type, device: Callable[[Any], torch.device], *names: str) -> type:
    """A subclass whose properties of these names return a device."""
    return subclass_with(cls, {n: property(device) for n in names})


def _to_real(value: Any, linked: bool = False) -> Any:
    """Replace fake tensors by zeros on the CPU, also inside diffusers' output objects.

    If ``linked``, the zeros carry the gradient.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            if linked and value.requires_grad:
                return leave(value)
            return torch.zeros(value.shape, dtype=value.dtype)
        if type(value).__module__.startswith("diffusers") and hasattr(value, "__dict__"):
            clone = object.__new__(type(value))
            clone.__dict__ = {k: _to_real(v, linked) for k, v in vars(value).items()}
            return clone
        return value

    return tree_map(leaf, value)
