"""Checkpoints of a run whose denoiser is divided: each process writes and reads its own parts.

The digests, the renaming of a complete folder and ``state.json`` are those of
:mod:`flowgrpo.training.checkpoints`; the files of tensors are those of :mod:`flowgrpo.training.shards`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgrpo.data import files
from flowgrpo.training import checkpoints, shards
from flowgrpo.training.checkpoints import Tensors

Gather = Callable[[list[Any]], list[Any]]
"""Joins the lists of all processes, in the order of their ranks."""


def save(
    folder: Path,
    parts: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    is_main: bool,
    gather: Gather,
) -> None:
    """Write a checkpoint atomically, as :func:`flowgrpo.training.checkpoints.save`; all processes call it.

    Args:
        folder: Its final path.
        parts: Tensors by part and name. Divided ones are written by all processes, whole ones by the
            main process.
        state: Values for JSON.
        is_main: Whether this is the main process.
        gather: Joins lists of all processes; also a barrier.

    Raises:
        OSError: In all processes, if one of them cannot write; what was there before remains.
    """
    temporary = checkpoints.temporary(folder)
    digests: dict[str, str] = {}

    def write() -> None:
        shards.write(temporary, parts)
        digests.update({f.name: checkpoints.digest(f) for f in shards.own_files(temporary)})

    def commit() -> None:
        sums = {name: digest for found in everyone for name, digest in found.items()}
        checkpoints.commit(folder, {**state, checkpoints.SHARDED: True}, sums)

    def together(work: Callable[[], None], takes_part: bool) -> None:
        problem = _tried(work) if takes_part else None
        text = problem and (problem.errno, str(problem))
        found = [one for one in gather([text]) if one]
        if not found:
            return
        if is_main and temporary.exists():
            files.delete(temporary)  # Frees the space on a full disk.
        number, text = found[0]
        raise problem or OSError(number or 0, f"another process could not write: {text}")

    together(lambda: checkpoints.begin(folder), is_main)
    together(write, True)
    everyone = gather([digests])
    together(commit, is_main)


def _tried(work: Callable[[], None]) -> OSError | None:
    """The error of the work, if it could not write."""
    try:
        work()
    except OSError as error:
        return error
    return None


def load(folder: Path, place: shards.Place) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the parts of a checkpoint that belong to this process; all processes call it.

    The checkpoint may be of any number of processes, or of a run that was not sharded. The main process
    has checked the digests (:func:`flowgrpo.training.checkpoints.verify`).

    Args:
        folder: The checkpoint.
        place: Where tensors are divided now.

    Returns:
        Tensors by part and name, and the state.
    """
    state = checkpoints.peek(folder)
    if state.pop(checkpoints.SHARDED, False):
        return shards.read(folder, place), state
    found = checkpoints.parts_of(folder)
    return {part: shards.read_whole(file, part, place) for part, file in found}, state
