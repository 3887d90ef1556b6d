"""Autograd between the pipeline's tensors on the CPU and the fake tensors of its models.

A gradient of a reward passes through several models, and through the pipeline's arithmetic between them.
The two functions here join the parts of its graph. Their backward passes are methods of the nodes,
which :mod:`flowgrpo.memory.backward` calls.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, device: str) -> Tensor:
        ctx.cross = _like(value, "cpu")
        return torch.empty(value.shape, dtype=value.dtype, device=device)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fake: Tensor) -> Tensor:
        ctx.cross = _like(fake, str(fake.device))
        return torch.zeros(fake.shape, dtype=fake.dtype)


def _like(tensor: Tensor, device: str) -> Callable[[Tensor], Tensor]:
    """Makes gradients of a tensor on the other side; does not keep the tensor alive."""
    shape, dtype = tensor.shape, tensor.dtype
    return lambda gradient: torch.empty(shape, dtype=dtype, device=device)


def enter(value: Tensor, device: str) -> Tensor:
    """A fake tensor on a device in place of a tensor on the CPU, with its gradient. Under a fake mode only."""
    fake: Tensor = _Enter.apply(value, device)
    return fake


def leave(fake: Tensor) -> Tensor:
    """Zeros on the CPU in place of a fake tensor, with its gradient. Outside of fake modes only."""
    value: Tensor = _Leave.apply(fake)
    return value
