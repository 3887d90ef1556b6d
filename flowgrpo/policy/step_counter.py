"""Gives the steps of a pipeline's loop their index on the whole grid.

A loop ``for i, t in enumerate(timesteps)`` that begins at step 20 of 28 counts from 0. Pipelines use
that index: ControlNets and skipped layers are active in a window of the steps, Lumina ends its guidance
early, Ideogram has a guidance scale for each step. With an index from 0 a replay would do all this at
the wrong step. The policy therefore runs a copy of the pipeline's ``__call__`` in which ``enumerate``
yields the plan's steps with their index on the grid.

Loops that compare their index with 0 are left as they are. They use their first iteration, wherever it
is on the grid, to prepare values for the others: keys and values of condition images (FLUX.2 klein KV,
Qwen-Image 2.1) or prompt embeddings for further guidance (LTX-2). Their index counts the plan's steps
from 0, as do the scheduler's ``timesteps`` and ``sigmas``, so ``sigmas[i]`` is right as well. Of these
pipelines in diffusers 0.42 none uses the index as a share of the grid.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor

from flowgrpo.policy.scheduler import PolicyScheduler


def counted(call: Callable[..., Any], scheduler: PolicyScheduler) -> Callable[..., Any]:
    """A copy of a pipeline's ``__call__`` whose loop enumerates its steps by their index on the grid.

    The copy is a function with globals of its own; the pipeline's class keeps its method. In the copy,
    ``enumerate(timesteps)`` yields the timesteps of the plan with their indices on the grid. Everything
    else is enumerated as usual. The first call shows whether a loop denoises in this way; from then on,
    ``scheduler.timesteps`` has the whole grid, so that shares of its length are right as well.

    Args:
        call: The pipeline's ``__call__``, unwrapped.
        scheduler: The pipeline's scheduler.

    Returns:
        The copy, or ``call`` itself if its loop compares its index with 0.
    """
    if not isinstance(call, FunctionType) or compares_index_with_0(call):
        return call

    def enumerate_steps(iterable: Any, start: int = 0) -> Iterator[tuple[int, Any]]:
        # A progress bar has its iterable as an attribute.
        steps, timesteps = getattr(iterable, "iterable", iterable), scheduler.timesteps
        if not isinstance(steps, Tensor) or start != 0 or not _same(steps, timesteps):
            return enumerate(iterable, start)
        return _on_grid(scheduler, timesteps)

    copy = FunctionType(
        call.__code__,
        {**call.__globals__, "enumerate": enumerate_steps},
        call.__name__,
        call.__defaults__,
        call.__closure__,
    )
    copy.__kwdefaults__ = call.__kwdefaults__
    return copy


def compares_index_with_0(call: Callable[..., Any]) -> bool:
    """Whether a loop ``for i, t in enumerate(timesteps)`` of a function contains ``i == 0``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, SyntaxError, TypeError):
        return False
    return any(
        _is_comparison_with_0(node, index)
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For) and (index := _index_of_steps(loop))
        for node in ast.walk(loop)
    )


def _index_of_steps(loop: ast.For) -> str | None:
    """The name of the index in ``for i, t in enumerate(timesteps)``; None for other loops."""
    over = loop.iter
    if not isinstance(over, ast.Call) or ast.unparse(over.func) != "enumerate" or not over.args:
        return None
    target = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else None
    steps = "timesteps" in ast.unparse(over.args[0])
    return target.id if steps and isinstance(target, ast.Name) else None


def _is_comparison_with_0(node: ast.AST, index: str) -> bool:
    if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
        return False
    return {index, "0"} == {ast.unparse(node.left), ast.unparse(node.comparators[0])}


def _on_grid(scheduler: PolicyScheduler, timesteps: Tensor) -> Iterator[tuple[int, Any]]:
    """The timesteps of the plan with their indices on the grid."""
    call, loop = scheduler.call, scheduler.loop
    for i, node in enumerate(loop.nodes[:-1]):
        taken = loop.taken
        # The timesteps are those of the whole grid, or those of the plan.
        yield node, timesteps[node if call.whole_grid else i]
        # A loop that takes a step denoises; other loops only read the timesteps.
        call.enumerates = call.enumerates or loop.taken == taken + 1


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
