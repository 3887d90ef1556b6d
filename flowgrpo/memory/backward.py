"""A backward pass node by node, in place of autograd's engine.

The engine asks a device's driver for its streams, which fake tensors of a device that is not there
have none of. Gradients, what is saved and when it is freed are autograd's own; only the order of
nodes is kept here, and it is the engine's: the newest first.
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
"""A node, which of its outputs, and the gradient there."""


def roots_of(
    tensors: Sequence[Any], gradients: Sequence[Tensor | None] | None = None
) -> list[Root]:
    """Where a backward of these tensors begins; without gradients, each has one of its own shape."""
    found = []
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            gradient = torch.empty_like(tensor) if gradients is None else gradients[i]
            if gradient is not None:
                found.append((tensor.grad_fn, tensor.output_nr, gradient))
    return found


@torch.no_grad()
def backward(roots: list[Root], wanted: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Run a graph backward and free it on the way. The roots are taken out of their list.

    Returns:
        The gradients of the wanted leaves; those of others are dropped.
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
    """Hand over the roots. No name may hold on to one: a node keeps all that come after it alive."""
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
    """Run the newest node that has all its gradients, and pass on what it returns."""
    node = heapq.heappop(ready)[-1]
    gradients = arrived.pop(node, [])
    if hasattr(node, "variable"):
        if gradients and id(node.variable) in found:
            found[id(node.variable)] = gradients[0]
        return
    edges = node.next_functions
    results = _called(node, gradients) if gradients else (None,) * len(edges)
    # What only this node saved dies with it, before gradients are added up.
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
    """How many gradients each node waits for."""
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
    """Add a gradient to those that a node has, in the shape and precision of what it belongs to."""
    if gradient is None:
        return
    outputs = node._input_metadata
    slots = arrived.setdefault(node, [None] * len(outputs))
    # A node does not undo broadcasting and casting; autograd's engine does.
    if gradient.shape != outputs[place].shape:
        gradient = gradient.sum_to_size(outputs[place].shape)
    gradient = gradient.to(outputs[place].dtype)
    before = slots[place]
    slots[place] = gradient if before is None else before + gradient


def _called(node: Any, gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
    if hasattr(node, "job"):
        return _computed_again(node, gradients)
    results = node(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _computed_again(node: Any, gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Compute a block again, go backward through what that saved, and let go of its gradients."""
    _, _, *needed = node.needs_input_grad
    pairs = zip(node.tensors, needed, strict=True)
    tensors = [v.detach().requires_grad_(n) for v, n in pairs]
    with torch.enable_grad(), node.job.around():
        roots = roots_of(node.job.run(tensors), gradients)
    gradients.clear()
    wanted = [v for v, n in zip(tensors, needed, strict=True) if n]
    found = iter(backward(roots, wanted))
    # Only tensors have edges: the anchor first.
    return (None, *(next(found) if n else None for n in needed))


@dataclass
class _Job:
    """A block of a model with its arguments, but for the tensors among them."""

    around: Callable[[], AbstractContextManager[Any]]
    module: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    form: Any = None

    def run(self, tensors: Sequence[Tensor]) -> list[Any]:
        """What the block returns, flat."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(v, _Slot) else v for v in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        results, self.form = tree_flatten(self.module(*args, **kwargs))
        return results


class _Slot:
    """Where a tensor was."""


class Again(torch.autograd.Function):
    """Gradient checkpointing: runs without saving anything but the inputs.

    Its backward is :func:`_computed_again`, which can let go of gradients that the caller of a
    function's own ``backward`` would keep.
    """

    @staticmethod
    def forward(ctx: Any, job: _Job, anchor: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        """The block's results; ``anchor`` needs a gradient, so that these do."""
        ctx.job, ctx.tensors = job, tensors
        return tuple(job.run(tensors))


def again(
    around: Callable[[], AbstractContextManager[Any]],
    anchor: Tensor,
    module: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``module(*args, **kwargs)``, which keeps nothing but the arguments for its backward.

    Args:
        around: What must be entered to compute it again, such as autocast.
        anchor: Any tensor that needs a gradient.
        module: A block of a model.
        args: For it.
        kwargs: For it.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [v for v in leaves if isinstance(v, Tensor)]
    if not any(v.requires_grad for v in tensors):
        result = module(*args, **kwargs)
        if not any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(result)):
            # Nothing is trained so far, and nothing kept.
            return result
        del result
    others = [_Slot() if isinstance(v, Tensor) else v for v in leaves]
    job = _Job(around, module, others, spec)
    return tree_unflatten(list(Again.apply(job, anchor, *tensors)), job.form)
