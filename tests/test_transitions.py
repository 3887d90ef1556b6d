"""One denoising step: the published numbers, and what must hold for every number."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from flowgrpo.core.transitions import (
    CPS,
    DDIM,
    ODE,
    CalibratedSDE,
    DanceSDE,
    FlowSDE,
    Gaussian,
    Prediction,
    Step,
    StepwiseSDE,
    Transition,
    gaussian_kl,
    require_noise,
    require_path,
)
from flowgrpo.policy.scheduler import policy_scheduler

levels = st.floats(0.05, 1.0)


def double(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def flow(transition: Transition, x: Tensor, velocity: Tensor, step: Step) -> Gaussian:
    return transition(x, Prediction.from_velocity(x, velocity, step.noise), step)


# Parity: reference/algorithms.md section 11, x = [.5, -1], v = [.25, 2], sigma .8 -> .6.
SECTION_11 = [
    (FlowSDE(noise_level=0.7), [0.31525, -1.253], 0.6260990337, -0.4636806928, -0.0101832813),
    (DanceSDE(noise_level=0.3), [0.4438125, -1.39325], 0.1341640786, 0.9684497877, -0.0043669238),
    (CPS(noise_level=0.8), [0.2219756081, -1.151246118], 0.5706339098, -0.4148395898, -0.0370614203),
]  # fmt: skip


@pytest.mark.parametrize(("transition", "mean", "std", "log_prob", "surrogate"), SECTION_11)
def test_vectors_of_the_reference(transition, mean, std, log_prob, surrogate):
    step = Step.flow(0.8, 0.6)
    gaussian = flow(transition, double(0.5, -1), double(0.25, 2), step)
    x_next = double(0.45, -1.3)
    assert gaussian.mean[0].tolist() == pytest.approx(mean, abs=1e-9)
    assert gaussian.std == pytest.approx(std, abs=1e-10)
    assert float(gaussian.log_prob(x_next)) == pytest.approx(log_prob, abs=1e-6)
    unnormalised = Gaussian(gaussian.mean, gaussian.std, normalised=False)
    assert float(unnormalised.log_prob(x_next)) == pytest.approx(surrogate, abs=1e-8)


def test_unnormalised_cps_is_the_surrogate():
    step = Step.flow(0.8, 0.6)
    transition = CPS(noise_level=0.8, log_prob="unnormalised")
    log_prob = flow(transition, double(0.5, -1), double(0.25, 2), step).log_prob(double(0.45, -1.3))
    assert float(log_prob) == pytest.approx(-0.0370614203, abs=1e-8)


# Parity: reference/flow_factory.md section 7, x = 1, v = -.5, noise .3; (step, kernel, mean, std, x', log-prob).
MIDDLE, FIRST = Step.flow(0.8, 0.7), Step.flow(1.0, 0.9, sigma_max=0.9)
FLOW_FACTORY = [
    (MIDDLE, FlowSDE(noise_level=0.7), 0.93975, 0.442719, 1.0725657, -0.1491182),
    (MIDDLE, DanceSDE(noise_level=0.7), 1.0224375, 0.2213594, 1.0888453, 0.5440290),
    (MIDDLE, CPS(noise_level=0.7, log_prob="unnormalised"), 0.7060140, 0.6237046, 0.8931254, -0.0350107),
    (FIRST, FlowSDE(noise_level=0.7), 0.805, 0.7, 1.015, -0.6072636),
]  # fmt: skip


@pytest.mark.parametrize(("step", "transition", "mean", "std", "x_next", "log_prob"), FLOW_FACTORY)
def test_vectors_of_flow_factory(step, transition, mean, std, x_next, log_prob):
    gaussian = flow(transition, double(1), double(-0.5), step)
    sample = gaussian.sample(double(0.3))
    assert float(gaussian.mean) == pytest.approx(mean, abs=1e-7)
    assert gaussian.std == pytest.approx(std, abs=2e-7)
    assert float(sample) == pytest.approx(x_next, abs=1e-7)
    assert float(gaussian.log_prob(sample)) == pytest.approx(log_prob, abs=1e-6)


def test_ode_of_flow_factory():
    assert float(flow(ODE(), double(1), double(-0.5), MIDDLE).mean) == pytest.approx(1.05)


# Parity: grids of section 1.1 and "Std per step" of section 11, to the digits printed there.
SD35_GRID = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
FLUX_GRID = [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]
STDS = [
    ("sd35", FlowSDE(noise_level=0.7), ".700 .743 .536 .446 .392 .353 .319 .282 .225 .0063"),
    ("sd35", CPS(noise_level=0.8), ".913 .869 .816 .752 .673 .573 .442 .264 .0085 0"),
    ("sd35", DanceSDE(noise_level=0.3), ".060 .065 .071 .078 .087 .097 .111 .130 .156 .028"),
    ("flux", FlowSDE(noise_level=0.9), ".900 .931 .646 .506 .401 .288"),
    ("flux", CPS(noise_level=0.8), ".860 .751 .621 .461 .260 0"),
]


def steps_of(model: str) -> list[Step]:
    if model == "sd35":
        scheduler = policy_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
        scheduler.set_timesteps(10)
    else:
        scheduler = policy_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
        scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)], mu=0.63)
    return [scheduler.interval(i, i + 1) for i in range(len(scheduler.timesteps))]


@pytest.mark.parametrize(("model", "grid"), [("sd35", SD35_GRID), ("flux", FLUX_GRID)])
def test_grids_of_the_reference(model, grid):
    steps = steps_of(model)
    assert [s.noise for s in steps] == pytest.approx(grid[:-1], abs=5.1e-5)
    assert [s.noise_next for s in steps] == pytest.approx(grid[1:], abs=5.1e-5)
    assert {s.sigma_max for s in steps} == {steps[0].noise_next}


@pytest.mark.parametrize(("model", "transition", "printed"), STDS)
def test_std_per_step_of_the_reference(model, transition, printed):
    found = [flow(transition, double(0), double(0), s).std for s in steps_of(model)]
    for std, text in zip(found, printed.split(), strict=True):
        digits = len(text.partition(".")[2])
        # Half a unit, and a little more: Dance's .08648 is printed as .087, rounded twice.
        assert std == pytest.approx(float(text), abs=0.55 * 10**-digits)


# Properties. Data are N(m, s0^2) per element; the exact velocity is linear in x, so that a step maps
# a normal to a normal whose moments follow from its mean at x = 0 and x = 1.
def exact(transition: Transition, step: Step, m: float, s0: float) -> tuple[float, float, float]:
    """Slope, offset and std of ``x_next`` given x, for the exact velocity of N(m, s0^2)."""
    x = double(0, 1)
    variance = (step.signal * s0) ** 2 + step.noise**2
    x0 = m + step.signal * s0**2 / variance * (x - step.signal * m)
    x1 = step.noise / variance * (x - step.signal * m)
    gaussian = flow(transition, x, x1 - x0, step)
    at_zero, at_one = gaussian.mean[0].tolist()
    return at_one - at_zero, at_zero, gaussian.std


def moments(transition: Transition, step: Step, m: float, s0: float) -> tuple[float, float]:
    """Mean and variance of ``x_next`` when x has the flow's own marginal."""
    slope, offset, std = exact(transition, step, m, s0)
    variance = (step.signal * s0) ** 2 + step.noise**2
    return slope * step.signal * m + offset, slope**2 * variance + std**2


