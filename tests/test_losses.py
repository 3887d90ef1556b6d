"""Losses: surrogates, Guard's ratio, NFT's objective and the KLs against naive computations."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowgrpo.core.transitions import (
    CPS,
    DDIM,
    ODE,
    DanceSDE,
    FlowSDE,
    Gaussian,
    Prediction,
    Step,
    Transition,
    gaussian_kl,
)
from flowgrpo.losses.base import Loss, LossInputs, LossNeeds, PolicyOutputs, check_interface
from flowgrpo.losses.clipped import (
    ClippedLoss,
    bounded_surrogate,
    clipped_surrogate,
    guard_weight,
    guarded_log_ratio,
    step_gain,
)
from flowgrpo.losses.group_matching import CRDLoss, DGPOLoss
from flowgrpo.losses.matching import MatchingLoss
from flowgrpo.losses.nft import NFTLoss, nft_loss

numbers = st.floats(-3, 3, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8), st.floats(0.01, 0.5))
@settings(deadline=None)
def test_clipped_surrogate_equals_plain_python(actions, clip_range):
    new, old, advantage = torch.tensor(actions, dtype=torch.float64).T
    found = clipped_surrogate(new - old, advantage, clip_range)
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
    clipped_surrogate(log_prob, torch.tensor([advantage]), 0.2).sum().backward()
    assert log_prob.grad is not None
    assert bool(log_prob.grad != 0) is learns


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    log_prob = torch.tensor([-3.0, 2.0], requires_grad=True)
    advantage = torch.tensor([1.5, -0.5])
    loss = clipped_surrogate(log_prob - log_prob.detach(), advantage, 1e-4)
    assert torch.equal(loss.detach(), -advantage)
    loss.sum().backward()
    assert torch.equal(log_prob.grad, -advantage)


def kl(kind: str) -> float:
    """The KL of a Dance step from .8 to .6 with a velocity gap of (0.2, -0.4)."""
    step, x = Step.flow(0.8, 0.6), torch.tensor([[0.5, -1.0]])
    velocity = torch.tensor([[0.25, 2.0]])
    gap = torch.tensor([[0.2, -0.4]])
    predictions = [Prediction.from_velocity(x, v, step.noise) for v in (velocity + gap, velocity)]
    policy, reference = (
        PolicyOutputs(p, DanceSDE(noise_level=0.3)(x, p, step)) for p in predictions
    )
    return float(ClippedLoss(kl=kind).kl_to(policy, reference, step))


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


# What bounds an action.


def test_a_rise_may_be_bounded_otherwise_than_a_fall():
    log_ratio, advantage = torch.log(torch.tensor([1.15, 0.85])), torch.tensor([1.0, -1.0])
    wide = clipped_surrogate(log_ratio, advantage, 0.1, 0.2)
    assert wide.tolist() == pytest.approx([-1.15, 0.9])
    assert clipped_surrogate(log_ratio, advantage, 0.1).tolist() == pytest.approx([-1.1, 0.9])


@pytest.mark.parametrize(
    ("shift", "advantage", "moved", "learns"),
    # Only what is too far away and goes on is stopped (reference section 10, Flow-DPPO).
    [(0.1, 1.0, 2e-5, False), (0.1, 1.0, 5e-6, True), (-0.1, 1.0, 2e-5, True),
     (-0.1, -1.0, 2e-5, False), (0.1, -1.0, 2e-5, True), (0.0, 1.0, 0.0, True)],
)  # fmt: skip
def test_kl_bound_stops_what_is_far_and_goes_on(shift, advantage, moved, learns):
    log_ratio = torch.tensor([shift], requires_grad=True)
    loss = bounded_surrogate(log_ratio, torch.tensor([advantage]), torch.tensor([moved]), 1e-5)
    loss.sum().backward()
    assert log_ratio.grad is not None
    wanted = -advantage * math.exp(shift) if learns else 0.0
    assert float(log_ratio.grad) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("advantage", "bound", "loss"),
    [(1.0, 1e-6, -0.9994150212), (-1.0, 1e-5, 0.9994150212), (-1.0, 1e-6, 0.0), (-1.0, None, 0.0)],
)
def test_flow_dppo_equals_its_vectors(advantage, bound, loss):
    """One step of the Flow-SDE, whose KL of 7.9e-6 only the bound of 1e-6 stops, which is the default."""
    step, sde, x = (
        Step.flow(0.8, 0.6),
        FlowSDE(noise_level=0.7),
        torch.tensor([[0.5, -1.0]]).double(),
    )
    old, new = (
        sde(x, Prediction.from_velocity(x, torch.tensor([v]).double(), 0.8), step)
        for v in ([0.25, 2.0], [0.26, 1.99])
    )
    assert float(gaussian_kl(new, old)) == pytest.approx(7.9082908e-6, rel=1e-4)
    x_next = torch.tensor([[0.45, -1.3]]).double()
    log_ratio = new.log_prob(x_next) - old.log_prob(x_next)
    found, outside = ClippedLoss(clip="kl", clip_range=bound).surrogate(
        log_ratio, torch.tensor([advantage]), new, old.mean, 1.0
    )
    assert float(found) == pytest.approx(loss, abs=1e-6)
    assert outside.item() is (bound != 1e-5)


def test_the_default_bound_is_on_the_scale_of_what_it_bounds():
    assert (ClippedLoss().clip_range, ClippedLoss(clip="kl").clip_range) == (1e-4, 1e-6)


@pytest.mark.parametrize("clip", ["ratio", "kl"])
def test_surrogate_says_what_is_out_of_bounds(clip):
    loss = ClippedLoss(clip=clip, clip_range=0.1, clip_high=0.3 if clip == "ratio" else None)
    old = torch.zeros(4, 1)
    mean = torch.tensor([[0.0], [0.2], [0.5], [-0.2]])
    gaussian = Gaussian(mean, 1.0)
    change = torch.tensor([0.0, 0.2, 0.3, -0.2])
    _, outside = loss.surrogate(change, torch.ones(4), gaussian, old, 1.0)
    # Ratios 1, 1.22, 1.35, 0.82 in (0.9, 1.3); or KLs 0, .02, .125, .02 against 0.1.
    wanted = [False, False, True, True] if clip == "ratio" else [False, False, True, False]
    assert outside.tolist() == wanted


# GRPO-Guard.

FLOW, NOISY = Step.flow(0.8, 0.6, 0.9), Step.diffusion(0.3, 0.5)
KINDS = [
    (FlowSDE(), FLOW), (DanceSDE(), FLOW), (CPS(), FLOW), (CPS(log_prob="unnormalised"), FLOW),
    (DDIM(), NOISY), (CPS(), NOISY),
]  # fmt: skip


def gaussian_of(transition: Transition, step: Step, output: torch.Tensor) -> Gaussian:
    """The step from a fixed state, for an output of the model."""
    x = torch.linspace(-1, 1, output.shape[1], dtype=output.dtype).expand_as(output)
    if step.path == "flow":
        return transition(x, Prediction.from_velocity(x, output, step.noise), step)
    x0 = (x - step.noise * output) / step.signal
    return transition(x, Prediction(x0, output, output), step)


@pytest.mark.parametrize(("transition", "step"), KINDS)
def test_guard_is_the_published_formula(transition, step):
    """``std * (log r + mean(d^2) / (2 std^2))`` with the true normals' log-ratio."""
    torch.manual_seed(0)
    output = torch.randn(5, 7, dtype=torch.float64)
    old = gaussian_of(transition, step, output)
    new = gaussian_of(transition, step, output + 0.1 * torch.randn_like(output))
    x_next = old.sample(torch.randn_like(output))
    normal = [torch.distributions.Normal(g.mean, g.std) for g in (new, old)]
    log_ratio = (normal[0].log_prob(x_next) - normal[1].log_prob(x_next)).mean(1)
    bias = (new.mean - old.mean).square().mean(1) / (2 * old.std**2)
    found = guarded_log_ratio(new.mean, old.mean, x_next, old.std)
    torch.testing.assert_close(found.double(), old.std * (log_ratio + bias), atol=1e-6, rtol=1e-5)


