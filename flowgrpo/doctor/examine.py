"""Examines a model: loads it, finds arguments with which it can be called, and runs the checks.

An error that a pipeline raises on the way becomes one sentence that names the attempt.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.steps import AllSteps
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import CPS, DDIM, Transition
from flowgrpo.data.pictures import picture_of
from flowgrpo.data.prompts import Prompt
from flowgrpo.doctor import checks
from flowgrpo.doctor.subject import PROMPTS, Check, CheckFunction, Settings, Subject
from flowgrpo.policy import Full, LoRA, PipelinePolicy, Sampling
from flowgrpo.policy.arguments import (
    Calling,
    check_signature,
    check_strength,
    generators_for,
    is_unrelated,
    keep_size,
)
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.loading import DTYPES, autoencoders, denoisers
from flowgrpo.policy.placement import as_media, encode_deterministically
from flowgrpo.policy.scheduler import FlowPolicyScheduler, first_order
from flowgrpo.policy.settings import ModelSource
from flowgrpo.training.console import Console

BATCH_DEPENDENT = {
    "noise level 0 equals the stock sampler",
    "replay equals rollout (batch of 1)",
    "ratio is 1 before an update (batch of 1)",
}
"""Checks that fail if the image of a prompt depends on the other prompts of its batch."""


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's result for a model.

    Attributes:
        model: Hub id or folder.
        pipeline: Name of the pipeline's class.
        path: ``flow`` for rectified flow, ``diffusion`` for models that predict noise, v or data.
        media: ``image`` or ``video``.
        dtype: Precision of the denoiser.
        device: Device that the checks ran on.
        weights: ``lora`` or ``full``.
        prompts: Number of prompts in a batch.
        notes: Choices that the doctor made where the settings leave them open.
        checks: Results of all checks.
    """

    model: str
    pipeline: str
    path: str
    media: str
    dtype: str
    device: str
    weights: str
    prompts: int
    notes: Sequence[str]
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(c.passed for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """A table for a JSON file; numbers that are not finite become null."""
        table = asdict(self) | {"passed": self.passed}
        for check in table["checks"]:
            check["measured"] = _number(check["measured"])
            check["by_step"] = [_number(n) for n in check["by_step"]]
        return table


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class _Trial:
    """A call of the stock pipeline that succeeded.

    Attributes:
        sampling: Its arguments.
        prompts: Its prompts.
        media: Its images or videos.
        notes: Choices that were made to find it.
        tiled: Whether the VAE had to decode in tiles.
    """

    sampling: Sampling
    prompts: Sequence[Prompt]
    media: Tensor
    notes: Sequence[str]
    tiled: bool = False


def _pictures(policy: PipelinePolicy, prompt: Prompt, image: Tensor) -> list[str]:
    """A sentence on whether the pipeline can be trained on given pictures, with one of its own images.

    Videos are left out: their pipelines are trained on pictures with one frame.
    """
    if image.ndim != 3:
        return []
    picture = picture_of(image)
    try:
        quality = policy.pictures.round_trip(prompt, picture)
    except Exception as error:
        if is_unrelated(error):
            raise
        return [f"no training on given pictures: {error}"]
    return [
        f"can be trained on given pictures: its own image, encoded and decoded, comes back with {quality:.1f} dB"
    ]


def examine(model: str | Path | ModelSource, settings: Settings) -> Diagnosis:
    """Run all checks on a hub id or a folder.

    Raises:
        FileNotFoundError: If ``model`` is a folder without a pipeline.
        UnsupportedPipelineError: If the pipeline cannot be a policy; the message gives the reason.
    """
    diagnosis = _examine(model, settings, (PROMPTS, PROMPTS[:1]))
    failed = {c.name for c in diagnosis.checks if not c.passed}
    only_batches = bool(failed) and failed <= BATCH_DEPENDENT and diagnosis.prompts > 1
    if settings.dtype != "float32" or not only_batches:
        return diagnosis
    # In fp32, with a correct replay in the same batch, the cause is that the prompts of a batch attend
    # to each other's padding. Such a pipeline can be trained with one prompt per batch.
    again = _examine(model, settings, (PROMPTS[:1],))
    note = "the image of a prompt depends on the other prompts of its batch"
    return replace(again, notes=(note, *again.notes)) if again.passed else diagnosis


def _examine(
    model: str | Path | ModelSource, settings: Settings, batches: Sequence[Sequence[Prompt]]
) -> Diagnosis:
    """Run all checks on the first batch of prompts that the pipeline accepts."""
    noise = SampleNoise([Random(7).at(i) for i in range(len(PROMPTS))])
    pipeline = _stock(model, settings)
    weights, notes = settings.weights, []
    if weights is None:
        bare = [type(m).__name__ for m in denoisers(pipeline).values() if not _adaptable(m)]
        weights = Full() if bare else LoRA(rank=4, alpha=4)
        if bare:
            notes.append(f"all weights are trained: diffusers has no LoRA support for {bare[0]}")
    trial = _trial(pipeline, settings, noise, batches)
    name = type(pipeline).__name__
    del pipeline
    memory = replace(settings.memory, vae_tiling=settings.memory.vae_tiling or trial.tiled)
    settings = replace(settings, sampling=trial.sampling, weights=weights, memory=memory)
    noise = noise[: len(trial.prompts)]
    with explained("creating a policy"):
        policy = PipelinePolicy.from_pretrained(
            model,
            sampling=trial.sampling,
            weights=weights,
            batch_size=len(trial.prompts),
            dtype=settings.dtype,
            device=settings.device,
            memory=memory,
        )
    flow = isinstance(policy.scheduler, FlowPolicyScheduler)
    transition: Transition = CPS(noise_level=0.7) if flow else DDIM(eta=1.0)
    steps = AllSteps().select(trial.sampling.num_steps, 0, Random(0))
    with explained("a stochastic rollout"):
        (rollout,) = policy.run(
            trial.prompts, noise, stochastic=steps, transition=transition, record=steps
        )
    subject = Subject(model, policy, settings, trial.prompts, noise, transition, rollout)
    notes += _pictures(policy, trial.prompts[0], trial.media[0])
    return Diagnosis(
        model=str(model),
        pipeline=name,
        path="flow" if flow else "diffusion",
        media="video" if trial.media.ndim == 5 else "image",
        dtype=settings.dtype,
        device=settings.device,
        weights=weights.kind,
        prompts=len(trial.prompts),
        notes=(*notes, *trial.notes),
        checks=[c for check in checks.ALL for c in _guarded(check, subject, trial.media)],
    )


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print a table of the checks, the notes, and the advice of each failed check."""
    d = diagnosis
    console.table(
        f"{d.model}: {d.pipeline}, {d.path}, {d.media}, {d.dtype} on {d.device}",
        ["check", "measured", ""],
        [[c.name, c.value, "ok" if c.passed else "FAILED"] for c in d.checks],
    )
    for note in d.notes:
        console.say(note)
    for check in d.checks:
        if not check.passed:
            console.say(f"{check.name}: {check.advice}")


@contextmanager
def explained(attempt: str) -> Iterator[None]:
    """Turn errors raised in the context into one sentence about the attempt.

    Raises:
        UnsupportedPipelineError: With the attempt, and the type and the first line of the error.
    """
    try:
        yield
    except (UnsupportedPipelineError, FileNotFoundError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedPipelineError(f"{attempt} failed: {_in_short(error)}") from error


def _guarded(check: CheckFunction, subject: Subject, stock: Tensor) -> Sequence[Check]:
    """Run a check; an error that the pipeline raises becomes a failed check."""
    try:
        return check(subject, stock)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
        advice = "the pipeline raised an error in this check"
        return [Check(name, _in_short(error), False, advice, math.inf)]


def _in_short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"


def _adaptable(model: object) -> bool:
    return hasattr(model, "add_adapter") and hasattr(model, "load_lora_adapter")


def _stock(model: str | Path | ModelSource, settings: Settings) -> DiffusionPipeline:
    """Load the pipeline for diffusers' own call, with diffusers' own first-order sampler.

    Raises:
        UnsupportedPipelineError: If its signature shows that it cannot be a policy.
    """
    with explained(f"loading {model}"):
        pipeline = checks.load(model, settings)
    call = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    check_signature(pipeline, call)
    check_strength(type(pipeline).__name__, call, settings.sampling.call)
    denoisers(pipeline)
    for vae in autoencoders(pipeline):
        # A stock pipeline has the same dtype in all its models; a policy keeps the VAE in fp32.
        vae.to(DTYPES[settings.dtype])
    encode_deterministically(pipeline)
    pipeline.scheduler = first_order(pipeline.scheduler)
    return pipeline


def _trial(
    pipeline: DiffusionPipeline,
    settings: Settings,
    noise: SampleNoise,
    batches: Sequence[Sequence[Prompt]],
) -> _Trial:
    """Find arguments with which the pipeline can be called.

    Tries all prompts and one prompt, without and with generated condition images; if the decoder asks
    for tiling, the same again with tiles.
    """
    tried: list[str] = []
    parameters = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    vae: Any = getattr(pipeline, "vae", None)
    ways = [
        (tiled, *completion, prompts)
        for tiled in ((False, True) if hasattr(vae, "enable_tiling") else (False,))
        for completion in _completions(settings.sampling, parameters)
        for prompts in batches
    ]
    for tiled, sampling, made, prompts in ways:
        if tiled:
            # Some VAEs only decode in tiles, and their error mentions tiling (Allegro).
            if not any("tiling" in words for words in tried):
                break
            pipeline.vae.enable_tiling()
        try:
            media = _call(pipeline, sampling, prompts, noise)
        except (UnsupportedPipelineError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            words = [counted(len(prompts), "prompt"), made]
            words.append("with a tiled decoder" if tiled else "")
            tried.append(f"{', '.join(w for w in words if w)}: {_in_short(error)}")
            continue
        notes = [made] if made else []
        if tiled:
            notes.append("the decoder requires tiling: set memory.vae_tiling = true for training")
        if len(prompts) == 1:
            notes.append(
                "the pipeline takes one prompt at a time: set the batch sizes to 1 for training"
            )
        return _Trial(sampling, prompts, media, notes, tiled)
    raise UnsupportedPipelineError(
        f"{type(pipeline).__name__} cannot be called with diffusers' own first-order sampler; tried "
        f"{'; '.join(tried)}"
    )


def _completions(
    sampling: Sampling, parameters: Mapping[str, Any]
) -> Iterator[tuple[Sampling, str]]:
    """The sampling unchanged, then with a condition image, then with all condition media of the call.

    Yields:
        The sampling, and a note about the media that were added.
    """
    yield sampling, ""
    size = (sampling.width or 256, sampling.height or 256)
    gradient = Image.linear_gradient("L").convert("RGB").resize(size)
    # Half of the mask is white: loops that restore the area outside a mask would pass with a full one.
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    usual = getattr(parameters.get("num_frames"), "default", None)
    number = sampling.num_frames or (usual if isinstance(usual, int) else 16)
    made: dict[str, Any] = {"image": gradient, "mask_image": mask, "control_image": gradient}
    made |= dict.fromkeys(("video", "conditioning_frames", "control_video"), [gradient] * number)
    missing = [n for n in made if n in parameters and n not in sampling.call]
    for names in [missing[:1], missing] if len(missing) > 1 else [missing]:
        if names:
            filled = replace(sampling, call=sampling.call | {n: made[n] for n in names})
            yield filled, f"with a generated {' and '.join(names)}"


def _call(
    pipeline: DiffusionPipeline, sampling: Sampling, prompts: Sequence[Prompt], noise: SampleNoise
) -> Tensor:
    """Call the stock pipeline. Returns its images or videos in fp32 on the CPU."""

    def run(arguments: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            output = pipeline(
                generator=generators_for(arguments, noise[: len(prompts)].initial()),
                output_type="pt",
                return_dict=False,
                **arguments,
            )
        return as_media(output, pipeline).float().cpu()

    arguments = {"prompt": [p.text for p in prompts], **sampling.arguments()}
    call = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    arguments = keep_size(arguments, call)
    return Calling()(run, arguments, len(prompts))
