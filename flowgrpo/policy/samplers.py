"""Which of diffusers' own samplers takes first-order deterministic steps as a shipped scheduler would.

Its grid is the policy's grid: a pipeline is sampled where it was meant to be sampled, and without
noise as diffusers itself would. Only the order of its steps is reduced to one.
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from flowgrpo.policy.calling import UnsupportedPipelineError

REFUSED = ("LCM", "TCD", "Consistency", "DiffusionForcing", "SCM")
"""Schedulers of samplers that jump to the data and add noise anew; their steps are no transitions."""
FIRST_ORDER = {
    "solver_order": 1,
    "algorithm_type": "dpmsolver++",
    "predict_x0": True,
    # UniPC corrects a state with what the model says of the next one.
    "disable_corrector": list(range(10000)),
    "thresholding": False,
}
"""Settings with which a multistep solver of diffusers takes plain steps."""


def first_order(shipped: SchedulerMixin) -> SchedulerMixin:
    """Diffusers' own first-order deterministic sampler on the grid of a shipped scheduler.

    A multistep solver (DPM-Solver++, UniPC, DEIS) stays what it is, at order one. Schedulers whose
    states grow with the noise (Euler, Heun, LMS) become Euler; all others on a diffusion path become
    DDIM, and all on a rectified flow become flow-matching Euler.

    Raises:
        UnsupportedPipelineError: If its steps are no transitions, or its noise schedule is unknown.
    """
    name, config = type(shipped).__name__, dict(shipped.config)
    if any(word in name for word in REFUSED):
        raise UnsupportedPipelineError(
            f"a pipeline with {name} cannot be a policy: its sampler jumps to the data and adds noise "
            "anew, so that its steps have no density to optimise"
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
            "schedulers with alphas_cumprod are known"
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
    """Whether a scheduler is for a model of a rectified flow."""
    config = shipped.config
    return (
        type(shipped).__name__.startswith("FlowMatch")
        or isinstance(shipped, FlowMatchEulerDiscreteScheduler)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _ddim(shipped: SchedulerMixin, config: dict[str, Any]) -> DDIMScheduler:
    """DDIM on the shipped one's noise schedule.

    DDIM clips the predicted data unless told otherwise; latents must not be clipped, and only a
    scheduler that was shipped with clipping keeps it.
    """
    scheduler = DDIMScheduler.from_config(
        {**config, "clip_sample": bool(config.get("clip_sample", False)), "thresholding": False}
    )
    # CogVideoX rescales its own; the numbers are what the model was trained on.
    scheduler.alphas_cumprod = shipped.alphas_cumprod.clone()
    if hasattr(shipped, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.as_tensor(shipped.final_alpha_cumprod).clone()
    return scheduler