def test_guard_has_a_bias_per_sample():
    """The released code averages it over the batch; another sample must not change one's ratio."""
    old, std = torch.zeros(2, 3), 0.5
    x_next = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]])
    mean = torch.tensor([[0.1, 0.1, 0.1], [3.0, 3.0, 3.0]])
    both = guarded_log_ratio(mean, old, x_next, std)
    assert float(both[0]) == float(guarded_log_ratio(mean[:1], old[:1], x_next[:1], std))
    assert float(both[0]) == pytest.approx(0.1 * (0.2 - 0.4 + 0.6) / 3)


@pytest.mark.parametrize(("transition", "step"), KINDS)
def test_guard_stays_centred_where_the_plain_ratio_sinks(transition, step):
    torch.manual_seed(1)
    output = torch.zeros(20_000, 4)
    old = gaussian_of(transition, step, output)
    new = gaussian_of(transition, step, output + 0.3)
    x_next = old.sample(torch.randn_like(output))
    guarded = guarded_log_ratio(new.mean, old.mean, x_next, old.std)
    plain = Gaussian(new.mean, old.std).log_prob(x_next) - Gaussian(old.mean, old.std).log_prob(x_next)  # fmt: skip
    error = float(guarded.std() / len(guarded) ** 0.5)
    assert abs(float(guarded.mean())) < 4 * error
    assert float(plain.mean()) < -0.5 * float((new.mean - old.mean).square().mean()) / (2 * old.std**2)  # fmt: skip


