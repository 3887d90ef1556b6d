"""Checkpoints of a run whose denoiser is divided: each process writes and reads its own parts.

``torch.distributed.checkpoint`` writes one safetensors file per process, with the place of each part in
its header, and reads them into any other division, so a run can resume on another number of processes.
Its usual storage (``FileSystemWriter``) holds pickled metadata; the one for safetensors holds none. The
digests, the renaming of a complete folder and ``state.json`` are those of
:mod:`flowgrpo.training.checkpoints`.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from flowgrpo.data import files
from flowgrpo.training import checkpoints
from flowgrpo.training.checkpoints import Tensors

Gather = Callable[[list[Any]], list[Any]]
"""Joins the lists of all processes, in the order of their ranks."""
Place = Callable[[str, str, torch.Size], Tensor | None]
"""From part, name and whole shape to the parameter whose division a tensor has; None if it is whole."""


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
    problem = _tried(lambda: checkpoints.begin(folder)) if is_main else None
    _require_written(problem, gather, temporary, is_main)
    problem = _tried(lambda: _write(temporary, parts))
    own = sorted(temporary.glob(f"shard-{torch.distributed.get_rank() + 1:05d}-*"))
    digests = {file.name: checkpoints.digest(file) for file in own} if problem is None else {}
    _require_written(problem, gather, temporary, is_main)
    everyone = gather([digests])
    problem = None
    if is_main:
        sums = {name: digest for found in everyone for name, digest in found.items()}
        body = {**state, checkpoints.SHARDED: True}
        problem = _tried(lambda: checkpoints.commit(folder, body, sums))
    _require_written(problem, gather, temporary, is_main)


def _write(folder: Path, parts: Mapping[str, Tensors]) -> None:
    files.reached("write", folder)
    flat = {
        f"{part}/{name}": tensor.detach()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save_distributed(flat, storage_writer=writer)
    except CheckpointException as error:
        # With the errors of all processes, each with its traceback; the first says enough.
        first = next(iter(error.failures.values()))[0]
        raise first from None


def _tried(work: Callable[[], None]) -> OSError | None:
    """The error of the work, if it could not write."""
    try:
        work()
    except OSError as error:
        return error
    return None


def _require_written(
    problem: OSError | None, gather: Gather, temporary: Path, is_main: bool
) -> None:
    """Wait for all processes.

    Raises:
        OSError: In all processes, if one could not write.
    """
    found = [e for e in gather([None if problem is None else (problem.errno, str(problem))]) if e]
    if not found:
        return
    if is_main and temporary.exists():
        files.delete(temporary)  # Frees the space on a full disk.
    number, text = found[0]
    raise problem or OSError(number or 0, f"another process could not write: {text}")


def load(folder: Path, place: Place) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
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
        return read_shards(folder, place), state
    return {
        part: _read_whole(file, part, place) for part, file in checkpoints.parts_of(folder)
    }, state


def read_shards(folder: Path, place: Place, *, alone: bool = False) -> dict[str, dict[str, Tensor]]:
    """The parts of a sharded checkpoint.

    Args:
        folder: The checkpoint.
        place: Where tensors are divided now.
        alone: Whether only this process reads.
    """
    reader = HuggingFaceStorageReader(str(folder))
    flat: dict[str, Tensor] = {}
    for key, found in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)  # safetensors files hold nothing else
        part, _, name = key.partition("/")
        flat[key] = _empty(place(part, name, found.size), found.size, found.properties.dtype)
    with warnings.catch_warnings():
        # That torch.distributed is not initialised, if one process reads alone.
        warnings.simplefilter("ignore", UserWarning)
        load_distributed(flat, storage_reader=reader, no_dist=alone)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts


def _empty(parameter: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if parameter is None:
        return torch.empty(shape, dtype=dtype)
    return torch.empty_like(parameter, dtype=dtype, requires_grad=False)


def _read_whole(file: Path, part: str, place: Place) -> dict[str, Tensor]:
    """The tensors of a file of whole tensors; of each that is divided now, only the rows of this process."""
    tensors = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            stored = opened.get_slice(name)
            parameter = place(part, name, torch.Size(stored.get_shape()))
            if not isinstance(parameter, DTensor):
                tensors[name] = opened.get_tensor(name)
                continue
            size = parameter.to_local().shape[0]
            per_process = -(-parameter.shape[0] // parameter.device_mesh.size(-1))
            first = parameter.device_mesh.get_local_rank(parameter.device_mesh.ndim - 1)
            start = min(first * per_process, parameter.shape[0])
            rows = stored[start : start + size]
            tensors[name] = torch.empty_like(parameter, dtype=rows.dtype, requires_grad=False)
            tensors[name].to_local().copy_(rows)
    return tensors
