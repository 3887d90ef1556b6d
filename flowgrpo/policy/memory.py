"""What makes a run fit on its device and run fast: the ``[memory]`` section."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from typing import Any, Literal

import torch
from accelerate import cpu_offload_with_hook
from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from flowgrpo.core.imports import suggest

Quantization = Literal["none", "nf4", "int8", "torchao_int8"]
PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao_int8": "torchao"}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Settings that trade memory for time; none of them changes what is computed but ``quantize``."""

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: far less memory, a third more time."""
    offload_text_encoders: bool = True
    """Keep text and image encoders in main memory, and bring them to the accelerator only for
    prompts that were not seen before."""
    offload_vae: bool = False
    """Keep the VAE in main memory, and bring it to the accelerator only to encode and decode."""
    prompt_cache_gb: float = 4.0
    """Main memory for encoded prompts; older ones move to a temporary folder."""
    prompt_disk_gb: float = 16.0
    """Disk space for encoded prompts."""
    vae_tiling: bool = False
    """Decode large images and videos in overlapping tiles."""
    vae_slicing: bool = False
    """Decode one sample after the other."""
    decode_batch: int = 0
    """Samples decoded at once; 0 for as many as were sampled."""
    score_batch: int = 0
    """Samples handed to the reward models at once; 0 for as many as were sampled."""
    quantize: Quantization = "none"
    """Precision in which a frozen denoiser is kept under its adapters: ``nf4`` and ``int8`` by
    bitsandbytes, ``torchao_int8`` by torchao."""
    compile: Literal["none", "regional"] = "none"
    """``regional`` compiles the denoiser's repeated block once: minutes at the start, faster steps."""
    attention: str = ""
    """Attention backend by diffusers' name, such as ``native``, ``flash`` or ``xformers``; empty
    leaves it to diffusers."""

    def check(self, trains_all: bool) -> None:
        """Raise ValueError on settings that make no sense or contradict each other."""
        for name in ("prompt_cache_gb", "prompt_disk_gb", "decode_batch", "score_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"memory.{name} must be at least 0, got {getattr(self, name)}")
        if self.quantize != "none" and trains_all:
            raise ValueError(
                f"memory.quantize = {self.quantize!r} freezes the denoiser; it needs "
                "model.weights.kind = 'lora'"
            )
        known = [b.value for b in AttentionBackendName]
        if self.attention and self.attention not in known:
            raise ValueError(
                f"memory.attention must be one of {', '.join(known)}, got {self.attention!r}"
                f"{suggest(self.attention, known)}"
            )


def require_installed(memory: Memory, optimizer: str) -> None:
    """Raise ImportError if a setting needs a package that is not there; says which."""
    wanted = {f"memory.quantize = {memory.quantize!r}": PACKAGES.get(memory.quantize, "")}
    if optimizer == "adamw8bit":
        wanted["train.optimizer = 'adamw8bit'"] = "bitsandbytes"
    for setting, package in wanted.items():
        if package and find_spec(package) is None:
            raise ImportError(f"{setting} needs {package}: pip install 'flowgrpo[quant]'")


def quantization(
    kind: Quantization, dtype: torch.dtype, parts: list[str]
) -> PipelineQuantizationConfig | None:
    """How ``from_pretrained`` is to load the denoisers ``parts``."""
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


def is_quantized(model: ModelMixin) -> bool:
    """Whether a model must be left in the precision and on the device that it was loaded in."""
    return getattr(model, "hf_quantizer", None) is not None


def prepare_denoisers(denoisers: Mapping[str, ModelMixin], memory: Memory) -> None:
    """Checkpointing, attention and compilation of the models in the loop.

    Raises:
        ValueError: If a model has no such feature.
    """
    for name, model in denoisers.items():
        kind = type(model).__name__
        if memory.gradient_checkpointing:
            if not getattr(model, "_supports_gradient_checkpointing", False):
                raise ValueError(f"memory.gradient_checkpointing: {kind} ({name}) has none")
            model.enable_gradient_checkpointing()
        if memory.attention:
            try:
                model.set_attention_backend(memory.attention)
            except (ImportError, RuntimeError, ValueError) as error:
                raise ValueError(f"memory.attention = {memory.attention!r}: {error}") from error
        if memory.compile == "regional":
            for block in repeated_blocks(model):
                block.compile(dynamic=False)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model stacks: members of its lists whose class occurs again, outermost only.

    Not all models name theirs in diffusers (SD3, UNets do not).
    """
    listed = [m for stack in model.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    counts = Counter(type(m) for m in listed)
    chosen = [m for m in listed if counts[type(m)] > 1 and list(m.parameters())]
    inner = {id(n) for m in chosen for n in m.modules() if n is not m}
    return [m for m in chosen if id(m) not in inner]


def prepare_decoder(pipeline: DiffusionPipeline, memory: Memory) -> None:
    """Tiled, sliced or split decoding.

    Raises:
        ValueError: If the VAE has no such feature.
    """
    vae = getattr(pipeline, "vae", None)
    for wanted, method in (
        (memory.vae_tiling, "enable_tiling"),
        (memory.vae_slicing, "enable_slicing"),
    ):
        if wanted and not hasattr(vae, method):
            raise ValueError(f"memory: {type(vae).__name__} cannot {method.replace('_', ' ')}")
        if wanted:
            getattr(vae, method)()
    if memory.decode_batch and vae is not None:
        vae.decode = _split(vae.decode, memory.decode_batch)


def _split(decode: Callable[..., Any], size: int) -> Callable[..., Any]:
    """``decode`` on at most ``size`` samples at a time."""

    @wraps(decode)
    def split(z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        def part(value: Any, rows: slice) -> Any:
            whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(z)
            return value[rows] if whole else value

        if len(z) <= size:
            return decode(z, *args, return_dict=return_dict, **kwargs)
        outputs = []
        for start in range(0, len(z), size):
            rows = slice(start, start + size)
            rest = {k: part(v, rows) for k, v in kwargs.items()}
            outputs.append(
                decode(z[rows], *(part(a, rows) for a in args), return_dict=return_dict, **rest)
            )
        if return_dict:
            return type(outputs[0])(sample=torch.cat([o.sample for o in outputs]))
        return (torch.cat([o[0] for o in outputs]),)

    return split


def offload_autoencoder(model: nn.Module, device: torch.device) -> None:
    """Keep a VAE in main memory, and have it on the device while it encodes or decodes."""
    # As below: the hook is how the pipeline knows where the work is done.
    _, hook = cpu_offload_with_hook(model, device)
    for name in ("encode", "decode"):
        if hasattr(model, name):
            setattr(model, name, _visiting(model, getattr(model, name), hook))


def _visiting(model: nn.Module, method: Callable[..., Any], hook: Any) -> Callable[..., Any]:
    @wraps(method)
    def visiting(*args: Any, **kwargs: Any) -> Any:
        hook.hook.pre_forward(model)
        try:
            return method(*args, **kwargs)
        finally:
            hook.offload()

    return visiting


class Encoders:
    """Text and image encoders that come to the accelerator only while they are used."""

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device, offload: bool):
        """Place the models: on ``device``, or in main memory if they are to be offloaded."""
        self._hooks = []
        for model in models.values():
            if offload and device.type != "cpu":
                # accelerate's hook moves a model when it is called, and tells the pipeline where
                # the work is done.
                model.to("cpu")
                _, hook = cpu_offload_with_hook(model, device)
                self._hooks.append(hook)
            else:
                model.to(device)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Afterwards, whatever came to the accelerator has left it."""
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.offload()