@pytest.mark.parametrize("transition", [FlowSDE(), DanceSDE(), CPS(), CPS(noise_level=0.3), DDIM()])
def test_guard_gives_all_steps_gradients_of_one_size(transition):
    sigmas = [0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089]
    alphas = [0.02, 0.08, 0.2, 0.4, 0.6, 0.8, 0.95]
    diffusion = isinstance(transition, DDIM)
    pairs = itertools.pairwise(alphas if diffusion else sigmas)
    steps = [Step.diffusion(a, b) if diffusion else Step.flow(a, b, sigmas[0]) for a, b in pairs]
    plain, guarded = [], []
    torch.manual_seed(2)
    noise = torch.randn(1, 512, dtype=torch.float64)
    for step in steps:
        output = torch.zeros(1, 512, dtype=torch.float64, requires_grad=True)
        new = gaussian_of(transition, step, output)
        old = Gaussian(new.mean.detach(), new.std)
        x_next = old.sample(noise)
        ratio = guarded_log_ratio(new.mean, old.mean, x_next, old.std)
        (g,) = torch.autograd.grad(ratio.sum() * guard_weight(transition, step), output)
        guarded.append(float(g.norm()))
        (p,) = torch.autograd.grad(gaussian_of(transition, step, output).log_prob(x_next).sum(), output)  # fmt: skip
        plain.append(float(p.norm()))
    spread = 1.2 if isinstance(transition, DanceSDE) else 1.001
    assert max(guarded) / min(guarded) < spread
    if not diffusion:
        assert max(plain) / min(plain) > 2 * spread


def test_the_gain_of_cps_becomes_dt_without_noise():
    assert step_gain(CPS(noise_level=1e-6), FLOW) == pytest.approx(FLOW.dt, rel=1e-6)
    assert step_gain(FlowSDE(noise_level=0.7), Step.flow(0.6, 0.5, 0.9)) == pytest.approx(
        1.245 * 0.1
    )


@pytest.mark.parametrize("predicted", ["noise", "v", "data"])
def test_the_gain_is_the_derivative_by_what_the_model_predicts(predicted):
    step = Step.diffusion(0.3, 0.5, predicted)
    transition = DDIM(eta=0.7)
    output = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    x = torch.ones(1, 1, dtype=torch.float64)
    mean = transition(x, Prediction.from_output(x, output, step), step).mean
    (slope,) = torch.autograd.grad(mean.sum(), output)
    assert step_gain(transition, step) == pytest.approx(abs(float(slope)), rel=1e-9)
    # All three say the same of one state.
    said = Prediction.from_output(x, 0.2 * x, step)
    assert float(step.signal * said.x0 + step.noise * said.x1) == pytest.approx(1)


def test_the_gain_is_finite_where_there_is_nothing_but_noise():
    """As at the first step of CogVideoX."""
    first = Step.diffusion(0.0, 0.02, "v")
    assert 0 < step_gain(DDIM(eta=1.0), first) < 1
    assert math.isfinite(guard_weight(DDIM(eta=1.0), first))


# DiffusionNFT.


