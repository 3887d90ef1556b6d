"""Exports trained parameters: adapters in the formats that other programs read, and merged weights.

``adapter_files`` writes adapters, ``checkpoint_file`` a denoiser or a whole pipeline in one file.
``layer_names`` has the names that diffusers, ComfyUI and sd-scripts give to the layers of each family's
denoiser, ``original_parts`` those of VAEs and text encoders.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import (
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import snapshot_download

from flowgrpo.data.files import reached
from flowgrpo.policy.export import adapter_files
from flowgrpo.policy.export.checkpoint_file import (
    require_known,
    write_checkpoint,
    write_pipeline,
)
from flowgrpo.policy.export.original_parts import original_encoders
from flowgrpo.policy.loading import VARIANT
from flowgrpo.policy.settings import Full, LoRA, ModelSource
from flowgrpo.policy.weights import ADAPTER, NOISE_FILE, InitialNoise, Trainable

INDEX = "model_index.json"
INDEX_VARIANT = re.compile(r"\.index\.(\w+)\.json$")
"""Finds ``fp16`` in ``model.safetensors.index.fp16.json``."""


@dataclass(frozen=True)
class ExportedFile:
    """A file or folder of an export.

    Attributes:
        path: The file, or the folder of a pipeline.
        readers: The programs that read it, and how.
    """

    path: Path
    readers: str


@dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
        files: What was written.
        missing: A sentence for each format that was not written, with the reason.
    """

    files: list[ExportedFile] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line for each file with its readers, and one for each format that was not written."""
        width = max((len(str(f.path)) for f in self.files), default=0)
        written = [f"{f.path!s:{width}}  {f.readers}" for f in self.files]
        return [*written, *(f"not written: {reason}" for reason in self.missing)]


def export(
    pipeline: DiffusionPipeline, trainable: Trainable | InitialNoise, folder: Path
) -> Exported:
    """Write the trained parameters in all formats that exist for them.

    An adapter is written for diffusers and, if they load adapters of the model, for ComfyUI and for
    sd-scripts. Full weights are written as a pipeline folder for ``from_pretrained(folder)``. The initial
    noise is written as ``initial_noise.safetensors``.

    Args:
        pipeline: The pipeline with its shipped scheduler.
        trainable: The trained parameters.
        folder: Folder to write to; created if missing.

    Returns:
        What was written, and what was not.
    """
    if isinstance(trainable, InitialNoise):
        return export_noise(trainable, folder)
    if isinstance(trainable.weights, Full):
        return _write_pipeline(pipeline, trainable, folder)
    exported = export_diffusers(pipeline, trainable, folder)
    for write in (export_comfyui, export_kohya):
        try:
            exported.files.extend(write(pipeline, trainable, folder).files)
        except adapter_files.NoFormatError as error:
            exported.missing.append(error.reason)
        except ValueError as error:
            exported.missing.append(str(error))
    return exported


def base_note(source: ModelSource, trainable: Trainable | InitialNoise) -> str:
    """What a reader of an exported adapter must know about its base; empty if it is the model itself."""
    if not source.adapters or not isinstance(trainable.weights, LoRA):
        return ""
    names = ", ".join(f"{a.path} (scale {a.scale:g})" for a in source.adapters)
    return (
        f"The adapter belongs to {source.path} with {names}, which it does not contain; flowgrpo export "
        "--format merged writes a model with all of them"
    )


def export_noise(noise: InitialNoise, folder: Path) -> Exported:
    """Write the distribution of the initial noise as ``initial_noise.safetensors``."""
    noise.export(folder)
    reader = (
        "diffusers: latents=mean + std * torch.randn(batch, *mean.shape) in the pipeline's call"
    )
    return Exported([ExportedFile(folder / NOISE_FILE, reader)])


def export_diffusers(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write an adapter for ``pipe.load_lora_weights(folder)``.

    Raises:
        ValueError: If the trained parameters are no adapter.
    """
    models = _adapted(trainable)
    exported = Exported()
    for file in adapter_files.write_diffusers(pipeline, models, folder):
        own = file.parent != folder
        call = f"pipe.{file.parent.name}.load_lora_adapter" if own else "pipe.load_lora_weights"
        exported.files.append(ExportedFile(file, f"diffusers: {call}"))
    return exported


