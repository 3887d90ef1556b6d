"""The clipped surrogate and the KL forms, against slow and plain computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo.core.losses import Loss, clipped_surrogate
from flowgrpo.core.transitions import DanceSDE, Prediction, Step

numbers = st.floats(-3, 3, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8), st.floats(0.01, 0.5))
@settings(deadline=None)
def test_clipped_surrogate_equals_plain_python(actions, clip_range):
    new, old, advantage = torch.tensor(actions, dtype=torch.float64).T
    found = clipped_surrogate(new, old, advantage, clip_range)
    for value, (n, o, a) in zip(found.tolist(), actions, strict=True):
        ratio = math.exp(n - o)
        clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
        assert value == pytest.approx(-min(ratio * a, clipped * a), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("shift", "advantage", "learns"),
    # Beyond the clip range only what has gone the wrong way is still corrected.
    [(0.0, 1.0, True), (0.5, 1.0, False), (-0.5, 1.0, True), (0.5, -1.0, True), (-0.5, -1.0, False)],
)  # fmt: skip
def test_gradient_stops_where_the_ratio_has_gone_far_enough(shift, advantage, learns):
    log_prob = torch.tensor([shift], requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2).sum().backward()
    assert log_prob.grad is not None
    assert bool(log_prob.grad != 0) is learns


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    log_prob = torch.tensor([-3.0, 2.0], requires_grad=True)
    advantage = torch.tensor([1.5, -0.5])
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantage, 1e-4)
    assert torch.equal(loss.detach(), -advantage)
    loss.sum().backward()
    assert torch.equal(log_prob.grad, -advantage)


def kl(kind: str) -> float:
    """The KL of a Dance step from .8 to .6 with a velocity gap of (0.2, -0.4)."""
    step, x = Step.flow(0.8, 0.6), torch.tensor([[0.5, -1.0]])
    velocity = torch.tensor([[0.25, 2.0]])
    gap = torch.tensor([[0.2, -0.4]])
    policy, reference = (
        DanceSDE(noise_level=0.3)(x, Prediction.from_velocity(x, v, step.noise), step)
        for v in (velocity + gap, velocity)
    )
    return float(Loss(kl=kind).kl_to(policy, reference, step, gap))


def test_kl_forms():
    # reference/algorithms.md section 1.5: (dt / 2) (1 / g + g (1 - s) / (2 s))^2 mean(gap^2).
    g, s, dt, square = 0.3, 0.8, 0.2, (0.2**2 + 0.4**2) / 2
    exact = dt / 2 * (1 / g + g * (1 - s) / (2 * s)) ** 2 * square
    assert kl("exact") == pytest.approx(exact, rel=1e-5)
    assert kl("flow_grpo") == pytest.approx(exact * dt, rel=1e-5)
    assert kl("velocity") == pytest.approx(square, rel=1e-6)


def test_flow_grpo_kl_is_the_released_formula():
    # train_sd3.py:896: mean((mean - mean_ref)^2) / (2 g^2), without dt.
    step, x = Step.flow(0.8, 0.6), torch.tensor([[0.5, -1.0]])
    means = []
    for v in ([0.45, 1.6], [0.25, 2.0]):
        prediction = Prediction.from_velocity(x, torch.tensor([v]), step.noise)
        means.append(DanceSDE(noise_level=0.3)(x, prediction, step).mean)
    wanted = (means[0] - means[1]).square().mean() / (2 * 0.3**2)
    assert kl("flow_grpo") == pytest.approx(float(wanted), rel=1e-5)