def test_nft_by_hand():
    """Two elements: x0 (1, 3), old (1, 2), sample (0, 2), beta .5, r .75."""
    x0, old, sample = torch.tensor([[1.0, 3.0], [1.0, 2.0], [0.0, 2.0]])[:, None].unbind(0)
    # x0+ = (1, 2.5): errors (1, .5), L+ = (.625) / .75; x0- = (1, 1.5): errors (1, -.5), the same.
    found = nft_loss(x0, old, sample, torch.tensor([0.75]), 0.5)
    assert float(found) == pytest.approx((0.75 * 0.625 / 0.75 + 0.25 * 0.625 / 0.75) / 0.5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_mixes_velocities_as_the_paper_does(beta):
    torch.manual_seed(0)
    t = 0.6
    x, v, v_old, sample = torch.randn(4, 3, 8, dtype=torch.float64).unbind(0)
    r = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    wanted = torch.zeros(3, dtype=torch.float64)
    for weight, mixed in (
        (r, beta * v + (1 - beta) * v_old),
        (1 - r, (1 + beta) * v_old - beta * v),
    ):
        error = x - t * mixed - sample
        wanted += weight * (error**2).mean(1) / error.abs().mean(1)
    found = nft_loss(x - t * v, x - t * v_old, sample, r, beta)
    torch.testing.assert_close(found.double(), wanted / beta, atol=1e-5, rtol=1e-5)


def noised(x0: Tensor, old_x0: Tensor, sample: Tensor, advantage: Tensor) -> LossInputs:
    """A batch of noised samples, each with a state of its own, for which two policies predict data."""
    number = len(x0)
    policy, old = (
        PolicyOutputs(Prediction(x, x, x), Gaussian(x, 0.0)) for x in (x0, old_x0.detach())
    )
    return LossInputs(
        policy=policy,
        x=torch.zeros_like(sample),
        state=torch.arange(number),
        x_next=sample,
        old_log_prob=torch.zeros(number),
        advantage=advantage,
        group=torch.zeros(number, dtype=torch.long),
        sample=torch.arange(number),
        step=0,
        interval=FLOW,
        transition=ODE(),
        old_policy=old,
    )


def test_nft_pulls_to_good_samples_and_from_bad_ones():
    old, sample = torch.zeros(3, 4), torch.ones(3, 4)
    x0 = old.clone().requires_grad_()
    advantage = torch.tensor([5.0, -5.0, 0.0])
    NFTLoss()(noised(x0, old, sample, advantage)).loss.sum().backward()
    assert x0.grad is not None
    assert (x0.grad[0] < 0).all()
    assert (x0.grad[1] > 0).all()
    assert (x0.grad[2] == 0).all()


def test_nft_trains_on_what_is_neither_good_nor_bad_if_asked():
    """The gradient is that of r = 1/2 where the reward is known, and none where it failed."""
    old, sample = torch.tensor([[0.3, -0.5, 0.1, 0.8]]).repeat(2, 1), torch.ones(2, 4)
    x0 = torch.zeros(2, 4, requires_grad=True)
    inputs = noised(x0, old, sample, torch.zeros(2))
    inputs = replace(inputs, has_reward=torch.tensor([True, False]))
    loss = NFTLoss(zero_advantage="train", kl_coef=0.0)
    assert loss.needs.all_actions
    found = loss(inputs).loss
    wanted = 5 * nft_loss(x0[:1], old[:1], sample[:1], torch.tensor([0.5]), 1.0)
    torch.testing.assert_close(found, torch.cat([wanted.detach(), torch.zeros(1)]))
    found.sum().backward()
    assert x0.grad is not None
    assert x0.grad[0].abs().max() > 0.1
    assert (x0.grad[1] == 0).all()
    assert NFTLoss(kl_coef=0.0)(inputs).loss.tolist() == [0, 0]


def test_nft_on_the_old_policy_needs_an_opinion():
    """At r = 1/2 the two implicit policies balance."""
    old, sample = torch.zeros(1, 4), torch.ones(1, 4)
    x0 = old.clone().requires_grad_()
    nft_loss(x0, old, sample, torch.tensor([0.5]), 1.0).sum().backward()
    assert x0.grad is not None
    assert float(x0.grad.abs().max()) < 1e-6


def test_optimality_and_trails():
    loss = NFTLoss()
    assert loss.optimality(torch.tensor([-9.0, -5, 0, 2.5, 7])).tolist() == [0, 0, 0.5, 0.75, 1]
    assert [loss.remaining_share(n) for n in (0, 100, 900)] == [0, 0.1, 0.5]
    late = NFTLoss(trail="late")
    assert [late.remaining_share(n) for n in (75, 175, 999)] == pytest.approx([0, 0.75, 0.999])
    assert NFTLoss(trail="none").remaining_share(999) == 0


# Losses as the learner calls them, on the vectors of a published step: state, velocity and next state.

X, VELOCITY, X_NEXT = (torch.tensor([v]) for v in ([0.5, -1.0], [0.25, 2.0], [0.45, -1.3]))
VECTORS = [
    # Transition, mean, std and mean log-probability of X_NEXT, computed independently.
    (FlowSDE(noise_level=0.7), (0.31525, -1.253), 0.6260990337, -0.4636806928),
    (DanceSDE(noise_level=0.3), (0.4438125, -1.39325), 0.1341640786, 0.9684497877),
    (CPS(noise_level=0.8), (0.2219756081, -1.151246118), 0.5706339098, -0.4148395898),
]  # fmt: skip
REFERENCE_VELOCITY = torch.tensor([[0.05, 2.4]])


def batch(transition: Transition, old_log_prob: float, advantage: Sequence[float], **more: object) -> LossInputs:  # fmt: skip
    """Actions that share the state ``X``; all go to ``X_NEXT``."""
    step, number = Step.flow(0.8, 0.6, 0.9), len(advantage)
    policy, reference = (
        PolicyOutputs(p, transition(X, p, step))
        for p in (Prediction.from_velocity(X, v, 0.8) for v in (VELOCITY, REFERENCE_VELOCITY))
    )
    return LossInputs(
        policy=policy,
        x=X,
        state=torch.zeros(number, dtype=torch.long),
        x_next=X_NEXT.expand(number, -1),
        old_log_prob=torch.full((number,), old_log_prob),
        advantage=torch.tensor(advantage),
        group=torch.zeros(number, dtype=torch.long),
        sample=torch.arange(number),
        step=3,
        interval=step,
        transition=transition,
        reference=reference,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("transition", "mean", "std", "log_prob"), VECTORS)
def test_clipped_loss_on_published_vectors(transition, mean, std, log_prob):
    """The ratio is exp(0.05), beyond the clip range of 0.02."""
    found = ClippedLoss(clip_range=0.02, kl_coef=1.0)(
        batch(transition, log_prob - 0.05, [2.0, -2.0])
    )
    ratio = math.exp(0.05)
    assert found.loss.tolist() == pytest.approx([-2 * 1.02, 2 * ratio], rel=1e-5)
    assert found.metrics["ratio/deviation"].tolist() == pytest.approx([ratio - 1] * 2, rel=1e-4)
    assert found.metrics["ratio/clip_fraction"].tolist() == [1, 1]
    assert found.metrics["log_prob/noise"].tolist() == pytest.approx([0.05] * 2, rel=1e-4)
    # The mean is linear in the velocity, so that the reference's follows from the derivative.
    gap = step_gain(transition, Step.flow(0.8, 0.6, 0.9)) * (VELOCITY - REFERENCE_VELOCITY)
    kl = float(gap.square().mean()) / (2 * std**2)
    assert found.kl is not None
    assert found.kl.tolist() == pytest.approx([kl] * 2, rel=1e-5)


@pytest.mark.parametrize(("transition", "mean", "std", "log_prob"), VECTORS)
@pytest.mark.parametrize("settings", [{"ratio": "guard"}, {"clip": "kl"}])
def test_losses_with_old_means_on_published_vectors(settings, transition, mean, std, log_prob):
    """The old mean is 0.1 above the new one in the first element."""
    old_mean = torch.tensor([[mean[0] + 0.1, mean[1]]])
    inputs = batch(transition, log_prob - 0.05, [1.5], old_mean=old_mean, first_update=False)
    found = ClippedLoss(clip_range=1e-6, **settings)(inputs)
    if "ratio" in settings:
        log_ratio = -0.1 * (0.45 - mean[0] - 0.1) / std / 2
        ratio, weight = math.exp(log_ratio), guard_weight(transition, inputs.interval)
        inside = min(max(ratio, 1 - 1e-6), 1 + 1e-6)
        wanted = weight * max(-1.5 * ratio, -1.5 * inside)
    else:
        # The KL is above its bound, and a larger ratio would increase it: nothing is trained.
        wanted = 0.0
    assert float(found.loss) == pytest.approx(wanted, rel=1e-4)
    assert "log_prob/noise" not in found.metrics
    assert found.metrics["ratio/clip_fraction"].tolist() == [1]


def test_nft_loss_on_published_vectors():
    """x0 = X - 0.8 v; beta 1, an advantage of 2.5 of a scale of 5 is an optimality of 0.75."""
    inputs = batch(ODE(), 0.0, [2.5, 0.0])
    inputs = replace(inputs, old_policy=inputs.reference)
    found = NFTLoss(kl_coef=1.0)(inputs)
    x0, old = [0.3, -2.6], [0.46, -2.92]
    parts = []
    for implicit in (x0, [2 * o - x for o, x in zip(old, x0, strict=True)]):
        error = [a - b for a, b in zip(implicit, [0.45, -1.3], strict=True)]
        parts.append(sum(e * e for e in error) / sum(abs(e) for e in error))
    assert found.loss.tolist() == pytest.approx([5 * (0.75 * parts[0] + 0.25 * parts[1]), 0], rel=1e-5)  # fmt: skip
    assert found.kl is not None
    assert found.kl.tolist() == pytest.approx([(0.2**2 + 0.4**2) / 2] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "needs"),
    [
        (
            ClippedLoss(),
            LossNeeds(is_additive=True, action_kinds=("step", "initial_noise"), balanced_steps=True),
        ),
        (ClippedLoss(ratio="guard"), LossNeeds(is_additive=True, old_mean=True)),
        (
            ClippedLoss(clip="kl", kl_coef=0.1),
            LossNeeds(is_additive=True, old_mean=True, reference=True, all_actions=True, balanced_steps=True),
        ),
        (
            ClippedLoss(kl="flow_grpo", kl_coef=0.1),
            LossNeeds(is_additive=True, reference=True, all_actions=True, balanced_steps=True),
        ),
    ],
)  # fmt: skip
def test_losses_declare_their_needs(loss, needs):
    assert loss.needs == needs


