"""A cache of nested tensors by key, in main memory and in a temporary file."""

import errno
import io
import logging
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from flowgrpo.policy.offloading import pinned

log = logging.getLogger(__name__)

GB = 2**30


@dataclass(frozen=True)
class _Record:
    """A value in the file.

    Attributes:
        start: Where it begins.
        size: Its bytes.
        checksum: CRC-32 of these.
    """

    start: int
    size: int
    checksum: int


class TensorStore:
    """A cache of nested tensors by key.

    The least recently used values move from memory to a temporary file, and are dropped from there. The
    file has no name (on POSIX systems), so nothing is left of it however the process ends, and no other
    user can open it. A value that cannot be read back as it was written counts as dropped.

    Attributes:
        memory_bytes: Limit of the tensors in main memory.
        disk_bytes: Limit of the file's size.
    """

    def __init__(self, memory_bytes: int = 4 * GB, disk_bytes: int = 16 * GB):
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self._memory: OrderedDict[str, Any] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._on_disk: OrderedDict[str, _Record] = OrderedDict()
        self._file: IO[bytes] | None = None
        self._warned = False

    def __len__(self) -> int:
        return len(self._memory) + len(self._on_disk)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._on_disk

    def get(self, key: str, device: torch.device) -> Any:
        """The value with its tensors on a device.

        Raises:
            KeyError: If the store does not have it, or it was damaged on the disk.
        """
        if key in self._on_disk:
            value = self._read(key, self._on_disk.pop(key))
            self._add(key, value)
        self._memory.move_to_end(key)
        return _mapped(self._memory[key], lambda t: t.to(device, non_blocking=True))

    def put(self, key: str, value: Any) -> None:
        """Store a value; its tensors are copied to main memory."""
        self._add(key, _mapped(value, lambda t: pinned(t.detach().cpu())))

    def room_for(self, key: str) -> int:
        """The number of values of the size of a stored one that main memory holds."""
        if key not in self._memory:
            return 0
        return self.memory_bytes // max(1, self._sizes[key])

    def _add(self, key: str, value: Any) -> None:
        self._memory[key], self._sizes[key] = value, num_bytes(value)
        # The newest value stays in memory, because it is about to be used.
        while sum(self._sizes.values()) > self.memory_bytes and len(self._memory) > 1:
            oldest, old = self._memory.popitem(last=False)
            del self._sizes[oldest]
            self._write(oldest, old)

    def _write(self, key: str, value: Any) -> None:
        """Move a value to the file, in place of older ones if there is no room; or drop it."""
        if num_bytes(value) > self.disk_bytes:
            return
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getvalue()
        start = self._room(len(data))
        while start is None and self._on_disk:
            self._on_disk.popitem(last=False)
            start = self._room(len(data))
        if start is None:
            return
        try:
            if self._file is None:
                # Open as long as the store is in use.
                self._file = tempfile.TemporaryFile(buffering=0, prefix="flowgrpo-")  # noqa: SIM115
            self._file.seek(start)
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn(f"encoded prompts cannot be kept in {tempfile.gettempdir()}: {error}")
            return
        self._on_disk[key] = _Record(start, len(data), zlib.crc32(data))

    def _room(self, size: int) -> int | None:
        """The first place in the file where this many bytes fit; None if there is none."""
        end = 0
        for record in sorted(self._on_disk.values(), key=lambda r: r.start):
            if record.start - end >= size:
                return end
            end = record.start + record.size
        return end if end + size <= self.disk_bytes else None

    def _read(self, key: str, record: _Record) -> Any:
        """A value from the file. Raises KeyError if it is damaged."""
        assert self._file is not None
        try:
            self._file.seek(record.start)
            data = self._file.read(record.size)
        except OSError as error:
            self._warn(f"encoded prompts cannot be read from {tempfile.gettempdir()}: {error}")
            raise KeyError(key) from error
        if len(data) != record.size or zlib.crc32(data) != record.checksum:
            self._warn(
                f"an encoded prompt in {tempfile.gettempdir()} was damaged: it is encoded again, and the "
                "disk should be checked"
            )
            raise KeyError(key)
        return torch.load(io.BytesIO(data), weights_only=True)

    def _warn(self, text: str) -> None:
        if not self._warned:
            log.warning(text)
        self._warned = True


def num_bytes(value: Any) -> int:
    """Size in bytes of all tensors in a nested value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(num_bytes(v) for v in value)
    return 0


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value of lists and tuples with a function applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    return value
