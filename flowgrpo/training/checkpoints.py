"""Checkpoints: atomic, checked, without pickle.

A checkpoint is a folder of safetensors files and one ``state.json`` with their SHA-256 digests and its
own. It is written under a temporary name and renamed when complete, so that after a process is killed
at any moment the last complete checkpoint remains.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from flowgrpo.core.tensors import Tensor
from flowgrpo.data import files, strict_json

STATE = "state.json"
OWN_DIGEST = "state_sha256"
DAMAGED = "damaged-"
"""Prefix of the names to which :func:`set_aside` renames damaged checkpoints."""
SHARDED = "sharded"
"""Key of the state of a checkpoint that each process of the run wrote a part of."""
Tensors = Mapping[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint is damaged; the message names the file and the remedy."""


def save(folder: Path, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; an existing one of that name is replaced.

    Args:
        folder: Its final path.
        parts: Tensors by part, then by tensor name. A part may have any name; its file is
            percent-encoded.
        state: Values that JSON can hold; the keys ``sha256``, ``state_sha256`` and ``sharded`` are reserved.

    Raises:
        OSError: If the disk is full, for instance; what was there before remains.
    """
    begin(folder)
    try:
        digests = _write(temporary(folder), parts)
        _write_state(temporary(folder), state, digests)
    except BaseException:
        # Frees the space on a full disk.
        shutil.rmtree(temporary(folder), ignore_errors=True)
        raise
    _rename(folder)


def temporary(folder: Path) -> Path:
    """The name under which a checkpoint is written."""
    return folder.with_name(f".{folder.name}.tmp")


def begin(folder: Path) -> None:
    """Make the empty folder to write a checkpoint to."""
    if temporary(folder).exists():
        files.delete(temporary(folder))
    temporary(folder).mkdir(parents=True)


def commit(folder: Path, state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Complete a checkpoint whose tensors are written and synced under :func:`temporary`.

    Args:
        folder: Its final path.
        state: Values that JSON can hold.
        digests: The SHA-256 of each file, by its name.
    """
    _write_state(temporary(folder), state, digests)
    _rename(folder)


def _rename(folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        files.rename(folder, old)
    files.rename(temporary(folder), folder)
    files.sync(folder.parent)
    if old.exists():
        files.delete(old)


def _write(folder: Path, parts: Mapping[str, Tensors]) -> dict[str, str]:
    digests = {}
    for name, tensors in parts.items():
        file = folder / f"{quote(name, safe='')}.safetensors"
        files.reached("write", file)
        files.save_tensors(file, tensors)
        digests[file.name] = digest(file)
        files.sync(file)
    return digests


def _write_state(folder: Path, state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    # The digest must be that of what is read back, so numbers that are not finite go first.
    body = strict_json.finite({**state, "sha256": digests})
    files.write(
        folder / STATE, strict_json.dumps({**body, OWN_DIGEST: _state_digest(body)}, indent=1)
    )
    files.sync(folder)


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the parts and the state of a checkpoint, as :func:`save` received them.

    Raises:
        CheckpointError: If a file is missing or its digest differs.
    """
    from safetensors.torch import load_file

    verify(folder)
    state, digests = _read_state(folder)
    if state.pop(SHARDED, False):
        from flowgrpo.training import shards

        return shards.read(folder, lambda *_: None, alone=True), state
    return {part: load_file(file) for part, file in _parts(folder, digests)}, state


def verify(folder: Path) -> None:
    """Check all files of a checkpoint.

    Raises:
        CheckpointError: If a file is missing or its digest differs.
    """
    for name, expected in _read_state(folder)[1].items():
        file = folder / name
        if not file.exists():
            raise CheckpointError(f"{file} is missing; {_advice(folder)}")
        if digest(file) != expected:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is not the one in {STATE}; {_advice(folder)}"
            )


def parts_of(folder: Path) -> list[tuple[str, Path]]:
    """The parts of a checkpoint that is not sharded, with the file of each.

    Raises:
        CheckpointError: If the state is damaged.
    """
    return _parts(folder, _read_state(folder)[1])


def _parts(folder: Path, digests: Mapping[str, str]) -> list[tuple[str, Path]]:
    return [(unquote(Path(name).stem), folder / name) for name in digests]


def peek(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. The tensors' files must exist, and are not read.

    Raises:
        CheckpointError: If the state is damaged, or a file is missing.
    """
    state, digests = _read_state(folder)
    missing = [name for name in digests if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder / missing[0]} is missing; {_advice(folder)}")
    return state


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The state, and the digests of the tensors' files by their names."""
    try:
        state = json.loads((folder / STATE).read_text())
        own = state.pop(OWN_DIGEST)
        is_sound = own == _state_digest(state)
        digests = state.pop("sha256")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / STATE} is missing; {_advice(folder)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / STATE} cannot be read ({error!r}); {_advice(folder)}"
        ) from error
    if not is_sound:
        raise CheckpointError(
            f"{folder / STATE} is damaged: its SHA-256 differs; {_advice(folder)}"
        )
    return state, digests


def _advice(folder: Path) -> str:
    if not folder.name.isdecimal():
        return "restore the file, or use another checkpoint of the run, such as its last"
    return f"delete {folder} to resume from the previous checkpoint, or restore the file"


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    found = complete(folder)
    return found[-1] if found else None


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer found. Returns its new path."""
    target = folder.with_name(f"{DAMAGED}{folder.name}")
    if target.exists():
        files.delete(target)
    files.rename(folder, target)
    return target


def tidy(folder: Path) -> None:
    """Remove the remains of a process that was killed while it wrote or replaced a checkpoint."""
    for unfinished in folder.glob(".*.tmp"):
        files.delete(unfinished)
    for old in folder.glob(".*.old"):
        replaced = folder / old.name[1 : -len(".old")]
        if replaced.exists():
            files.delete(old)
        else:
            files.rename(old, replaced)


def prune(folder: Path, keep: int) -> None:
    """Delete all that is older than the ``keep`` newest checkpoints, and unfinished ones."""
    tidy(folder)
    kept = complete(folder)[-keep:]
    for old in [p for p in numbered(folder) if kept and p < kept[0]]:
        # Under this name a checkpoint that is only half deleted is not taken for one.
        unwanted = old.with_name(f".{old.name}.tmp")
        files.rename(old, unwanted)
        files.delete(unwanted)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; ``best`` is not among them."""
    return [p for p in numbered(folder) if (p / STATE).exists()]


def numbered(folder: Path) -> list[Path]:
    """All checkpoints in a folder, oldest first, also those that have lost their state."""
    return sorted(folder.glob("[0-9]*"))


def _state_digest(body: Any) -> str:
    """The SHA-256 of a state, independent of its formatting."""
    plain = json.dumps(json.loads(json.dumps(body)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
