"""The policy's grid is the shipped scheduler's, and without noise it walks there as diffusers does."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.scheduler import FlowPolicyScheduler, first_order, policy_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = BETAS | {"timestep_spacing": "trailing"}
ZERO_SNR = TRAILING | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
DATA = 0.7
NUM = 7
PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", LEADING),
    ("DDIM", TRAILING),
    ("DDIM", LEADING | {"prediction_type": "sample"}),
    ("DDIM", ZERO_SNR),
    ("DDIM", LEADING | {"beta_schedule": "squaredcos_cap_v2"}),
    ("EulerDiscrete", BETAS),
    ("EulerDiscrete", LEADING),
    ("EulerDiscrete", TRAILING),
    ("EulerDiscrete", ZERO_SNR),
    ("EulerDiscrete", LEADING | {"use_karras_sigmas": True}),
    ("EulerDiscrete", LEADING | {"use_exponential_sigmas": True}),
    ("EulerDiscrete", LEADING | {"use_beta_sigmas": True}),
    ("EulerDiscrete", LEADING | {"interpolation_type": "log_linear"}),
    ("EulerDiscrete", LEADING | {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscrete", LEADING | {"prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_karras_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_beta_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "shift_terminal": 0.1}),
]
"""Schedulers that take plain steps as they are shipped."""
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("PNDM", LEADING | {"skip_prk_steps": True}),
    ("DDPM", LEADING | {"clip_sample": False}),
    ("EulerAncestralDiscrete", LEADING),
    ("HeunDiscrete", LEADING),
    ("LMSDiscrete", LEADING),
    ("KDPM2Discrete", LEADING),
    ("DPMSolverMultistep", BETAS),
    ("DPMSolverMultistep", LEADING | {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", TRAILING | {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistep", LEADING | {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", ZERO_SNR),
    ("DPMSolverSinglestep", BETAS),
    ("DEISMultistep", LEADING),
    ("UniPCMultistep", LEADING),
    ("UniPCMultistep", LEADING | {"use_karras_sigmas": True, "predict_x0": False}),
    ("UniPCMultistep", FLOW),
    ("UniPCMultistep", FLOW | {"use_karras_sigmas": True}),
    ("DPMSolverMultistep", FLOW),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
]
"""Schedulers whose steps are of higher order or random."""


def made(name: str, config: dict[str, Any]) -> SchedulerMixin:
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def says(x: Tensor, timestep: Tensor, kind: str, bars: Tensor | None) -> Tensor:
    """A model that takes the timestep it is told for true and always sees the same data."""
    if bars is None:
        sigma = float(timestep) / 1000
        return (x - DATA) / max(sigma, 1e-4)
    low, part = int(timestep), float(timestep) % 1
    bar = float(bars[low])
    if part:
        # Between two timesteps the log of noise over signal is interpolated, as by diffusers.
        logs = (1 / bars[low : low + 2].double() - 1).log()
        bar = float(1 / (1 + (logs[0] + part * (logs[1] - logs[0])).exp()))
    signal, noise = bar**0.5, (1 - bar) ** 0.5
    epsilon = (x - signal * DATA) / noise
    if kind == "sample":
        return torch.full_like(x, DATA)
    return epsilon if kind == "epsilon" else signal * epsilon - noise * DATA


def walked(scheduler: Any, model: SchedulerMixin) -> Tensor:
    """The last state of a pipeline's loop, from noise of the size that the scheduler asks for."""
    scheduler.set_timesteps(NUM)
    bars, kind = getattr(model, "alphas_cumprod", None), model.config.get("prediction_type", "")
    flow = isinstance(policy_scheduler(model), FlowPolicyScheduler)
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(says(seen, t, kind, None if flow else bars), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("name", "config"), PLAIN, ids=str)
def test_plain_samplers_are_walked_as_shipped(name: str, config: dict[str, Any]) -> None:
    shipped = made(name, config)
    ours = walked(policy_scheduler(shipped), shipped)
    # A state that ends with a little noise (sigma_min) is decoded by Euler at a size 4e-4 larger.
    torch.testing.assert_close(ours, walked(shipped, shipped), atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize(("name", "config"), OTHERS, ids=str)
def test_other_samplers_are_walked_as_diffusers_plain_steps_do(
    name: str, config: dict[str, Any]
) -> None:
    shipped = made(name, config)
    ours, plain = policy_scheduler(shipped), first_order(shipped)
    found = walked(ours, shipped)
    torch.testing.assert_close(found, walked(plain, shipped), atol=1e-4, rtol=1e-4)
    # A model that knows the data leads there on every grid whose timesteps are its sigmas.
    assert (found - DATA).abs().max() < 0.15


@pytest.mark.parametrize(("name", "config"), [*PLAIN, *OTHERS], ids=str)
def test_the_grid_is_the_shipped_one(name: str, config: dict[str, Any]) -> None:
    shipped = made(name, config)
    ours = policy_scheduler(shipped)
    ours.set_timesteps(NUM)
    shipped.set_timesteps(NUM)
    # Samplers of second order visit nodes twice.
    wanted = list(dict.fromkeys(shipped.timesteps.tolist()))
    found = ours.timesteps.tolist()
    if name not in ("KDPM2Discrete", "FlowMatchHeunDiscrete"):
        assert found == pytest.approx(wanted, abs=1e-3)
    steps = [ours.interval(i, i + 1) for i in range(len(found))]
    assert all(a.noise > a.noise_next for a in steps)
    assert steps[0].noise > 0.97
    assert steps[-1].noise_next < 0.05


FOUR = [999, 749, 499, 249]
"""Timesteps of SDXL-Lightning and SDXL-Turbo with four steps, which is trailing spacing."""


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "EulerAncestralDiscrete"]
)
def test_own_timesteps_make_the_grid(name: str) -> None:
    """A base model with leading spacing gets the grid of a model that was distilled to four steps."""
    own, distilled = (policy_scheduler(made(name, c)) for c in (LEADING, TRAILING))
    own.set_timesteps(timesteps=FOUR)
    distilled.set_timesteps(4)
    assert own.timesteps.tolist() == distilled.timesteps.tolist() == FOUR
    for i in range(4):
        found, wanted = own.interval(i, i + 1), distilled.interval(i, i + 1)
        # The last step of DDIM with leading spacing ends at alpha_bar of timestep 0.
        assert found.noise == pytest.approx(wanted.noise, abs=1e-6)
        assert found.noise_next == pytest.approx(wanted.noise_next, abs=0.05 if i == 3 else 1e-6)


