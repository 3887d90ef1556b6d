"""Whether a model or an adapter that a configuration names can be found, without loading it.

A name that is no path here may be the id of a model on the hub. Ids have one slash, and so have paths
such as ``runs/a``; :func:`ask_hub` tells the two apart. This module imports neither torch nor diffusers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flowgrpo.core.imports import suggest

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt")
WEIGHT_FILES = (*SINGLE_FILES, ".pt", ".pth", ".bin")
"""Ends of the names of files; ids of models may hold dots, too, as in ``owner/name-v1.5``."""
CONFIG, STATE = "config.toml", "state.json"
"""Files of a run directory and of a checkpoint in it."""
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",  # the same sizes
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl_base",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "black-forest-labs/FLUX.1-dev": "flux1_dev",
    "Qwen/Qwen-Image": "qwen_image",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan21_t2v_1_3b",
    "hunyuanvideo-community/HunyuanVideo": "hunyuan_video",
}
"""Models whose config files are in the package, in the folder ``published``: sizes of layers, which are facts."""

Check = Callable[[str], Path | None]
"""Checks a name; returns the path, None for what may be a hub id."""


@dataclass(frozen=True)
class Found:
    """Where a model is.

    Attributes:
        words: The place.
        is_here: Whether the run can start without a download.
    """

    words: str
    is_here: bool


def published_folder(model: str) -> Path | None:
    """The folder of a published model's config files in the package; None for other models."""
    name = PUBLISHED.get(model)
    return None if name is None else Path(__file__).parent / "published" / name


def check_path(model: str) -> Path | None:
    """Check a model that is named by a path. Nothing is read but names.

    Returns:
        The path; None for ``shapes`` and for hub ids.

    Raises:
        FileNotFoundError: If there is no such folder, or it is not a pipeline.
    """
    path = Path(model).expanduser()
    if model == "shapes":
        return None
    if path.is_dir():
        if (path / CONFIG).is_file() and (path / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"{model} is a run directory: after full fine-tuning give {path / 'export'}; an adapter belongs "
                "into model.adapters or model.weights.init, with the run's own model.path"
            )
        if (path / STATE).is_file():
            raise FileNotFoundError(
                f"{model} is a checkpoint of a run: write a model with 'flowgrpo export RUN --checkpoint NAME "
                "--format merged --out MODEL', or give it as model.weights.init if it holds an adapter"
            )
        if not (path / INDEX).exists() and not (path / f"modular_{INDEX}").exists():
            raise FileNotFoundError(f"{model} is not a diffusers pipeline: it has no {INDEX}")
        return path
    if path.is_file():
        return path
    if not may_be_id(model):
        raise FileNotFoundError(f"no such folder or file: {model}")
    return None


def may_be_id(name: str) -> bool:
    """Whether a name has the form of a hub id, with or without an owner."""
    is_path = name.startswith((".", "/", "~")) or name.endswith(WEIGHT_FILES)
    return not is_path and name.count("/") <= 1


def check_start(name: str) -> Path | None:
    """As :func:`check_adapter`, for an adapter that may also be a checkpoint of a run."""
    is_checkpoint = (Path(name).expanduser() / STATE).is_file()
    return Path(name).expanduser() if is_checkpoint else check_adapter(name)


def check_adapter(name: str) -> Path | None:
    """Check an adapter that is named by a path. Nothing is read but names.

    Args:
        name: A file, folder, hub id or run directory.

    Returns:
        The file or the folder with the adapter; None for hub ids.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        if not may_be_id(name) or "/" not in name:
            raise FileNotFoundError(f"no such file or folder: {name}")
        return None
    if (path / CONFIG).is_file():
        if not (path / "export").is_dir():
            raise FileNotFoundError(
                f"{name} is a run that has not finished; write its adapter with: flowgrpo export "
                f"{name} --out FOLDER, or give one of its checkpoints as model.weights.init"
            )
        path = path / "export"
        if (path / INDEX).is_file():
            raise FileNotFoundError(
                f"{name} trained whole weights, so it has no adapter; give {path} as model.path"
            )
    if (path / STATE).is_file():
        raise FileNotFoundError(
            f"{name} is a checkpoint of a run; write its adapter with: flowgrpo export "
            f"{path.absolute().parents[1]} --checkpoint {checkpoint_name(path)} --out FOLDER"
        )
    return path


def require(name: str, key: str, check: Check = check_path) -> None:
    """Check a model or an adapter before anything is loaded, on the hub, too, if it is not here.

    Args:
        name: Its path or hub id.
        key: The key or option that names it, for the error.
        check: Checks the path, such as :func:`check_adapter`.

    Raises:
        FileNotFoundError: If there is none, or the hub cannot be asked.
    """
    try:
        reason = "" if check(name) is not None or name == "shapes" else ask_hub(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from error
    if reason:
        raise FileNotFoundError(
            f"{key}: {name} is no file or folder here; as an id of the hub, {reason}"
        )


def checkpoint_name(folder: Path) -> str:
    """The name of a checkpoint's folder for ``--checkpoint``."""
    return str(int(folder.name)) if folder.name.isdecimal() else "best"


def ask_hub(name: str) -> str:
    """Look for a model of this name in the cache of the hub, then on the hub.

    The hub is asked once for each name.

    Returns:
        The reason why the hub could not be asked; empty if there is such a model.

    Raises:
        FileNotFoundError: If there is none, or the name can only be a path.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return "" if any((folder / "snapshots").glob("*/*")) else _answer(name)


@lru_cache
def _answer(name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor the id of a model: {error}"
        ) from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: accept its licence on the hub, and run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no such file or folder: {name}{_beside(name)}; and on the hub there is no such model, or it is "
            "private and 'hf auth login' is missing"
        ) from error
    except HfHubHTTPError:
        # The hub is there, and busy, for instance. The download tries again, and names the reason.
        return ""
    # Without a network, each version of the hub's client and of its HTTP library raises errors of its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"it is not in the cache, and the hub cannot be asked ({reason}){_beside(name)}"
    return ""


def _beside(name: str) -> str:
    """The nearest name in the folder that a path is in, for an error."""
    path = Path(name)
    is_inside = path.parent != Path()
    there = [p.name for p in path.parent.glob("*") if p.name != path.name] if is_inside else []
    return suggest(name, [f"{path.parent}/{n}" for n in there])


def locate(model: str) -> Found:
    """Where a model is, for a dry run. The hub is asked if the model is not in its cache.

    Raises:
        FileNotFoundError: If there is no such folder, or no such model on the hub.
    """
    path = check_path(model)
    if model == "shapes":
        return Found("in the package", True)
    if path is not None:
        return Found("a folder" if path.is_dir() else "a file", True)
    reason = ask_hub(model)
    if reason:
        return Found(f"NOT HERE: {reason}", False)
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, INDEX), str):
        return Found("in the cache of the hub", True)
    try:
        files = HfApi().model_info(model, files_metadata=True, timeout=10).siblings or ()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Found(f"on the hub, or a part of it in the cache ({reason})", False)
    size = sum(f.size or 0 for f in files)
    return Found(f"on the hub; {size / 1e9:.1f} GB in all its files", False)
