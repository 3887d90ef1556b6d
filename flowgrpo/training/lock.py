"""An exclusive lock on a run directory, so that two processes cannot write into one run.

The operating system holds the lock (``flock``) and frees it when the process ends, however it ends.
NFS shares it between hosts unless the mount says otherwise (``local_lock``); Lustre needs the mount
option ``flock``.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.data import strict_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"


class RunLock:
    """The lock of a run directory, held from its creation to :meth:`release`.

    Attributes:
        warning: A sentence for the user if the file system cannot lock, or if an earlier process on
            another host has not released the lock itself; empty otherwise.
    """

    def __init__(self, folder: Path):
        """Take the lock.

        Raises:
            ConfigError: If another process holds it; the message names its host, process id and the
                time at which it took the lock.
        """
        self.path, self.warning = folder / NAME, ""
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                raise OSError("this platform has no flock")
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._read()
            os.close(self._descriptor)
            self._descriptor = None
            raise ConfigError(
                f"{folder} is in use by {_words(holder)}: wait for it, stop it, or choose another "
                "--set run.folder=..."
            ) from error
        except OSError as error:
            self.warning = (
                f"WARNING: the file system of {folder} cannot lock ({error}), so nothing prevents a "
                "second process from writing into this run: start it once only"
            )
        earlier = self._read()
        if earlier and earlier.get("host") != socket.gethostname():
            self.warning = self.warning or (
                f"WARNING: the last process in {folder}, {_words(earlier)}, did not end by itself: make "
                "sure that it is gone, because some network file systems do not share locks between hosts"
            )
        self._write(
            strict_json.dumps(
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                }
            )
        )

    def release(self) -> None:
        """Free the lock; nothing happens if it has been released before."""
        if self._descriptor is not None:
            self._write("")
            os.close(self._descriptor)
            self._descriptor = None

    def _read(self) -> dict[str, Any]:
        assert self._descriptor is not None
        try:
            return _parse(os.pread(self._descriptor, 1000, 0))
        except OSError:
            return {}

    def _write(self, text: str) -> None:
        assert self._descriptor is not None
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)
        except OSError:  # The name of the holder is a service; the lock holds without it.
            return


def holder(folder: Path) -> dict[str, Any] | None:
    """The process that holds the lock of a run directory, with ``host``, ``pid`` and ``since``.

    The lock is left as it is: it is only tried for an instant, and only if a process has written its
    name and has not released the lock.

    Returns:
        None if no process holds it, or none that the operating system here knows of.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = _parse(os.pread(descriptor, 1000, 0))
        if not found or fcntl is None:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return found
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _parse(text: bytes) -> dict[str, Any]:
    """The holder that a lock file names; empty if it names none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
