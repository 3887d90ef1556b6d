"""Pipelines from a checkpoint in one file, in the layout of the original code or of ComfyUI.

Such a file holds the weights of some components, without their configuration. Everything else comes from
the pipeline ``base``: the configuration, the tokenizers, the scheduler, and the components that the file
lacks. Diffusers converts the weights.

The folder ``published`` has the configurations of Stable Diffusion 1.5 and XL, whose files usually hold
all weights; with CLIP's vocabulary from open_clip these files load without a hub.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import CLIPTokenizer

from flowgrpo.policy.settings import ModelSource

SUFFIXES = (".safetensors", ".ckpt")
PUBLISHED = Path(__file__).parent / "published"
"""Folders with the configurations of published pipelines."""
SHIPPED = {"v1": "sd15", "xl_base": "sdxl_base"}
"""Folders in PUBLISHED by diffusers' names of the kinds of checkpoints."""
VAE = ("first_stage_model.", "vae.")
CLIP = {
    "text_encoder": (
        "cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoders.clip_g."),
}  # fmt: skip
"""Prefixes of the weights of CLIP text encoders, by the component's name."""
T5 = ("text_encoders.t5xxl.transformer.",)
QUANTISED = ("scale_weight", "weight_scale", "scaled_fp8", "weight.absmax", "input_scale")
"""Ends of the names of factors by which quantised weights have to be multiplied."""


def is_single_file(path: Path) -> bool:
    """Whether a path names a checkpoint in one file."""
    return path.suffix in SUFFIXES and path.is_file()


def load_single_file(source: ModelSource, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline from a checkpoint in one file.

    Args:
        source: The file, and where to find the components that it lacks.
        dtype: Precision of the models. The VAE is in fp32.

    Raises:
        ValueError: If the file holds no known denoiser, quantised weights, or weights that do not fit
            the pipeline.
        FileNotFoundError: If the base cannot be found, or lacks weights that the file lacks too.
    """
    file = Path(source.path)
    weights = _read(file)
    folder = base_folder(source, weights)
    index = json.loads((folder / "model_index.json").read_text())
    entries = {k: v for k, v in index.items() if isinstance(v, list) and v[0] is not None}
    denoiser = next((n for n in ("unet", "transformer") if n in entries), None)
    if denoiser is None or f"{denoiser}_2" in entries:
        raise ValueError(
            f"model.path = {file.name} is one denoiser, and {index['_class_name']} of {source.base or folder} "
            f"has {'two' if denoiser else 'none'}; give a pipeline folder as model.path"
        )
    parts = {denoiser, *(n for n, v in entries.items() if _holds(weights, n, v[1]))}
    loaded: dict[str, Any] = {}
    for name in sorted(parts):
        own = torch.float32 if name == "vae" else dtype
        loaded[name] = _component(file, weights, folder, name, entries[name][1], own)
    loaded |= {
        n: _clip_tokenizer("!" if n == "tokenizer_2" else "<|endoftext|>")
        for n, (_, cls) in entries.items()
        if cls == "CLIPTokenizer" and not (folder / n).exists()
    }
    if "safety_checker" in index:
        loaded |= {"safety_checker": None, "requires_safety_checker": False}
    _require_rest(source, folder, [n for n in entries if n not in loaded], entries)
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder),
        dtype={"default": dtype, "vae": torch.float32},
        variant=source.variant or None,
        **loaded,
    )
    # An export must not copy the components of the base in place of those of the file.
    pipeline.register_to_config(_name_or_path=str(file))
    return pipeline


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ValueError: If it cannot be read, or is not a checkpoint of a denoiser in full precision.
    """
    try:
        weights = dict(load_single_file_checkpoint(str(file)))
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model.path: {file} cannot be read as a checkpoint: {first}") from error
    if any("lora" in k for k in weights):
        raise ValueError(
            f"model.path: {file} is a LoRA adapter, not a model; give its base as model.path, and the file "
            "as model.adapters or model.weights.init"
        )
    if any(k.endswith(QUANTISED) for k in weights):
        raise ValueError(
            f"model.path: {file} holds quantised weights, which diffusers does not convert; use the file in "
            "fp16 or bf16"
        )
    return weights


def base_folder(source: ModelSource, weights: Mapping[str, Tensor]) -> Path:
    """The folder of the pipeline that completes a checkpoint, downloaded from the hub if necessary.

    Args:
        source: The base, if one is given; the revision is the base's.
        weights: Tensors of the checkpoint, by which its published pipeline is known.

    Raises:
        ValueError: If no base is given and the kind of the checkpoint is unknown.
        FileNotFoundError: If the base is not to be had.
    """
    if source.base and Path(source.base).is_dir():
        folder = Path(source.base)
        if not (folder / "model_index.json").exists():
            raise FileNotFoundError(f"model.base = {folder} has no model_index.json")
        return folder
    kind = infer_diffusers_model_type(weights)
    # Diffusers takes whatever it does not know for Stable Diffusion 1.
    if not source.base and kind == "v1" and CHECKPOINT_KEY_NAMES["v1"] not in weights:
        raise ValueError(
            f"model.path: {source.path} is not a checkpoint of a published model that diffusers knows; set "
            "model.base to a hub id or folder of the pipeline it belongs to"
        )
    name = source.base or DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    if not source.base and kind in SHIPPED:
        return PUBLISHED / SHIPPED[kind]
    try:
        return _download(name, source, weights)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source.path} needs the configuration and the tokenizers of its pipeline, and {name} cannot be "
            f"downloaded ({first}); set model.base to a folder with that pipeline"
        ) from error


