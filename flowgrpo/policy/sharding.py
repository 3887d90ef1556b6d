"""Divides denoisers among processes with PyTorch's FSDP2, and handles the divided tensors.

``fully_shard`` replaces each parameter by a ``DTensor`` of which a process holds a part: rows of the first
axis. Before a block computes, its parameters are gathered from all processes, and freed afterwards. The
pipeline calls its denoiser as before, but each forward and backward pass is now a collective operation, so
all processes must make equal calls.

Everything that is computed per element (optimizer, moving average, behaviour weights) works on the parts.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from flowgrpo.policy.compilation import repeated_blocks
from flowgrpo.policy.settings import Full, Noise, Parallel, Weights


def make_mesh(parallel: Parallel, device: torch.device) -> DeviceMesh:
    """The processes as a mesh of one axis or, in hybrid sharding, of copies times parts."""
    number = torch.distributed.get_world_size()
    size = parallel.shard_group or number
    if size == number:
        return init_device_mesh(device.type, (number,), mesh_dim_names=("shard",))
    # Consecutive ranks, which launchers place on one node, share a copy.
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (number // size, size), mesh_dim_names=names)


def gathered_dtype(weights: Weights | Noise, dtype: torch.dtype) -> torch.dtype | None:
    """The precision in which parameters are gathered; None for that in which each is kept.

    In full fine-tuning, autocast would keep a copy of every gathered weight for the backward pass, and so
    the whole model. Gathered in the precision of the arithmetic, weights need no copy.

    Args:
        weights: What is trained.
        dtype: Precision of the arithmetic.
    """
    return dtype if isinstance(weights, Full) and dtype != torch.float32 else None


def gathered_bytes(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Bytes of a module's whole parameters, gathered in a precision, or each in its own if it is None."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in module.parameters())


def shard(
    models: Mapping[str, ModelMixin],
    parallel: Parallel,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Divide models among the processes in place, block by block, and move the parts to the device.

    The models may be in main memory, so that a device never holds more than the parts and one block.
    Frozen and trained parameters keep their own precisions.

    Args:
        models: The denoisers, with their adapters and with ``requires_grad`` set.
        parallel: The settings.
        weights: What is trained.
        device: Device of this process.
        dtype: Precision of the arithmetic.
    """
    mesh = make_mesh(parallel, device)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if (gathered := gathered_dtype(weights, dtype)) is not None:
        policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for model in models.values():
        # Parameters must be gathered anew in each forward pass, also those of the root, because the
        # weights change between passes (reference policy, moving average).
        for module in (*repeated_blocks(model), model):
            module.forward = _without_views(module.forward)
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for buffer in model.buffers():
            # The tensors of a file share its memory, which a buffer would keep.
            buffer.data = buffer.data.clone()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The learner divides by the number of actions of all processes, so gradients are
                # added; by default they are averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _without_views(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with copies of the outputs that are views.

    FSDP gathers parameters for the backward pass by a hook on the outputs, and an in-place operation on a
    view drops the hook.
    """

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value._is_view() else value

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return tree_map(own, forward(*args, **kwargs))

    return wrapped


def local(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor, which shares its memory; another tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided_like(part: Tensor, parameter: Tensor) -> Tensor:
    """A tensor divided as ``parameter`` is, from this process's part of it."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """A divided tensor, gathered; all processes must call this. Another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale divided gradients down to a norm, over all processes. Returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def parts_of(wholes: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of tensors in main memory, divided as parameters; all of those that are whole."""

    def part(whole: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return whole
        mesh, placements = parameter.device_mesh, parameter.placements
        there = whole.to(parameter.device)
        # Every process has the tensor, so that nothing is sent.
        divided = distribute_tensor(there, mesh, placements, src_data_rank=None)
        return local(divided).cpu().clone()

    return [part(whole, p) for whole, p in zip(wholes, parameters, strict=True)]


@contextmanager
def exchanged(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> Iterator[None]:
    """Let divided parameters have other values inside the context, by copying.

    FSDP keeps pointers to the memory of the parts, so these cannot be exchanged.

    Args:
        parameters: Divided parameters.
        others: Values for each, divided alike, or this process's part of them on any device.
    """
    own = [local(p).clone() for p in parameters]
    try:
        _copy(parameters, others)
        yield
    finally:
        _copy(parameters, own)


def _copy(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        local(parameter).copy_(local(value))


def gather(models: Mapping[str, nn.Module], is_main: bool, *, trained_only: bool) -> None:
    """Undo :func:`shard` for export: afterwards the main process has the parameters in main memory.

    They are gathered one by one, so that a device holds one whole parameter at a time, and the main
    process one copy of the model. The parameters of the other processes have no values any more. The
    models cannot compute afterwards. All processes must call this.

    Args:
        models: The denoisers, and divided text encoders; models that are not divided stay as they are.
        is_main: Whether this process keeps the values.
        trained_only: Whether frozen parameters stay divided, as the export of an adapter does not need
            them.
    """
    for model in models.values():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The class that it had before; its name is in the configuration that diffusers writes.
                classes = type(module).__mro__[1:]
                module.__class__ = next(c for c in classes if c is not FSDPModule)
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor) or (
                    trained_only and not parameter.requires_grad
                ):
                    continue
                value = whole(parameter.detach())
                value = value.cpu() if is_main else torch.empty_like(value, device="meta")
                setattr(module, name, nn.Parameter(value, parameter.requires_grad))


Sharder = Callable[[Mapping[str, ModelMixin]], None]
"""Divides denoisers in place."""