def steps_below_one() -> st.SearchStrategy[Step]:
    sigma = st.floats(0.05, 0.99)
    return st.tuples(sigma, st.floats(0.0, 0.95)).map(lambda p: Step.flow(p[0], p[0] * p[1]))


@given(steps_below_one(), st.floats(0, 1), st.floats(-3, 3))
@settings(deadline=None)
def test_cps_keeps_the_noise_at_every_level(step, level, m):
    mean, variance = moments(CPS(noise_level=level), step, m, 0.0)
    assert mean == pytest.approx(step.signal_next * m, abs=1e-9)
    assert variance == pytest.approx(step.noise_next**2, abs=1e-9)


@given(steps_below_one(), st.floats(0, 1), st.floats(0.1, 2))
@settings(deadline=None)
def test_cps_never_has_more_variance_than_the_ode(step, level, s0):
    _, ode = moments(ODE(), step, 0.5, s0)
    assert moments(CPS(noise_level=level), step, 0.5, s0)[1] <= ode * (1 + 1e-9)


def test_cps_at_the_first_step_keeps_the_noise():
    assert moments(CPS(noise_level=0.7), Step.flow(1.0, 0.9, 0.9), 2.0, 0.0)[1] == pytest.approx(
        0.81
    )


@given(steps_below_one(), levels, st.sampled_from([FlowSDE, DanceSDE]))
@settings(deadline=None)
def test_noise_excess_of_an_sde_step(step, level, kind):
    g = level * (math.sqrt(step.noise / step.signal) if kind is FlowSDE else 1)
    excess = step.dt**2 * (g**2 / step.noise + g**4 / (4 * step.noise**2))
    mean, variance = moments(kind(noise_level=level), step, 1.5, 0.0)
    assert mean == pytest.approx(step.signal_next * 1.5)
    assert variance - step.noise_next**2 == pytest.approx(excess, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("level", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("kind", [FlowSDE, DanceSDE])
def test_an_sde_keeps_the_marginal_as_the_grid_is_refined(kind, level):
    m, s0, start, end = 2.0, 0.6, 0.9, 0.1

    def error(num_steps: int) -> float:
        sigmas = torch.linspace(start, end, num_steps + 1, dtype=torch.float64).tolist()
        mean, variance = (1 - start) * m, ((1 - start) * s0) ** 2 + start**2
        for sigma, sigma_next in pairwise(sigmas):
            slope, offset, std = exact(kind(noise_level=level), Step.flow(sigma, sigma_next), m, s0)
            mean, variance = slope * mean + offset, slope**2 * variance + std**2
        wanted = ((1 - end) * s0) ** 2 + end**2
        return abs(variance / wanted - 1) + abs(mean - (1 - end) * m)

    coarse, fine = error(100), error(400)
    assert fine < 0.01
    assert fine < coarse / 3


@given(steps_below_one(), levels, st.floats(0.5, 3.0), st.sampled_from([FlowSDE, DanceSDE, CPS]))
@settings(deadline=None)
def test_larger_noise_is_the_same_step_on_larger_states(step, level, scale, kind):
    """PRX in pixel space starts from noise of standard deviation 2."""
    x, v = double(0.3, -2), double(1.1, 0.4)
    wide = Step.flow(step.noise, step.noise_next, step.sigma_max, noise_scale=scale)
    transition = kind(noise_level=min(1.0, level))
    plain, scaled = flow(transition, x, v, step), flow(transition, scale * x, scale * v, wide)
    assert torch.allclose(scaled.mean, scale * plain.mean, rtol=1e-9)
    assert scaled.std == pytest.approx(scale * plain.std)


@given(steps_below_one(), levels)
@settings(deadline=None)
def test_dance_equals_flow_sde_of_the_same_diffusion(step, level):
    x, v = double(0.3, -2), double(1.1, 0.4)
    one = flow(FlowSDE(noise_level=level), x, v, step)
    g = level * math.sqrt(step.noise / step.signal)
    two = flow(DanceSDE(noise_level=g), x, v, step)
    assert torch.allclose(one.mean, two.mean, rtol=1e-9)
    assert one.std == pytest.approx(two.std)


@given(steps_below_one())
@settings(deadline=None)
def test_no_noise_is_the_ode(step):
    x, v = double(0.3, -2), double(1.1, 0.4)
    gaussian = flow(CPS(noise_level=0.0), x, v, step)
    assert gaussian.std == 0
    assert torch.allclose(gaussian.mean, flow(ODE(), x, v, step).mean, atol=1e-12)


@pytest.mark.parametrize("sigma", [1.0, 0.9999])
def test_first_step_of_flow_sde_has_the_noise_level_on_every_grid(sigma):
    for second in (0.99, 0.9, 0.5):
        gaussian = flow(
            FlowSDE(noise_level=0.7), double(1), double(0), Step.flow(sigma, second, second)
        )
        assert gaussian.std == pytest.approx(0.7, rel=0.01)


# Diffusion: DDIM and CPS on Stable Diffusion's schedule.
def stable_diffusion(**changes: object) -> DDIMScheduler:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**schedule, clip_sample=False, steps_offset=1, **changes)


def from_epsilon(x: Tensor, epsilon: Tensor, step: Step) -> Prediction:
    return Prediction((x - step.noise * epsilon) / step.signal, epsilon, epsilon)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_equals_diffusers(eta, to_one):
    theirs = stable_diffusion(set_alpha_to_one=to_one)
    theirs.set_timesteps(7)
    ours = policy_scheduler(theirs)
    ours.set_timesteps(7)
    x, epsilon, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for node, timestep in enumerate(theirs.timesteps):
        step = ours.interval(node, node + 1)
        wanted = theirs.step(epsilon, timestep, x, eta=eta, variance_noise=noise).prev_sample
        gaussian = DDIM(eta=eta)(x, from_epsilon(x, epsilon, step), step)
        assert torch.allclose(gaussian.sample(noise), wanted, atol=2e-5)


def test_ddim_with_eta_1_is_the_ddpm_posterior():
    alpha_bar, alpha_bar_next = 0.3, 0.55
    step = Step.diffusion(alpha_bar, alpha_bar_next)
    x, epsilon = double(0.4, -1.2), double(0.9, 0.1)
    prediction = from_epsilon(x, epsilon, step)
    gaussian = DDIM(eta=1.0)(x, prediction, step)
    alpha = alpha_bar / alpha_bar_next
    # arXiv:2006.11239, eq. 7.
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    mean = (
        math.sqrt(alpha_bar_next) * (1 - alpha) * prediction.x0
        + math.sqrt(alpha) * (1 - alpha_bar_next) * x
    ) / (1 - alpha_bar)
    assert gaussian.std**2 == pytest.approx(variance)
    assert torch.allclose(gaussian.mean, mean)


@pytest.mark.parametrize("transition", [DDIM(eta=0.0), CPS(noise_level=0.0)])
def test_no_noise_on_a_diffusion_path_is_the_ode(transition):
    step = Step.diffusion(0.3, 0.55)
    x, epsilon = double(0.4, -1.2), double(0.9, 0.1)
    prediction = from_epsilon(x, epsilon, step)
    gaussian = transition(x, prediction, step)
    assert gaussian.std == 0
    assert torch.allclose(gaussian.mean, ODE()(x, prediction, step).mean)


@pytest.mark.parametrize(("transition", "name"), [(FlowSDE(), "flow_sde"), (DanceSDE(), "dance_sde")])  # fmt: skip
def test_flow_transitions_refuse_a_diffusion_path(transition, name):
    step = Step.diffusion(0.3, 0.55)
    x = double(1)
    with pytest.raises(ValueError, match=f"{name} is defined on a rectified-flow.*'ddim'"):
        transition(x, from_epsilon(x, x, step), step)


def test_ddim_refuses_a_flow_path():
    with pytest.raises(ValueError, match=r"ddim is defined on a diffusion path.*'flow_sde'"):
        flow(DDIM(), double(1), double(1), Step.flow(0.8, 0.6))


# Densities.
@given(st.floats(0.01, 2), st.integers(0, 1000))
@settings(deadline=None)
def test_log_prob_is_the_mean_of_torchs_normal(std, seed):
    mean, x_next = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
    wanted = Normal(mean, std).log_prob(x_next).mean(dim=(1, 2, 3))
    assert torch.allclose(Gaussian(mean, std).log_prob(x_next), wanted, rtol=1e-4, atol=1e-5)


@given(st.floats(0.01, 2), st.integers(0, 1000))
@settings(deadline=None)
def test_kl_is_the_mean_of_torchs_kl(std, seed):
    mean, reference = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    wanted = kl_divergence(Normal(mean, std), Normal(reference, std)).mean(dim=(1, 2))
    ours = gaussian_kl(Gaussian(mean, std), Gaussian(reference, std))
    assert torch.allclose(ours, wanted, rtol=1e-4)


def test_log_prob_is_fp32_for_half_precision_states():
    mean, x_next = torch.full((1, 4096), 0.1).half(), torch.full((1, 4096), 0.35).half()
    log_prob = Gaussian(mean, 0.5).log_prob(x_next)
    assert log_prob.dtype == torch.float32
    wanted = Normal(mean.double(), 0.5).log_prob(x_next.double()).mean()
    assert float(log_prob) == pytest.approx(float(wanted), abs=1e-6)


def test_a_deterministic_step_has_no_log_prob():
    gaussian = flow(ODE(), double(1), double(1), Step.flow(0.8, 0.6))
    with pytest.raises(ValueError, match="deterministic step"):
        gaussian.log_prob(gaussian.mean)


@pytest.mark.parametrize("transition", [FlowSDE(), DanceSDE(), CPS()])
def test_gradients_flow_through_the_mean_only(transition):
    x, step = double(0.5, -1), Step.flow(0.8, 0.6)
    velocity = double(0.25, 2).requires_grad_()
    gaussian = flow(transition, x, velocity, step)
    # The sample itself depends on the velocity; its log-probability must not know.
    x_next = gaussian.sample(double(0.3, -0.8))
    (found,) = torch.autograd.grad(gaussian.log_prob(x_next), velocity)
    zero, one = flow(transition, x, double(0, 0), step), flow(transition, x, double(1, 1), step)
    slope = one.mean - zero.mean
    wanted = slope * (x_next - gaussian.mean).detach() / gaussian.std**2 / 2
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert found.abs().min() > 0


def test_the_linear_schedule_is_that_of_the_released_video_script():
    """Mean and std by the script's own expression, at sigma 0.8 of a grid whose second sigma is 0.9."""
    sigma, after, second = 0.8, 0.6, 0.9
    x, velocity = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.25, 2.0]])
    step = Step.flow(sigma, after, second)
    prediction = Prediction.from_velocity(x, velocity, sigma)
    found = FlowSDE(noise_level=1.0, schedule="linear")(x, prediction, step)
    g, dt = 0.72, after - sigma
    mean = (
        x * (1 + g**2 / (2 * sigma) * dt) + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    )
    torch.testing.assert_close(found.mean, mean)
    assert found.std == pytest.approx(g * 0.2**0.5)