def _download(name: str, source: ModelSource, weights: Mapping[str, Tensor]) -> Path:
    """The folder of a hub id, without the weights that the checkpoint has."""
    revision = source.revision or None
    configs = ["model_index.json", "*/config.json"]
    first = Path(snapshot_download(name, revision=revision, allow_patterns=configs))
    index = json.loads((first / "model_index.json").read_text())
    entries = {k: v for k, v in index.items() if isinstance(v, list) and v[0] is not None}
    denoisers = [n for n in ("unet", "transformer") if n in entries]
    held = [*denoisers, *(n for n, v in entries.items() if _holds(weights, n, v[1]))]
    options = {"revision": revision, "variant": source.variant or None}
    passed: dict[str, Any] = dict.fromkeys([*held, "safety_checker"])
    return Path(DiffusionPipeline.download(name, **options, **passed))


def _holds(weights: Mapping[str, Tensor], name: str, cls: str) -> bool:
    """Whether a checkpoint has the weights of a component besides the denoiser."""
    prefixes: tuple[str, ...] = ()
    if name == "vae":
        prefixes = VAE
    elif cls.startswith("CLIPTextModel"):
        prefixes = CLIP.get(name, ())
    elif cls == "T5EncoderModel":
        prefixes = T5
    return any(k.startswith(prefixes) for k in weights) if prefixes else False


def _component(
    file: Path, weights: dict[str, Tensor], folder: Path, name: str, cls: str, dtype: torch.dtype
) -> Any:
    """A component from the weights of the file, with the configuration in the folder.

    Raises:
        ValueError: If diffusers cannot convert the weights, or they do not fit.
    """
    place: dict[str, Any] = {"config": str(folder), "subfolder": name}
    kind: Any = getattr(diffusers if hasattr(diffusers, cls) else transformers, cls)
    if issubclass(kind, ModelMixin) and not issubclass(kind, FromOriginalModelMixin):
        raise ValueError(
            f"model.path: diffusers loads {cls} from no single file; give a pipeline folder or hub id"
        )
    # Diffusers tells the encoders of one file apart by their widths only.
    own = {k: v for k, v in weights.items() if k.startswith(CLIP[name])} if name in CLIP else {}

    def load(dtype: torch.dtype) -> Any:
        # Diffusers takes tensors out of the mapping as it converts them.
        if issubclass(kind, ModelMixin):
            return kind.from_single_file(dict(weights), torch_dtype=dtype, **place)
        if cls == "T5EncoderModel":
            model = create_diffusers_t5_model_from_checkpoint(
                kind, dict(weights), torch_dtype=dtype, **place
            )
            model.tie_weights()
            return model
        return create_diffusers_clip_model_from_ldm(kind, own, torch_dtype=dtype, **place)

    def misfit(reason: str) -> ValueError:
        return ValueError(
            f"the weights of {cls} in {file} do not fit the configuration in {folder / name}: {reason}; set "
            "model.base to the pipeline that the file belongs to"
        )

    try:
        model = load(dtype)
    except NotImplementedError as error:
        # Missing weights are on the meta device, which cannot be converted to a precision.
        raise misfit("some of its weights are missing in the file") from error
    except (SingleFileComponentError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise misfit(first[:200]) from error
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    if missing:
        raise misfit(f"{len(missing)} missing ({', '.join(missing[:3])})")
    return model.eval()


def _require_rest(
    source: ModelSource, folder: Path, names: list[str], entries: Mapping[str, list[str]]
) -> None:
    """Check that the base has what the file lacks.

    Raises:
        FileNotFoundError: With the components, and what to set.
    """
    missing = [n for n in names if not (folder / n).is_dir()]
    for name in names:
        library, cls = entries[name]
        module = diffusers if library == "diffusers" else transformers
        is_model = issubclass(getattr(module, cls, type), torch.nn.Module)
        files = list((folder / name).glob("*")) if name not in missing else []
        if is_model and not any(f.suffix in (".safetensors", ".bin") for f in files):
            missing.append(name)
    if missing:
        known = "" if PUBLISHED in folder.parents else f" and {folder} have"
        raise FileNotFoundError(
            f"{source.path}{known or ' has'} no {', '.join(dict.fromkeys(missing))}; set model.base to the hub id or "
            "folder of a pipeline with them"
        )


def _clip_tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer of Stable Diffusion, from the vocabulary that open_clip has.

    The vocabulary is in the order of CLIP's: the 256 bytes, the bytes at the end of a word, the merged
    pairs, and the two special tokens.

    Args:
        pad: The padding token: ``!`` in the second tokenizer of Stable Diffusion XL.
    """
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    single = list(bytes_to_unicode().values())
    tokens = [*single, *(t + "</w>" for t in single), *("".join(p) for p in pairs)]
    vocab = {t: i for i, t in enumerate((*tokens, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token=pad, model_max_length=77)
