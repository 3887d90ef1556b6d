"""Durable file operations of a run directory.

A run writes, renames and deletes through these functions only. Each of them calls :data:`failpoint`
before it touches the disk, so that a test can end the process, or fail, at every single operation.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

failpoint: Callable[[str, Path], None] | None = None
"""For tests: called with the operation (``write``, ``sync``, ``rename``, ``delete``) and its path before
each operation."""
TEMPORARY = ".tmp"
"""Suffix of files that :func:`write_whole` has not yet renamed."""


def reached(operation: str, path: Path) -> None:
    """Announce an operation to the failpoint, if a test has set one."""
    if failpoint is not None:
        failpoint(operation, path)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the entries of a folder, are on the disk."""
    reached("sync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder; a file at the target is replaced."""
    reached("rename", path)
    path.replace(target)


def delete(path: Path) -> None:
    """Delete a file or a folder with its contents, if it exists."""
    reached("delete", path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk; not atomic."""
    reached("write", path)
    path.write_text(text, encoding="utf-8")
    sync(path)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that after an interruption it has either its old or its new contents."""
    temporary = path.with_suffix(TEMPORARY)
    try:
        write(temporary, text)
        rename(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of JSON. It is on the disk after :func:`sync`."""
    reached("write", path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
