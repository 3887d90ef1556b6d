"""Diffusers' first-order deterministic counterpart of a shipped scheduler.

The counterpart makes the policy's grid, so a pipeline is sampled at the noise levels for which it was
shipped. Without noise, the policy's steps equal the counterpart's steps. Only the order of the shipped
solver is reduced to one, because a step of higher order depends on more than the current state.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from flowgrpo.policy.call import UnsupportedPipelineError

REFUSED = ("LCM", "TCD", "Consistency", "DiffusionForcing", "SCM")
"""Parts of the names of schedulers that predict the data and add fresh noise to it. Such a step does
not draw from a Gaussian around the current state."""
FIRST_ORDER = {
    "solver_order": 1,
    "algorithm_type": "dpmsolver++",
    "predict_x0": True,
    # UniPC corrects a state with the model's output at the next one.
    "disable_corrector": list(range(10000)),
    "thresholding": False,
}
"""Settings that reduce a multistep solver of diffusers to order one."""


def first_order(shipped: SchedulerMixin) -> SchedulerMixin:
    """The first-order deterministic scheduler of diffusers on the grid of a shipped scheduler.

    Multistep solvers (DPM-Solver++, UniPC, DEIS) keep their class at order one. Schedulers whose states
    grow with the noise (Euler, Heun, LMS) become Euler. Other diffusion schedulers become DDIM, and
    other rectified-flow schedulers become flow-matching Euler.

    Raises:
        UnsupportedPipelineError: If the steps of the shipped scheduler have no density, or its noise
            schedule is unknown.
    """
    name, config = type(shipped).__name__, dict(shipped.config)
    if any(word in name for word in REFUSED):
        raise UnsupportedPipelineError(
            f"a pipeline with {name} cannot be a policy: its sampler jumps to the data and adds fresh "
            "noise, so its steps have no density to optimise"
        )
    if isinstance(shipped, FlowMatchEulerDiscreteScheduler) or name.startswith("FlowMatch"):
        return FlowMatchEulerDiscreteScheduler.from_config({**config, "stochastic_sampling": False})
    if is_flow(shipped) and "solver_order" not in config:
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"],
            shift=config.get("flow_shift") or 1.0,
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
        )
    if not hasattr(shipped, "alphas_cumprod"):
        raise UnsupportedPipelineError(
            f"a pipeline with {name} cannot be a policy: only rectified-flow schedulers and diffusion "
            "schedulers with alphas_cumprod are supported"
        )
    if "solver_order" in config:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        changes = FIRST_ORDER | (flow if is_flow(shipped) else {})
        return type(shipped).from_config(
            {**config, **{k: v for k, v in changes.items() if k in config}}
        )
    if hasattr(shipped, "sigmas"):
        return EulerDiscreteScheduler.from_config(config)
    return _ddim(shipped, config)


def is_flow(shipped: SchedulerMixin) -> bool:
    """Whether a scheduler is made for rectified-flow models."""
    config = shipped.config
    return (
        type(shipped).__name__.startswith("FlowMatch")
        or isinstance(shipped, FlowMatchEulerDiscreteScheduler)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _ddim(shipped: SchedulerMixin, config: dict[str, Any]) -> DDIMScheduler:
    """DDIM with the noise schedule of the shipped scheduler.

    DDIM clips the predicted data by default. Latents must not be clipped, so clipping stays on only if
    the shipped scheduler has it on.
    """
    scheduler = DDIMScheduler.from_config(
        {**config, "clip_sample": bool(config.get("clip_sample", False)), "thresholding": False}
    )
    # CogVideoX rescales its alphas; the model was trained on the rescaled ones.
    scheduler.alphas_cumprod = shipped.alphas_cumprod.clone()
    if hasattr(shipped, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.as_tensor(shipped.final_alpha_cumprod).clone()
    return scheduler
