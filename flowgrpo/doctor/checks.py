"""The doctor's checks: properties that a policy must have.

Every check measures a number and compares it with a tolerance. The first line of a check's docstring
is its name if the pipeline raises an error.
"""

import gc
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowgrpo.core.random import Random
from flowgrpo.doctor.gradients import gradients
from flowgrpo.doctor.subject import Check, CheckFunction, Settings, Subject
from flowgrpo.policy import LoRA, PipelinePolicy
from flowgrpo.policy.export import export
from flowgrpo.policy.loading import DTYPES, load_pipeline, without_safety_checker
from flowgrpo.policy.settings import ModelSource


def load(model: str | Path | ModelSource, settings: Settings) -> DiffusionPipeline:
    """Load a pipeline with diffusers, without progress bars and without a safety checker."""
    pipeline = load_pipeline(model, DTYPES[settings.dtype]).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    without_safety_checker(pipeline)
    return pipeline


def finite(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """The denoiser's output is finite."""
    output = torch.cat([r.prediction.output.flatten() for r in subject.rollout.records])
    share = float((~output.isfinite()).float().mean())
    dtype = subject.settings.dtype
    other = "float32" if dtype == "float32" else "bfloat16 or float32"
    return [
        Check(
            "the denoiser's output is finite",
            "all values" if share == 0 else f"{share:.1%} are not",
            share == 0,
            f"the model overflows in {dtype}: use {other}",
            share,
        )
    ]


def noise_zero(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Noise level 0 equals the stock sampler: the image is that of diffusers' first-order sampler."""
    return [
        _agreement(
            "noise level 0 equals the stock sampler",
            subject.policy.images(subject.prompts, subject.noise),
            stock,
            subject.settings,
            "flowgrpo's deterministic sampler differs from diffusers' first-order sampler",
        )
    ]


def recorded(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Sampled noise has the variance of the log-probability's density."""
    records = subject.rollout.records
    # (x_next - mean) / std is standard normal if the state was drawn from the recorded density.
    noise = torch.cat([((r.x_next - r.gaussian.mean) / r.gaussian.std).flatten() for r in records])
    variance = float(noise.square().mean())
    return [
        Check(
            "sampled noise has the variance of its density",
            f"{variance:.3f} times",
            # The mean of n squared standard normals has standard error sqrt(2 / n); five are allowed.
            abs(variance - 1) <= 5 * (2 / noise.numel()) ** 0.5,
            "ratios would belong to a distribution other than the one that was sampled from",
            variance,
        )
    ]


def replay(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Replay equals rollout: every step is replayed in the rollout's batch and in batches of one.

    Returns:
        For each of the two batch sizes, a check of the denoiser's output (relative to its largest
        value) and a check of the log-ratio before any update.
    """
    checks, settings, records = [], subject.settings, subject.rollout.records
    # The output of an untrained model may be zero everywhere.
    scale = max(float(v.prediction.output.abs().max()) for v in records) or 1.0
    for words, size in (("same batch", len(subject.prompts)), ("batch of 1", 1)):
        outputs, changes = [0.0] * len(records), [0.0] * len(records)
        for i, record in enumerate(records):
            for start in range(0, len(subject.prompts), size):
                rows = slice(start, start + size)
                with torch.no_grad():
                    again = subject.policy.replay(
                        subject.prompts[rows], record.x[rows], record.step, subject.transition
                    )
                output = record.prediction.output[rows]
                outputs[i] = max(outputs[i], _gap(again.prediction.output, output) / scale)
                old = record.gaussian.log_prob(record.x_next)[rows]
                new = again.gaussian.log_prob(record.x_next[rows])
                changes[i] = max(changes[i], _gap(new, old))
        difference, change = max(outputs), max(changes)
        allowed = 1e-4 if settings.dtype == "float32" else 5e-2
        checks += [
            Check(
                f"replay equals rollout ({words})",
                f"{difference:.1e}",
                difference <= allowed,
                "the inputs of the denoiser differ between rollout and training",
                difference,
                outputs,
            ),
            Check(
                f"ratio is 1 before an update ({words})",
                f"off by {change:.1e}",
                change <= settings.clip_range / 2,
                f"numerical noise exceeds half of the clip range {settings.clip_range:g}: use a higher "
                "precision, equal batch sizes in rollout and training, or a wider clip range",
                change,
                changes,
            ),
        ]
    return checks


def branch(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """A branch equals its rollout: latents of a middle step are injected, and lead to the same image."""
    records, media = subject.rollout.records, subject.rollout.media
    assert media is not None
    middle = records[len(records) // 2]
    (branch,) = subject.policy.run(
        subject.prompts,
        subject.noise,
        nodes=range(middle.step + 1, subject.settings.sampling.num_steps + 1),
        x=middle.x_next,
        stochastic=[v.step for v in records if v.step > middle.step],
        transition=subject.transition,
    )
    assert branch.media is not None
    return [
        _agreement(
            "a branch equals its rollout",
            branch.media,
            media,
            subject.settings,
            "latents cannot be injected exactly at a middle step",
        )
    ]


def decode(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Decoding final latents equals the rollout's image."""
    policy, last = subject.policy, subject.settings.sampling.num_steps - 1
    (rollout,) = policy.run(subject.prompts, subject.noise, record=[last], decode=False)
    return [
        _agreement(
            "decoding final latents equals the rollout",
            policy.decode(subject.prompts, rollout.records[-1].x_next),
            policy.images(subject.prompts, subject.noise),
            subject.settings,
            "the pipeline decodes injected final latents differently",
        )
    ]


def exported(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """An export loads back to the same image.

    The trained weights are perturbed, exported, and loaded by diffusers alone. The pipeline of the
    policy is freed before that, so this check must be the last.
    """
    name = "an export loads back to the same image"
    advice = "the exported weights give other images, or cannot be loaded"
    policy, settings = subject.policy, subject.settings
    assert policy.trainable is not None
    generator = Random(11).generator()
    with torch.no_grad():
        for p in policy.trainable.parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))
    tuned = policy.images(subject.prompts, subject.noise)
    with tempfile.TemporaryDirectory() as folder:
        export(policy.stock_pipeline(), policy.trainable, Path(folder))
        del policy.pipeline
        gc.collect()
        try:
            pipeline = _load_exported(subject.model, Path(folder), list(policy.denoisers), settings)
        except Exception as error:
            text = f"cannot be loaded: {str(error).splitlines()[0] if str(error) else error!r}"
            return [Check(name, text, False, advice, math.inf)]
    loaded = PipelinePolicy(
        pipeline,
        sampling=settings.sampling,
        batch_size=len(subject.prompts),
        dtype=settings.dtype,
        device=settings.device,
        memory=settings.memory,
    )
    images = loaded.images(subject.prompts, subject.noise)
    return [_agreement(name, images, tuned, settings, advice)]


ALL: Sequence[CheckFunction] = (
    finite, noise_zero, recorded, replay, gradients, branch, decode, exported,
)  # fmt: skip


def _load_exported(
    model: str | Path | ModelSource, folder: Path, denoisers: Sequence[str], settings: Settings
) -> DiffusionPipeline:
    """Load an export with diffusers: adapters into the base model, or a whole pipeline."""
    if not isinstance(settings.weights, LoRA):
        return load(folder, settings)
    pipeline = load(model, settings)
    for part in denoisers:
        if (folder / part).is_dir():
            getattr(pipeline, part).load_lora_adapter(
                folder / part, prefix=None, weight_name="pytorch_lora_weights.safetensors"
            )
    if list(folder.glob("*.safetensors")):
        pipeline.load_lora_weights(folder)
    return pipeline


def _agreement(name: str, a: Tensor, b: Tensor, settings: Settings, advice: str) -> Check:
    """Check that two images are equal up to the tolerance.

    In half precision, rounding differs between two ways to compute an image, so the mean difference is
    compared; in fp32 the largest.
    """
    if settings.dtype == "float32":
        gap, allowed = _gap(a, b), settings.tolerance
    else:
        gap, allowed = float((a - b).abs().mean()), 10 * settings.tolerance
    return Check(name, f"{gap:.1e}", gap <= allowed, advice, gap)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite if a value is not finite."""
    gap = (a.detach().float().cpu() - b.detach().float().cpu()).abs().max()
    return float(gap) if bool(gap.isfinite()) else float("inf")
