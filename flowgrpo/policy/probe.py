"""Checks before training that a pipeline makes the requested sizes, and that no step dominates the gradient."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import median

import torch

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import Prediction, Transition
from flowgrpo.data.prompts import Prompt
from flowgrpo.losses.clipped import step_gain
from flowgrpo.policy.arguments import is_unrelated
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.pipeline import PipelinePolicy
from flowgrpo.policy.settings import Sampling
from flowgrpo.policy.weights import InitialNoise

Size = tuple[int | None, int | None, int | None]
MULTIPLES = (8, 16, 32, 64)
"""Image sides are multiples of one of these numbers, by model."""
MAX_SCALE = 50.0
"""Largest allowed ratio of a step's gradient to the median of all steps. With Flow-SDE on ten steps of
SD3.5, gradients differ by a factor of 31."""
STRIDES = (4, 8, 6, 1)
"""Videos have one frame more than a multiple of one of these numbers, by model."""


def check_sizes(policy: PipelinePolicy, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Decode one sample of each size among the prompts, and compare its size with the requested one.

    Some pipelines refuse a size that their VAE cannot decode; others round it with a warning. The sample
    is decoded after a single step, because noise decodes as well as an image.

    Raises:
        ValueError: With the requested size, and the nearest size that the pipeline makes.
        OverflowError: If the denoiser's output is not finite in its precision (FLUX in fp16).
    """
    for prompt in {p.size: p for p in prompts}.values():
        requested, got = _requested(prompt, sampling), _made(policy, prompt, sampling)
        if requested == (None, None, None):
            if isinstance(got, str):
                raise ValueError(f"{type(policy.pipeline).__name__} cannot be called: {got}")
            continue
        if isinstance(got, str) or not _agree(requested, got):
            nearest = _nearest(policy, prompt, requested, sampling)
            advice = f"; the nearest size that it makes is {_words(nearest)}" if nearest else ""
            found = got if isinstance(got, str) else f"it makes {_words(got)}"
            raise ValueError(
                f"{type(policy.pipeline).__name__} cannot make {_words(requested)}: {found}{advice}"
            )


def edited_as_squares(
    policy: PipelinePolicy, prompts: Sequence[Prompt], sampling: Sampling
) -> Sequence[Prompt]:
    """Prompts whose image a pipeline edits to a square, because they have no size.

    FLUX Kontext does, where other editing pipelines take the size of the image.
    """
    call = inspect.signature(inspect.unwrap(type(policy.pipeline).__call__)).parameters
    if "max_area" not in call:
        return []
    return [p for p in prompts if p.images and _requested(p, sampling)[:2] == (None, None)]


def ignores_negatives(
    policy: PipelinePolicy, prompts: Sequence[Prompt], sampling: Sampling
) -> bool:
    """Whether the pipeline, called like this, has negative prompts that do not change its prediction.

    That is so without guidance, which every pipeline switches off by arguments of its own
    (``guidance_scale``, ``true_cfg_scale``). It is tried: two different negative prompts give the same
    output of the denoiser if they are ignored.

    Returns:
        False if they matter, or there are none.
    """
    common = sampling.call.get("negative_prompt")
    prompt = next((p for p in prompts if p.negative is not None), None)
    if prompt is None and (common is None or not prompts):
        return False
    prompt = prompt or replace(prompts[0], negative=str(common))
    outputs = []
    for negative in (prompt.negative, f"not {prompt.negative}, nor a grey tower at night"):
        noise = SampleNoise([Random(0).at("probe")])
        (rollout,) = policy.run(
            [replace(prompt, negative=negative)],
            noise,
            nodes=[0, 1],
            record=[0],
            decode=False,
            sampling=sampling,
        )
        outputs.append(rollout.records[0].prediction.output)
    return torch.equal(*outputs)


def fit_noise(policy: PipelinePolicy, prompts: Sequence[Prompt]) -> None:
    """Fit the trained initial noise to the shape of the latents, if the initial noise is trained.

    Raises:
        ValueError: If the latents of the prompts have several shapes.
        UnsupportedPipelineError: If the initial noise of the pipeline cannot be replaced.
    """
    if not isinstance(policy.trainable, InitialNoise):
        return
    name = type(policy.pipeline).__name__
    if not hasattr(policy.pipeline, "prepare_latents"):
        raise UnsupportedPipelineError(
            f"model.weights.kind = 'noise': {name} has no prepare_latents, so its initial noise "
            "cannot be replaced"
        )
    shapes = set()
    for prompt in {p.size: p for p in prompts}.values():
        noise = SampleNoise([Random(0).at("probe")])
        (rollout,) = policy.run([prompt], noise, nodes=[0, 1], record=[0], decode=False)
        shapes.add(tuple(rollout.records[0].x.shape[1:]))
    if policy.displaces:
        raise UnsupportedPipelineError(
            f"model.weights.kind = 'noise': the loop of {name} steps more than the latents that it "
            "prepares, or steps them in another layout, so its initial noise cannot be replaced"
        )
    if len(shapes) > 1:
        raise ValueError(
            "model.weights.kind = 'noise' trains one distribution, but the latents of these prompts "
            f"have the shapes {sorted(shapes)}: give all prompts one size"
        )
    policy.trainable.fit(shapes.pop(), policy.device)


