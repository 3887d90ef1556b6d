"""The doctor's check of gradients: they reach the trained weights and no others."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowgrpo.core.random import Random
from flowgrpo.core.text import counted
from flowgrpo.doctor.subject import Check, Subject


def gradients(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Gradients reach the trained weights.

    After a backward pass through every step, each trained weight on which the output depends has a
    gradient, and no other weight has one.
    """
    policy, replaced = subject.policy, 0
    assert policy.trainable is not None
    trained = list(policy.trainable.parameters.values())
    missed, moved, leaked = _backward(subject)
    if moved < 0.4 * len(trained):
        with _zeros_replaced(policy.denoisers.values()) as replaced:
            if replaced:
                missed, moved, leaked = _backward(subject)
    reached = len(trained) - len(missed)
    # In some transformers the last block does not use all of its weights, so a weight without a
    # gradient is an error only if the output depends on it.
    cut = bool(missed) and _output_depends_on(subject, missed)
    words = (
        f"{reached}/{counted(len(trained), 'tensor')}, {moved} not zero, {counted(leaked, 'other')}"
    )
    if missed and not cut:
        words += f" ({len(missed)} do not change the output)"
    if replaced:
        words += f" (untrained model: {replaced} zero matrices replaced by noise)"
    return [
        Check(
            "gradients reach the trained weights",
            words,
            # In a new LoRA one of the two matrices is zero, so the other has zero gradient.
            not cut and 2 * reached >= len(trained) and moved >= 0.4 * reached and not leaked,
            "the denoising loop does not use all trained weights, or the pipeline detaches the gradient",
            reached / len(trained),
        )
    ]


def _output_depends_on(subject: Subject, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether the denoiser's output changes when these weights are perturbed."""
    originals = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def output() -> Tensor:
        records = subject.rollout.records
        again = [
            subject.policy.replay(subject.prompts, r.x, r.step, subject.transition) for r in records
        ]
        return torch.cat([r.prediction.output.flatten() for r in again])

    before = output()
    try:
        for i, p in enumerate(parameters):
            p.data.add_(0.1 * torch.randn(p.shape, generator=Random(13).at(i).generator()).to(p))
        # Negated, so that NaN counts as a change.
        return not float((output() - before).abs().max()) <= 1e-6 * float(before.abs().max())
    finally:
        for p, value in zip(parameters, originals, strict=True):
            p.data.copy_(value)


def _backward(subject: Subject) -> tuple[list[nn.Parameter], int, int]:
    """Run a backward pass through the log-probability of every recorded step.

    Returns:
        The trained weights without a finite gradient, the number of those whose gradient is not zero,
        and the number of other weights that have a gradient.
    """
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
def _zeros_replaced(models: Iterable[nn.Module]) -> Iterator[int]:
    """Replace all-zero matrices of the models by small noise inside the context; yields their number.

    Untrained models have such matrices (gates, last layers), through which no gradient passes. The
    zero matrices of adapters are left alone.
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
