"""Finds out before any long work whether a pipeline makes what the prompts ask for."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import median

import torch

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import Prediction, Transition
from flowgrpo.data.prompts import Prompt
from flowgrpo.losses.clipped import step_gain
from flowgrpo.policy.calling import UnsupportedPipelineError
from flowgrpo.policy.calls import Sampling
from flowgrpo.policy.initial_noise import InitialNoise
from flowgrpo.policy.pipeline import PipelinePolicy

Size = tuple[int | None, int | None, int | None]
MULTIPLES = (8, 16, 32, 64)
"""Image sides are multiples of one of these."""
MAX_SCALE = 50.0
"""How far above the median the gradient of a step may be. Flow-SDE's range over a factor of 31 on the
ten steps of SD3.5."""
STRIDES = (4, 8, 6, 1)
"""Videos have one frame more than a multiple of one of these."""


def check_sizes(policy: PipelinePolicy, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Decode the noise of one prompt of each size, and compare what comes out with what was asked.

    Some pipelines refuse a size that their VAE cannot take; others round it with a warning.

    Raises:
        ValueError: With the size asked for, and the nearest one that the pipeline makes.
        OverflowError: If the denoiser's output is not finite in its precision (FLUX in fp16).
    """
    for prompt in {p.size: p for p in prompts}.values():
        asked, got = _asked(prompt, sampling), _made(policy, prompt, sampling)
        if asked == (None, None, None):
            if isinstance(got, str):
                raise ValueError(f"{type(policy.pipeline).__name__} cannot be called: {got}")
            continue
        if isinstance(got, str) or not _agree(asked, got):
            nearest = _nearest(policy, prompt, asked, sampling)
            advice = f"; the nearest that it makes is {_words(nearest)}" if nearest else ""
            found = got if isinstance(got, str) else f"it makes {_words(got)}"
            raise ValueError(
                f"{type(policy.pipeline).__name__} cannot make {_words(asked)}: {found}{advice}"
            )


def fit_noise(policy: PipelinePolicy, prompts: Sequence[Prompt]) -> None:
    """Find out the latents' shape where the initial noise is trained; else do nothing.

    Raises:
        ValueError: If the prompts' latents have several shapes, or the pipeline prepares none.
    """
    if not isinstance(policy.trainable, InitialNoise):
        return
    name = type(policy.pipeline).__name__
    if not hasattr(policy.pipeline, "prepare_latents"):
        raise UnsupportedPipelineError(
            f"model.weights.kind = 'noise': {name} has no prepare_latents, so that its initial noise "
            "cannot be replaced"
        )
    shapes = set()
    for prompt in {p.size: p for p in prompts}.values():
        noise = SampleNoise([Random(0).at("probe")])
        (rollout,) = policy.run([prompt], noise, nodes=[0, 1], record=[0], decode=False)
        shapes.add(tuple(rollout.records[0].x.shape[1:]))
    if policy.displaces:
        raise UnsupportedPipelineError(
            f"model.weights.kind = 'noise': {name} steps other or more than the latents that it "
            "prepares, where its noise cannot be replaced"
        )
    if len(shapes) > 1:
        raise ValueError(
            "model.weights.kind = 'noise' trains one distribution, but the latents of these prompts "
            f"have the shapes {sorted(shapes)}: give all prompts one size"
        )
    policy.trainable.fit(shapes.pop(), policy.device)


def check_scales(policy: PipelinePolicy, transition: Transition, steps: Sequence[int]) -> None:
    """Check that no trained step drowns the others. To be called when the grid is known.

    The gradient of a log-density goes as ``1 / std``. Where a grid all but ends before its last step,
    as that of SD3 does, coefficients-preserving and DDIM steps inject almost no noise there.

    Raises:
        ValueError: If the gradient of a step is far above those of the others.
    """
    if len(steps) < 2:
        return
    scales = {}
    for step in steps:
        interval = policy.scheduler.interval(step, step + 1)
        zero = torch.zeros(1, 1, dtype=torch.float64)
        std = transition(zero, Prediction(zero, zero, zero), interval).std
        if not isinstance(std, float) or std == 0:
            return  # A transition of a stranger; a density of none is refused where it is asked for.
        scales[step] = step_gain(transition, interval) / std
    usual = median(scales.values())
    worst = max(scales, key=lambda step: scales[step])
    if scales[worst] > MAX_SCALE * usual:
        left = policy.scheduler.interval(worst, worst + 1).noise_next
        raise ValueError(
            f"step {worst} of the grid injects next to no noise with this transition (sigma {left:.2g} is "
            f"left after it), so that its gradient is {scales[worst] / usual:.0f} times that of the "
            "others and would drown them: leave it out (algorithm.steps, for kind 'all' by skip_last = "
            f"{policy.num_steps() - worst}), or set loss.ratio = 'guard'"
        )


def _asked(prompt: Prompt, sampling: Sampling) -> Size:
    height, width, frames = prompt.size
    return (
        height or sampling.height,
        width or sampling.width,
        frames or sampling.num_frames,
    )


def _made(policy: PipelinePolicy, prompt: Prompt, sampling: Sampling) -> Size | str:
    """The size of what comes out, or why nothing does."""
    noise = SampleNoise([Random(0).at("probe")])
    try:
        # A step is taken to see the state as the loop holds it; its noise decodes as well as an image.
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
    except (OverflowError, torch.OutOfMemoryError):
        raise
    # Pipelines object to a size in every way there is.
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return media.shape[-2], media.shape[-1], media.shape[1] if media.ndim == 5 else None


def _agree(asked: Size, got: Size) -> bool:
    return all(a is None or g is None or a == g for a, g in zip(asked, got, strict=True))


def _nearest(
    policy: PipelinePolicy, prompt: Prompt, asked: Size, sampling: Sampling
) -> Size | None:
    """The first of the roundings to common multiples that the pipeline really makes."""
    height, width, frames = asked
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
    parts.append(f"{frames} frames" if frames else "")
    return ", ".join(p for p in parts if p)
