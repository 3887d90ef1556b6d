"""Dispatch modes for running models on fake tensors: counting bytes, known values, fused attention.

On fake tensors PyTorch computes shapes, dtypes and the tensors that autograd saves, and allocates
nothing. The modes here count the bytes that real tensors would take, keep the values of small integer
tensors, and choose the attention kernel and the autocast rules of an accelerator that may be absent.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

CUDA_BLOCK = 512
"""Granularity of PyTorch's CUDA allocator, in bytes."""


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of storages that operations create, until each storage is freed.

    Works on fake and on real tensors.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at any time so far.
    """

    def __init__(self, known: Sequence[Tensor] = (), block: int = 1):
        """Start counting.

        Args:
            known: Existing tensors, such as parameters, which are not counted.
            block: Sizes are rounded up to multiples of this number of bytes.
        """
        super().__init__()
        self.live = self.peak = 0
        self.block = block
        self.sizes: dict[int, int] = {}
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self.sizes:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class KnownValues(TorchDispatchMode):
    """Keeps the values of fake integer and boolean tensors, such as masks and lengths.

    Some models derive shapes from these values. An operation whose inputs all have known values is
    repeated on real CPU tensors, which are small, so its result has known values too.

    Attributes:
        guesses: Whether code that asks for an unknown number, such as the smallest value of its input, gets 0
            (or False). Otherwise PyTorch raises an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guesses = False
        self._known = WeakIdKeyDictionary()

    def tell(self, fake: Tensor, value: Tensor) -> None:
        """Store the value of a fake tensor, unless it is floating-point."""
        if not value.is_floating_point():
            with _disable_current_modes():
                self._known[fake] = value.detach().cpu()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], self._positions(args[1]))
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if not tensors or any(t not in self._known for t in tensors):
            if self.guesses and func is torch.ops.aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else 0
            return func(*args, **kwargs)
        real_args, real_kwargs = tree_map(self._value, (args, kwargs))
        with _disable_current_modes():
            values = func(*real_args, **{k: v for k, v in real_kwargs.items() if k != "device"})
        if func is torch.ops.aten._local_scalar_dense.default:
            return values
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            result = tensors[0].new_empty(values.shape, dtype=values.dtype)
        else:
            result = func(*args, **kwargs)
        for fake, value in zip(tree_leaves(result), tree_leaves(values), strict=True):
            if isinstance(fake, Tensor) and fake.shape == value.shape:
                self.tell(fake, value)
        return result

    def _value(self, value: Any) -> Any:
        return self._known[value] if isinstance(value, Tensor) else value

    def _positions(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replace known boolean masks by integer positions, so that the result's shape is known."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool and index in self._known:
                with _disable_current_modes():
                    columns = self._known[index].nonzero().unbind(1)
                for column in columns:
                    fake = index.new_empty(column.shape, dtype=column.dtype)
                    self.tell(fake, column)
                    found.append(fake)
            else:
                found.append(index)
        return found


class FusedAttention(TorchFunctionMode):
    """Replaces scaled dot-product attention by the fused kernel that an accelerator would choose.

    PyTorch only chooses a kernel for a device that is present. The rule here: flash attention in 16
    bits without a mask and with head dimensions up to 256, else the memory-efficient kernel. Both save
    queries, keys, values, the output and one number per query.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    lead, (length, width) = query.shape[:-3], query.shape[-2:]
    query, key, value = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = bias.expand(query.shape[0], query.shape[1], length, key.shape[-2])
    ops = torch.ops.aten
    if device == "cpu":
        attend = ops._scaled_dot_product_flash_attention_for_cpu
        out = attend(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]
    elif bias is None and query.dtype != torch.float32 and width <= 256:
        attend = ops._scaled_dot_product_flash_attention
        out = attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    else:
        attend = ops._scaled_dot_product_efficient_attention
        saves = torch.is_grad_enabled()
        out = attend(query, key, value, bias, saves, dropout_p, is_causal, scale=scale)[0]
    return out.reshape(*lead, *out.shape[-3:])


@contextmanager
def autocast_as_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Enable autocast with the rules of a device type, also if no such device is present.

    With ``dtype`` fp32, autocast is disabled inside.
    """
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    enabled = dtype != torch.float32
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled(device, enabled)
    if enabled:
        torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