def test_nft_declares_its_needs():
    needs = NFTLoss(trail="late").needs
    assert needs.old_policy is not None
    assert needs.old_policy(175) == 0.75
    wanted = LossNeeds(action_kinds=("noised_sample",), reference=True, all_actions=True)
    assert replace(needs, old_policy=None) == wanted
    assert not NFTLoss(kl_coef=0.0).needs.reference


def test_a_clip_range_below_the_noise_is_warned_of():
    loss = ClippedLoss(clip_range=1e-3)
    assert not loss.warning({"log_prob/noise": 9e-4})
    assert "up to 2.0e-03" in loss.warning({"log_prob/noise": 2e-3})
    assert not ClippedLoss(clip="kl", clip_range=1e-3).warning({"log_prob/noise": 2e-3})
    assert not NFTLoss().warning({"log_prob/noise": 2e-3})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (ClippedLoss(clip_range=0.0), "loss.clip_range must be at least"),
        (ClippedLoss(clip_high=-1.0), "loss.clip_high must be at least"),
        (ClippedLoss(clip="kl", clip_high=0.1), "loss.clip_high has no meaning"),
        (ClippedLoss(kl_coef=-1.0), "loss.kl_coef must be at least 0"),
        (NFTLoss(beta=0.0), "loss.beta must be at least"),
        (NFTLoss(advantage_scale=0.0), "loss.advantage_scale must be at least"),
        (NFTLoss(kl_coef=-1.0), "loss.kl_coef must be at least 0"),
        (MatchingLoss(power=0.0), "loss.power must be at least"),
        (MatchingLoss(advantage_scale=0.0), "loss.advantage_scale must be at least"),
        (MatchingLoss(clip_range=0.0), "loss.clip_range must be at least"),
        (MatchingLoss(soft_clip=-1.0), "loss.soft_clip must be at least 0"),
        (MatchingLoss(proximal_coef=-1.0), "loss.proximal_coef must be at least 0"),
        (MatchingLoss(kl_coef=-1.0), "loss.kl_coef must be at least 0"),
        (DGPOLoss(beta=0.0), "loss.beta must be at least"),
        (DGPOLoss(clip_range=-1.0), "loss.clip_range must be at least 0"),
        (DGPOLoss(kl_coef=-1.0), "loss.kl_coef must be at least 0"),
        (DGPOLoss(sample_old_after=-1), "loss.sample_old_after must be at least 0"),
        (CRDLoss(beta=0.0), "loss.beta must be at least"),
        (CRDLoss(kl_coef=-1.0), "loss.kl_coef must be at least 0"),
    ],
)
def test_losses_that_cannot_train_are_refused(loss, message):
    check_interface(loss)
    with pytest.raises(ValueError, match=message):
        loss.check()


def test_a_loss_without_a_part_is_refused():
    class Bare:
        needs = LossNeeds()

        def __call__(self, inputs):
            return inputs

    with pytest.raises(
        ValueError,
        match="Bare has no metrics, kl_coef, group_term, check, check_algorithm, warning;",
    ):
        check_interface(Bare())

    class Silent(Loss):
        """Inherits all parts, also the one that it should have."""

    with pytest.raises(ValueError, match="Silent has no __call__;"):
        check_interface(Silent())
