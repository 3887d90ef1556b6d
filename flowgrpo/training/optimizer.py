"""The optimizer of the trained parameters: learning rate, sum and clipping of gradients, spikes, moments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowgrpo.config import Train
from flowgrpo.policy.sharding import clip_gradients

GRADIENT_NORMS_KEPT = 50
"""Gradient norms of past optimizer steps whose median defines a spike."""
MIN_NORMS_FOR_SPIKE = 10
"""Below this many past norms, no step counts as a spike."""


@dataclass(frozen=True)
class TakenStep:
    """One optimizer step.

    Attributes:
        norm: Norm of the gradient over all processes, before it was clipped.
        learning_rate: The learning rate of the step.
        skipped: Whether the weights were left as they are, because the gradient was a spike or not finite.
    """

    norm: float
    learning_rate: float
    skipped: bool


class PolicyOptimizer:
    """Takes the optimizer steps of a run.

    Attributes:
        adam: AdamW, with the state of each parameter.
        prepared: ``adam`` as accelerate has wrapped it, which unscales the gradients of fp16.
        num_updates: Optimizer steps taken or skipped so far.
        gradient_norms: Norms of the last gradients that were applied.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        train: Train,
        accelerator: Accelerator,
        is_sharded: bool,
    ):
        """Begin without moments.

        Args:
            named: The trained parameters.
            train: Settings of the optimizer.
            accelerator: Reduces gradients over processes.
            is_sharded: Whether the parameters are divided among the processes.
        """
        self.named, self.parameters = named, list(named.values())
        self.train, self.accelerator, self.is_sharded = train, accelerator, is_sharded
        self.adam = adamw(self.parameters, train)
        self.prepared = accelerator.prepare(self.adam)
        self.num_updates = 0
        self.gradient_norms: list[float] = []

    def step(self) -> TakenStep:
        """Clip the gradient and take an optimizer step, unless the gradient is a spike or not finite.

        All processes must call this. The gradients are dropped.
        """
        sum_gradients(self.parameters, self.accelerator)
        train, rate = self.train, self.learning_rate(self.num_updates)
        for group in self.prepared.param_groups:
            group["lr"] = rate
        if self.is_sharded:
            norm = clip_gradients(self.parameters, train.max_grad_norm)
        else:
            norm = float(self.accelerator.clip_grad_norm_(self.parameters, train.max_grad_norm))
        known = self.gradient_norms
        usual = median(known) if len(known) >= MIN_NORMS_FOR_SPIKE else float("inf")
        is_spike = train.spike_factor > 0 and norm > train.spike_factor * usual
        # "not <" is true for NaN as well.
        skipped = is_spike or not norm < float("inf")
        if not skipped:
            self.prepared.step()
            self.gradient_norms = [*known, norm][-GRADIENT_NORMS_KEPT:] if norm > 0 else known
        elif self.accelerator.scaler is not None:
            # The scaler has unscaled these gradients; without this call it refuses the next step.
            self.accelerator.scaler.update()
        self.prepared.zero_grad()
        self.num_updates += 1
        return TakenStep(norm, rate, skipped)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an optimizer step, counted from 0 over the whole run.

        It rises linearly over ``warmup`` steps. ``linear`` and ``cosine`` fall from ``lr`` to a tenth of it.
        """
        train = self.train
        warm = min(1.0, (update + 1) / (train.warmup + 1))
        done = update / max(1, train.iterations * train.optimizer_steps)
        fall = {
            "constant": 1.0,
            "linear": 1 - 0.9 * done,
            "cosine": 0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * done))),
        }[train.schedule]
        return train.lr * warm * fall

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The contents of a checkpoint: moments by name, and values for JSON."""
        scaler = self.accelerator.scaler
        return moments(self.adam, self.named), {
            "num_updates": self.num_updates,
            "gradient_norms": self.gradient_norms,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def restore(self, saved: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Load the contents of a checkpoint, as :meth:`state` returned them."""
        restore_moments(self.adam, self.named, saved)
        self.num_updates = state["num_updates"]
        self.gradient_norms = state["gradient_norms"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def moments(adam: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of an optimizer for a checkpoint, as ``<parameter>/<moment>``."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in named.items()
        for key, value in adam.state.get(parameter, {}).items()
    }


def restore_moments(
    adam: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> None:
    """Load the state of an optimizer, as :func:`moments` returned it."""
    # AdamW holds its step count as a tensor on the CPU (the 8-bit AdamW as a number) and its moments on
    # the parameter's device.
    is_plain = isinstance(adam, torch.optim.AdamW)
    for name, parameter in named.items():
        own = {k.rsplit("/", 1)[1]: v for k, v in saved.items() if k.rsplit("/", 1)[0] == name}
        if own:
            adam.state[parameter] = {
                k: (v if is_plain else int(v)) if k == "step" else v.to(parameter.device)
                for k, v in own.items()
            }


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its sum over all processes, in one message.

    The sum is not divided by the number of processes: each process has already divided its loss by
    the number of actions on all of them. Parameters without a gradient contribute zeros, because the
    processes may have trained different denoisers.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # FSDP has added the gradients of divided parameters in the backward pass.
    own = [p for p in parameters if not isinstance(p, DTensor)]
    if accelerator.num_processes > 1 and own:
        flat = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
        flat = accelerator.reduce(flat, "sum")
        sizes = [p.numel() for p in own]
        for parameter, part in zip(own, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


def adamw(parameters: list[nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """AdamW, with moments in fp32 or in 8 bits."""
    betas = (train.betas[0], train.betas[1])
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay
        )
    if parameters[0].device.type == "cpu":
        raise ValueError(
            "train.optimizer = 'adamw8bit' runs on an accelerator only; use 'adamw' on the CPU"
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay)
