"""Keeps frozen models in main memory, and copies them to the device while they work.

Encoders and autoencoders are frozen, so their weights in main memory never change: a visit to the device
copies them there and drops the copy at its end, and nothing is copied back. The copies in main memory are
pinned, which makes a transfer to a GPU several times as fast.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn


def pinned(tensor: Tensor) -> Tensor:
    """A tensor in pinned main memory if there is a GPU and room; otherwise as it is."""
    if tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:
        # The system limits locked memory.
        return tensor


class HostCopy(ModelHook):
    """A hook of accelerate that brings a frozen model to the device when it is called.

    A hook rather than a context around calls, because pipelines call their encoders in many methods, and
    take their execution device from such hooks.

    Attributes:
        execution_device: The device on which the model works.
        is_present: Whether the model is on the device.
        visits: Number of times that the model was copied to the device.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        """Move a model to main memory, and copy it to the device in its calls.

        Args:
            model: A frozen model.
            device: The device on which it works.
        """
        self.execution_device, self.visits = device, 0
        self.is_present = False
        model.to("cpu")
        tensors: dict[int, Tensor] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        for tensor in tensors.values():
            tensor.data = pinned(tensor.data)
        self._tensors = [(t, t.data) for t in tensors.values()]
        add_hook_to_module(model, self, append=True)

    @property
    def num_bytes(self) -> int:
        """Bytes that a visit copies."""
        return sum(host.numel() * host.element_size() for _, host in self._tensors)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Copy the model and its arguments to the device."""
        self.bring()
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    def bring(self) -> None:
        """Copy the model to the device, unless it is there."""
        if self.is_present:
            return
        for tensor, host in self._tensors:
            tensor.data = host.to(self.execution_device, non_blocking=True)
        self.is_present, self.visits = True, self.visits + 1

    def drop(self) -> None:
        """Drop the copy on the device."""
        if not self.is_present:
            return
        for tensor, host in self._tensors:
            tensor.data = host
        self.is_present = False


def offload_autoencoder(model: nn.Module, device: torch.device) -> HostCopy:
    """Keep a VAE in main memory, and copy it to the device while it encodes or decodes."""
    copy = HostCopy(model, device)
    for name in ("encode", "decode"):
        if hasattr(model, name):
            setattr(model, name, _on_device(getattr(model, name), copy))
    return copy


def _on_device(method: Callable[..., Any], copy: HostCopy) -> Callable[..., Any]:
    """The method, called with the model on its device."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        copy.bring()
        try:
            return method(*args, **kwargs)
        finally:
            copy.drop()

    return wrapped


class Encoders:
    """The text and image encoders of a pipeline, offloaded to main memory if requested.

    Attributes:
        copies: The encoders' copies in main memory, by name; empty if they are not offloaded.
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device, offload: bool):
        """Move the models to the device, or to main memory if they are offloaded.

        Args:
            models: The encoders, by their names in the pipeline.
            device: Device on which they compute.
            offload: Whether they are on the device only inside :meth:`loaded`.
        """
        self.copies: dict[str, HostCopy] = {}
        self._depth = 0
        for name, model in models.items():
            if offload and device.type != "cpu":
                self.copies[name] = HostCopy(model, device)
            else:
                model.to(device)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """A context in which encoders may be on the device; the outermost drops them at its end."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for copy in self.copies.values():
                    copy.drop()
