"""Adds up the memory of a run's parts to a peak, and finds settings that lower it.

Sizes are bytes as PyTorch's allocator counts them (``torch.cuda.max_memory_allocated``). The peak is
the sum of all resident parts plus the largest phase, since only one phase runs at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flowgrpo.memory.tracer import Activations

GB = 2**30
"""Bytes in a GB, as GPU vendors count."""
OVERHEAD, FRAGMENTATION = 0.8 * GB, 0.04
"""Memory beyond the allocations: bytes of the CUDA context, and the share lost between blocks."""
QUANTIZED = {"none": 0.0, "nf4": 0.5 + 4 / 64, "int8": 1.0, "torchao_int8": 1.0}
"""Bytes per weight of a quantised linear layer; nf4 stores one fp32 scale per 64 weights. 0 means
not quantised."""
OPTIMIZER = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256}
"""Bytes of optimizer state per trained parameter: two moments in fp32, or in 8 bits with one fp32
scale per 256 values."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """The settings that change how much memory a run takes.

    Attributes:
        rollout_batch: Samples per batch of a rollout.
        train_batch: Actions per batch of a replay with gradients.
        decode_batch: Latents decoded at a time; 0 decodes a whole rollout batch.
        gradient_checkpointing: Whether the denoisers recompute activations in the backward pass.
        offload_text_encoders: Whether the encoders are on the device only while prompts are encoded.
        offload_vae: Whether the VAE is on the device only while it works.
        quantize: A key of :data:`QUANTIZED`.
        optimizer: A key of :data:`OPTIMIZER`.
        parts: Number of processes among which the denoisers are divided; 1 if each has whole ones.
        most_parts: Number of processes among which they could be divided.
        encoder_parts: Number of processes among which the text encoders are divided.
        context: Number of processes that compute each sample together.
        vae_stays: Whether the VAE must stay on the device, because it is differentiated.
    """

    rollout_batch: int
    train_batch: int
    decode_batch: int = 0
    gradient_checkpointing: bool = False
    offload_text_encoders: bool = False
    offload_vae: bool = False
    quantize: str = "none"
    optimizer: str = "adamw"
    parts: int = 1
    most_parts: int = 1
    encoder_parts: int = 1
    context: int = 1
    vae_stays: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("quantize", self.quantize, QUANTIZED),
            ("optimizer", self.optimizer, OPTIMIZER),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of the parts of a run, in bytes unless noted.

    Attributes:
        denoisers: Weights of each denoiser, by component name.
        linear: Number of parameters in the denoisers' frozen linear layers.
        linear_bytes: Size of these parameters.
        encoders: Weights of each text or image encoder, by component name.
        vae: Weights of the VAE.
        trained: Number of trained parameters, which are in fp32.
        adapter: Size of the adapters, which come on top of ``denoisers``; 0 for full fine-tuning.
        averaged: Whether a moving average of the trained weights is kept.
        earlier: Whether the trained weights before the last update are kept (``train.staleness``).
        fake_score: Whether there is a fake score: values of the trained weights and AdamW's moments of its own.
        old_policy: Whether values of the trained weights are kept for the old policy.
        experience: Size of the states that a rollout stores.
        rewards: Size of each reward model on the device, by label; ``None`` if unknown.
        encode: Activations of the encoders for one rollout batch.
        rollout: Activations of the denoisers without gradients for one rollout batch.
        decode: Activations of the VAE for one rollout batch.
        training: Activations of one training batch with gradients.
        others: Other policies that are evaluated before an update, such as the reference and teachers, by
            name: the size of weights that are on the device meanwhile, and the activations of one rollout batch.
        within: Whether other weights are evaluated while the activations of training are alive.
        batches: The ``rollout_batch`` and ``train_batch`` for which activations were traced.
        gathered: Size of the parameters of a divided denoiser that are whole at the same time: those
            outside of its blocks, a block, and the next block, which is gathered in advance.
        gathered_gradients: Size of a block's gradients before they are divided, and of the message that
            adds them.
        gathered_encoders: The same as ``gathered`` for a text encoder; the largest of them.
        whole: Size of the largest denoiser in the precision in which it is gathered.
        whole_encoders: Size of all text encoders.
        outputs: The denoisers' outputs of all steps of one rollout batch, kept until it is decoded.
        attention: Numbers in all queries of a denoiser's pass for one sample, if processes compute samples
            together.
    """

    denoisers: Mapping[str, int]
    linear: int
    linear_bytes: int
    encoders: Mapping[str, int]
    vae: int
    trained: int
    adapter: int
    averaged: bool
    earlier: bool = False
    fake_score: bool = False
    old_policy: bool = False
    experience: int
    rewards: Mapping[str, int | None]
    encode: int
    rollout: int
    decode: int
    training: Activations
    within: bool
    batches: tuple[int, int]
    gathered: int = 0
    gathered_gradients: int = 0
    gathered_encoders: int = 0
    whole: int = 0
    whole_encoders: int = 0
    outputs: int = 0
    attention: int = 0
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """Peak memory by part, in bytes.

    Attributes:
        resident: Parts that stay on the device for the whole run, by name.
        phases: Memory on top of these, by phase; one phase runs at a time.
    """

    resident: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def phase(self) -> str:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda k: self.phases[k])

    @property
    def peak(self) -> int:
        """Largest allocated memory at any time, in bytes."""
        return sum(self.resident.values()) + self.phases[self.phase]

    @property
    def needed(self) -> int:
        """Memory that a device should have, in bytes: the peak, fragmentation and CUDA's context."""
        return round(self.peak * (1 + FRAGMENTATION) + OVERHEAD)