# A state of signal 0.6 and noise 0.8, made of x0 = (1, -2) and x1 = (0.5, 3).
X0, X1 = double(1, -2), double(0.5, 3)


@pytest.mark.parametrize(
    ("predicted", "output"),
    [("noise", X1), ("data", X0), ("v", 0.6 * X1 - 0.8 * X0)],
)
def test_every_kind_of_output_gives_both_ends_of_the_path(predicted, output):
    step = Step.diffusion(0.36, 0.64, predicted)
    assert (step.signal, step.noise) == pytest.approx((0.6, 0.8))
    assert (step.signal_next, step.noise_next) == pytest.approx((0.8, 0.6))
    found = Prediction.from_output(0.6 * X0 + 0.8 * X1, output, step)
    torch.testing.assert_close(found.x0, X0)
    torch.testing.assert_close(found.x1, X1)
    assert found.output is output
    # Rounding may take alpha_bar above 1.
    assert Step.diffusion(0.36, 1 + 1e-9).noise_next == 0


def test_a_velocity_gives_both_ends_of_the_path():
    step = Step.flow(0.75, 0.5, sigma_max=0.9, noise_scale=2.0)
    assert (step.signal, step.signal_next, step.dt, step.sigma_max, step.noise_scale) == (0.25, 0.5, 0.25, 0.9, 2.0)  # fmt: skip
    found = Prediction.from_output(0.25 * X0 + 0.75 * X1, X1 - X0, step)
    torch.testing.assert_close(found.x0, X0)
    torch.testing.assert_close(found.x1, X1)
    ode = ODE()(0.25 * X0 + 0.75 * X1, found, step)
    torch.testing.assert_close(ode.mean, 0.5 * X0 + 0.5 * X1)


