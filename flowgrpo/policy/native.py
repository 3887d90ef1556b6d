"""Arithmetic in the precision of a denoiser's weights, without autocast (``memory.arithmetic = "native"``).

The adapters are the one part whose weights are in another precision: their master weights, and with them
the gradients and the optimizer's state, are in fp32.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flowgrpo.policy.call import UnsupportedPipelineError

MIXED = re.compile(r"same dtype|scalar type|(input|bias) type|to have the same type", re.IGNORECASE)
"""Matches PyTorch's messages about operands of different precisions."""


class _Linear(nn.Linear):
    """A linear layer that computes in the precision of its input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class _Conv2d(nn.Conv2d):
    """A convolution that computes in the precision of its input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self._conv_forward(input, self.weight.to(input.dtype), bias)


CASTING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def compute_adapters_in_input_precision(model: nn.Module, adapter: str) -> None:
    """Let the layers of an adapter cast their weights to the precision of their inputs in every pass.

    PEFT casts the inputs to the precision of the adapter's weights instead: an fp32 copy of every
    adapted layer's input, which the backward pass keeps. Names and values of parameters stay the same.
    The backward pass of the cast returns gradients in fp32.

    Args:
        model: The denoiser with its adapter.
        adapter: Name of the adapter.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        layer.cast_input_dtype_enabled = False
        for matrix in (layer.lora_A[adapter], layer.lora_B[adapter]):
            # The class and not the method of the object, so that compiled blocks see one code.
            matrix.__class__ = CASTING[type(matrix)]


def refusing_mixed(forward: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """A denoiser's ``forward`` that raises UnsupportedPipelineError if operands differ in precision."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except (RuntimeError, ValueError) as error:
            if not MIXED.search(str(error)):
                raise
            raise UnsupportedPipelineError(
                f"memory.arithmetic = 'native': {type(model).__name__} mixes precisions without autocast "
                f"({str(error).splitlines()[0]}); use memory.arithmetic = 'autocast'"
            ) from error

    return wrapped