def export_comfyui(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write an adapter for ComfyUI, below ``folder / "comfyui"``.

    Raises:
        ValueError: If ComfyUI has no names for the model or for an adapted layer, or the trained
            parameters are no adapter.
    """
    files = adapter_files.write_comfyui(pipeline, _adapted(trainable), folder)
    return Exported([ExportedFile(f, "ComfyUI: models/loras") for f in files])


def export_kohya(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write an adapter for sd-scripts, and for AUTOMATIC1111 if it loads the model, below
    ``folder / "kohya"``.

    Raises:
        ValueError: If sd-scripts has no names for the model or for an adapted layer, or the trained
            parameters are no adapter.
    """
    models = _adapted(trainable)
    files = adapter_files.write_kohya(pipeline, models, folder)
    programs = ", ".join(adapter_files.readers(models))
    return Exported([ExportedFile(f, programs) for f in files])


def export_merged(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write a pipeline folder with the adapter added to the weights, for ``from_pretrained(folder)``.

    The adapter is removed from the pipeline. The weights are rounded to the precision in which the model
    was loaded.
    """
    merge(trainable)
    return _write_pipeline(pipeline, trainable, folder)


def export_denoiser(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write each trained denoiser as one file with the original checkpoint's names, the adapter added.

    The files contain neither text encoders nor the VAE. The adapter is removed from the pipeline.

    Raises:
        ValueError: If flowgrpo does not know the original names of all weights of a denoiser, or the
            model is quantised.
    """
    for model in trainable.denoisers.values():
        require_known(model)
    merge(trainable)
    exported = Exported()
    for name, model in trainable.denoisers.items():
        file = write_checkpoint(model, folder / f"{name}.safetensors")
        call = f"{type(model).__name__}.from_single_file"
        reader = f"ComfyUI: models/diffusion_models; diffusers: {call}"
        exported.files.append(ExportedFile(file, reader))
    return exported


def export_checkpoint(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write the whole pipeline as one file with the original checkpoint's names, the adapter added.

    The adapter is removed from the pipeline.

    Raises:
        ValueError: If flowgrpo does not know the layout of the model's checkpoints, or the model is
            quantised.
    """
    (model,) = trainable.denoisers.values()
    require_known(model)
    original_encoders(pipeline)
    merge(trainable)
    file = write_pipeline(pipeline, model, folder / "checkpoint.safetensors")
    name = type(pipeline).__name__
    programs = ["ComfyUI: models/checkpoints", f"diffusers: {name}.from_single_file"]
    if isinstance(pipeline, StableDiffusionPipeline | StableDiffusionXLPipeline):
        programs.append("AUTOMATIC1111: models/Stable-diffusion")
    return Exported([ExportedFile(file, "; ".join(programs))])


def merge(trainable: Trainable) -> None:
    """Add the adapter to the weights and remove it; nothing to do after full fine-tuning."""
    if isinstance(trainable.weights, LoRA):
        for model in trainable.denoisers.values():
            model.fuse_lora(adapter_names=[ADAPTER], safe_fusing=True)
            model.unload_lora()


def _write_pipeline(pipeline: DiffusionPipeline, trainable: Trainable, folder: Path) -> Exported:
    """Write a pipeline folder with the trained denoisers, and copies of all other files.

    Saving the other components would change their precision, and some cannot be loaded again after
    diffusers has saved them (PRX's text encoder).
    """
    folder.mkdir(parents=True, exist_ok=True)
    exported = Exported([ExportedFile(folder, "diffusers: DiffusionPipeline.from_pretrained")])
    source = _source(pipeline)
    if source is None:
        pipeline.save_pretrained(folder)
        return exported
    parts = [p for p in pipeline.components if (source / p).is_dir()]
    for part in parts:
        if part not in trainable.denoisers:
            _copy_part(source / part, folder / part)
    for name, model in trainable.denoisers.items():
        reached("write", folder / name)
        model.save_pretrained(folder / name)
    reached("write", folder / INDEX)
    shutil.copyfile(source / INDEX, folder / INDEX)
    return exported


def _copy_part(source: Path, target: Path) -> None:
    """Copy a component's files without their permissions, its weights without their variant's name.

    ``from_pretrained`` would look for the variant in all components, also in the one that was trained.
    The copies of a read-only folder can be written to.
    """
    for file in sorted(f for f in source.rglob("*") if f.is_file()):
        to = target / file.relative_to(source)
        found = VARIANT.search(file.name) or INDEX_VARIANT.search(file.name)
        if found is not None:
            mark = f".{found[1]}"
            to = to.with_name(file.name.replace(mark, "", 1))
            if (source / to.relative_to(target)).exists():
                continue
        to.parent.mkdir(parents=True, exist_ok=True)
        reached("write", to)
        if found is not None and file.suffix == ".json":
            to.write_text(file.read_text().replace(mark, ""))
        else:
            shutil.copyfile(file, to)


def _source(pipeline: DiffusionPipeline) -> Path | None:
    """The folder from which a pipeline was loaded; None if there is none any more."""
    name = pipeline.config.get("_name_or_path") or ""
    if (Path(name) / INDEX).exists():
        return Path(name)
    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    return found if (found / INDEX).exists() else None


def _adapted(trainable: Trainable) -> Mapping[str, ModelMixin]:
    """The denoisers with an adapter.

    Raises:
        ValueError: If full weights were trained.
    """
    if isinstance(trainable.weights, Full):
        raise ValueError(
            "full weights were trained, so there is no adapter; export them as 'merged'"
        )
    return trainable.denoisers
