"""A pipeline without weights: its classes at their real sizes, made from the small config files.

Every component is built as its class builds it, with parameters on the meta device: they have
shapes and dtypes and take no memory. Schedulers are real. Tokenizers are real where their files are
there; where only configs are, a stand-in pads every prompt to the model's length, which is what
most pipelines ask for anyway.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download
from torch import nn
from transformers import BatchEncoding, PreTrainedModel

from flowgrpo.policy.loading import AUTOENCODERS

CONFIGS = ("model_index.json", "*/*config.json")
MAX_TEXT = 512
"""Tokens of a prompt where neither the call nor the tokenizer's config says how many."""
DROPPED = ("safety_checker", "feature_extractor")
"""Components that a policy does without, where the second serves the first."""


class NoEstimate(RuntimeError):
    """The memory of a model cannot be estimated; the message says why."""


def config_folder(model: str | Path) -> Path:
    """The folder with a pipeline's config files: a local one, or from the hub (a few kB).

    Raises:
        NoEstimate: If the files cannot be had.
    """
    shapes = Path(__file__).parents[1] / "shapes" / "model"
    path = shapes if str(model) == "shapes" else Path(model)
    if path.is_dir():
        folder = path
    else:
        try:
            folder = Path(snapshot_download(str(model), allow_patterns=list(CONFIGS)))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise NoEstimate(f"the config files of {model} cannot be had ({reason})") from error
    if not (folder / "model_index.json").exists():
        raise NoEstimate(f"{model} has no model_index.json")
    return folder


def build(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline of a folder with parameters on the meta device, in the precision of a policy.

    Args:
        folder: With ``model_index.json`` and the components' configs.
        dtype: Precision of the models; the VAE has fp32, and parts that their class keeps in fp32.

    Raises:
        NoEstimate: If a component's class or config cannot be had.
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
                arguments[name] = _component(folder, name, entry, dtype)
            except (OSError, ValueError, ImportError, AttributeError) as error:
                raise NoEstimate(f"the component {name} cannot be built: {error}") from error
    if "requires_safety_checker" in arguments:
        arguments["requires_safety_checker"] = False
    name = index["_class_name"]
    try:
        return _class("diffusers", name)(**arguments)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise NoEstimate(f"{name} cannot be built without weights: {error}") from error


def _is_component(entry: Any) -> bool:
    """Whether an entry of ``model_index.json`` is a library and a class, and not a plain value."""
    two = isinstance(entry, list) and len(entry) == 2
    return two and all(part is None or isinstance(part, str) for part in entry)


def _component(folder: Path, name: str, entry: list[str], dtype: torch.dtype) -> Any:
    cls, place = _class(*entry), folder / name
    own = torch.float32 if name in AUTOENCODERS else dtype
    if issubclass(cls, ModelMixin):
        # An autoencoder's buffers are real, for pipelines read them; a denoiser's tables can be large.
        with init_empty_weights() if hasattr(cls, "decode") else torch.device("meta"):
            model = cls.from_config(cls.load_config(place))
        kept: Mapping[str, Any] | list[str] = cls._keep_in_fp32_modules or []
        return _cast(model, own, kept)
    if issubclass(cls, PreTrainedModel):
        with init_empty_weights():
            model = cls(cls.config_class.from_pretrained(place))
        # Moving parameters to the meta device parts those that share their memory.
        model.tie_weights()
        # transformers keeps the first list in fp32 under fp16 alone, the second always.
        loose, strict = model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict
        kept = [*(loose or ()), *(strict or ())] if own == torch.float16 else [*(strict or ())]
        return _cast(model, own, kept)
    if "Tokenizer" in cls.__name__:
        return _tokenizer(cls, place)
    return cls.from_pretrained(place)


def _class(library: str, name: str) -> Any:
    """A class as ``model_index.json`` names it."""
    try:
        return getattr(importlib.import_module(library), name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(f"diffusers.pipelines.{library}"), name)


def _cast(model: nn.Module, dtype: torch.dtype, kept: Any) -> nn.Module:
    """The model in a precision; parameters whose names hold one of ``kept`` stay as they are."""
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                full = f"{prefix}.{name}".split(".")
                # from_pretrained leaves alone what is in no file.
                spared = name in module._non_persistent_buffers_set or any(k in full for k in kept)
                if tensor is None or not tensor.is_floating_point() or spared:
                    continue
                tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


class Padding:
    """Stands in for a tokenizer: every prompt fills the length that is asked for."""

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
        """Any text will do, for its length is not looked at."""
        return str(messages)

    def tokenize(self, text: str) -> list[str]:
        """No token is a learnt one of textual inversion."""
        return text.split()

    def batch_decode(self, ids: Any, *_: Any, **__: Any) -> list[str]:
        """For warnings about prompts that are too long."""
        return ["" for _ in ids]


def _tokenizer(cls: Any, place: Path) -> Any:
    # Anything can be wrong with half a tokenizer, and the stand-in is good enough for all of it.
    try:
        return cls.from_pretrained(place)
    except Exception:
        file = place / "tokenizer_config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        length = config.get("model_max_length", 77 if "CLIP" in cls.__name__ else MAX_TEXT)
        return Padding(min(int(length), MAX_TEXT))