def check_defined(policy: PipelinePolicy, transition: Transition, steps: Sequence[int]) -> None:
    """Check that a transition is defined at each step at which it is used.

    Args:
        policy: The policy, after a call that has set its grid.
        transition: The stochastic step.
        steps: The steps.

    Raises:
        ValueError: From the transition, where it is not.
    """
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for step in steps:
        interval = policy.scheduler.interval(step, step + 1)
        transition(zero, Prediction(zero, zero, zero), interval)


def check_scales(
    policy: PipelinePolicy, transition: Transition, steps: Sequence[int], remedy: str = ""
) -> None:
    """Check that no trained step has a gradient far above those of the other steps.

    The gradient of a log-density is proportional to ``1 / std``. On grids whose last but one noise level
    is near zero, such as SD3's, coefficients-preserving and DDIM steps add almost no noise there.

    Args:
        policy: The policy, after a call that has set its grid.
        transition: The stochastic step.
        steps: The trained steps.
        remedy: What to do, for the message, if it is not the choice of stochastic steps.

    Raises:
        ValueError: If the gradient of a step is more than MAX_SCALE times the median.
    """
    if len(steps) < 2:
        return
    scales = {}
    for step in steps:
        interval = policy.scheduler.interval(step, step + 1)
        zero = torch.zeros(1, 1, dtype=torch.float64)
        std = transition(zero, Prediction(zero, zero, zero), interval).std
        if not isinstance(std, float) or std == 0:
            return  # A custom transition, or one without noise, which log_prob refuses.
        scales[step] = step_gain(transition, interval) / std
    usual = median(scales.values())
    worst = max(scales, key=lambda step: scales[step])
    if scales[worst] > MAX_SCALE * usual:
        remedy = remedy or (
            "leave it out (algorithm.steps, for kind 'all' by skip_last = "
            f"{policy.num_steps() - worst}), or set loss.ratio = 'guard' or loss.step_weight = 'rectified'"
        )
        left = policy.scheduler.interval(worst, worst + 1).noise_next
        raise ValueError(
            f"step {worst} of the grid adds almost no noise with this transition (sigma {left:.2g} is "
            f"left after it), so its gradient is {scales[worst] / usual:.0f} times that of the other "
            f"steps and would dominate the update: {remedy}"
        )


def _requested(prompt: Prompt, sampling: Sampling) -> Size:
    height, width, frames = prompt.size
    return (
        height or sampling.height,
        width or sampling.width,
        frames or sampling.num_frames,
    )


def _made(policy: PipelinePolicy, prompt: Prompt, sampling: Sampling) -> Size | str:
    """The size of a decoded sample, or the message of the error that the pipeline raised."""
    noise = SampleNoise([Random(0).at("probe")])
    try:
        # One step is taken to record the state in the layout of the loop.
        (rollout,) = policy.run(
            [prompt], noise, nodes=[0, 1], record=[0], decode=False, sampling=sampling
        )
        record = rollout.records[0]
        if not bool(record.prediction.output.isfinite().all()):
            raise OverflowError(
                f"{type(policy.pipeline).__name__} overflows in {policy.dtype}: set model.dtype = "
                "'bfloat16' or 'float32'"
            )
        media = policy.decode([prompt], record.x, sampling)
    except OverflowError:
        raise
    # Pipelines refuse a size with errors of all kinds.
    except Exception as error:
        if is_unrelated(error):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return media.shape[-2], media.shape[-1], media.shape[1] if media.ndim == 5 else None


def _agree(requested: Size, got: Size) -> bool:
    return all(a is None or g is None or a == g for a, g in zip(requested, got, strict=True))


def _nearest(
    policy: PipelinePolicy, prompt: Prompt, requested: Size, sampling: Sampling
) -> Size | None:
    """The first size, rounded to common multiples, that the pipeline makes."""
    height, width, frames = requested
    plain = replace(sampling, height=None, width=None, num_frames=None)
    for m, stride in product(MULTIPLES, STRIDES if frames else (1,)):
        size = (
            max(m, round(height / m) * m) if height else None,
            max(m, round(width / m) * m) if width else None,
            max(1, round((frames - 1) / stride) * stride + 1) if frames else None,
        )
        rounded = replace(prompt, height=size[0], width=size[1], num_frames=size[2])
        got = _made(policy, rounded, plain)
        if not isinstance(got, str) and _agree(size, got):
            return size
    return None


def _words(size: Size) -> str:
    height, width, frames = size
    parts = [f"{height} high" if height else "", f"{width} wide" if width else ""]
    parts.append(f"{counted(frames, 'frame')}" if frames else "")
    return ", ".join(p for p in parts if p)