def budget(m: Footprint, options: MemoryOptions) -> Budget:
    """Peak memory of a model with these settings; activations scale with the batch sizes."""
    rollout, train = options.rollout_batch / m.batches[0], options.train_batch / m.batches[1]
    decode = (
        min(options.decode_batch or options.rollout_batch, options.rollout_batch) / m.batches[0]
    )
    weights = dict(m.denoisers)
    if QUANTIZED[options.quantize]:
        saved = m.linear_bytes - round(m.linear * QUANTIZED[options.quantize])
        whole = sum(weights.values())
        weights = {k: v - round(saved * v / whole) for k, v in weights.items()}
    parts = options.parts
    trained = m.trained / parts
    resident = {f"weights of {k}": round(v / parts) for k, v in weights.items()}
    # Parts of divided encoders that are offloaded stay in main memory; blocks alone are gathered.
    shared = options.encoder_parts
    encoders = {k: round(v / (shared if is_text(k) else 1)) for k, v in m.encoders.items()}
    if not options.offload_text_encoders:
        resident |= {f"weights of {k}": v for k, v in encoders.items()}
    resident |= {
        "weights of vae": 0 if options.offload_vae else m.vae,
        "adapter": round(m.adapter / parts),
        f"optimizer ({options.optimizer})": round(trained * OPTIMIZER[options.optimizer]),
        "moving average": round(4 * trained) if m.averaged else 0,
        "weights before the update": round(4 * trained) if m.earlier else 0,
        "fake score and its optimizer": round(12 * trained) if m.fake_score else 0,
        "old policy": round(4 * trained) if m.old_policy else 0,
        "latents of a rollout": m.experience,
        **{f"reward {k}": v for k, v in m.rewards.items() if v is not None},
    }
    resting = sum(v for k, v in encoders.items() if shared == 1 or not is_text(k))
    resting = resting if options.offload_text_encoders else 0
    resting += m.gathered_encoders if shared > 1 else 0
    activations = trained_activations(m, options, options.gradient_checkpointing)
    scale = options.train_batch / m.batches[0] / options.context
    if m.within and not options.gradient_checkpointing:
        activations = max(
            activations, m.training.saved * train + m.rollout * scale * options.context
        )
    gathered, messages = (m.gathered, m.gathered_gradients) if parts > 1 else (0, 0)
    phases = {
        "text encoding": resting + round(m.encode * rollout),
        "rollout": round((m.rollout / options.context + m.outputs) * rollout) + gathered,
        "decoding": round(m.decode * decode + m.outputs * rollout)
        + (m.vae if options.offload_vae else 0),
        "training": round(4 * trained) + round(activations / options.context) + gathered + messages,
    }
    for name, (size, evaluated) in m.others.items():
        phases[name] = round(size / parts) + round(evaluated * scale) + gathered
    return Budget({k: v for k, v in resident.items() if v}, phases)


