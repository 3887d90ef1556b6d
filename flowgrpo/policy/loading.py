"""Loading pipelines, and finding what to train in them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """``DiffusionPipeline.from_pretrained`` for a hub id, a folder or ``"shapes"``.

    The VAE stays in fp32, because what it decodes is judged.

    Raises:
        FileNotFoundError: If a folder is named that is no pipeline.
    """
    path = Path(__file__).parents[1] / "shapes" / "model" if str(model) == "shapes" else Path(model)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise FileNotFoundError(f"{path} is no diffusers pipeline: it has no model_index.json")
    looks_like_path = str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    source = str(path) if path.is_dir() else str(model)
    return DiffusionPipeline.from_pretrained(source, dtype={"default": dtype, "vae": torch.float32})


def without_safety_checker(pipeline: DiffusionPipeline) -> None:
    """Take it out where there is one: it would blacken images that the reward then judges."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None


def denoisers(pipeline: DiffusionPipeline) -> Mapping[str, ModelMixin]:
    """The models that the denoising loop calls, by their name in the pipeline.

    Raises:
        ValueError: If there is none.
    """
    found = {
        name: model
        for name, model in pipeline.components.items()
        if isinstance(model, ModelMixin) and name.split("_")[0] in ("transformer", "unet")
    }
    if not found:
        names = ", ".join(pipeline.components)
        raise ValueError(
            f"{type(pipeline).__name__} has no transformer or unet; its components: {names}"
        )
    return found
