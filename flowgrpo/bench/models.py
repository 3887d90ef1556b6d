"""The model that a benchmark measures: how it is loaded, and the hashes that identify it."""

import hashlib
import inspect
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import BenchError, Json
from flowgrpo.bench.files import sha256
from flowgrpo.core.imports import suggest
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.loading import DTYPES, load_pipeline

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "flowgrpo")
EXPORT = "export"
"""The folder of a run directory with its trained weights."""
SHAPES = Path(__file__).parents[1] / "shapes" / "model"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter and its scale.

    Attributes:
        path: A folder, a ``.safetensors`` file, or a hub id; a run directory stands for its export.
        scale: Factor of the adapter's output.
    """

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Adapter":
        """Read ``PATH`` or ``PATH:SCALE``.

        Raises:
            ValueError: If the scale is no finite number, or a run directory has no adapter.
        """
        path, colon, scale = text.rpartition(":")
        if not colon or Path(text).exists() or "/" in scale or "\\" in scale:
            return cls(_exported(text))
        try:
            value = float(scale)
        except ValueError:
            raise ValueError(
                f"--adapter must be PATH or PATH:SCALE with a number as scale, got {text!r}"
            ) from None
        if value != value or abs(value) == float("inf"):
            raise ValueError(f"--adapter: the scale must be finite, got {text!r}")
        return cls(_exported(path), value)

    @property
    def name(self) -> str:
        """A short name: that of the file or folder, or of the run that it was exported from."""
        path = Path(self.path)
        return path.parent.name if path.name == EXPORT else path.stem


def _exported(path: str) -> str:
    """The adapter of a run directory; another path as it is.

    Raises:
        ValueError: If the run is not finished, or trained something else than an adapter.
    """
    run = Path(path)
    if not (run / "config.toml").is_file():
        return path
    if not (run / EXPORT).is_dir():
        raise ValueError(
            f"--adapter: {path} has no export yet, which a run writes when it finishes: give the run as "
            "--model, or export a checkpoint with 'flowgrpo export'"
        )
    if not (run / EXPORT / "pytorch_lora_weights.safetensors").is_file():
        raise ValueError(f"--adapter: {path} trained no adapter: give the run as --model")
    return str((run / EXPORT).resolve())


@dataclass(frozen=True)
class Subject:
    """A model to be measured, loaded only if images are to be made.

    Attributes:
        label: Names the model in paths and tables.
        identity: Returns what decides the weights: model, revision or hash, adapters. Asked once
            the model is on this machine.
        load: Makes the policy.
        sampling: How its pipeline is called.
        dtype: Precision of the denoiser.
    """

    label: str
    identity: Callable[[], Json]
    load: Callable[[], PipelinePolicy]
    sampling: Sampling
    dtype: str


def subject(
    model: str,
    *,
    adapters: Sequence[Adapter] = (),
    sampling: Sampling,
    dtype: str = "float32",
    device: str = "cpu",
    batch: int = 16,
    label: str = "",
) -> Subject:
    """A model by hub id, pipeline folder, single file or ``"shapes"``, with adapters."""

    def load() -> PipelinePolicy:
        pipeline = load_any(model, dtype)
        add_adapters(pipeline, adapters)
        return PipelinePolicy(
            pipeline, sampling=sampling, batch_size=batch, dtype=dtype, device=device
        )

    def identity() -> Json:
        return {**identify(model), "adapters": [identify_adapter(a) for a in adapters]}

    return Subject(label or label_of(model, adapters), identity, load, sampling, dtype)


def load_any(model: str, dtype: str) -> Any:
    """A pipeline from a hub id, a folder, ``"shapes"`` or one checkpoint file.

    Parts that a single file lacks, such as text encoders, come from the hub.

    Raises:
        BenchError: If a single file's pipeline class is unknown, or parts of it are not to be had.
    """
    path = Path(model)
    if path.suffix not in WEIGHTS or not path.is_file():
        return load_pipeline(model, DTYPES[dtype])
    import diffusers
    from diffusers.loaders.single_file_utils import (
        infer_diffusers_model_type,
        load_single_file_checkpoint,
    )

    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
    name = SINGLE_FILES.get(kind)
    if name is None:
        raise BenchError(
            f"{model} holds a model of the kind {kind!r}, whose pipeline is not known here: convert it "
            "to a pipeline folder with diffusers"
        )
    try:
        return getattr(diffusers, name).from_single_file(model, torch_dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise BenchError(f"{model} cannot be loaded as a {name}: {error}") from error


SINGLE_FILES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "chroma": "ChromaPipeline",
    "z-image-turbo": "ZImagePipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""Pipelines of the model kinds that diffusers infers from a single file."""


