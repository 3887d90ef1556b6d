"""Settings of a policy: how its pipeline is called, what is trained, and how memory is saved.

Plain frozen dataclasses that are also sections of a configuration file, so this module imports
neither torch nor diffusers.
"""

import math
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from flowgrpo.core.imports import suggest
from flowgrpo.core.text import counted

Quantization = Literal["none", "nf4", "int8", "torchao_int8"]


@dataclass(frozen=True)
class Package:
    """An optional package: what it is called, the module that is imported, and how it is installed."""

    name: str
    module: str
    install: str


QUANT = "pip install 'flowgrpo[quant]'"
BITSANDBYTES = Package("bitsandbytes", "bitsandbytes", QUANT)
PACKAGES = {
    "nf4": BITSANDBYTES,
    "int8": BITSANDBYTES,
    "torchao_int8": Package("torchao", "torchao", QUANT),
}
"""The package that each quantisation needs."""
ATTENTION = {
    "hub": Package("kernels", "kernels", "pip install kernels"),
    "native": None,
    "3": Package("FlashAttention 3", "flash_attn_3", "build it from source"),
    "flash": Package("flash-attn", "flash_attn", "pip install flash-attn"),
    "sage": Package("sageattention", "sageattention", "pip install sageattention"),
    "xformers": Package("xformers", "xformers", "pip install 'flowgrpo[xformers]'"),
}
"""The package that an attention backend of diffusers 0.42 needs, by a part of its name; the first one counts."""
OWN_KEYS = {
    "num_inference_steps": "num_steps",
    "guidance_scale": "guidance_scale",
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
}
"""Arguments of a pipeline's call that have a key in ``[sampling]``."""
SET_BY_POLICY = ("prompt", "latents", "generator", "output_type", "return_dict")
"""Arguments of a pipeline's call that the policy sets."""


