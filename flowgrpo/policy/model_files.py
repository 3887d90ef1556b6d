"""Whether a model that a configuration names can be found, without loading it.

This module imports neither torch nor diffusers.
"""

from dataclasses import dataclass
from pathlib import Path

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt")
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
        if (path / "config.toml").is_file() and (path / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"{model} is a run directory: after full fine-tuning give {path / 'export'}; an adapter belongs "
                "into model.adapters or model.weights.init, with the run's own model.path"
            )
        if (path / "state.json").is_file():
            raise FileNotFoundError(
                f"{model} is a checkpoint of a run: write a model with 'flowgrpo export RUN --checkpoint NAME "
                "--format merged --out MODEL', or give it as model.weights.init if it holds an adapter"
            )
        if not (path / INDEX).exists() and not (path / f"modular_{INDEX}").exists():
            raise FileNotFoundError(f"{model} is not a diffusers pipeline: it has no {INDEX}")
        return path
    if path.is_file():
        return path
    # Hub ids have one slash.
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith(SINGLE_FILES):
        raise FileNotFoundError(f"no such folder or file: {model}")
    return None


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
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(model, INDEX), str):
            return Found("in the cache of the hub", True)
        size = sum(f.size or 0 for f in HfApi().model_info(model, files_metadata=True, timeout=10).siblings or ())  # fmt: skip
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{model} is neither a folder nor the id of a model: {error}"
        ) from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{model} is gated: accept its licence on the hub, and run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no model {model} on the hub, or it is private and 'hf auth login' is missing"
        ) from error
    # Without a network, each version of the hub's client and of its HTTP library raises errors of its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Found(
            f"NOT HERE: it is not in the cache, and the hub cannot be asked ({reason})", False
        )
    return Found(f"on the hub; {size / 1e9:.1f} GB in all its files", False)
