"""The second-order solver: its order, diffusers' numbers, and where a policy takes it."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from flowgrpo.core.solvers import SecondOrder, Solver
from flowgrpo.core.transitions import ODE, Prediction, Step
from flowgrpo.data.prompts import Prompt
from tests.conftest import MakePolicy, noise_of, sampling_of, transition_of

MEAN, STD = 1.5, 0.4


def exact(x: Tensor, step: Step) -> Prediction:
    """What a perfect model says where data are N(MEAN, STD^2)."""
    variance = (step.signal * STD) ** 2 + step.noise**2
    pull = (x - step.signal * MEAN) / variance
    x0, x1 = MEAN + step.signal * STD**2 * pull, step.noise * pull
    return Prediction(x0, x1, x1 - x0 if step.path == "flow" else x1)


def steps_of(path: str, number: int) -> list[Step]:
    if path == "flow":
        # Short of the ends, where no solver has its order.
        grid = torch.linspace(0.95, 0.05, number + 1, dtype=torch.float64).tolist()
        return [Step.flow(a, b) for a, b in pairwise(grid)]
    angles = torch.linspace(1.5, 0.1, number + 1, dtype=torch.float64).tolist()
    return [Step.diffusion(math.cos(a) ** 2, math.cos(b) ** 2) for a, b in pairwise(angles)]


def error(path: str, number: int, second_order: bool) -> float:
    """Distance to the exact flow: a state keeps its quantile."""
    steps = steps_of(path, number)
    z = torch.tensor([[-1.0, 0.3, 2.0]], dtype=torch.float64)

    def state(signal: float, noise: float) -> Tensor:
        return signal * MEAN + math.hypot(signal * STD, noise) * z

    solver = SecondOrder() if second_order else ODE()
    x = state(steps[0].signal, steps[0].noise)
    for step in steps:
        x = solver(x, exact(x, step), step).mean
    return float((x - state(steps[-1].signal_next, steps[-1].noise_next)).abs().max())


@pytest.mark.parametrize("path", ["flow", "diffusion"])
@pytest.mark.parametrize(("second_order", "order"), [(False, 1), (True, 2)])
def test_errors_fall_with_the_solvers_order(path, second_order, order):
    coarse, fine = error(path, 80, second_order), error(path, 160, second_order)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)
    assert error(path, 20, True) < error(path, 20, False) / 3


def test_numbers_are_those_of_diffusers():
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
        final_sigmas_type="zero", algorithm_type="dpmsolver++", solver_order=2,
        solver_type="midpoint", lower_order_final=True,
    )  # fmt: skip
    scheduler.set_timesteps(7)
    torch.manual_seed(0)
    x = wanted = torch.randn(2, 5)
    solver = SecondOrder()
    sigmas = scheduler.sigmas.tolist()
    for t, (sigma, following) in zip(scheduler.timesteps, pairwise(sigmas), strict=True):
        step = Step.flow(sigma, following)
        wanted = scheduler.step(exact(wanted, step).output, t, wanted).prev_sample
        x = solver(x, exact(x, step), step).mean
        torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-4)


def test_without_a_past_it_is_the_ode_step():
    x = torch.tensor([[0.5, -1.0]])
    ends = [(0.8, 0.6), (1.0, 0.7), (0.3, 0.0), (1.0, 0.0)]
    for step in [Step.flow(a, b) for a, b in ends] + steps_of("diffusion", 5):
        found = SecondOrder()(x, exact(x, step), step).mean
        torch.testing.assert_close(found, ODE()(x, exact(x, step), step).mean)
    # A step from pure noise is infinitely long, and says nothing about what follows.
    solver, first, second = SecondOrder(), Step.flow(1.0, 0.7), Step.flow(0.7, 0.5)
    x = solver(x, exact(x, first), first).mean
    ode = ODE()(x, exact(x, second), second).mean
    torch.testing.assert_close(solver(x, exact(x, second), second).mean, ode)


def test_continued_steps_are_those_of_the_released_flash():
    """States of MixGRPO's ``run_sample_step`` (e5cdd6a) with this model, window and second order after it."""
    at_last, after_window = [[0.8791290521621704, -1.2690457105636597, 0.31528234481811523]], [[1.012823462486267, -0.3545880615711212, -0.016650140285491943]]  # fmt: skip
    wanted = [[[1.176689624786377, 0.21062518656253815, 0.4423128068447113]], [[1.6015113592147827, 1.4206016063690186, 1.4639885425567627]]]  # fmt: skip
    window, *after = (Step.flow(a, b) for a, b in pairwise([0.9, 5 / 6, 0.5769230723381042, 0.0]))
    solver = SecondOrder()
    solver.observe(exact(torch.tensor(at_last), window), window)
    x = torch.tensor(after_window)
    for step, state in zip(after, wanted, strict=True):
        x = solver(x, exact(x, step), step).mean
        torch.testing.assert_close(x, torch.tensor(state), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_policy_takes_it_after_the_last_stochastic_step(make_policy: MakePolicy, name: str):
    policy = make_policy(name, sampling=sampling_of(name, num_steps=5), weights=None)
    prompts = [Prompt("a cube")] * 2

    def walk(solver: Solver, stochastic: list[int]) -> list[Tensor]:
        (rollout,) = policy.run(
            prompts, noise_of(0, 1), stochastic=stochastic, transition=transition_of(name),
            record=range(5), decode=False, solver=solver,
        )  # fmt: skip
        return [v.x_next for v in rollout.records]

    plain, better = walk("euler", [1]), walk("dpm_2m", [1])
    # Steps 0 to 1 are as ever; step 2 has no past; 3 looks back; 4 starts elsewhere.
    for step in range(3):
        torch.testing.assert_close(better[step], plain[step], atol=1e-5, rtol=1e-5)
    assert (better[3] - plain[3]).abs().max() > 1e-3
    continued = walk("dpm_2m_continued", [1])
    assert all(torch.equal(continued[step], better[step]) for step in range(2))
    assert (continued[2] - plain[2]).abs().max() > 1e-3
    # Nothing is remembered from one call to the next.
    for one, two in zip(better, walk("dpm_2m", [1]), strict=True):
        assert torch.equal(one, two)
    free, euler = walk("dpm_2m", []), walk("euler", [])
    first_free = next(i for i in range(5) if not torch.allclose(free[i], euler[i], atol=1e-4))
    assert first_free == (2 if name == "sd3" else 1)  # a flow's first step is from pure noise
