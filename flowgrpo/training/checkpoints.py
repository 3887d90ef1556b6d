"""Checkpoints: atomic, checked, without pickle.

A checkpoint is a folder of safetensors files and one ``state.json`` with their SHA-256 digests. It is
written under a temporary name and renamed when complete, so that after a process is killed at any
moment the last complete checkpoint remains.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"
Tensors = Mapping[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint is damaged; the message names the file and the remedy."""


def save(folder: Path, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; an existing one of that name is replaced.

    Args:
        folder: Its final path.
        parts: Tensors by file name without suffix, then by tensor name.
        state: Values that JSON can hold; the key ``sha256`` is reserved.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    digests = {}
    for name, tensors in parts.items():
        file = temporary / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
        digests[file.name] = _digest(file)
        _sync(file)
    (temporary / STATE).write_text(json.dumps({**state, "sha256": digests}, indent=1))
    _sync(temporary / STATE)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the parts and the state of a checkpoint, as :func:`save` received them.

    Raises:
        CheckpointError: If a file is missing or its digest differs.
    """
    advice = f"delete {folder} to resume from the previous checkpoint, or restore the file"
    try:
        state = json.loads((folder / STATE).read_text())
        digests = state.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read ({error}); {advice}") from error
    parts = {}
    for name, digest in digests.items():
        file = folder / name
        if not file.exists() or _digest(file) != digest:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is not the one in {STATE}; {advice}"
            )
        parts[file.stem] = load_file(file)
    return parts, state


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    found = _numbered(folder)
    return found[-1] if found else None


def tidy(folder: Path) -> None:
    """Remove the remains of a process that was killed while it wrote or replaced a checkpoint."""
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished)
    for old in folder.glob(".*.old"):
        replaced = folder / old.name[1 : -len(".old")]
        if replaced.exists():
            shutil.rmtree(old)
        else:
            old.rename(replaced)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and incomplete ones."""
    tidy(folder)
    for old in _numbered(folder)[:-keep]:
        shutil.rmtree(old)


def _numbered(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if (p / STATE).exists())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
