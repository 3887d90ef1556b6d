"""Files that survive being killed: atomic writes, an append-only log with checksums, a lock."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import BenchError, Json
from flowgrpo.data import strict_json
from flowgrpo.data.files import reached, rename

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCK = ".lock"
PATIENCE = 5.0
"""Seconds that a process of the same job waits for another one that is just taking the lock."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that it is never seen half written.

    Raises:
        BenchError: If the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reached("write", temporary)
        temporary.write_bytes(data)
        rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error


def write_json(path: Path, table: Json) -> None:
    """Write a table as JSON, atomically."""
    write_atomically(path, (strict_json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A table from a JSON file.

    Raises:
        BenchError: If it cannot be read.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise BenchError(f"{path} cannot be read: it holds no JSON object")
    return table


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(table: Json) -> str:
    """Sixteen hexadecimal digits that depend on the content of a JSON table only."""
    text = json.dumps(table, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _explained(error: OSError, path: Path) -> Exception:
    if error.errno in FULL:
        return BenchError(
            f"the disk of {path.parent} is full: free some space and run the same command again; "
            "everything already written is kept"
        )
    return error


class Log:
    """An append-only JSON-lines file: a header, then records, each line with a checksum.

    A line that a killed process left half written is cut off when the file is opened; a line that
    was damaged later is left out with a warning.

    Attributes:
        records: All records, in the order of the file.
        header: The first line.
    """

    def __init__(self, path: Path, header: Json):
        """Open a log, or begin it with ``header``.

        Raises:
            BenchError: If the file begins with another header, or the disk is full.
        """
        self.path, self.header = path, dict(header)
        self.records: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, end = read_lines(path) if path.exists() else ([], 0)
        if lines and lines[0] != self.header:
            raise BenchError(f"{path} begins with another header; move it away to begin anew")
        self.records, self._end = lines[1:], end
        try:
            self._file = path.open("ab", buffering=0)
            self._file.truncate(end)
            if not lines:
                self.append(self.header)
                self.records.clear()
        except OSError as error:
            raise _explained(error, path) from error

    def append(self, record: Json) -> None:
        """Add one record; it is in the file when this returns.

        Raises:
            BenchError: If the disk is full.
        """
        # The checksum must be that of what is read back.
        kept = strict_json.finite(record)
        text = strict_json.dumps({**kept, "crc": checksum(kept)}, ensure_ascii=False)
        line = f"{text}\n".encode()
        try:
            reached("write", self.path)
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise _explained(error, self.path) from error
        self._end += len(line)
        self.records.append(kept)

    def close(self) -> None:
        """Close the file, and wait until it is on the disk."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()


def checksum(record: Json) -> int:
    """CRC-32 of a record's content."""
    return zlib.crc32(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The intact records of a log, and where its last complete line ends.

    Raises:
        BenchError: If its first line, the header, is damaged.
    """
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            intact = record.pop("crc") == checksum(record)
        except (ValueError, KeyError, AttributeError, TypeError):
            intact = False
        if intact:
            lines.append(record)
        elif number == 1:
            raise BenchError(f"{path}, line 1: damaged; move the file away to begin anew")
        else:
            log.warning("%s, line %d is damaged; it is left out and made again", path, number)
    return lines, end


def job() -> str:
    """The same for all processes that one ``torchrun`` started on this machine, and for no other."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    master = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    return f"{socket.gethostname()}:{os.getpid()}" if alone else f"{run} {master}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this job; all ranks of one job may hold it at once.

    The lock is the operating system's and ends with the process, however that ends.

    Raises:
        BenchError: If another job holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / LOCK, job()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _acquire(descriptor, own, folder):
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline or (holder and holder != own and _alone()):
                raise BenchError(
                    f"another process ({holder or 'unknown'}) is working on {folder}: wait for it, "
                    "or choose another --out"
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _acquire(descriptor: int, own: str, folder: Path) -> bool:
    """Take the lock if it is free, or share it with the same job."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass
    else:
        for unfinished in folder.rglob(".*.tmp"):
            unfinished.unlink(missing_ok=True)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, own.encode(), 0)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    if os.pread(descriptor, 4096, 0).decode(errors="replace").strip() == own:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def refuse_changes(
    path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Sequence[str] = ()
) -> None:
    """Compare stored settings with those of a command.

    Raises:
        BenchError: Naming the first key that differs, with both values.
    """
    for key in sorted({*kept, *wanted} - set(ignored)):
        if kept.get(key) != wanted.get(key):
            raise BenchError(
                f"{path.parent} was made with {key} = {kept.get(key)!r}, and this command says "
                f"{wanted.get(key)!r}: use the same value, or choose another --out"
            )
