"""Builds a pipeline on the meta device from its config files, without weights.

Every component is an instance of its real class at its real size; parameters have shapes and dtypes
but take no memory. Schedulers are loaded as usual. A tokenizer is loaded if its files are available;
otherwise :class:`PaddingTokenizer` takes its place and pads every prompt to the model's maximum length.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin, pipelines
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from huggingface_hub import snapshot_download
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import BatchEncoding, PreTrainedModel

from flowgrpo.policy.loading import AUTOENCODERS, expanded
from flowgrpo.policy.model_files import published_folder
from flowgrpo.policy.settings import ModelSource
from flowgrpo.policy.single_file import base_folder, is_single_file

CONFIGS = ("model_index.json", "*/*config.json")
MAX_TEXT = 512
"""Largest number of tokens of a prompt, and the number if no config names one."""
LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes a model_index.json may name."""
DROPPED = ("safety_checker", "feature_extractor")
"""Components that a policy never loads; the feature extractor only serves the safety checker."""


class EstimateError(RuntimeError):
    """The memory of a run cannot be estimated; the message gives the reason."""


def config_folder(model: str | Path | ModelSource) -> Path:
    """The folder with a pipeline's config files.

    It is the model's own folder, or that in the hub's cache. For models that many configurations name,
    the config files are in the package, without tokenizers. Otherwise they are downloaded (a few kB).

    Raises:
        EstimateError: If the files cannot be downloaded, or the folder has no ``model_index.json``.
    """
    source = model if isinstance(model, ModelSource) else ModelSource(path=str(model))
    shapes = Path(__file__).parents[1] / "shapes" / "model"
    path = shapes if str(source) == "shapes" else Path(expanded(source.path))
    published = published_folder(source.path)
    if path.is_dir():
        folder = path
    elif published is not None and not source.revision:
        folder = _cached(source.path) or published
    elif is_single_file(path) and source.base:
        return config_folder(replace(source, path=source.base, base=""))
    elif is_single_file(path):
        try:
            folder = base_folder(source, load_single_file_checkpoint(str(path)))
        except (OSError, ValueError) as error:
            raise EstimateError(str(error)) from error
    else:
        try:
            revision = source.revision or None
            patterns = list(CONFIGS)
            folder = Path(
                snapshot_download(source.path, revision=revision, allow_patterns=patterns)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EstimateError(
                f"the config files of {model} cannot be downloaded ({reason})"
            ) from error
    if not (folder / "model_index.json").exists():
        raise EstimateError(f"{model} has no model_index.json")
    return folder


def _cached(model: str) -> Path | None:
    """The folder of a model in the hub's cache, if it has the config of every component."""
    try:
        folder = Path(snapshot_download(model, local_files_only=True))
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError):
        return None
    parts = [k for k, v in index.items() if _is_component(v) and v[0] is not None]
    return folder if all(any((folder / p).glob("*config.json")) for p in parts) else None


def tokenizers(folder: Path) -> dict[str, Any]:
    """The tokenizers of a pipeline's folder whose files are there, by name."""
    index = json.loads((folder / "model_index.json").read_text())
    found = {
        name: _tokenizer(_class(*entry), folder / name)
        for name, entry in index.items()
        if name.startswith("tokenizer") and _is_component(entry) and entry[0] is not None
    }
    return {k: v for k, v in found.items() if not isinstance(v, PaddingTokenizer)}


def pipeline_class(folder: Path) -> Any:
    """The class of a pipeline's folder."""
    return _class("diffusers", json.loads((folder / "model_index.json").read_text())["_class_name"])


def build(folder: Path, dtype: torch.dtype, device: str = "meta") -> DiffusionPipeline:
    """Build the pipeline of a folder without weights, in the dtypes of a policy.

    Args:
        folder: Contains ``model_index.json`` and the components' configs.
        dtype: Of the models. The VAE is in fp32, as are the modules that a class keeps in fp32.
        device: Device of the parameters. On the meta device they take no memory; on any other they are
            drawn at random there, as the models' classes initialise them.

    Raises:
        EstimateError: If a component's class or config is missing, or the pipeline cannot be built.
    """
    index = json.loads((folder / "model_index.json").read_text())
    entries = {k: v for k, v in index.items() if not k.startswith("_")}
    arguments: dict[str, Any] = {}
    dropped = DROPPED if "safety_checker" in entries else ()
    for name, entry in entries.items():
        if not _is_component(entry):
            arguments[name] = entry
        elif entry[0] is None or name in dropped:
            arguments[name] = None
        else:
            try:
                arguments[name] = _component(folder, name, entry, dtype, device)
            except (OSError, ValueError, ImportError, AttributeError) as error:
                raise EstimateError(f"the component {name} cannot be built: {error}") from error
    if "requires_safety_checker" in arguments:
        arguments["requires_safety_checker"] = False
    name = index["_class_name"]
    try:
        return _class("diffusers", name)(**arguments)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise EstimateError(f"{name} cannot be built without weights: {error}") from error