def test_densities_with_a_deviation_for_each_element():
    generator = torch.Generator().manual_seed(0)
    mean, other, x = torch.randn(3, 2, 3, 4, generator=generator)
    std, theirs = torch.rand(2, 1, 3, 4, generator=generator) + 0.5
    ours, reference = Gaussian(mean, std), Gaussian(other, theirs)
    wanted = Normal(mean, std).log_prob(x).mean(dim=(1, 2))
    torch.testing.assert_close(ours.log_prob(x), wanted)
    wanted = kl_divergence(Normal(mean, std), Normal(other, theirs)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(ours, reference), wanted)
    # One number on one side only.
    wanted = kl_divergence(Normal(mean, std), Normal(other, 0.7)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(ours, Gaussian(other, 0.7)), wanted)
    wanted = kl_divergence(Normal(mean, 0.7), Normal(other, theirs)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(Gaussian(mean, 0.7), reference), wanted)
    with pytest.raises(ValueError, match=r"equal standard deviations, got 0\.5 and 0\.7"):
        gaussian_kl(Gaussian(mean, 0.5), Gaussian(other, 0.7))
    torch.testing.assert_close(ours.sample(x), mean + std * x)


def test_flow_sde_caps_its_noise_only_where_it_would_be_infinite():
    """Grids that begin at 0.9999 are capped, too; 0.9995 is not."""
    for sigma, capped in ((1.0, 0.9), (0.9999, 0.9), (0.9995, 0.9995), (0.99, 0.99)):
        step = Step.flow(sigma, sigma - 0.1, sigma_max=0.9)
        found = flow(FlowSDE(noise_level=0.7), double(1), double(-0.5), step)
        assert found.std == pytest.approx(0.7 * math.sqrt(sigma / (1 - capped) * 0.1))


