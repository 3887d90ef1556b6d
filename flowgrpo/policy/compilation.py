"""Compiles the blocks that a denoiser repeats, and knows which of them run compiled.

``torch.compile`` compiles a block once for each kind of input: each shape, with and without gradients,
with and without an adapter. All blocks of one class share these variants, and after eight of them dynamo
runs further kinds uncompiled. A run has more: the batches of rollout and replay, the first block, whose
inputs carry no gradient, blocks with a second attention, the last block. So the limit is raised, and a
policy pads partial batches to whole ones (:class:`flowgrpo.policy.pipeline.PipelinePolicy`).
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flowgrpo.core.text import counted

log = logging.getLogger(__name__)

VARIANTS = 64
"""Compiled variants of one block's code."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats: members of its module lists whose class occurs more than once.

    Blocks inside such blocks are left out. Found by structure, because not all models of diffusers name
    their repeated blocks (SD3 and UNets do not).
    """
    listed = [m for stack in model.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    counts = Counter(type(m) for m in listed)
    chosen = [m for m in listed if counts[type(m)] > 1 and list(m.parameters())]
    inner = {id(n) for m in chosen for n in m.modules() if n is not m}
    return [m for m in chosen if id(m) not in inner]


class CompiledBlocks:
    """The blocks of a denoiser, compiled.

    Attributes:
        number: Number of blocks.
        eager: The indices of blocks of which a call ran uncompiled.
    """

    def __init__(self, blocks: Sequence[nn.Module], backend: str = "inductor"):
        """Compile blocks at their first calls.

        Args:
            blocks: From :func:`repeated_blocks`.
            backend: A backend of ``torch.compile``.
        """
        self.number, self.eager, self._runs = len(blocks), set[int](), 0
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        for index, block in enumerate(blocks):
            block.compile(dynamic=False, backend=self._backend(backend))
            call = block._compiled_call_impl
            assert call is not None, "set by compile"
            block._compiled_call_impl = self._watched(index, call)

    def __str__(self) -> str:
        return f"{self.number - len(self.eager)} of {counted(self.number, 'block')}"

    def _backend(self, name: str) -> Callable[..., Any]:
        """The backend, whose compiled code counts its calls."""
        compile_graph = torch._dynamo.lookup_backend(name)

        def backend(graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
            compiled = compile_graph(graph, inputs, **options)

            def run(*args: Any) -> Any:
                self._runs += 1
                return compiled(*args)

            return run

        return backend

    def _watched(self, index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a block, which notes whether compiled code ran in it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self._runs
            output = call(*args, **kwargs)
            if self._runs == before:
                self._note(index)
            return output

        return watched

    def _note(self, index: int) -> None:
        if not self.eager:
            log.warning(
                "memory.compile: a block runs uncompiled, because torch.compile met more than %d kinds of "
                "inputs or cannot compile it; TORCH_LOGS=recompiles tells which",
                torch._dynamo.config.recompile_limit,
            )
        self.eager.add(index)
