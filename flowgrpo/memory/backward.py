"""A backward pass in Python that runs autograd's graph node by node.

Autograd's own engine requests CUDA streams from the driver, so it cannot run on fake tensors of a
device that is absent. This module calls the same graph nodes in the engine's order (largest sequence
number first), so gradients, saved tensors and the moment at which each is freed are autograd's own.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Root = tuple[Node, int, Tensor]
"""A graph node, the index of one of its outputs, and the gradient with respect to that output."""


def roots_of(
    tensors: Sequence[Any], gradients: Sequence[Tensor | None] | None = None
) -> list[Root]:
    """Roots of a backward pass from the given tensors; values that need no gradient are skipped.

    Args:
        tensors: Outputs of a forward pass; entries that are not tensors are ignored.
        gradients: One gradient per entry; ``None`` uses an uninitialised tensor of each one's shape.
    """
    found = []
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            gradient = torch.empty_like(tensor) if gradients is None else gradients[i]
            if gradient is not None:
                found.append((tensor.grad_fn, tensor.output_nr, gradient))
    return found


@torch.no_grad()
def backward(roots: list[Root], wanted: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Run a graph backward and free each node after it has run.

    Args:
        roots: From :func:`roots_of`. The list is emptied, so that no reference keeps the graph alive.
        wanted: Leaf tensors whose gradients are returned.

    Returns:
        The gradient of each wanted leaf, or ``None`` if it received none. Gradients of other leaves
        are discarded as soon as they are computed.
    """
    due = _dependencies([node for node, *_ in roots])
    arrived: dict[Node, list[Tensor | None]] = {}
    ready: list[tuple[int, int, Node]] = []
    found: dict[int, Tensor | None] = {id(w): None for w in wanted}
    _begin(roots, due, arrived, ready)
    while ready:
        _advance(ready, due, arrived, found)
    return [found[id(w)] for w in wanted]


def _begin(
    roots: list[Root],
    due: Counter[Node],
    arrived: dict[Node, list[Tensor | None]],
    ready: list[tuple[int, int, Node]],
) -> None:
    """Register the roots' gradients and empty the list: a referenced node keeps its successors alive."""
    for node, place, gradient in roots:
        _arrive(arrived, node, place, gradient)
    for node in dict.fromkeys(node for node, *_ in roots):
        if node not in due:
            heapq.heappush(ready, (-node._sequence_nr(), id(node), node))
    roots.clear()


def _advance(
    ready: list[tuple[int, int, Node]],
    due: Counter[Node],
    arrived: dict[Node, list[Tensor | None]],
    found: dict[int, Tensor | None],
) -> None:
    """Run the newest node whose gradients have all arrived, and pass its results to its successors."""
    node = heapq.heappop(ready)[-1]
    gradients = arrived.pop(node, [])
    if hasattr(node, "variable"):
        if gradients and id(node.variable) in found:
            found[id(node.variable)] = gradients[0]
        return
    edges = node.next_functions
    results = _called(node, gradients) if gradients else (None,) * len(edges)
    # Free the tensors that only this node saved before gradients are accumulated, as the engine does.
    del node, gradients
    for (after, place), gradient in zip(edges, results, strict=False):
        if after is None:
            continue
        _arrive(arrived, after, place, gradient)
        due[after] -= 1
        if not due[after]:
            del due[after]
            heapq.heappush(ready, (-after._sequence_nr(), id(after), after))


def _dependencies(starts: Sequence[Node]) -> Counter[Node]:
    """Number of gradients that each node waits for."""
    due: Counter[Node] = Counter()
    seen, stack = set(starts), list(dict.fromkeys(starts))
    while stack:
        for after, _ in stack.pop().next_functions:
            if after is None:
                continue
            due[after] += 1
            if after not in seen:
                seen.add(after)
                stack.append(after)
    return due


def _arrive(
    arrived: dict[Node, list[Tensor | None]], node: Node, place: int, gradient: Tensor | None
) -> None:
    """Accumulate a gradient for one output of a node, in that output's shape and dtype."""
    if gradient is None:
        return
    outputs = node._input_metadata
    slots = arrived.setdefault(node, [None] * len(outputs))
    # Undo broadcasting and casting, which autograd's engine does between nodes.
    if gradient.shape != outputs[place].shape:
        gradient = gradient.sum_to_size(outputs[place].shape)
    gradient = gradient.to(outputs[place].dtype)
    before = slots[place]
    slots[place] = gradient if before is None else before + gradient


def _called(node: Any, gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
    if hasattr(node, "job"):
        return _computed_again(node, gradients)
    if hasattr(node, "cross"):
        (gradient,) = gradients
        # One edge per tensor argument.
        return (None if gradient is None else node.cross(gradient),)
    results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _computed_again(node: Any, gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Recompute a checkpointed block with gradients enabled, and run its backward pass."""
    _, _, *needed = node.needs_input_grad
    pairs = zip(node.tensors, needed, strict=True)
    tensors = [v.detach().requires_grad_(n) for v, n in pairs]
    with torch.enable_grad(), node.job.around():
        roots = roots_of(node.job.run(tensors), gradients)
    gradients.clear()
    wanted = [v for v, n in zip(tensors, needed, strict=True) if n]
    found = iter(backward(roots, wanted))
    # `Again.apply` has one edge per tensor argument; the first belongs to the dummy tensor.
    return (None, *(next(found) if n else None for n in needed))


@dataclass
class _Job:
    """A block of a model and its arguments, with a placeholder for each tensor among them."""

    around: Callable[[], AbstractContextManager[Any]]
    module: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    form: Any = None

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Call the block on these tensors. Returns the leaves of its result; ``form`` has their tree."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(v, _Slot) else v for v in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        results, self.form = tree_flatten(self.module(*args, **kwargs))
        return results


class _Slot:
    """Placeholder for a tensor argument."""


class Again(torch.autograd.Function):
    """Gradient checkpointing that saves only the inputs of a block.

    Its backward pass is :func:`_computed_again` rather than a ``backward`` method, because the caller
    of such a method keeps the incoming gradients alive while it runs.
    """

    @staticmethod
    def forward(ctx: Any, job: _Job, dummy: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        """Run the block. ``dummy`` requires a gradient, so that the results require one too."""
        ctx.job, ctx.tensors = job, tensors
        return tuple(job.run(tensors))


def again(
    around: Callable[[], AbstractContextManager[Any]],
    dummy: Tensor,
    module: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call ``module(*args, **kwargs)`` and save only its arguments for the backward pass.

    Args:
        around: Makes the context manager under which the block is recomputed, such as autocast.
        dummy: Any tensor that requires a gradient.
        module: A block of a model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    if not any(v.requires_grad for v in tensors):
        result = module(*args, **kwargs)
        if not any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(result)):
            # No input and no parameter of this block requires a gradient, so nothing is saved.
            return result
        del result
    others = [_Slot() if isinstance(v, Tensor) else v for v in leaves]
    job = _Job(around, module, others, spec)
    return tree_unflatten(list(Again.apply(job, dummy, *tensors)), job.form)