@pytest.mark.parametrize(
    ("transition", "problem"),
    [
        (ODE(), "injects no noise"),
        (FlowSDE(noise_level=0.0), "injects no noise"),
        (DDIM(eta=0.0), "injects no noise"),
        (CPS(noise_level=-0.1), "injects no noise"),
        (CPS(noise_level=1.01), r"transition.noise_level must be in \(0, 1\] for 'cps', got 1.01"),
        (DDIM(eta=1.01), r"transition.eta must be in \(0, 1\] for 'ddim', got 1.01"),
        (CPS(noise_level=1.0), ""),
        (DDIM(eta=1.0), ""),
        (FlowSDE(noise_level=1.5), ""),
        (DanceSDE(noise_level=0.01), ""),
        (lambda x, prediction, step: Gaussian(x, 1.0), ""),
    ],
)
def test_transitions_that_cannot_be_trained_on_are_refused(transition, problem):
    if not problem:
        require_noise(transition)
        return
    with pytest.raises(ValueError, match=problem):
        require_noise(transition)


def test_paths_of_transitions():
    for transition in (FlowSDE(), DanceSDE(), CPS(), ODE()):
        require_path(transition, "flow")
    for transition in (DDIM(), CPS(), ODE()):
        require_path(transition, "diffusion")


