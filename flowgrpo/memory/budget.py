"""From what the parts of a run take to the peak, and from the peak to the settings to change.

Memory is what PyTorch's allocator hands out (``torch.cuda.max_memory_allocated``). What is there all
the time is added to the largest of the phases, which follow one another and share the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flowgrpo.memory.trace import Activations

GB = 2**30
"""As on the labels of GPUs."""
OVERHEAD, FRAGMENTATION = 0.8 * GB, 0.04
"""What a device must have beyond the allocations: CUDA's context, and what lies between blocks."""
QUANTIZED = {"none": 0.0, "nf4": 0.5 + 4 / 64, "int8": 1.0, "torchao_int8": 1.0}
"""Bytes per weight of a linear layer; nf4 has one fp32 scale for 64 of them. 0 leaves it alone."""
OPTIMIZER = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256}
"""Bytes per trained parameter; 8 bits have one fp32 scale for 256 values."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that decide how much memory a run takes."""

    rollout_batch: int
    train_batch: int
    decode_batch: int = 0
    gradient_checkpointing: bool = False
    offload_text_encoders: bool = False
    offload_vae: bool = False
    quantize: str = "none"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("quantize", self.quantize, QUANTIZED),
            ("optimizer", self.optimizer, OPTIMIZER),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found out about a model, in bytes unless it says otherwise.

    Attributes:
        denoisers: Weights of each.
        linear: Parameters in the denoisers' frozen linear layers, as a number.
        linear_bytes: What these take.
        encoders: Weights of each text or image encoder.
        vae: Weights.
        trained: Trained parameters, as a number; they have fp32.
        adapter: What they take on top of ``denoisers``.
        averaged: Whether a moving average is kept.
        reference: Copies of the trained weights that the reference model is.
        experience: States of a rollout.
        rewards: Reward models on the device, by label; None where it is not known.
        encode: Activations of the encoders for one batch of rollouts.
        rollout: Activations of the denoiser without gradients, the same.
        decode: Activations of the VAE, the same.
        training: Activations of one training forward.
        kl: Whether a forward of the reference happens while they are kept.
        batches: ``rollout_batch`` and ``train_batch`` that these belong to.
    """

    denoisers: Mapping[str, int]
    linear: int
    linear_bytes: int
    encoders: Mapping[str, int]
    vae: int
    trained: int
    adapter: int
    averaged: bool
    reference: int
    experience: int
    rewards: Mapping[str, int | None]
    encode: int
    rollout: int
    decode: int
    training: Activations
    kl: bool
    batches: tuple[int, int]


@dataclass(frozen=True)
class Budget:
    """Peak memory by part.

    Attributes:
        resident: Bytes of what is there all the time, by name.
        phases: Bytes on top of it, by phase; one happens at a time.
    """

    resident: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda k: self.phases[k])

    @property
    def peak(self) -> int:
        """The most at any time, in bytes."""
        return sum(self.resident.values()) + self.phases[self.phase]

    @property
    def needed(self) -> int:
        """What a device should have, in bytes."""
        return round(self.peak * (1 + FRAGMENTATION) + OVERHEAD)


def budget(m: Measured, choice: Choice) -> Budget:
    """The peak of a model with these settings; activations grow with their batches."""
    rollout, train = choice.rollout_batch / m.batches[0], choice.train_batch / m.batches[1]
    decode = min(choice.decode_batch or choice.rollout_batch, choice.rollout_batch) / m.batches[0]
    weights = dict(m.denoisers)
    if QUANTIZED[choice.quantize]:
        saved = m.linear_bytes - round(m.linear * QUANTIZED[choice.quantize])
        whole = sum(weights.values())
        weights = {k: v - round(saved * v / whole) for k, v in weights.items()}
    resident = {f"weights of {k}": v for k, v in weights.items()}
    encoders = {f"weights of {k}": v for k, v in m.encoders.items()}
    if not choice.offload_text_encoders:
        resident |= encoders
    resident |= {
        "weights of vae": 0 if choice.offload_vae else m.vae,
        "adapter": m.adapter,
        f"optimizer ({choice.optimizer})": round(m.trained * OPTIMIZER[choice.optimizer]),
        "moving average": 4 * m.trained if m.averaged else 0,
        "reference": m.reference,
        "latents of a rollout": m.experience,
        **{f"reward {k}": v for k, v in m.rewards.items() if v is not None},
    }
    resting = sum(encoders.values()) if choice.offload_text_encoders else 0
    activations = m.training.peak(choice.gradient_checkpointing) * train
    if m.kl and not choice.gradient_checkpointing:
        # The reference's forward runs while all that was saved is kept.
        reference = m.rollout * choice.train_batch / m.batches[0]
        activations = max(activations, m.training.saved * train + reference)
    phases = {
        "text encoding": resting + round(m.encode * rollout),
        "rollout": round(m.rollout * rollout),
        "decoding": round(m.decode * decode) + (m.vae if choice.offload_vae else 0),
        "training": 4 * m.trained + round(activations),
    }
    return Budget({k: v for k, v in resident.items() if v}, phases)


@dataclass(frozen=True)
class Advice:
    """One setting to change, and the peak that is left with it and those before it, in bytes."""

    setting: str
    peak: int


def advise(m: Measured, choice: Choice, capacity: int) -> tuple[Sequence[Advice], bool]:
    """Settings to change, the cheapest first, until the run fits into ``capacity`` bytes.

    Returns:
        The changes, and whether it fits with them.
    """
    now = budget(m, choice)
    changes: list[Advice] = []
    while now.needed > capacity:
        for setting, other in _options(choice, now.phase):
            less = budget(m, other)
            # A change that wins next to nothing would only cost speed.
            if less.peak < 0.98 * now.peak:
                choice, now = other, less
                key = setting.partition(" ")[0]
                # A second change of a setting replaces the first.
                changes = [c for c in changes if not c.setting.startswith(key)]
                changes.append(Advice(setting, less.peak))
                break
        else:
            return changes, False
    return changes, True


def _options(choice: Choice, phase: str) -> Iterator[tuple[str, Choice]]:
    """Changes that could help, by what they cost: nothing, some time, more time, precision."""
    if not choice.offload_text_encoders:
        yield "memory.offload_text_encoders = true", replace(choice, offload_text_encoders=True)
    if not choice.offload_vae and phase != "decoding":
        yield "memory.offload_vae = true", replace(choice, offload_vae=True)
    decoded = choice.decode_batch or choice.rollout_batch
    if phase == "decoding" and decoded > 1:
        half = decoded // 2
        yield f"memory.decode_batch = {half}", replace(choice, decode_batch=half)
    if phase in ("rollout", "text encoding") and choice.rollout_batch > 1:
        half = choice.rollout_batch // 2
        yield f"train.rollout_batch = {half}", replace(choice, rollout_batch=half)
    if phase == "training" and choice.train_batch > 1:
        half = choice.train_batch // 2
        yield f"train.train_batch = {half}", replace(choice, train_batch=half)
    if phase == "training" and not choice.gradient_checkpointing:
        yield "memory.gradient_checkpointing = true", replace(choice, gradient_checkpointing=True)
    if choice.optimizer == "adamw":
        yield "train.optimizer = 'adamw8bit'", replace(choice, optimizer="adamw8bit")
    for kind in ("int8", "nf4"):
        if QUANTIZED[kind] != QUANTIZED[choice.quantize] and choice.quantize in ("none", "int8"):
            yield f"memory.quantize = '{kind}'", replace(choice, quantize=kind)
