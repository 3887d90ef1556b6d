"""The node-by-node backward pass of the memory estimate agrees with autograd."""

from contextlib import nullcontext

import torch
from torch import nn

from flowgrpo.memory.backward import again, backward, roots_of
from flowgrpo.memory.dispatch_modes import MemoryCounter


def test_gradients_equal_autograds() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4), nn.Linear(4, 4)
    x = torch.randn(2, 3, requires_grad=True)
    hidden = first(x).relu()
    out = second(hidden) * hidden + hidden.sum(1, keepdim=True)
    wanted = [x, *first.parameters(), *second.parameters()]
    theirs = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
    ours = backward(roots_of([out, None], [torch.ones_like(out), None]), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_a_recomputed_block_has_gradients_for_its_inputs() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    dummy = torch.zeros(1, requires_grad=True)
    runs = []

    def block(scale: float, x: torch.Tensor, *, shift: torch.Tensor) -> tuple[torch.Tensor, None]:
        runs.append(1)
        return first(x) * scale + shift, None

    x, shift = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    theirs = torch.autograd.grad(second(block(2.0, x, shift=shift)[0]).sum(), [x, shift])
    out, nothing = again(nullcontext, dummy, block, (2.0, x), {"shift": shift})
    assert nothing is None
    loss = second(out).sum()
    ours = backward(roots_of([loss], [torch.ones_like(loss)]), [x, shift])
    assert len(runs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_saved_tensors_are_freed_during_the_backward() -> None:
    weight = torch.ones(64, 64, requires_grad=True)
    with MemoryCounter([weight]) as live:
        x = torch.ones(64, 64)
        for _ in range(8):
            x = (x @ weight).relu()
        roots = roots_of([x])
        del x
        saved = live.live
        backward(roots)
        # Each step saves one state; at most a few gradients more are alive at a time, and none at the end.
        assert live.peak <= saved + 4 * 64 * 64 * 4
        assert live.live == 0
