"""Samples a policy's model with a scheduler of diffusers, in place of the policy's own sampler.

The pipeline runs its own call with that scheduler, as users do after
``pipe.scheduler = Scheduler.from_config(pipe.scheduler.config)``. Nothing is recorded.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.text import shorten
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.arguments import (
    batches,
    generators_for,
    is_unrelated,
    keep_size,
    own_arguments,
)
from flowgrpo.policy.pipeline import PipelinePolicy
from flowgrpo.policy.placement import as_media
from flowgrpo.policy.rollout import CallResult
from flowgrpo.policy.scheduler import is_flow
from flowgrpo.policy.settings import Sampling
from flowgrpo.policy.step_plan import StepPlan

SHIPPED = "shipped"
"""Stands for the scheduler that the pipeline came with."""
FLOW_MATCHING = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
"""Schedulers that are made for rectified-flow models."""
LEAVING_NOISE = ("DEISMultistepScheduler", "SASolverScheduler")
"""Classes whose grid of a flow ends twice at its smallest noise and not at 0, in diffusers 0.42: their
pictures keep noise (0.1 of its standard deviation with 28 steps and shift 3)."""
CONTINUOUS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
"""Classes that give the denoiser noise levels in place of the timesteps that it was trained with."""


def with_other_scheduler(
    policy: PipelinePolicy,
    prompts: Sequence[Prompt],
    noise: SampleNoise,
    sampling: Sampling,
    name: str,
) -> Float[Tensor, "batch *media"]:
    """Media of the pipeline with another scheduler, from the same initial noise as the policy's own.

    Args:
        policy: The policy; its scheduler is in place again afterwards.
        prompts: One prompt per sample.
        noise: One random stream per sample, for the initial latents and for the draws of a stochastic
            scheduler.
        sampling: Arguments of the pipeline's call.
        name: Class of the scheduler in diffusers, or ``shipped``.

    Raises:
        ValueError: If the scheduler or the sampling does not fit the model; the message says why.
    """
    if sampling.shift is not None or sampling.base_after is not None:
        key = "shift" if sampling.shift is not None else "base_after"
        raise ValueError(
            f"sampler {name}: sampling.{key} belongs to flowgrpo's own sampler; remove it, or use the sampler 'ode'"
        )
    scheduler = compatible(policy.shipped_scheduler, name)
    if sampling.sigmas and getattr(scheduler.config, "use_flow_sigmas", False):
        raise ValueError(
            f"sampler {name} makes a grid of its own, and sampling.sigmas would be ignored; remove it, or use a sampler "
            f"of {', '.join(FLOW_MATCHING)}"
        )
    done = []
    for rows in batches(prompts, policy.batch_size):
        part = slice(rows.start, rows.stop)
        done.append(_media(policy, prompts[part], noise[part], sampling, scheduler))
    policy.num_decodes += len(prompts)
    return torch.cat(done)


def compatible(shipped: SchedulerMixin, name: str) -> SchedulerMixin:
    """A scheduler of a class of diffusers, with the configuration of the shipped one.

    For diffusion models, ``compatibles`` of the shipped scheduler says which classes can take its place.
    For rectified-flow models these are the flow-matching schedulers and those that have
    ``use_flow_sigmas``, which is then on, with the shift of the shipped one.

    Raises:
        ValueError: If there is no such class, or it cannot take the place of the shipped one.
    """
    if name in (SHIPPED, type(shipped).__name__):
        return type(shipped).from_config(shipped.config)
    own, known = type(shipped).__name__, compatible_names(shipped)
    if name not in known:
        kind = "a rectified-flow model" if is_flow(shipped) else "a diffusion model"
        raise ValueError(
            f"sampler {name} cannot take the place of this model's {own}, which is made for {kind}; those that may, if the pipeline's call accepts them: "
            f"{', '.join(known)}"
        )
    kind, config = getattr(diffusers, name), dict(shipped.config)
    if is_flow(shipped):
        shift = config.get("shift", config.get("flow_shift")) or 1.0
        config |= {"shift": shift}
        if name not in FLOW_MATCHING:
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            config |= {**flow, "flow_shift": shift}
    try:
        return kind.from_config(config)
    except Exception as error:
        raise ValueError(
            f"sampler {name} cannot be made from the configuration of this model's {own}: {_first_line(error)}"
        ) from error


def compatible_names(shipped: SchedulerMixin) -> list[str]:
    """The classes of diffusers that can take the place of a scheduler, itself included, by name."""
    found = {type(shipped).__name__}
    if is_flow(shipped):
        others = [k.name for k in KarrasDiffusionSchedulers] + ["SASolverScheduler"]
        found |= {n for n in FLOW_MATCHING if hasattr(diffusers, n)}
        found |= {n for n in others if "use_flow_sigmas" in _settings(n)} - {*LEAVING_NOISE}
    else:
        found |= {c.__name__ for c in shipped.compatibles} - {*CONTINUOUS}
        # Some of them exist as a placeholder that says which package is missing.
        found = {n for n in found if n == type(shipped).__name__ or _settings(n)}
    return sorted(found)


def _settings(name: str) -> set[str]:
    """The settings of a scheduler's class; none if its class needs a package that is not installed."""
    kind = getattr(diffusers, name, None)
    if kind is None or not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        return set()
    return set(inspect.signature(kind).parameters)


def _media(
    policy: PipelinePolicy,
    prompts: Sequence[Prompt],
    noise: SampleNoise,
    sampling: Sampling,
    scheduler: SchedulerMixin,
) -> Float[Tensor, "batch *media"]:
    """Call the pipeline once with a scheduler.

    Raises:
        ValueError: If its call fails, with its reason.
    """
    pipeline = policy.pipeline
    call = inspect.unwrap(type(pipeline).__call__)  # which the policy's wrappers do not see

    def run(arguments: dict[str, Any]) -> CallResult:
        generators = generators_for(arguments, noise.initial())
        output = call(
            pipeline, **arguments, generator=generators, output_type="pt", return_dict=False
        )
        return CallResult(as_media(output, pipeline), [], None)

    arguments = sampling.arguments() | own_arguments(prompts)
    arguments = keep_size(arguments, inspect.signature(call).parameters)
    policy.check_sampling(sampling, prompts[:1])
    with _replaced(policy, scheduler), torch.no_grad():
        try:
            media = policy._learned.calling(run, arguments, len(prompts)).output
        except Exception as error:
            if is_unrelated(error):
                raise
            raise ValueError(
                f"{type(pipeline).__name__} cannot be sampled with {type(scheduler).__name__}: {_first_line(error)}"
            ) from error
    if not media.isfinite().all():
        raise ValueError(
            f"{type(pipeline).__name__} with {type(scheduler).__name__} gives values that are not finite; use more "
            "steps, or another sampler"
        )
    return media.float().cpu()


@contextmanager
def _replaced(policy: PipelinePolicy, scheduler: SchedulerMixin) -> Iterator[None]:
    """Put a scheduler into the pipeline; the random numbers that it draws without a generator are fixed."""
    policy.scheduler.begin(StepPlan())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.pipeline.scheduler = scheduler
        try:
            yield
        finally:
            policy.pipeline.scheduler = policy.scheduler
            policy.scheduler.begin(StepPlan())  # drops the tensors of the call


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip() or type(error).__name__
    return shorten(text.splitlines()[0], 300)
