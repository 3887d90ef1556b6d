"""Keeps what is costly to compute: in main memory up to a bound, then on disk, then not at all."""

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)
"""What ``repr`` tells apart."""
GB = 2**30


class TensorStore:
    """Nested tensors by key. The least recently used move to disk, and are forgotten there last.

    Attributes:
        memory_bytes: Most to hold in main memory.
        disk_bytes: Most to hold in a temporary folder, which goes with the store.
    """

    def __init__(self, memory_bytes: int = 4 * GB, disk_bytes: int = 16 * GB):
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self._memory: OrderedDict[str, Any] = OrderedDict()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    def get(self, key: str, device: torch.device) -> Any:
        """The value, its tensors on a device. Raises KeyError if it is not kept."""
        if key in self._files:
            value = torch.load(self._path(key), weights_only=True)
            self._drop_file(key)
            self._keep(key, value)
        self._memory.move_to_end(key)
        return _mapped(self._memory[key], lambda t: t.to(device))

    def put(self, key: str, value: Any) -> None:
        """Keep a value; its tensors are copied to main memory."""
        self._keep(key, _mapped(value, lambda t: t.detach().cpu()))

    def _keep(self, key: str, value: Any) -> None:
        self._memory[key], self._sizes[key] = value, num_bytes(value)
        # The newest one always stays: it is about to be used.
        while sum(self._sizes.values()) > self.memory_bytes and len(self._memory) > 1:
            oldest, old = self._memory.popitem(last=False)
            size = self._sizes.pop(oldest)
            if size <= self.disk_bytes:
                torch.save(old, self._path(oldest))
                self._files[oldest] = size
        while sum(self._files.values()) > self.disk_bytes:
            self._drop_file(next(iter(self._files)))

    def _drop_file(self, key: str) -> None:
        del self._files[key]
        self._path(key).unlink()

    def _path(self, key: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="flowgrpo-")
        return Path(self._folder.name) / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def num_bytes(value: Any) -> int:
    """Size of all tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(num_bytes(v) for v in value)
    return 0


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value of lists and tuples with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return value


def fingerprint(value: Any) -> str | None:
    """A text that equal values share and others do not; ``None`` for what cannot be told apart."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}{_digest(value.tobytes())}"
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return (
            f"{plain.dtype}{tuple(plain.shape)}{_digest(plain.flatten().view(torch.uint8).numpy())}"
        )
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{_digest(np.ascontiguousarray(value))}"
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        parts = [fingerprint(v) for v in value]
        return None if None in parts else f"[{', '.join(p for p in parts if p is not None)}]"
    return None


def seed_of(text: str) -> int:
    """A seed for what belongs to a text, in every process alike."""
    return int(_digest(text.encode())[:15], 16)


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def has_media(value: Any) -> bool:
    """Whether there is a picture or a tensor somewhere in a nested value."""
    if isinstance(value, dict):
        return any(has_media(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(has_media(v) for v in value)
    return isinstance(value, Image.Image | Tensor | np.ndarray)


def remembered(method: Callable[..., Any], capacity: int = 64) -> Callable[..., Any]:
    """A frozen model's method that keeps its last results, by what went in.

    For the encodings of condition images: a pipeline encodes them anew in every call, and a training
    step is one call.
    """
    kept: OrderedDict[str, Any] = OrderedDict()

    @torch.no_grad()
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        key = fingerprint([args, kwargs])
        if key is None:
            return method(*args, **kwargs)
        if key not in kept:
            kept[key] = method(*args, **kwargs)
            if len(kept) > capacity:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    return wrapped
