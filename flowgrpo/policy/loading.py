"""Loading pipelines, and finding what to train in them."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin

from flowgrpo.policy.memory import Quantization, quantization

AUTOENCODERS = ("vae", "movq")
"""What pipelines call the model that decodes their latents."""
VARIANT = re.compile(r"(?:model|-of-\d+)\.(?!safetensors|bin)(\w+)[.-]")
"""In ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors`` and
``model-00001-of-00002.fp16.safetensors``."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, quantize: Quantization = "none"
) -> DiffusionPipeline:
    """``DiffusionPipeline.from_pretrained`` for a hub id, a folder or ``"shapes"``.

    Autoencoders stay in fp32, because what they decode is judged. ``quantize`` is for the denoisers.

    Raises:
        FileNotFoundError: If a folder is named that is no pipeline.
    """
    path = Path(__file__).parents[1] / "shapes" / "model" if str(model) == "shapes" else Path(model)
    if (path / "modular_model_index.json").exists():
        raise FileNotFoundError(
            f"{path} is a modular pipeline, of blocks; a policy needs one with a call of its own and a "
            "model_index.json"
        )
    if path.is_dir() and not (path / "model_index.json").exists():
        raise FileNotFoundError(f"{path} is no diffusers pipeline: it has no model_index.json")
    looks_like_path = str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    source = str(path) if path.is_dir() else str(model)
    exact = dict.fromkeys(AUTOENCODERS, torch.float32)
    config = None
    if quantize != "none":
        names = [n for n in DiffusionPipeline.load_config(source) if _is_denoiser(n)]
        config = quantization(quantize, dtype, names)
    return DiffusionPipeline.from_pretrained(
        source,
        dtype={"default": dtype, **exact},
        quantization_config=config,
        variant=variant_of(path) if path.is_dir() else None,
    )


def variant_of(folder: Path) -> str | None:
    """What the weights of a pipeline folder are called (``fp16``), if some come in no other form."""
    for component in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = [f.name for f in component.iterdir() if f.suffix in (".safetensors", ".bin")]
        named = [m for m in map(VARIANT.search, files) if m]
        if named and len(named) == len(files):
            return named[0].group(1)
    return None


def _is_denoiser(name: str) -> bool:
    return name.split("_")[0] in ("transformer", "unet")


def without_safety_checker(pipeline: DiffusionPipeline) -> None:
    """Take it out where there is one: it would blacken images that the reward then judges.

    Cosmos cannot be called without its guardrail, and its licence forbids it; that one stays.
    """
    if hasattr(pipeline, "run_safety_checker"):
        pipeline.safety_checker = None


def denoisers(pipeline: DiffusionPipeline) -> Mapping[str, ModelMixin]:
    """The models that the denoising loop calls, by their name in the pipeline.

    Raises:
        ValueError: If there is none.
    """
    found = {
        name: model
        for name, model in pipeline.components.items()
        if isinstance(model, ModelMixin) and _is_denoiser(name)
    }
    if not found:
        names = ", ".join(pipeline.components)
        raise ValueError(
            f"{type(pipeline).__name__} has no transformer or unet; its components: {names}"
        )
    return found


def autoencoders(pipeline: DiffusionPipeline) -> list[ModelMixin]:
    """The models that decode latents: ``vae``, or by another name (Kandinsky's ``movq``)."""
    models = [m for m in pipeline.components.values() if isinstance(m, ModelMixin)]
    return [m for m in models if hasattr(m, "decode")]


def helpers(pipeline: DiffusionPipeline) -> list[ModelMixin]:
    """The models that the loop calls beside the denoisers: ControlNets, image adapters and the like."""
    apart = [*denoisers(pipeline).values(), *autoencoders(pipeline)]
    models = [m for m in pipeline.components.values() if isinstance(m, ModelMixin)]
    return [m for m in models if not any(m is a for a in apart)]
