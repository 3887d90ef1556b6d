"""The optimizer, and the sum of gradients over processes."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from flowgrpo.config import Train


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
