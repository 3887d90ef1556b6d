"""Files with the parts of divided tensors: one per process, in safetensors' format.

``torch.distributed.checkpoint`` writes them, with the place of each part in the file's header, and reads
them into any other division. Its usual storage (``FileSystemWriter``) pickles its metadata; the one for
safetensors holds none.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

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

Place = Callable[[str, str, torch.Size], Tensor | None]
"""From part, name and whole shape to the parameter whose division a tensor has; None if it is whole."""


def write(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write this process's file; all processes call it. Whole tensors are written by the main process.

    Raises:
        OSError: If a process cannot write; in all processes.
    """
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


def own_files(folder: Path) -> list[Path]:
    """The file that this process has written; none if it has no part."""
    return sorted(folder.glob(f"shard-{torch.distributed.get_rank() + 1:05d}-*"))


def read(folder: Path, place: Place, *, alone: bool = False) -> dict[str, dict[str, Tensor]]:
    """Read the files of all processes into another division; all processes call it.

    Args:
        folder: Folder of the files.
        place: Where tensors are divided now.
        alone: Whether only this process reads.

    Returns:
        Tensors by part and name.
    """
    reader = HuggingFaceStorageReader(str(folder))
    flat: dict[str, Tensor] = {}
    for key, found in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)  # safetensors files hold nothing else
        part, _, name = key.partition("/")
        parameter, dtype = place(part, name, found.size), found.properties.dtype
        flat[key] = (
            torch.empty(found.size, dtype=dtype)
            if parameter is None
            else torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        )
    with warnings.catch_warnings():
        # That torch.distributed is not initialised, if one process reads alone.
        warnings.simplefilter("ignore", UserWarning)
        load_distributed(flat, storage_reader=reader, no_dist=alone)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts


def read_whole(file: Path, part: str, place: Place) -> dict[str, Tensor]:
    """Read a file of whole tensors; of each that is divided now, only the rows of this process."""
    tensors = {}
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            stored = opened.get_slice(name)
            parameter = place(part, name, torch.Size(stored.get_shape()))
            if not isinstance(parameter, DTensor):
                tensors[name] = opened.get_tensor(name)
                continue
            # FSDP divides the first axis like torch.chunk.
            mesh, size = parameter.device_mesh, parameter.to_local().shape[0]
            per_process = -(-parameter.shape[0] // mesh.size(-1))
            start = min(mesh.get_local_rank(mesh.ndim - 1) * per_process, parameter.shape[0])
            rows = stored[start : start + size]
            tensors[name] = torch.empty_like(parameter, dtype=rows.dtype, requires_grad=False)
            tensors[name].to_local().copy_(rows)
    return tensors