@dataclass(frozen=True)
class Adapter:
    """An earlier LoRA adapter, added to the weights of the model before anything else."""

    path: str
    """A ``.safetensors`` file in the format of diffusers, peft, sd-scripts or ComfyUI; a folder or a hub
    id with one; or the directory of a finished run."""
    scale: float = 1.0
    """Factor of the adapter's effect, which already includes its own ``alpha / rank``."""
    model: str = ""
    """``transformer_2`` for an adapter of the second expert of Wan 2.2; empty otherwise."""

    @classmethod
    def parse(cls, text: str, option: str = "--lora") -> "Adapter":
        """Read ``PATH`` or ``PATH:SCALE``.

        Raises:
            ValueError: If the scale is no finite number.
        """
        path, colon, scale = text.rpartition(":")
        if not colon or Path(text).expanduser().exists() or "/" in scale or "\\" in scale:
            return cls(text)
        try:
            value = float(scale)
        except ValueError:
            raise ValueError(
                f"{option} must be PATH or PATH:SCALE with a number as scale, got {text!r}"
            ) from None
        if not math.isfinite(value):
            raise ValueError(f"{option}: the scale must be finite, got {text!r}")
        return cls(path, value)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a pipeline is loaded from; the attributes are the keys of ``[model]`` with these names."""

    path: str
    base: str = ""
    revision: str = ""
    variant: str = ""
    adapters: tuple[Adapter, ...] = ()

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Arguments of the pipeline's call."""

    num_steps: int = 10
    """Number of denoising steps (``num_inference_steps``)."""
    guidance_scale: float | None = None
    """Scale of classifier-free or distilled guidance. If unset, the pipeline's default applies."""
    height: int | None = None
    """Height of the images or frames in pixels. If unset, the pipeline's default applies."""
    width: int | None = None
    """Width of the images or frames in pixels. If unset, the pipeline's default applies."""
    num_frames: int | None = None
    """Number of frames of a video. If unset, the pipeline's default applies."""
    shift: float | None = None
    """Shift of the grid: sigma = shift u / (1 + (shift - 1) u) with u in equal steps from 1 to 0, as in
    DanceGRPO's code, whose FLUX scripts have 3. If unset, the pipeline's own grid applies. For
    rectified-flow pipelines only."""
    sigmas: tuple[float, ...] = ()
    """Noise levels at which the steps start, falling, as the pipeline's call takes them (``sigmas``): a
    pipeline that shifts its grid shifts these too. ``num_steps`` is their number. If empty, the
    pipeline's own grid applies."""
    timesteps: tuple[float, ...] = ()
    """Timesteps at which the steps start, falling, such as ``[999, 749, 499, 249]`` for a model that was
    distilled to four steps, if the pipeline's call takes ``timesteps``; in place of ``sigmas``."""
    base_after: float | None = None
    """Where the deterministic sampler changes from the trained model to the model before training: a share
    of the steps if below 1, else a number of steps. For evaluations only: ``evaluation.base_after``."""
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call, by their names in its signature. Arguments with a key of
    their own, such as ``guidance_scale``, are refused here."""

    def check(self) -> None:
        """Check ``call`` and the grid of steps.

        Raises:
            ValueError: With the keys: if ``call`` holds an argument that has a key of its own or that the
                policy sets, if keys contradict each other, or if the values of a grid do not fall.
        """
        for name in self.call:
            if name in OWN_KEYS:
                raise ValueError(
                    f"sampling.call.{name}: set sampling.{OWN_KEYS[name]} instead, which is the one place of "
                    "this value"
                )
            if name in SET_BY_POLICY:
                where = "; prompts are in prompts.train" if name == "prompt" else ""
                raise ValueError(
                    f"sampling.call.{name}: the policy sets this argument itself; remove it{where}"
                )
        for name in ("sigmas", "timesteps"):
            if name in self.call:
                raise ValueError(f"sampling.call.{name} has a key of its own: sampling.{name}")
            values = getattr(self, name)
            if not values:
                continue
            falls = all(a > b for a, b in pairwise(values))
            if not falls or values[-1] < 0 or (name == "sigmas" and values[-1] == 0):
                raise ValueError(
                    f"sampling.{name} must fall from noise to data and stay above 0 (the end of the last step, "
                    f"0, is not given), got {list(values)}"
                )
            if self.shift is not None:
                raise ValueError(
                    f"sampling.shift and sampling.{name} both set the grid; remove one"
                )
            if len(values) != self.num_steps:
                raise ValueError(
                    f"sampling.{name} has {counted(len(values), 'value')} and num_steps is {self.num_steps}; set "
                    f"num_steps = {len(values)}, in evaluations too"
                )
        self.tuned_steps()
        if self.sigmas and self.timesteps:
            raise ValueError("sampling.sigmas and sampling.timesteps both set the grid; remove one")

    def with_steps(self, num_steps: int) -> "Sampling":
        """The same with another number of steps."""
        return replace(self, num_steps=num_steps)

    def tuned_steps(self) -> int | None:
        """The steps of the trained model, if the model before training takes the others; else None.

        Raises:
            ValueError: If one of the two would take no step.
        """
        if self.base_after is None:
            return None
        value, number = self.base_after, self.num_steps
        steps = round(value * number) if value < 1 else int(value)
        if not 0 < steps < number or (steps != value and value >= 1):
            raise ValueError(
                f"base_after must be a share of the steps between 0 and 1, or a whole number of steps from 1 to "
                f"{number - 1}, so that both models take a step of {number}; got {value:g}"
            )
        return steps

    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that are set.

        Raises:
            ValueError: If the keys of the grid contradict each other.
        """
        self.check()
        named = {
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "sigmas": list(self.sigmas) or None,
            "timesteps": [int(t) if t == int(t) else t for t in self.timesteps] or None,
        }
        return {k: v for k, v in named.items() if v is not None} | self.call


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters on frozen weights (arXiv:2106.09685).

    The reference policy is the model with its adapters disabled, unless there is an ``init``.
    """

    kind: Literal["lora"] = "lora"
    rank: int = 32
    """Inner dimension of the adapters."""
    alpha: int = 64
    """Scale of the adapters: their output is multiplied by ``alpha / rank``."""
    targets: tuple[str, ...] = ()
    """Layers to adapt: names, ends of names, or regular expressions that match whole names, written
    with the prefix ``re:``. If empty, the attention projections are adapted: the layers with
    diffusers' usual names or, in models with other names, all layers inside an attention module."""
    models: tuple[str, ...] = ()
    """Denoisers to adapt, by their names in the pipeline, such as one of Wan 2.2's two transformers.
    If empty, all are adapted."""
    init: str = ""
    """An earlier adapter from which training starts: a file, folder, hub id or run directory, as in
    ``model.adapters``; or a checkpoint of a run, such as ``runs/a/checkpoints/best``. ``rank`` must be at
    least its rank, and ``targets`` must include its layers; the model is then the same as with the
    earlier adapter."""
    reference: Literal["init", "model"] = "init"
    """The reference policy if there is an ``init``: the model with the earlier adapter, or, with ``model``,
    the model without it, which is the reference policy of the run that trained the adapter."""


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train the weights of the denoiser, all or some of them, in fp32.

    The reference policy is a frozen copy of the trained weights.
    """

    kind: Literal["full"] = "full"
    parameters: tuple[str, ...] = ()
    """Parameters to train: regular expressions that match whole names. If empty, all are trained."""
    models: tuple[str, ...] = ()
    """Denoisers to train, by their names in the pipeline. If empty, all are trained."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Train the mean and the standard deviation of the initial noise; the model stays as it is.

    Source: FIND, arXiv:2407.19453.
    """

    kind: Literal["noise"] = "noise"


Weights = LoRA | Full
"""Settings that train weights of a denoiser."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Settings that trade memory for time. Only ``quantize`` and ``arithmetic`` change what is computed."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    offload_text_encoders: bool = True
    """Keep text and image encoders in main memory, and move them to the accelerator only to encode
    prompts that are not cached."""
    offload_vae: bool = False
    """Keep the VAE in main memory, and move it to the accelerator only to encode and decode."""
    prompt_cache_gb: float = 4.0
    """Main memory for encoded prompts, in GB. The least recently used move to a temporary file."""
    prompt_disk_gb: float = 16.0
    """Disk space for encoded prompts, in GB."""
    vae_tiling: bool = False
    """Decode large images and videos in overlapping tiles."""
    vae_slicing: bool = False
    """Decode one sample at a time."""
    decode_batch: int = 0
    """Samples decoded at once; 0 for the whole batch."""
    score_batch: int = 0
    """Samples passed to the reward models at once; 0 for the whole batch."""
    quantize: Quantization = "none"
    """Precision of the frozen denoiser under its adapters: ``nf4`` and ``int8`` use bitsandbytes,
    ``torchao_int8`` uses torchao."""
    arithmetic: Literal["autocast", "native"] = "autocast"
    """How the denoiser computes in bfloat16: ``autocast`` lets PyTorch choose a precision for every
    operation, so that norms return fp32 and every linear layer casts its input back; ``native`` computes
    everything in the precision of the weights, as diffusers does in inference. Adapters keep fp32 weights
    and fp32 gradients in both. ``native`` moves and keeps less. In float32 both are the same."""
    compile: Literal["none", "regional"] = "none"
    """``regional`` compiles the denoiser's repeated block once: minutes at the start, faster steps."""
    attention: str = ""
    """Attention backend by diffusers' name, such as ``native``, ``flash`` or ``xformers``. If empty,
    diffusers chooses."""

    def check(self, trains_all: bool, dtype: str = "float32") -> None:
        """Check the settings.

        Args:
            trains_all: Whether weights of the denoiser are trained without adapters.
            dtype: Precision of the denoiser's arithmetic.

        Raises:
            ValueError: If a value is not allowed, or settings exclude each other.
        """
        if self.quantize != "none" and trains_all:
            raise ValueError(
                f"memory.quantize = {self.quantize!r} freezes the denoiser; it needs "
                "model.weights.kind = 'lora'"
            )
        self.check_arithmetic(trains_all, dtype)
        if not self.attention:
            return
        # Imports torch, and so only where a backend is named.
        from diffusers.models.attention_dispatch import AttentionBackendName

        known = [b.value for b in AttentionBackendName]
        if self.attention not in known:
            raise ValueError(
                f"memory.attention must be one of {', '.join(known)}, got {self.attention!r}"
                f"{suggest(self.attention, known)}"
            )

    def check_arithmetic(self, trains_all: bool, dtype: str) -> None:
        """Check that the denoiser can compute without autocast, if so configured.

        Args:
            trains_all: Whether weights of the denoiser are trained without adapters.
            dtype: Precision of the denoiser's arithmetic.

        Raises:
            ValueError: If another setting needs autocast.
        """
        if self.arithmetic == "autocast":
            return
        setting = "memory.arithmetic = 'native'"
        if dtype == "float16":
            raise ValueError(
                f"{setting} is not supported with model.dtype = 'float16', whose range is too small for norms "
                "and residual sums without autocast; use model.dtype = 'bfloat16'"
            )
        if trains_all:
            raise ValueError(
                f"{setting} computes in the precision of the weights, and full fine-tuning keeps them in fp32; "
                "use memory.arithmetic = 'autocast', or model.weights.kind = 'lora'"
            )
        if self.quantize != "none":
            raise ValueError(
                f"{setting} is not supported with memory.quantize = {self.quantize!r}; use "
                "memory.arithmetic = 'autocast', or memory.quantize = 'none'"
            )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the processes of a run divide the model. Without these settings each has a whole copy."""

    shard: Literal["off", "denoiser", "all"] = "off"
    """``denoiser`` divides the weights, gradients and optimizer state of the denoiser among the processes
    (PyTorch's ``fully_shard``, FSDP2); each block is gathered for the time in which it computes. ``all``
    divides the text encoders, too. ``off`` is data parallelism."""
    shard_group: int = 0
    """Number of processes that share one copy of the denoiser; the copies are kept equal, as in data
    parallelism (hybrid sharding). Usually the number of accelerators of a node. 0 for all processes."""
    context: int = 1
    """Number of consecutive processes that compute each image or video together: each has a part of its tokens
    (Ulysses attention of diffusers). For videos whose activations do not fit on one device. Must divide the
    number of processes and the denoiser's number of attention heads. 1 is off."""

    @property
    def is_sharded(self) -> bool:
        """Whether the denoiser is divided among processes."""
        return self.shard != "off"

    @property
    def divides_encoders(self) -> bool:
        """Whether the text encoders are divided among processes, too."""
        return self.shard == "all"

    def check(
        self,
        num_processes: int,
        weights: Weights | Noise,
        memory: Memory,
        dtype: str,
        optimizer: str,
    ) -> None:
        """Check that the denoiser can be divided as configured.

        Args:
            num_processes: Number of processes of the run.
            weights: What is trained.
            memory: The memory settings.
            dtype: Precision of the denoiser's arithmetic.
            optimizer: Name of the optimizer.

        Raises:
            ValueError: With the key, if it cannot be divided.
        """
        self._check_context(num_processes, weights, memory)
        if not self.is_sharded:
            if self.shard_group:
                raise ValueError(
                    f"parallel.shard_group = {self.shard_group} is for sharding; set parallel.shard = "
                    "'denoiser', or remove it"
                )
            return
        with_shard = f"with parallel.shard = {self.shard!r}"
        if isinstance(weights, Noise):
            raise ValueError(
                f"model.weights.kind = 'noise' trains no weights of the denoiser and is not supported "
                f"{with_shard}; use parallel.shard = 'off'"
            )
        for value, usual, key in (
            (memory.quantize, "none", "memory.quantize"),
            (memory.compile, "none", "memory.compile"),
            (memory.arithmetic, "autocast", "memory.arithmetic"),
            (optimizer, "adamw", "train.optimizer"),
        ):
            if value != usual:
                raise ValueError(
                    f"{key} = {value!r} is not supported {with_shard}; use {usual!r}, or parallel.shard = 'off'"
                )
        if dtype == "float16":
            raise ValueError(
                f"model.dtype = 'float16' is not supported {with_shard}, because its gradient scaler does not "
                "know shards; use 'bfloat16'"
            )
        if num_processes == 1:
            raise ValueError(
                f"parallel.shard = {self.shard!r} divides the denoiser among processes, and there is one; "
                "start the run with torchrun --nproc-per-node N -m flowgrpo train ..., or use 'off'"
            )
        if self.shard_group and (self.shard_group == 1 or num_processes % self.shard_group):
            sizes = [n for n in range(2, num_processes + 1) if num_processes % n == 0]
            raise ValueError(
                f"parallel.shard_group = {self.shard_group} does not divide {counted(num_processes, 'process')} into equal "
                f"groups of several; use {' or '.join(map(str, sizes))}, or 0 for all"
            )

    def shares(self, num_processes: int) -> int:
        """Number of equal parts of the work: of the processes, or of the groups that compute together."""
        return 1 if num_processes % self.context else num_processes // self.context

    def workers(self, shares: int) -> str:
        """Those that have equal parts of the work, in words."""
        if self.context == 1:
            return counted(shares, "process")
        return f"{counted(shares, 'set')} of {counted(self.context, 'process')} (parallel.context)"

    def _check_context(self, num_processes: int, weights: Weights | Noise, memory: Memory) -> None:
        """Raise ValueError if the tokens of a sample cannot be divided as configured."""
        number = self.context
        if number == 1:
            return
        key = f"parallel.context = {number}"
        if num_processes == 1:
            raise ValueError(
                f"{key} divides the tokens of a sample among processes, and there is one; start the run with "
                f"--nproc {number} or a multiple of it, or use 1"
            )
        if num_processes % number:
            sizes = [n for n in range(1, num_processes + 1) if num_processes % n == 0]
            raise ValueError(
                f"{key} does not divide {counted(num_processes, 'process')} into equal groups; use "
                f"{', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
            )
        if isinstance(weights, Noise):
            raise ValueError(
                f"model.weights.kind = 'noise' trains the initial noise, whose gradient is not divided among "
                f"tokens, and is not supported with {key}; use 1"
            )
        for value, usual, name in (
            (memory.quantize, "none", "memory.quantize"),
            (memory.compile, "none", "memory.compile"),
            (memory.attention or "native", "native", "memory.attention"),
        ):
            if value != usual:
                raise ValueError(
                    f"{name} = {value!r} is not supported with {key}; use {usual!r}, or parallel.context = 1"
                )


def absent_packages(memory: Memory, optimizer: str) -> list[str]:
    """A sentence for each package of the settings that is not installed, with the command that installs it.

    Args:
        memory: The memory settings.
        optimizer: Name of the optimizer.
    """
    wanted = {f"memory.quantize = {memory.quantize!r}": PACKAGES.get(memory.quantize)}
    if optimizer == "adamw8bit":
        wanted["train.optimizer = 'adamw8bit'"] = PACKAGES["int8"]
    wanted[f"memory.attention = {memory.attention!r}"] = next(
        (p for part, p in ATTENTION.items() if part in memory.attention.split("_")), None
    )
    return [
        f"{setting} needs {package.name}: {package.install}"
        for setting, package in wanted.items()
        if package is not None and find_spec(package.module) is None
    ]
