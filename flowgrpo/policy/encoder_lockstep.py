"""Text encoders that are divided among the processes, and equal passes of them on all processes.

A divided encoder gathers its parameters from all processes in every forward pass. Processes encode
different prompts, though: one has more new prompts than another, or none. So within a section
(:meth:`EncoderLockstep.together`) the processes say before each pass which encoder they call next. Those
that call another one, or have nothing more to encode, join the pass with the inputs of a process that
needs it, and discard the result.

All processes make equal calls of the pipeline (:mod:`flowgrpo.policy.lockstep`); only the encoder passes in
them differ. A section begins with a call, and ends before the first pass of its denoiser: until then, a
process may also try several forms of the call's arguments, and encode its prompts for each.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from flowgrpo.policy.compilation import repeated_blocks
from flowgrpo.policy.settings import Parallel
from flowgrpo.policy.sharding import make_mesh


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, PreTrainedModel]:
    """The text encoders of a pipeline, by their names there; image encoders are not among them."""
    return {
        name: model
        for name, model in pipeline.components.items()
        if name.startswith("text_encoder") and isinstance(model, PreTrainedModel)
    }


def divide_encoders(
    pipeline: DiffusionPipeline, parallel: Parallel, device: torch.device, offload: bool
) -> dict[str, PreTrainedModel]:
    """Divide the frozen text encoders of a pipeline among the processes in place, block by block.

    Args:
        pipeline: Its text encoders are in main memory.
        parallel: The settings.
        device: Device on which they compute.
        offload: Whether the parts stay in main memory between passes; otherwise they are moved to the
            device.

    Returns:
        The encoders, by their names in the pipeline.

    Raises:
        ValueError: If there is no text encoder.
    """
    models = text_encoders(pipeline)
    if not models:
        raise ValueError(
            f"parallel.shard = 'all': {type(pipeline).__name__} has no text encoder that can be divided; use "
            "'denoiser'"
        )
    mesh = make_mesh(parallel, device)
    policy = CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy()
    for model in models.values():
        for module in (*repeated_blocks(model), model):
            known = type(module)
            fully_shard(module, mesh=mesh, offload_policy=policy, reshard_after_forward=True)
            # FSDP gives the module a subclass. Transformers looks up by the class's text which outputs a
            # model can record, such as its hidden states.
            for name in ("__module__", "__qualname__", "__name__"):
                setattr(type(module), name, getattr(known, name))
        for buffer in model.buffers():
            # The tensors of a file share its memory, which a buffer would keep.
            buffer.data = buffer.data.clone()
    return models


class EncoderLockstep:
    """Makes the passes of divided encoders equal on all processes within sections.

    Attributes:
        models: The divided encoders, by their names in the pipeline; none if each process has whole ones.
        passes: Number of passes of this process so far, joined ones included.
        joined: Number of joined passes.
    """

    def __init__(self, messages: Callable[[], Any], device: torch.device):
        """Create it without encoders.

        Args:
            messages: Returns the process group for messages on the CPU.
            device: Device of the inputs of joined passes.
        """
        self.models: dict[str, nn.Module] = {}
        self._messages, self._device = messages, device
        self._is_open = self._joins = False
        self.passes = self.joined = 0

    def watch(self, models: Mapping[str, nn.Module]) -> None:
        """Make the passes of these encoders equal, which have been divided."""
        self.models = dict(models)
        for index, model in enumerate(models.values()):
            # Before FSDP's own hook, which gathers parameters.
            model.register_forward_pre_hook(
                partial(self._before, index), prepend=True, with_kwargs=True
            )

    def end_before(self, denoisers: Mapping[str, nn.Module]) -> None:
        """End a section before the first pass of one of these models, which are divided already."""
        for model in denoisers.values() if self.models else ():
            model.register_forward_pre_hook(lambda *_: self._end(), prepend=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A section, which all processes enter and leave; without divided encoders it has no effect."""
        self._is_open = bool(self.models)
        try:
            yield
            self._end()
        finally:
            self._is_open = False

    def _end(self) -> None:
        """Join the passes of others until none has more, unless the section has ended before."""
        while self._is_open and (turn := self._next(None)) is not None:
            self._join(*turn)
        self._is_open = False

    def _before(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Wait until it is the turn of this process's pass, and join passes of others before it."""
        self.passes += 1
        if not self._is_open or self._joins:
            return
        own = (index, args, kwargs)
        while (turn := self._next(own)) is not None and turn is not own:
            self._join(*turn)

    def _next(self, own: "Pass | None") -> "Pass | None":
        """The pass that comes next, after all processes have said which is theirs.

        Args:
            own: The next pass of this process; None if it has none.

        Returns:
            ``own`` if it comes next, otherwise another process's; None if no process has one.
        """
        group = self._messages()
        index, kind = (-1, 0) if own is None else (own[0], _kind(own))
        mine = torch.tensor([int(own is None), index, kind])
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine, group=group)
        said = [tuple(row.tolist()) for row in rows]
        first = min(said)
        if first[0]:
            return None
        if all(s == first for s in said):
            return own
        source = said.index(first)
        told: list[Any] = [None]
        if dist.get_rank() == source:
            told = [send_to_device(own, "cpu")]
        dist.broadcast_object_list(told, src=source, group=group)
        if own is not None and said[dist.get_rank()] == first:
            return own
        return _as_pass(told[0])

    def _join(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make a pass of another process."""
        model = list(self.models.values())[index]
        args, kwargs = send_to_device((args, kwargs), self._device)
        self._joins = True
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        finally:
            self._joins = False
        self.joined += 1


Pass = tuple[int, tuple[Any, ...], dict[str, Any]]
"""The index of an encoder, and the inputs of a pass of it."""


def _as_pass(told: Any) -> Pass:
    index, args, kwargs = told
    return int(index), tuple(args), dict(kwargs)


def _kind(own: Pass) -> int:
    """A number that is equal for passes through the same layers: an input that is missing, such as
    images, can leave layers out."""
    _, args, kwargs = own
    given = (
        [value is not None for value in args],
        sorted(k for k, value in kwargs.items() if value is not None),
    )
    digest = hashlib.blake2b(repr(given).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
