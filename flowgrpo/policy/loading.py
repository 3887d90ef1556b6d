"""Loads pipelines, and finds their denoisers, autoencoders and helper models."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError
from transformers import PreTrainedModel

from flowgrpo.policy.adapters import add_adapters
from flowgrpo.policy.arguments import is_unrelated
from flowgrpo.policy.model_files import check_adapter, require
from flowgrpo.policy.settings import ModelSource, Quantization
from flowgrpo.policy.single_file import SUFFIXES, is_single_file, load_single_file

AUTOENCODERS = ("vae", "movq")
"""Names that pipelines give to the model that decodes their latents."""
VARIANT = re.compile(r"(?:model|-of-\d+)\.(?!safetensors|bin)(\w+)[.-]")
"""Finds ``fp16`` in ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors`` and
``model-00001-of-00002.fp16.safetensors``."""
HARMLESS = ("position_ids",)
"""Ends of names in old files that hold no trained weights: the numbers 0, 1, 2, ... of positions."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    model: str | Path | ModelSource,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization = "none",
) -> DiffusionPipeline:
    """Load a pipeline from a folder, the hub, or a checkpoint in one file, with its adapters added.

    Args:
        model: Hub id, folder, file, or ``"shapes"`` for the embedded model; or these with further
            settings.
        dtype: Precision of the models. Autoencoders stay in fp32, because rewards score their output.
        quantize: Quantisation of the denoisers.

    Raises:
        FileNotFoundError: If the folder, file or hub id does not exist or is not a pipeline.
        ValueError: If files are damaged, weights do not fit their models, or settings exclude each other.
    """
    source = model if isinstance(model, ModelSource) else ModelSource(path=str(model))
    source = replace(source, path=expanded(source.path), base=expanded(source.base))
    if source.adapters and quantize != "none":
        raise ValueError(
            f"model.adapters are added to the weights, which memory.quantize = {quantize!r} rounds; merge "
            "them into the model first, or set memory.quantize = 'none'"
        )
    for adapter in source.adapters:
        require(adapter.path, "adapter", check_adapter)
    path = Path(source.path)
    if is_single_file(path):
        if quantize != "none":
            raise ValueError(
                f"memory.quantize = {quantize!r} needs a pipeline folder or a hub id, and {path} is one file"
            )
        pipeline = load_single_file(source, dtype)
    else:
        pipeline = _load_folder(source, dtype, quantize)
    add_adapters(pipeline, source.adapters)
    return pipeline


def _load_folder(
    source: ModelSource, dtype: torch.dtype, quantize: Quantization
) -> DiffusionPipeline:
    """Load a pipeline with ``DiffusionPipeline.from_pretrained``.

    Raises:
        FileNotFoundError: If the folder or hub id does not exist or is not a pipeline.
        ValueError: If weights do not fit their models.
    """
    if source.base:
        raise ValueError(
            f"model.base = {source.base!r} completes a checkpoint in one file, and model.path = "
            f"{source.path!r} is a pipeline; remove it"
        )
    folder = pipeline_folder(source)
    exact = dict.fromkeys(AUTOENCODERS, torch.float32)
    config = None
    if quantize != "none":
        names = [n for n in DiffusionPipeline.load_config(folder) if _is_denoiser(n)]
        config = quantization(quantize, dtype, names)
    variant = source.variant or variant_of(folder)
    if source.variant and not any(
        f".{source.variant}." in f.name or f".{source.variant}-" in f.name
        for f in folder.rglob("*")
    ):
        raise ValueError(
            f"model.variant = {source.variant!r}: {source.path} has no weights of this variant; remove it"
        )
    with _readable(source.path), complete_weights(source.path):
        return DiffusionPipeline.from_pretrained(
            str(folder),
            dtype={"default": dtype, **exact},
            quantization_config=config,
            variant=variant,
        )


def pipeline_folder(source: ModelSource) -> Path:
    """The folder of a pipeline, downloaded from the hub if necessary.

    Raises:
        FileNotFoundError: If there is no such folder or hub id, or it is not a pipeline.
    """
    model, path = source.path, Path(source.path)
    if model == "shapes":
        path = Path(__file__).parents[1] / "shapes" / "model"
    looks_like_path = model.startswith((".", "/")) or model.count("/") > 1 or path.is_absolute()
    if path.is_file():
        raise FileNotFoundError(
            f"{path} is not a checkpoint in one file: its name ends in neither {' nor '.join(SUFFIXES)}"
        )
    if path.suffix in SUFFIXES and not path.is_dir():
        raise FileNotFoundError(f"no such file: {path}")
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    if path.is_dir() and source.revision:
        raise ValueError(
            f"model.revision = {source.revision!r} is for hub ids, and {path} is a folder; remove it"
        )
    if not path.is_dir():
        path = _downloaded(source)
    if (path / "modular_model_index.json").exists():
        raise FileNotFoundError(
            f"{path} is a modular pipeline, made of blocks; a policy needs a pipeline with a call of its "
            "own and a model_index.json"
        )
    if not (path / "model_index.json").exists():
        raise FileNotFoundError(f"{path} is not a diffusers pipeline: it has no model_index.json")
    return path


def _downloaded(source: ModelSource) -> Path:
    """The snapshot of a hub id; without a connection the cached one.

    Raises:
        FileNotFoundError: If it can neither be downloaded nor is cached.
    """
    options = {"revision": source.revision or None, "variant": source.variant or None}
    try:
        return Path(DiffusionPipeline.download(source.path, **options))
    except (OSError, ValueError, RevisionResolutionError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error.__cause__, LocalEntryNotFoundError) or "not fully cached" in reason:
            reason = "it is not in the cache, and the hub cannot be reached"
        which = f", revision {source.revision}" * bool(source.revision)
        raise FileNotFoundError(
            f"{source.path}{which} is neither a folder here nor a pipeline that can be downloaded: {reason}"
        ) from error


def expanded(path: str) -> str:
    """A path with ``~`` replaced by the home folder; other names as they are."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Raise what damaged files make diffusers and transformers raise as a ValueError that names the model."""
    try:
        yield
    except Exception as error:
        if is_unrelated(error) or isinstance(error, ImportError) or source in str(error):
            raise  # These have a message of their own.
        raise ValueError(
            f"the pipeline in {source} cannot be loaded ({type(error).__name__}: {error}): a file of it is "
            "damaged or has wrong contents; download it again, or correct its model_index.json and config.json"
        ) from error


@contextmanager
def complete_weights(source: str) -> Iterator[None]:
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


def quantization(
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