def test_a_grid_that_the_sampler_does_not_take_is_refused() -> None:
    with pytest.raises(
        UnsupportedPipelineError, match=r"takes no timesteps; use sampling\.sigmas or"
    ):
        policy_scheduler(made("UniPCMultistep", LEADING)).set_timesteps(timesteps=FOUR)
    with pytest.raises(UnsupportedPipelineError, match="must be below 1000, got 1000"):
        policy_scheduler(made("DDIM", LEADING)).set_timesteps(timesteps=[1000, 500])


def test_a_model_distilled_for_lcm_trains_on_ddim() -> None:
    """As the refusal of its own sampler advises."""
    lcm = made("LCM", BETAS)
    with pytest.raises(UnsupportedPipelineError, match=r"DDIMScheduler\.from_config"):
        policy_scheduler(lcm)
    lcm.set_timesteps(4)
    ours = policy_scheduler(diffusers.DDIMScheduler.from_config(lcm.config))
    ours.set_timesteps(timesteps=lcm.timesteps.tolist())
    assert ours.timesteps.tolist() == lcm.timesteps.tolist() == [999, 759, 499, 259]
    assert [round(ours.interval(i, i + 1).noise ** 2, 4) for i in range(4)] == [
        round(1 - float(lcm.alphas_cumprod[t]), 4) for t in lcm.timesteps
    ]
    assert ours.interval(3, 4).noise_next == 0


def test_a_path_of_data_and_noise_at_a_timestep() -> None:
    ours = policy_scheduler(made("EulerDiscrete", LEADING))
    ours.set_timesteps(NUM)
    data, noise = torch.full((2, 1, 2, 2), 3.0), torch.ones(2, 1, 2, 2)
    step = ours.interval(2, 3)
    noised = ours.add_noise(data, noise, ours.timesteps[[2, 2]])
    torch.testing.assert_close(noised, step.signal * data + step.noise * noise)


@pytest.mark.parametrize("name", ["LCM", "TCD", "SCM", "FlowMatchLCM"])
def test_samplers_that_jump_to_the_data_are_refused(name: str) -> None:
    with pytest.raises(
        UnsupportedPipelineError, match=f"{name}Scheduler cannot be a policy: its sampler jumps"
    ):
        first_order(made(name, {}))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(
        UnsupportedPipelineError, match=r"EDMEulerScheduler cannot be a policy: only rectified-flow"
    ):
        first_order(made("EDMEuler", {}))