def _is_component(entry: Any) -> bool:
    """Whether an entry of ``model_index.json`` is ``[library, class]`` rather than a plain value."""
    two = isinstance(entry, list) and len(entry) == 2
    return two and all(part is None or isinstance(part, str) for part in entry)


class _EmptyOnMeta(TorchFunctionMode):
    """Inside, ``torch.empty``, which makes the parameters of torch's layers, takes no memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def with_real_buffers(make: Callable[[], nn.Module]) -> Any:
    """A module whose parameters are on the meta device and whose buffers have their values.

    ``init_empty_weights`` alone first gives every parameter memory. The allocator can keep that as
    address space of the process, tens of GB for a large model, and a process whose address space is
    larger than the machine's memory can start no other process.
    """
    with init_empty_weights(), _EmptyOnMeta():
        module = make()
    if not any(b.is_meta for b in module.buffers()):
        return module
    # A buffer was made by torch.empty as well.
    with init_empty_weights():
        return make()


@contextmanager
def _drawn_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, modules are made on a device, with parameters of a dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(usual)


def _component(folder: Path, name: str, entry: list[str], dtype: torch.dtype, device: str) -> Any:
    cls, place = _class(*entry), folder / name
    own = torch.float32 if name in AUTOENCODERS else dtype
    if issubclass(cls, ModelMixin):
        # Pipelines read the buffers of autoencoders, so these are real; those of denoisers can be
        # large, and go on the meta device with the parameters.
        config = cls.load_config(place)
        if device != "meta":
            with _drawn_on(device, own):
                model = cls.from_config(config)
        elif hasattr(cls, "decode"):
            model = with_real_buffers(lambda: cls.from_config(config))
        else:
            with torch.device("meta"):
                model = cls.from_config(config)
        in_fp32: Mapping[str, Any] | list[str] = cls._keep_in_fp32_modules or []
        return _cast(model, own, in_fp32)
    if issubclass(cls, PreTrainedModel):
        settings = cls.config_class.from_pretrained(place)
        if device == "meta":
            model = with_real_buffers(lambda: cls(settings))
        else:
            with _drawn_on(device, own):
                model = cls(settings)
        # Parameters that share memory are separated when they move to the meta device.
        model.tie_weights()
        # transformers keeps the modules of the first list in fp32 for fp16 only, of the second always.
        loose, strict = model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict
        in_fp32 = [*(loose or ()), *(strict or ())] if own == torch.float16 else [*(strict or ())]
        return _cast(model, own, in_fp32)
    if "Tokenizer" in cls.__name__:
        return _tokenizer(cls, place)
    return cls.from_pretrained(place)


def _class(library: str, name: str) -> Any:
    """The class that ``model_index.json`` names: of a library, or of one of diffusers' pipelines."""
    if library not in LIBRARIES and not hasattr(pipelines, library):
        # Diffusers does not import such a module either.
        raise EstimateError(
            f"its model_index.json names {name} of {library!r}, which is not imported"
        )
    try:
        return getattr(importlib.import_module(library), name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(f"diffusers.pipelines.{library}"), name)


def _cast(model: nn.Module, dtype: torch.dtype, in_fp32: Any) -> nn.Module:
    """Cast a model to a dtype, except tensors with one of ``in_fp32`` in their dotted name."""
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                full = f"{prefix}.{name}".split(".")
                # from_pretrained does not cast buffers that are stored in no file.
                excluded = name in module._non_persistent_buffers_set or any(
                    k in full for k in in_fp32
                )
                if tensor is None or not tensor.is_floating_point() or excluded:
                    continue
                tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


class PaddingTokenizer:
    """Replaces a tokenizer whose files are missing: every prompt has ``max_length`` tokens."""

    padding_side = "right"
    pad_token_id = bos_token_id = 0
    eos_token_id = 1

    def __init__(self, model_max_length: int):
        self.model_max_length = model_max_length
        self.added_tokens_encoder: dict[str, int] = {}

    def __call__(
        self, text: str | list[str], *_: Any, max_length: int | None = None, **__: Any
    ) -> BatchEncoding:
        rows = 1 if isinstance(text, str) else len(text)
        ids = torch.ones(rows, max_length or self.model_max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, messages: Any, *_: Any, **__: Any) -> str:
        """Return any text; its length does not change the number of tokens."""
        return str(messages)

    def tokenize(self, text: str) -> list[str]:
        """Split at spaces; pipelines look for textual-inversion tokens in the result."""
        return text.split()

    def batch_decode(self, ids: Any, *_: Any, **__: Any) -> list[str]:
        """Return empty texts; pipelines quote them in warnings about truncated prompts."""
        return ["" for _ in ids]


def _tokenizer(cls: Any, place: Path) -> Any:
    # A folder with part of a tokenizer's files raises many kinds of errors, and all mean the same.
    try:
        return cls.from_pretrained(place)
    except Exception:
        file = place / "tokenizer_config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        length = config.get("model_max_length", 77 if "CLIP" in cls.__name__ else MAX_TEXT)
        return PaddingTokenizer(min(int(length), MAX_TEXT))