def trained_activations(m: Footprint, options: MemoryOptions, checkpointing: bool) -> float:
    """Most bytes of activations of a training batch, in all processes that compute it together."""
    batch = options.train_batch
    decoded = min(options.decode_batch or batch, batch) / batch
    return m.training.peak(checkpointing, decoded) * batch / m.batches[1]


def is_text(name: str) -> bool:
    """Whether a component of this name is a text encoder, which can be divided among processes."""
    return name.startswith("text_encoder")


def _divided(options: MemoryOptions) -> Iterator[tuple[str, MemoryOptions]]:
    """Divisions of the models among more processes, first that of the denoisers."""
    if options.parts < options.most_parts:
        yield "parallel.shard = 'denoiser'", replace(options, parts=options.most_parts)
    if options.encoder_parts < options.parts:
        yield "parallel.shard = 'all'", replace(options, encoder_parts=options.parts)


@dataclass(frozen=True)
class Advice:
    """One setting to change.

    Attributes:
        setting: A line of a configuration, such as ``memory.offload_vae = true``.
        peak: The peak in bytes after this change and those before it.
    """

    setting: str
    peak: int


def advise(m: Footprint, options: MemoryOptions, capacity: int) -> tuple[Sequence[Advice], bool]:
    """Find settings to change until a run fits into ``capacity`` bytes, the cheapest first.

    Returns:
        The changes, and whether the run fits with all of them.
    """
    now = budget(m, options)
    changes: list[Advice] = []
    while now.needed > capacity:
        for setting, other in _options(m, options, now.phase):
            less = budget(m, other)
            # A change that saves less than 2 % costs speed for nothing.
            if less.peak < 0.98 * now.peak:
                options, now = other, less
                key = setting.partition(" ")[0]
                # If a setting is changed twice, only the second change is listed.
                changes = [c for c in changes if not c.setting.startswith(key)]
                changes.append(Advice(setting, less.peak))
                break
        else:
            return changes, False
    return changes, True


def _options(
    m: Footprint, options: MemoryOptions, phase: str
) -> Iterator[tuple[str, MemoryOptions]]:
    """Changes that may lower the memory of a phase, ordered by their cost in speed and precision."""
    if not options.offload_text_encoders:
        yield "memory.offload_text_encoders = true", replace(options, offload_text_encoders=True)
    if not options.offload_vae and phase != "decoding" and not options.vae_stays:
        yield "memory.offload_vae = true", replace(options, offload_vae=True)
    decoded = options.decode_batch or options.rollout_batch
    if phase == "decoding" and decoded > 1:
        half = decoded // 2
        yield f"memory.decode_batch = {half}", replace(options, decode_batch=half)
    if phase in ("rollout", "text encoding") and options.rollout_batch > 1:
        half = options.rollout_batch // 2
        yield f"train.rollout_batch = {half}", replace(options, rollout_batch=half)
    recomputes = options.gradient_checkpointing and m.training.decoder > 0
    if phase == "training" and recomputes and options.decode_batch != 1:
        yield "memory.decode_batch = 1", replace(options, decode_batch=1)
    if phase == "training" and options.train_batch > 1:
        half = options.train_batch // 2
        yield f"train.train_batch = {half}", replace(options, train_batch=half)
    if phase == "training" and not options.gradient_checkpointing:
        yield "memory.gradient_checkpointing = true", replace(options, gradient_checkpointing=True)
    yield from _divided(options)
    if options.parts > 1:
        return  # A divided denoiser takes neither of the following.
    if options.optimizer == "adamw":
        yield (
            "train.optimizer = 'adamw8bit'",
            replace(options, optimizer="adamw8bit", most_parts=1),
        )
    for kind in ("int8", "nf4"):
        if QUANTIZED[kind] != QUANTIZED[options.quantize] and options.quantize in ("none", "int8"):
            yield f"memory.quantize = '{kind}'", replace(options, quantize=kind, most_parts=1)
