"""Durable file operations of run directories and benchmarks.

A run writes, renames and deletes through these functions, or announces an operation that a library does
with :func:`reached`. Each operation calls :data:`failpoint` before it touches the disk, so that a test
can end the process, or fail, at every single one.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.data import strict_json

if TYPE_CHECKING:
    from torch import Tensor

failpoint: Callable[[str, Path], None] | None = None
"""For tests: called with the operation (``write``, ``sync``, ``rename``, ``delete``) and its path before
each operation."""
TEMPORARY = ".tmp"
"""Suffix of files that :func:`replacing` has not yet renamed."""


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that after an interruption it has either its old or its new contents.

    Inside, write to the path that this yields. Afterwards that file is put on the disk and renamed.
    """
    temporary = path.with_suffix(TEMPORARY)
    try:
        reached("write", temporary)
        yield temporary
        sync(temporary)
        rename(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write text to a file so that after an interruption it has either its old or its new contents."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, with texts in its header; not atomic.

    Raises:
        OSError: With the error number that safetensors has in its text only, if the disk is full for
            instance.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error), str(path)) from error


def sync_tree(folder: Path) -> None:
    """Wait until all files below a folder, and the folders themselves, are on the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of JSON. It is on the disk after :func:`sync`."""
    reached("write", path)
    with path.open("a", encoding="utf-8") as file:
        file.write(strict_json.dumps(record) + "\n")
