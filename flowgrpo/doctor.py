"""Proves on a pipeline that it can be trained: ``flowgrpo doctor MODEL``.

Every check measures a number and compares it with a tolerance; the table shows both.
"""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.steps import AllSteps
from flowgrpo.core.transitions import CPS, DDIM, Transition
from flowgrpo.experience import Prompt
from flowgrpo.policy import LoRA, PipelinePolicy, Sampling
from flowgrpo.policy.export import export
from flowgrpo.policy.loading import DTYPES, load_pipeline
from flowgrpo.policy.scheduler import FlowPolicyScheduler, Visit, policy_scheduler
from flowgrpo.policy.weights import Weights

PROMPTS: Sequence[Prompt] = (
    Prompt("a photo of a red circle"),
    Prompt("two blue squares"),
    Prompt("a photo of a red circle"),
)


@dataclass(frozen=True)
class Check:
    """One property that a policy must have.

    Attributes:
        name: What is checked.
        value: What was measured, in words.
        passed: Whether it holds.
        advice: What a failure means.
    """

    name: str
    value: str
    passed: bool
    advice: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the doctor does.

    Attributes:
        sampling: How the pipeline is called.
        weights: What is made trainable.
        dtype: Precision of the denoiser.
        device: Where.
        clip_range: The clip range that the noise floor is compared with.
        tolerance: Largest difference of pixel values in [0, 1] between two ways to one image; in half
            precision ten times this is the largest mean difference.
    """

    sampling: Sampling
    weights: Weights = field(default_factory=lambda: LoRA(rank=4, alpha=4))
    dtype: str = "float32"
    device: str = "cpu"
    clip_range: float = 1e-4
    tolerance: float = 2e-3


def examine(model: str | Path, settings: Settings) -> list[Check]:
    """Run all checks on a hub id or a folder.

    Raises:
        ValueError: If the pipeline cannot be a policy at all; says why.
    """
    noise = SampleNoise([Random(7).at(i) for i in range(len(PROMPTS))])
    stock = _stock_images(model, settings, noise)
    policy = PipelinePolicy.from_pretrained(
        model,
        sampling=settings.sampling,
        weights=settings.weights,
        batch_size=len(PROMPTS),
        dtype=settings.dtype,
        device=settings.device,
    )
    flow = isinstance(policy.scheduler, FlowPolicyScheduler)
    transition: Transition = CPS(noise_level=0.7) if flow else DDIM(eta=1.0)
    steps = AllSteps().select(settings.sampling.num_steps, 0, torch.Generator())
    (rollout,) = policy.run(PROMPTS, noise, stochastic=steps, transition=transition, record=steps)
    assert rollout.media is not None
    return [
        _noise_zero(policy, stock, noise, settings),
        *_steps(rollout.visits),
        *_replay(policy, rollout.visits, transition, settings),
        _gradients(policy, rollout.visits, transition),
        _branch(policy, rollout.visits, rollout.media, noise, steps, transition, settings),
        _decode(policy, noise, settings),
        _export(model, policy, noise, settings),
    ]


def _load(model: str | Path, settings: Settings) -> DiffusionPipeline:
    pipeline = load_pipeline(model, DTYPES[settings.dtype]).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    return pipeline


def _stock_images(model: str | Path, settings: Settings, noise: SampleNoise) -> Tensor:
    """Images of the pipeline as diffusers runs it, with diffusers' own first-order sampler."""
    pipeline = _load(model, settings)
    if hasattr(pipeline, "vae"):
        # Stock pipelines have one precision throughout.
        pipeline.vae.to(DTYPES[settings.dtype])
    ours = policy_scheduler(pipeline.scheduler)
    if isinstance(ours, FlowPolicyScheduler):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(ours.config))
    else:
        scheduler = DDIMScheduler.from_config(dict(ours.config))
        scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
            ours.alphas_cumprod,
            ours.final_alpha_cumprod,
        )
        pipeline.scheduler = scheduler
    return _call(pipeline, settings, noise)


