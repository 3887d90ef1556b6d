"""What goes into one call of the pipeline, and which prompts can share a call."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from PIL import Image

from flowgrpo.data.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the pipeline is called."""

    num_steps: int = 10
    """Denoising steps."""
    guidance_scale: float | None = None
    """Classifier-free or distilled guidance; unset leaves it to the pipeline."""
    height: int | None = None
    """Pixels; unset leaves it to the pipeline."""
    width: int | None = None
    """Pixels; unset leaves it to the pipeline."""
    num_frames: int | None = None
    """Frames of a video; unset leaves it to the pipeline."""
    call: dict[str, Any] = field(default_factory=dict)
    """Any other argument of the pipeline's call, by its name there."""

    def arguments(self) -> dict[str, Any]:
        """The call's arguments."""
        named = {
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
        }
        return {k: v for k, v in named.items() if v is not None} | self.call


def call_key(prompt: Prompt) -> Hashable:
    """Prompts with equal keys can share a call: one size, one condition, a negative prompt or none.

    What a pipeline does without a negative prompt is not what it does with an empty one.
    """
    images = tuple(_key(i) for i in prompt.images)
    call = tuple((k, _key(prompt.call[k])) for k in sorted(prompt.call))
    return prompt.size, images, call, prompt.negative is None


def _key(value: Any) -> Hashable:
    """Equal for equal files and plain values; a picture in memory equals itself alone."""
    if isinstance(value, Image.Image):
        return id(value)
    return value if isinstance(value, Hashable) else repr(value)


def own_arguments(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What prompts with equal keys say about their call, ``prompt`` included."""
    first = prompts[0]
    arguments: dict[str, Any] = {"prompt": [p.text for p in prompts]}
    if first.negative is not None:
        arguments["negative_prompt"] = [p.negative for p in prompts]
    sizes = {"height": first.height, "width": first.width, "num_frames": first.num_frames}
    arguments |= {k: v for k, v in sizes.items() if v is not None}
    arguments |= first.open_call()
    if first.images:
        images = first.open_images()
        arguments["image"] = images[0] if len(images) == 1 else images
    return arguments


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[range]:
    """Rows that can share a call, at most ``size`` at a time, in order."""
    start = 0
    for _, alike in groupby(prompts, key=call_key):
        end = start + len(list(alike))
        for first in range(start, end, size):
            yield range(first, min(first + size, end))
        start = end
