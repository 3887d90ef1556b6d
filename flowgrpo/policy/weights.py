"""What is trained: LoRA adapters or all weights; the reference model; the moving average."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from torch import Tensor, nn

ATTENTION_PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
ADAPTER = "default"
PATTERN = "re:"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on a frozen base (arXiv:2106.09685); the reference is the bare base."""

    kind: Literal["lora"] = "lora"
    rank: int = 32
    """Inner dimension of the adapters."""
    alpha: int = 64
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Layers to adapt: names, ends of names, or regular expressions behind ``re:`` that match whole
    names; empty adapts the attention projections, whose names are those of diffusers or else all in a
    part named attention."""
    models: tuple[str, ...] = ()
    """Denoisers to adapt, by their name in the pipeline, such as one of Wan 2.2's two; empty for all."""

    def bounds(self) -> Sequence[tuple[str, int, int]]:
        """Keys, their values and the least that is allowed."""
        return [("model.weights.rank", self.rank, 1), ("model.weights.alpha", self.alpha, 1)]


@dataclass(frozen=True, kw_only=True)
class Full:
    """All weights of the denoiser, or some of them, in fp32; the reference is a frozen copy."""

    kind: Literal["full"] = "full"
    parameters: tuple[str, ...] = ()
    """Regular expressions that match whole names of the parameters to train; empty trains all."""
    models: tuple[str, ...] = ()
    """Denoisers to train, by their name in the pipeline; empty for all."""

    def bounds(self) -> Sequence[tuple[str, int, int]]:
        """Nothing to check."""
        return []


Weights = LoRA | Full


class Trainable:
    """The trained weights of one or more denoisers.

    Attributes:
        parameters: By qualified name, such as ``transformer.proj_out.weight``.
    """

    def __init__(
        self,
        denoisers: Mapping[str, ModelMixin],
        weights: Weights,
        *,
        seed: int,
        with_reference: bool,
    ):
        """Prepare the denoisers in place.

        Args:
            denoisers: The models to train, by their name in the pipeline.
            weights: LoRA or full fine-tuning.
            seed: For the adapters' initial weights.
            with_reference: Whether :meth:`reference` will be used; full fine-tuning then keeps a copy.

        Raises:
            ValueError: If LoRA targets name no layer, patterns no parameter, or models no denoiser.
        """
        unknown = [m for m in weights.models if m not in denoisers]
        if unknown:
            raise ValueError(
                f"model.weights.models: no denoiser {unknown[0]!r}; there: {', '.join(denoisers)}"
            )
        chosen = {k: m for k, m in denoisers.items() if not weights.models or k in weights.models}
        self.denoisers, self.weights = chosen, weights
        for model in denoisers.values():
            model.requires_grad_(False)
        for model in chosen.values():
            if isinstance(weights, LoRA):
                _add_adapter(model, weights, seed)
            else:
                _unfreeze(model, weights)
        denoisers = chosen
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{key}": p
            for name, model in denoisers.items()
            for key, p in model.named_parameters()
            if p.requires_grad
        }
        copies = with_reference and isinstance(weights, Full)
        # Off the accelerator: it is needed a few times per iteration only.
        self._reference = (
            [p.detach().cpu().clone() for p in self.parameters.values()] if copies else None
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the denoisers are the model that training began from."""
        if isinstance(self.weights, LoRA):
            for model in self.denoisers.values():
                model.disable_adapters()
            try:
                yield
            finally:
                for model in self.denoisers.values():
                    model.enable_adapters()
        else:
            if self._reference is None:
                raise RuntimeError(
                    "the policy was made without a reference; set with_reference=True"
                )
            own = list(self.parameters.values())
            there = [r.to(p.device) for r, p in zip(self._reference, own, strict=True)]
            with swapped(own, there):
                yield

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the trained weights. Raises ValueError unless names and shapes are exactly ours."""
        require_same(self.parameters, tensors)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])


class EMA:
    """An exponential moving average of the trained weights, on their device."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights; the decay rises as ``(1 + n) / (10 + n)``, as in Flow-GRPO."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; nothing is copied."""
        with swapped(self.parameters, self.average):
            yield


@contextmanager
def swapped(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters hold the other tensors, by exchanging pointers."""
    own = [p.data for p in parameters]
    try:
        for parameter, other in zip(parameters, others, strict=True):
            parameter.data = other
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


def require_same(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names and shapes are the same."""
    missing = sorted(parameters.keys() - tensors.keys())
    extra = sorted(tensors.keys() - parameters.keys())
    if missing or extra:
        raise ValueError(
            f"these weights belong to another model or LoRA setting: missing {missing[:3]}, "
            f"unexpected {extra[:3]} ({len(missing)} and {len(extra)} in all)"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"weight {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            )


def _add_adapter(model: ModelMixin, lora: LoRA, seed: int) -> None:
    if not hasattr(model, "add_adapter"):
        raise ValueError(
            f"diffusers has no adapters for {type(model).__name__}; set model.weights.kind = 'full'"
        )
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wanted = lora.targets or _default_targets(layers)
    matches = {w: [n for n in layers if _is_target(n, w)] for w in wanted}
    found = sorted({n for names in matches.values() for n in names})
    unknown = [w for w, names in matches.items() if not names]
    if not found or (lora.targets and unknown):
        ends = sorted(
            {
                ".".join(p for p in n.split(".")[-2:] if not p.isdigit() or n.endswith(p))
                for n in layers
            }
        )
        raise ValueError(
            f"LoRA targets {unknown} name no linear layer of {type(model).__name__}; "
            f"layer names there end in: {', '.join(ends[:40])}"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=found, init_lora_weights="gaussian"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _is_target(layer: str, target: str) -> bool:
    if target.startswith(PATTERN):
        return re.fullmatch(target.removeprefix(PATTERN), layer) is not None
    return layer == target or layer.endswith(f".{target}")


def _default_targets(layers: Sequence[str]) -> Sequence[str]:
    """The attention projections by diffusers' names; where a model has its own, all in attentions."""
    usual = [w for w in ATTENTION_PROJECTIONS if any(n == w or n.endswith(f".{w}") for n in layers)]
    return usual or [n for n in layers if "attn" in n.lower() or "attention" in n.lower()]


def _unfreeze(model: ModelMixin, weights: Full) -> None:
    """Make all parameters trainable, or those that a pattern matches, in fp32."""
    if not weights.parameters:
        model.float().requires_grad_(True)
        return
    named = dict(model.named_parameters())
    for pattern in weights.parameters:
        names = [n for n in named if re.fullmatch(pattern, n)]
        if not names:
            raise ValueError(
                f"model.weights.parameters: {pattern!r} matches no parameter of "
                f"{type(model).__name__}; there: {', '.join(sorted(named)[:20])}, ..."
            )
        for name in names:
            named[name].data = named[name].data.float()
            named[name].requires_grad_(True)