def _call(pipeline: DiffusionPipeline, settings: Settings, noise: SampleNoise) -> Tensor:
    with torch.no_grad():
        output = pipeline(
            prompt=[p.text for p in PROMPTS],
            generator=noise.initial(),
            output_type="pt",
            return_dict=False,
            **settings.sampling.arguments(),
        )[0]
    return torch.as_tensor(output).float().cpu()


def _noise_zero(
    policy: PipelinePolicy, stock: Tensor, noise: SampleNoise, settings: Settings
) -> Check:
    return _agreement(
        "noise 0 gives the stock image",
        policy.images(PROMPTS, noise),
        stock,
        settings,
        "our deterministic sampler differs from diffusers' first-order sampler",
    )


def _steps(visits: Sequence[Visit]) -> list[Check]:
    """The recorded steps are those that happened: one ends where the next begins, each as random
    as its density says."""
    jump = max(
        (_gap(a.x_next, b.x) for a, b in pairwise(visits) if b.step == a.step + 1), default=0.0
    )
    noise = torch.cat([((v.x_next - v.gaussian.mean) / v.gaussian.std).flatten() for v in visits])
    size = float(noise.square().mean())
    return [
        Check(
            "a step begins where the last one ended",
            f"off by {jump:.1e}",
            jump == 0,
            "the pipeline changes its state between two steps, which no log-probability accounts for",
        ),
        Check(
            "injected noise is as large as log_prob has it",
            f"variance {size:.3f} of 1",
            # Five standard errors of a mean of squared normals.
            abs(size - 1) <= 5 * (2 / noise.numel()) ** 0.5,
            "ratios would be of another distribution than the one that was sampled",
        ),
    ]


def _replay(
    policy: PipelinePolicy, visits: Sequence[Visit], transition: Transition, settings: Settings
) -> list[Check]:
    """Replay every step at the rollout's batch shape and one by one."""
    checks = []
    for words, size in (("same batch", len(PROMPTS)), ("batch of 1", 1)):
        output, change = 0.0, 0.0
        for visit in visits:
            for start in range(0, len(PROMPTS), size):
                rows = slice(start, start + size)
                with torch.no_grad():
                    again = policy.replay(PROMPTS[rows], visit.x[rows], visit.step, transition)
                output = max(output, _gap(again.prediction.output, visit.prediction.output[rows]))
                old = visit.gaussian.log_prob(visit.x_next)[rows]
                change = max(change, _gap(again.gaussian.log_prob(visit.x_next[rows]), old))
        scale = max(float(v.prediction.output.abs().max()) for v in visits)
        exact = 1e-4 if settings.dtype == "float32" else 5e-2
        checks.append(
            Check(
                f"replay equals rollout ({words})",
                f"{output / scale:.1e}",
                output <= exact * scale,
                "the model does not see in training what it saw in the rollout",
            )
        )
        checks.append(
            Check(
                f"ratio is 1 before an update ({words})",
                f"off by {change:.1e}",
                change <= settings.clip_range / 2,
                f"numerical noise fills the clip range {settings.clip_range:g}: use more precision, "
                "train where the rollout batch has the same shape, or widen the clip range",
            )
        )
    return checks


def _gradients(policy: PipelinePolicy, visits: Sequence[Visit], transition: Transition) -> Check:
    """Backward through every step: the trained weights, all of them and no others, get a gradient."""
    assert policy.trainable is not None
    for visit in visits:
        again = policy.replay(PROMPTS, visit.x, visit.step, transition)
        log_prob = again.gaussian.log_prob(visit.x_next)
        if log_prob.requires_grad:
            log_prob.sum().backward()
    trained = list(policy.trainable.parameters.values())
    reached = [p for p in trained if p.grad is not None and bool(p.grad.isfinite().all())]
    moved = sum(bool(p.grad.abs().max() > 0) for p in reached if p.grad is not None)
    ids = {id(p) for p in trained}
    leaked = [
        n
        for m in policy.models.values()
        for n, p in m.named_parameters()
        if p.grad is not None and id(p) not in ids
    ]
    for parameter in trained:
        parameter.grad = None
    return Check(
        "gradients reach what is trained",
        f"{len(reached)}/{len(trained)} tensors, {moved} not zero, {len(leaked)} others",
        # The last block of some transformers ignores part of its weights, and half of a fresh LoRA
        # has zero gradient because the other half is zero.
        len(reached) >= 0.9 * len(trained) and moved >= 0.4 * len(trained) and not leaked,
        "weights are trained that the loop does not use, or the pipeline cuts the gradient",
    )


