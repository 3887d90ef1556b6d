"""Do gradients reach what is trained, and only that?"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowgrpo.core.random import Random
from flowgrpo.doctor.subject import Check, Subject


def gradients(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Gradients reach what is trained.

    Backward through every step: the trained weights that the images depend on, all of them and no
    others, get a gradient.
    """
    policy, drawn = subject.policy, 0
    assert policy.trainable is not None
    trained = list(policy.trainable.parameters.values())
    missed, moved, leaked = _backward(subject)
    if moved < 0.4 * len(trained):
        with _zeros_drawn(policy.denoisers.values()) as drawn:
            if drawn:
                missed, moved, leaked = _backward(subject)
    reached = len(trained) - len(missed)
    # The last block of some transformers ignores part of its weights.
    cut = bool(missed) and _matter(subject, missed)
    words = f"{reached}/{len(trained)} tensors, {moved} not zero, {leaked} others"
    if missed and not cut:
        words += f" ({len(missed)} change nothing)"
    if drawn:
        words += f" (untrained model: {drawn} zero matrices drawn anew for this)"
    return [
        Check(
            "gradients reach what is trained",
            words,
            # Half of a fresh LoRA has zero gradient because the other half is zero.
            not cut and 2 * reached >= len(trained) and moved >= 0.4 * reached and not leaked,
            "weights are trained that the loop does not use, or the pipeline cuts the gradient",
            reached / len(trained),
        )
    ]


def _matter(subject: Subject, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether what the model says changes when these weights do."""
    kept = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def said() -> Tensor:
        records = subject.rollout.records
        again = [
            subject.policy.replay(subject.prompts, v.x, v.step, subject.transition) for v in records
        ]
        return torch.cat([v.prediction.output.flatten() for v in again])

    before = said()
    try:
        for i, p in enumerate(parameters):
            p.data.add_(0.1 * torch.randn(p.shape, generator=Random(13).at(i).generator()).to(p))
        # What is not a number counts as a change.
        return not float((said() - before).abs().max()) <= 1e-6 * float(before.abs().max())
    finally:
        for p, value in zip(parameters, kept, strict=True):
            p.data.copy_(value)


def _backward(subject: Subject) -> tuple[list[nn.Parameter], int, int]:
    """Which trained weights get no gradient, how many one that is not zero, how many others one."""
    policy = subject.policy
    assert policy.trainable is not None
    for record in subject.rollout.records:
        again = policy.replay(subject.prompts, record.x, record.step, subject.transition)
        log_prob = again.gaussian.log_prob(record.x_next)
        if log_prob.requires_grad:
            log_prob.sum().backward()
    trained = list(policy.trainable.parameters.values())
    reached = [p for p in trained if p.grad is not None and bool(p.grad.isfinite().all())]
    moved = sum(bool(p.grad.abs().max() > 0) for p in reached if p.grad is not None)
    ids = {id(p) for p in trained}
    every = [p for m in policy.models.values() for p in m.parameters()]
    leaked = sum(p.grad is not None and id(p) not in ids for p in every)
    for parameter in trained:
        parameter.grad = None
    met = {id(p) for p in reached}
    return [p for p in trained if id(p) not in met], moved, leaked


@contextmanager
def _zeros_drawn(models: Iterable[nn.Module]) -> Iterator[int]:
    """Inside, all-zero matrices hold small noise; gives their number.

    Untrained models have some (gates, last layers), which stop every gradient. Adapters keep theirs.
    """
    zeros = [
        p
        for m in models
        for n, p in m.named_parameters()
        if p.ndim > 1 and p.is_floating_point() and "lora_" not in n and not bool(p.any())
    ]
    try:
        for i, p in enumerate(zeros):
            p.data.copy_(0.05 * torch.randn(p.shape, generator=Random(12).at(i).generator()))
        yield len(zeros)
    finally:
        for p in zeros:
            p.data.zero_()