def test_ddim_from_pure_noise_and_to_the_data():
    """To the data there is no noise; from pure noise the posterior's deviation is that of the next state."""
    x = double(0.5, -1)
    to_data = DDIM()(x, Prediction(X0, X1, X1), Step.diffusion(0.36, 1.0))
    assert to_data.std == 0
    torch.testing.assert_close(to_data.mean, X0)
    from_noise = DDIM(eta=0.5)(x, Prediction(X0, X1, X1), Step.diffusion(0.0, 0.64))
    assert from_noise.std == pytest.approx(0.5 * 0.6)
    torch.testing.assert_close(from_noise.mean, 0.8 * X0 + math.sqrt(0.36 - 0.09) * X1)
    # A step of no length, and one from the data, add nothing.
    assert DDIM()(x, Prediction(X0, X1, X1), Step.diffusion(0.36, 0.36)).std == 0
    assert DDIM()(x, Prediction(X0, X1, X1), Step.diffusion(1.0, 1.0)).std == 0


# A level for each step, and Stepwise-Flow-GRPO's noise.


def test_calibrated_levels_are_those_of_the_step():
    x, v = double(0.5), double(-1.0)
    levels = (0.9, 0.4, 0.2)
    for index, level in enumerate(levels):
        step = Step.flow(0.8, 0.6, index=index)
        one = flow(CalibratedSDE(levels=levels), x, v, step)
        other = flow(DanceSDE(noise_level=level), x, v, step)
        assert one.std == other.std == pytest.approx(level * math.sqrt(0.2))
        assert torch.equal(one.mean, other.mean)
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"has 3 numbers, but step {index} is stochastic"):
            flow(CalibratedSDE(levels=levels), x, v, Step.flow(0.8, 0.6, index=index))
    # The index says where a step is; steps are equal by their weights.
    assert Step.flow(0.8, 0.6, index=1) == Step.flow(0.8, 0.6)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stepwise_noise_is_the_published_formula_and_keeps_the_variance(eta):
    x, v, (s, e) = double(0.5), double(-1.0), (0.7, 0.4)
    found = flow(StepwiseSDE(eta=eta), x, v, Step.flow(s, e))
    std = eta * e * math.sqrt(1 - s)
    assert found.std == pytest.approx(std)
    x0, x1 = 0.5 + s, 0.5 - (1 - s)
    assert found.mean.item() == pytest.approx((1 - e) * x0 + math.sqrt(e**2 - std**2) * x1)
    # A predicted noise of variance 1 and the injected one together have the weight e.
    unit = flow(StepwiseSDE(eta=eta), double(s), double(1.0), Step.flow(s, e))  # x0 = 0, x1 = 1
    assert unit.mean.item() ** 2 + unit.std**2 == pytest.approx(e**2)
    with pytest.raises(ValueError, match="no noise at sigma = 1"):
        flow(StepwiseSDE(eta=eta), x, v, Step.flow(1.0, 0.8))
    with pytest.raises(ValueError, match="stepwise_sde is defined on a rectified-flow path"):
        StepwiseSDE()(x, Prediction(x, x, x), Step.diffusion(0.3, 0.6))