def _branch(
    policy: PipelinePolicy,
    visits: Sequence[Visit],
    media: Tensor,
    noise: SampleNoise,
    steps: Sequence[int],
    transition: Transition,
    settings: Settings,
) -> Check:
    """Enter in the middle of a rollout and follow it to the end."""
    middle = visits[len(visits) // 2]
    later = [s for s in steps if s > middle.step]
    (branch,) = policy.run(
        PROMPTS,
        noise,
        nodes=range(middle.step + 1, settings.sampling.num_steps + 1),
        x=middle.x_next,
        stochastic=later,
        transition=transition,
    )
    assert branch.media is not None
    return _agreement(
        "a branch from the middle agrees",
        branch.media,
        media,
        settings,
        "states cannot be entered exactly",
    )


def _decode(policy: PipelinePolicy, noise: SampleNoise, settings: Settings) -> Check:
    (rollout,) = policy.run(PROMPTS, noise, record=[settings.sampling.num_steps - 1], decode=False)
    return _agreement(
        "decoding a last state agrees",
        policy.decode(PROMPTS, rollout.visits[-1].x_next),
        policy.images(PROMPTS, noise),
        settings,
        "final states are not decoded alike",
    )


def _export(
    model: str | Path, policy: PipelinePolicy, noise: SampleNoise, settings: Settings
) -> Check:
    """Disturb what is trained, export it, load it with diffusers alone, compare the images."""
    name = "an export loads back to the same image"
    advice = "users of the exported weights would see other images, or none"
    assert policy.trainable is not None
    generator = Random(11).generator()
    with torch.no_grad():
        for p in policy.trainable.parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    tuned = policy.images(PROMPTS, noise)
    with tempfile.TemporaryDirectory() as folder:
        export(policy.stock_pipeline(), policy.trainable, Path(folder))
        del policy.pipeline
        gc.collect()
        try:
            pipeline = _load_exported(model, Path(folder), list(policy.denoisers), settings)
        except (ValueError, OSError) as error:
            return Check(name, f"cannot be loaded: {error}", False, advice)
    loaded = PipelinePolicy(
        pipeline,
        sampling=settings.sampling,
        batch_size=len(PROMPTS),
        dtype=settings.dtype,
        device=settings.device,
    )
    return _agreement(name, loaded.images(PROMPTS, noise), tuned, settings, advice)


def _load_exported(
    model: str | Path, folder: Path, denoisers: Sequence[str], settings: Settings
) -> DiffusionPipeline:
    """What was exported, as diffusers loads it."""
    if not isinstance(settings.weights, LoRA):
        return _load(folder, settings)
    pipeline = _load(model, settings)
    for part in denoisers:
        if (folder / part).is_dir():
            getattr(pipeline, part).load_lora_adapter(
                folder / part, prefix=None, weight_name="pytorch_lora_weights.safetensors"
            )
    if list(folder.glob("*.safetensors")):
        pipeline.load_lora_weights(folder)
    return pipeline


def _agreement(name: str, a: Tensor, b: Tensor, settings: Settings, advice: str) -> Check:
    """Whether two ways lead to one image.

    In half precision, where two ways round differently, the mean difference counts.
    """
    if settings.dtype == "float32":
        gap, allowed = _gap(a, b), settings.tolerance
    else:
        gap, allowed = float((a - b).abs().mean()), 10 * settings.tolerance
    return Check(name, f"{gap:.1e}", gap <= allowed, advice)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    gap = (a.detach().float().cpu() - b.detach().float().cpu()).abs().max()
    return float(gap) if bool(gap.isfinite()) else float("inf")
