"""Checks and notes of a run that trains on given pictures, once its pipeline is loaded."""

from flowgrpo.config import Config, ConfigError
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted
from flowgrpo.data.examples import smaller_than
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.call import UnsupportedPipelineError

POOR = 15.0
"""Peak signal-to-noise ratio in dB below which an encoded picture does not come back; VAEs have 25 to 35."""


def check_pictures(policy: PipelinePolicy, prompts: PromptSet) -> None:
    """Check that the pipeline's states follow from pictures, for each size of the prompts.

    Raises:
        ConfigError: If they do not, or this is not known; the message names the reason.
    """
    try:
        for alike in prompts.buckets:
            first = alike[0]
            policy.pictures.encode([first], first.open_targets()[:1], [Random(0)])
    except UnsupportedPipelineError as error:
        raise ConfigError(f"algorithm: {error}") from error


def description(policy: PipelinePolicy, config: Config, prompts: PromptSet, quality: float) -> str:
    """A sentence about the pictures of a run.

    Args:
        policy: The policy.
        config: The configuration.
        prompts: The training prompts, with pictures.
        quality: The result of :func:`quality_of`.
    """
    number, train = len(prompts.prompts), config.train
    layout = policy.pictures.layout(prompts.prompts[0])
    passes = train.iterations * train.groups / number
    sizes = (
        f" and {counted(len(prompts.buckets) - 1, 'more size')}" if len(prompts.buckets) > 1 else ""
    )
    return (
        f"training on {number} {_name(config)} of {layout.height} x {layout.width} pixels{sizes}, {counted(passes, 'pass', '.3g')} "
        f"in {counted(train.iterations, 'iteration')}; encoded and decoded, the first picture comes back with {quality:.1f} dB"
    )


def quality_of(policy: PipelinePolicy, prompts: PromptSet) -> float:
    """Peak signal-to-noise ratio in dB of the first picture, encoded and decoded."""
    first = prompts.prompts[0]
    return policy.pictures.round_trip(first, first.open_targets()[0])


def picture_notes(
    policy: PipelinePolicy, config: Config, prompts: PromptSet, quality: float
) -> list[str]:
    """Warnings about pictures that the VAE does not reproduce or that are enlarged, and about guidance in
    training; arguments as of :func:`description`."""
    notes = []
    if quality < POOR:
        notes.append(
            f"an encoded picture comes back with {quality:.1f} dB only, and VAEs reach 25 to 35: compare the pictures "
            "with those that the model makes"
        )
    small = 0
    for alike in prompts.buckets:
        layout = policy.pictures.layout(alike[0])
        small += smaller_than(alike, layout.height, layout.width)
    if small:
        notes.append(
            f"{small} of {len(prompts.prompts)} {_name(config)} are smaller than the training size and are enlarged, "
            "and the model learns their blur: leave them out, or train at a smaller size"
        )
    scale = config.sampling.guidance_scale
    distilled = any(d.config.get("guidance_embeds") for d in policy.denoisers.values())
    if scale is not None and scale > 1 and not distilled:
        notes.append(
            f"sampling.guidance_scale = {scale:g} trains the guided prediction, which pre-training does not: set it "
            "to 1.0, and evaluation.guidance_scale to the scale of evaluations"
        )
    return notes


def _name(config: Config) -> str:
    return "pairs" if config.algorithm.num_targets == 2 else "pictures"
