"""Loads pipelines, and finds their denoisers, autoencoders and helper models."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from transformers import PreTrainedModel

from flowgrpo.policy.arguments import is_out_of_memory
from flowgrpo.policy.settings import Quantization

AUTOENCODERS = ("vae", "movq")
"""Names that pipelines give to the model that decodes their latents."""
VARIANT = re.compile(r"(?:model|-of-\d+)\.(?!safetensors|bin)(\w+)[.-]")
"""Finds ``fp16`` in ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors`` and
``model-00001-of-00002.fp16.safetensors``."""
HARMLESS = ("position_ids",)
"""Ends of names in old files that hold no trained weights: the numbers 0, 1, 2, ... of positions."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, quantize: Quantization = "none"
) -> DiffusionPipeline:
    """Load a pipeline with ``DiffusionPipeline.from_pretrained``.

    Args:
        model: Hub id, folder, or ``"shapes"`` for the embedded model.
        dtype: Precision of the models. Autoencoders stay in fp32, because rewards score their output.
        quantize: Quantisation of the denoisers.

    Raises:
        FileNotFoundError: If the folder does not exist or is not a pipeline.
        ValueError: If its files are damaged, lack weights, or do not belong together.
    """
    path = Path(__file__).parents[1] / "shapes" / "model" if str(model) == "shapes" else Path(model)
    if (path / "modular_model_index.json").exists():
        raise FileNotFoundError(
            f"{path} is a modular pipeline, made of blocks; a policy needs a pipeline with a call of its "
            "own and a model_index.json"
        )
    if path.is_dir() and not (path / "model_index.json").exists():
        raise FileNotFoundError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    looks_like_path = str(model).startswith((".", "/", "~")) or str(model).count("/") > 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    source = str(path) if path.is_dir() else str(model)
    exact = dict.fromkeys(AUTOENCODERS, torch.float32)
    config = None
    if quantize != "none":
        names = [n for n in DiffusionPipeline.load_config(source) if _is_denoiser(n)]
        config = _quantization(quantize, dtype, names)
    with _readable(source), _complete_weights(source):
        return DiffusionPipeline.from_pretrained(
            source,
            dtype={"default": dtype, **exact},
            quantization_config=config,
            variant=variant_of(path) if path.is_dir() else None,
        )


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Raise what damaged files make diffusers and transformers raise as a ValueError that names the model."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ImportError) or source in str(error):
            raise  # These have a message of their own.
        raise ValueError(
            f"the pipeline in {source} cannot be loaded ({type(error).__name__}: {error}): a file of it is "
            "damaged or has wrong contents; download it again, or correct its model_index.json and config.json"
        ) from error


@contextmanager
def _complete_weights(source: str) -> Iterator[None]:
    """Refuse models, loaded inside, whose files lack weights or have others.

    Diffusers and transformers only log a warning, and give missing weights random values. Both report
    the names through ``output_loading_info`` of ``from_pretrained``, which a pipeline does not pass on,
    so it is added here to each call. What their classes declare to be ignored is not reported.

    Raises:
        ValueError: With the class and the first names.
    """
    owners = (ModelMixin, PreTrainedModel)
    originals = [owner.__dict__["from_pretrained"] for owner in owners]

    def checked(original: Any) -> Any:
        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("output_loading_info"):
                return original.__func__(cls, *args, **kwargs)
            model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
            for kind in ("missing", "unexpected", "mismatched"):
                found = sorted(map(str, info.get(f"{kind}_keys") or ()))
                names = [n for n in found if not n.endswith(HARMLESS)]
                if names:
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    raise ValueError(
                        f"the weights of {cls.__name__} in {source} do not fit: {len(names)} {kind} "
                        f"({', '.join(names[:3])}{more}); download the model again, or correct its config.json"
                    )
            return model

        return classmethod(from_pretrained)

    for owner, original in zip(owners, originals, strict=True):
        owner.from_pretrained = checked(original)
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.from_pretrained = original


def _quantization(
    kind: Quantization, dtype: torch.dtype, parts: list[str]
) -> PipelineQuantizationConfig | None:
    """The quantisation of the components ``parts`` for ``from_pretrained``."""
    if kind == "none":
        return None
    if kind == "nf4":
        return PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit",
            quant_kwargs={
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": dtype,
            },
            components_to_quantize=parts,
        )
    if kind == "int8":
        return PipelineQuantizationConfig(
            quant_backend="bitsandbytes_8bit",
            quant_kwargs={"load_in_8bit": True},
            components_to_quantize=parts,
        )
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return PipelineQuantizationConfig(
        quant_mapping={part: TorchAoConfig(Int8WeightOnlyConfig()) for part in parts}
    )


def variant_of(folder: Path) -> str | None:
    """The variant of the weights in a pipeline folder (``fp16``), if a component has no other weights."""
    for component in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = [f.name for f in component.iterdir() if f.suffix in (".safetensors", ".bin")]
        named = [m for m in map(VARIANT.search, files) if m]
        if named and len(named) == len(files):
            return named[0].group(1)
    return None


def _is_denoiser(name: str) -> bool:
    return name.split("_")[0] in ("transformer", "unet")


def without_safety_checker(pipeline: DiffusionPipeline) -> None:
    """Remove a pipeline's safety checker, which would replace images by black ones before they are scored.

    Cosmos' guardrail stays: its pipelines cannot be called without it, and its licence forbids that.
    """
    if hasattr(pipeline, "run_safety_checker"):
        pipeline.safety_checker = None


def denoisers(pipeline: DiffusionPipeline) -> Mapping[str, ModelMixin]:
    """The models that predict in the denoising loop, by their names in the pipeline.

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
    """The models that decode latents, whatever their name (Kandinsky's is ``movq``)."""
    models = [m for m in pipeline.components.values() if isinstance(m, ModelMixin)]
    return [m for m in models if hasattr(m, "decode")]


def helpers(pipeline: DiffusionPipeline) -> list[ModelMixin]:
    """The models that the loop calls in addition to the denoisers, such as ControlNets and image adapters."""
    apart = [*denoisers(pipeline).values(), *autoencoders(pipeline)]
    models = [m for m in pipeline.components.values() if isinstance(m, ModelMixin)]
    return [m for m in models if not any(m is a for a in apart)]
