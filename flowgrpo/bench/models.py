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
from flowgrpo.policy.loading import expanded
from flowgrpo.policy.settings import Adapter, ModelSource

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "flowgrpo")
SHAPES = Path(__file__).parents[1] / "shapes" / "model"


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
    model: str | ModelSource,
    *,
    sampling: Sampling,
    dtype: str = "float32",
    device: str = "cpu",
    batch: int = 16,
    label: str = "",
) -> Subject:
    """A model by hub id, pipeline folder, single file or ``"shapes"``, with its adapters."""
    source = model if isinstance(model, ModelSource) else ModelSource(path=model)

    def load() -> PipelinePolicy:
        return PipelinePolicy.from_pretrained(
            source, sampling=sampling, batch_size=batch, dtype=dtype, device=device
        )

    own = label or label_of(source.path, source.adapters)
    return Subject(own, lambda: identify_source(source), load, sampling, dtype)


def identify_source(source: ModelSource) -> dict[str, Any]:
    """What decides the weights of a model: its name, hash or commit, base, variant and adapters."""
    found = identify(source.path, source.revision)
    if source.base:
        found["base"] = identify(source.base)
    if source.variant:
        found["variant"] = source.variant
    return {**found, "adapters": [identify_adapter(a) for a in source.adapters]}


def identify(model: str, revision: str = "") -> dict[str, Any]:
    """A model's name with the commit of its hub snapshot, or a hash of its files.

    Raises:
        BenchError: If a hub model is not on this machine.
    """
    path = SHAPES if model == "shapes" else Path(expanded(model))
    if path.is_file():
        return {"model": path.name, "sha256": sha256(path)}
    if path.is_dir():
        name = model if model == "shapes" else path.resolve().name
        return {"model": name, "sha256": hash_folder(path)}
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(model, revision=revision or None, local_files_only=True))
    except (OSError, ValueError) as error:
        raise BenchError(f"{model} is neither a folder nor a hub model on this machine") from error
    return {"model": model, "revision": snapshot.name}


def identify_adapter(adapter: Adapter) -> dict[str, Any]:
    """An adapter's name, hash and scale; a finished run's directory stands for its export."""
    run = Path(adapter.path)
    found = identify(str(run / "export") if (run / "config.toml").is_file() else adapter.path)
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
    parts = [Path(model).name or model, *(Path(a.path).stem for a in adapters)]
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