def add_adapters(pipeline: Any, adapters: Sequence[Adapter], trained: Sequence[str] = ()) -> None:
    """Load adapters into a pipeline and set their scales.

    Args:
        pipeline: A pipeline of diffusers.
        adapters: The adapters to load.
        trained: Adapters that are in it already, which stay at scale 1.

    Raises:
        BenchError: If an adapter cannot be loaded, or does not change the model.
    """
    if not adapters:
        return
    if not hasattr(pipeline, "load_lora_weights"):
        raise BenchError(f"{type(pipeline).__name__} of diffusers loads no adapters")
    names = [f"bench_{i}" for i in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        before = {n for n, _ in _lora_parameters(pipeline, "")}
        try:
            pipeline.load_lora_weights(adapter.path, adapter_name=name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BenchError(f"adapter {adapter.path} cannot be loaded: {error}") from error
        added = [(n, p) for n, p in _lora_parameters(pipeline, name) if n not in before]
        outputs = [p for n, p in added if "lora_B" in n]
        if not outputs:
            raise BenchError(f"adapter {adapter.path} fits no layer of {type(pipeline).__name__}")
        if not any(bool(p.detach().any()) for p in outputs):
            raise BenchError(
                f"adapter {adapter.path} is all zeros, so it does not change the model: is it the "
                "file of an untrained adapter?"
            )
    scales = [1.0] * len(trained) + [a.scale for a in adapters]
    pipeline.set_adapters([*trained, *names], scales)


def _lora_parameters(pipeline: Any, adapter: str) -> list[tuple[str, Any]]:
    """LoRA matrices of an adapter, or of all, by component and name."""
    return [
        (f"{part}.{name}", parameter)
        for part, model in pipeline.components.items()
        if hasattr(model, "named_parameters")
        for name, parameter in model.named_parameters()
        if "lora_" in name and (not adapter or f".{adapter}." in name)
    ]


def identify(model: str) -> dict[str, Any]:
    """A model's name with the commit of its hub snapshot, or a hash of its files.

    Raises:
        BenchError: If a hub model is not on this machine.
    """
    path = SHAPES if model == "shapes" else Path(model)
    if path.is_file():
        return {"model": path.name, "sha256": sha256(path)}
    if path.is_dir():
        name = model if model == "shapes" else path.resolve().name
        return {"model": name, "sha256": hash_folder(path)}
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise BenchError(f"{model} is neither a folder nor a hub model on this machine") from error
    return {"model": model, "revision": snapshot.name}


def identify_adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter's name, hash and scale."""
    found = identify(adapter.path)
    return {"adapter": found.pop("model"), **found, "scale": adapter.scale}


def hash_folder(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's weights and JSON files."""
    total = hashlib.sha256()
    files = [p for p in folder.rglob("*") if p.suffix in (*WEIGHTS, ".json") and p.is_file()]
    for file in sorted(files, key=lambda p: p.relative_to(folder).as_posix()):
        total.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


def label_of(model: str, adapters: Sequence[Adapter] = ()) -> str:
    """A short name for paths: letters, digits, points, dashes and underscores."""
    parts = [Path(model).name or model, *(a.name for a in adapters)]
    text = "+".join(parts)
    return "".join(c if c.isalnum() or c in "._-+" else "-" for c in text).strip(".-") or "model"


def call_settings(sampling: Sampling) -> dict[str, Any]:
    """The arguments of the pipeline's call in a form that JSON holds."""
    return {k: _plain(v) for k, v in sampling.arguments().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return repr(value)


def sampler_settings(policy: PipelinePolicy) -> dict[str, Any]:
    """The sampler in use, its schedule's settings, and the call's defaults where none were given."""
    call = inspect.signature(inspect.unwrap(type(policy.pipeline).__call__)).parameters
    given = policy.sampling.arguments()
    defaults = {
        name: _plain(call[name].default)
        for name in ("guidance_scale", "true_cfg_scale", "max_sequence_length")
        if name in call and name not in given and call[name].default is not call[name].empty
    }
    ours, shipped = type(policy.scheduler), type(policy.shipped_scheduler).__name__
    kind = next((c.__name__ for c in ours.__mro__ if c.__module__.startswith("diffusers")), "")
    schedule = {
        k: _plain(policy.scheduler.config.get(k))
        for k in (
            "shift",
            "use_dynamic_shifting",
            "prediction_type",
            "beta_schedule",
            "timestep_spacing",
        )
        if policy.scheduler.config.get(k) is not None
    }
    return {
        "pipeline": type(policy.pipeline).__name__,
        "sampler": kind,
        "shipped_sampler": shipped,
        "schedule": schedule,
        "call_defaults": defaults,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that images depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parse_label(text: str) -> str:
    """Check a label that becomes part of paths. Raises ValueError if it cannot."""
    if not text or text != label_of(text):
        raise ValueError(
            f"--label must consist of letters, digits, '.', '-', '_' and '+', got {text!r}"
            f"{suggest(text, [label_of(text)])}"
        )
    return text
