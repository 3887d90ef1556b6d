"""What a policy must be able to do.

Every check measures a number and compares it with a tolerance; the table shows both.
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
from flowgrpo.doctor.subject import Check, Measure, Settings, Subject
from flowgrpo.policy import LoRA, PipelinePolicy
from flowgrpo.policy.export import export
from flowgrpo.policy.loading import DTYPES, load_pipeline, without_safety_checker


def load(model: str | Path, settings: Settings) -> DiffusionPipeline:
    """The pipeline as diffusers loads it."""
    pipeline = load_pipeline(model, DTYPES[settings.dtype]).to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    without_safety_checker(pipeline)
    return pipeline


def finite(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """What the denoiser says is finite."""
    said = torch.cat([v.prediction.output.flatten() for v in subject.rollout.records])
    broken = float((~said.isfinite()).float().mean())
    dtype = subject.settings.dtype
    other = "float32" if dtype == "float32" else "bfloat16 or float32"
    return [
        Check(
            "what the denoiser says is finite",
            "all of it" if broken == 0 else f"{broken:.1%} is not",
            broken == 0,
            f"the model overflows in {dtype}: use {other}",
            broken,
        )
    ]


def noise_zero(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Noise 0 gives the stock image."""
    return [
        _agreement(
            "noise 0 gives the stock image",
            subject.policy.images(subject.prompts, subject.noise),
            stock,
            subject.settings,
            "our deterministic sampler differs from diffusers' first-order sampler",
        )
    ]


def recorded(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Recorded steps are as random as their density says."""
    records = subject.rollout.records
    noise = torch.cat([((v.x_next - v.gaussian.mean) / v.gaussian.std).flatten() for v in records])
    size = float(noise.square().mean())
    return [
        Check(
            "injected noise is as large as log_prob has it",
            f"variance {size:.3f} of 1",
            # Five standard errors of a mean of squared normals.
            abs(size - 1) <= 5 * (2 / noise.numel()) ** 0.5,
            "ratios would be of another distribution than the one that was sampled",
            size,
        )
    ]


def replay(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Replay equals rollout.

    Every step again, at the rollout's batch shape and one by one.
    """
    checks, settings, records = [], subject.settings, subject.rollout.records
    # A model that was never trained may say nothing but zeros.
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
                said = record.prediction.output[rows]
                outputs[i] = max(outputs[i], _gap(again.prediction.output, said) / scale)
                old = record.gaussian.log_prob(record.x_next)[rows]
                new = again.gaussian.log_prob(record.x_next[rows])
                changes[i] = max(changes[i], _gap(new, old))
        output, change = max(outputs), max(changes)
        exact = 1e-4 if settings.dtype == "float32" else 5e-2
        checks += [
            Check(
                f"replay equals rollout ({words})",
                f"{output:.1e}",
                output <= exact,
                "the model does not see in training what it saw in the rollout",
                output,
                outputs,
            ),
            Check(
                f"ratio is 1 before an update ({words})",
                f"off by {change:.1e}",
                change <= settings.clip_range / 2,
                f"numerical noise fills the clip range {settings.clip_range:g}: use more precision, "
                "train where the rollout batch has the same shape, or widen the clip range",
                change,
                changes,
            ),
        ]
    return checks


def branch(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """A branch from the middle agrees: enter in the middle of a rollout, follow it to the end."""
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
            "a branch from the middle agrees",
            branch.media,
            media,
            subject.settings,
            "states cannot be entered exactly",
        )
    ]


def decode(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Decoding a last state agrees."""
    policy, last = subject.policy, subject.settings.sampling.num_steps - 1
    (rollout,) = policy.run(subject.prompts, subject.noise, record=[last], decode=False)
    return [
        _agreement(
            "decoding a last state agrees",
            policy.decode(subject.prompts, rollout.records[-1].x_next),
            policy.images(subject.prompts, subject.noise),
            subject.settings,
            "final states are not decoded alike",
        )
    ]


def exported(subject: Subject, stock: Tensor) -> Sequence[Check]:
    """An export loads back to the same image.

    Disturb what is trained, export it, load it with diffusers alone, compare the images. The policy
    is gone after this.
    """
    name = "an export loads back to the same image"
    advice = "users of the exported weights would see other images, or none"
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


ALL: Sequence[Measure] = (
    finite, noise_zero, recorded, replay, gradients, branch, decode, exported,
)  # fmt: skip


def _load_exported(
    model: str | Path, folder: Path, denoisers: Sequence[str], settings: Settings
) -> DiffusionPipeline:
    """What was exported, as diffusers loads it."""
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
    """Whether two ways lead to one image.

    In half precision, where two ways round differently, the mean difference counts.
    """
    if settings.dtype == "float32":
        gap, allowed = _gap(a, b), settings.tolerance
    else:
        gap, allowed = float((a - b).abs().mean()), 10 * settings.tolerance
    return Check(name, f"{gap:.1e}", gap <= allowed, advice, gap)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not finite."""
    gap = (a.detach().float().cpu() - b.detach().float().cpu()).abs().max()
    return float(gap) if bool(gap.isfinite()) else float("inf")
