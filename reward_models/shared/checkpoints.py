"""Checkpoints of reward models: device and precision, files, and loading with every weight checked."""

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

Precision = Literal["float32", "float16", "bfloat16"]


def pick_device(device: str) -> str:
    """``auto`` takes a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def pick_dtype(dtype: str) -> torch.dtype:
    """
    Raises:
        ValueError: If the name is none of the three precisions.
    """
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return getattr(torch, dtype)


def find_file(model: str, names: Sequence[str]) -> Path:
    """A checkpoint: the file ``model``, or one of ``names`` in that folder, or on the hub.

    Raises:
        ValueError: If there is no such file or folder and it is no hub id, or the folder has none.
        OSError: If the hub has no such file.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"folder {model!r} holds none of {', '.join(names)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"{model!r} is no file, no folder and no hub id")
    return Path(hf_hub_download(model, names[0]))


def read_state(path: Path) -> dict[str, Tensor]:
    """The weights in a file of safetensors or of torch, unwrapped; nothing in it is executed.

    Raises:
        ValueError: If the file holds anything but weights.
    """
    state: Any = (
        load_file(path)
        if path.suffix == ".safetensors"
        else torch.load(path, map_location="cpu", weights_only=True)
    )
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path.name} holds no state dict")
    return dict(state)


def refuse(
    source: str, what: str, missing: Collection[str], left_over: Collection[str] = ()
) -> None:
    """
    Raises:
        ValueError: If weights are missing or left over.
    """
    for how, keys in (("missing", missing), ("left over", left_over)):
        if keys:
            raise ValueError(
                f"{source!r} is no {what}: {len(keys)} weights are {how}, such as {min(keys)}"
            )


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], source: str, what: str, assign: bool = False
) -> None:
    """Load weights; none may be missing, left over or of another shape.

    With ``assign`` the module takes the tensors themselves, so that it can be built on ``meta``.

    Raises:
        ValueError: If they do not fit.
    """
    wanted = module.state_dict()
    refuse(source, what, wanted.keys() - state.keys(), state.keys() - wanted.keys())
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{source!r} is no {what}: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(state, assign=assign)


def numbered(shapes: Mapping[int, Sequence[int]]) -> nn.Sequential:
    """Linear layers for weights of these shapes, named by their indices in the published head."""
    layers = {str(n): nn.Linear(inputs, outputs) for n, (outputs, inputs) in shapes.items()}
    return nn.Sequential(OrderedDict(layers))


def from_pretrained(
    kind: type, model: str, what: str, dtype: torch.dtype, parts: Sequence[str] = (), **options: Any
) -> Any:
    """Load a model of transformers and refuse it unless every weight comes from the checkpoint.

    Args:
        kind: The class.
        model: Hub id or folder.
        what: Name of the expected model, for the message.
        dtype: Precision.
        parts: Prefixes of further weights that the checkpoint may hold.
        options: Further arguments of ``from_pretrained``.

    Raises:
        ValueError: If weights are missing or left over.
        RuntimeError: If weights are of another shape than the configuration says.
        OSError: If there is no such model.
    """
    loaded, info = kind.from_pretrained(  # type: ignore[attr-defined]
        model, dtype=dtype, output_loading_info=True, **options
    )
    # Old checkpoints also hold position tables, which transformers computes: they are no weights.
    tables = {name.rsplit(".", 1)[-1] for name, _ in loaded.named_buffers()}
    left_over = {
        k
        for k in info["unexpected_keys"]
        if k.rsplit(".", 1)[-1] not in tables and not k.startswith(tuple(parts))
    }
    refuse(model, what, info["missing_keys"], left_over)
    return loaded.eval().requires_grad_(False)
