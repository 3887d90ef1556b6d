"""What is generated: a prompt with what belongs to it, and a group of samples of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrpo.data.pictures import as_rgb


def _in_memory(value: Any) -> Any:
    """A picture as RGB, from its file or as it is; anything else as it is."""
    if isinstance(value, Image.Image):
        return as_rgb(value)
    return _open(value) if isinstance(value, Path) else value


@lru_cache(maxsize=64)
def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return as_rgb(image)


@dataclass(frozen=True)
class Prompt:
    """What to generate.

    Attributes:
        text: The caption.
        negative: What to guide away from; ``None`` leaves it to the pipeline.
        metadata: Anything a reward needs, such as GenEval's ``tag``, ``include`` and ``exclude``.
        images: What an editing or image-to-video pipeline starts from: files, or pictures in memory.
        height: Pixels; ``None`` leaves it to the configuration. Likewise ``width``.
        num_frames: Frames of a video; ``None`` leaves it to the configuration.
        call: Further arguments of the pipeline's call for this prompt, by their names there; pictures
            (``control_image``, ``mask_image``, ``last_image``) as files or in memory.

    Example:
        ``Prompt("a photo of two circles", metadata={"tag": "counting", "include": [...]})``
    """

    text: str
    negative: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Path | Image.Image] = ()
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int | None, int | None, int | None]:
        """Height, width and number of frames; prompts of one size can share a tensor."""
        return self.height, self.width, self.num_frames

    def open_images(self) -> list[Image.Image]:
        """The condition images in memory, as RGB."""
        return [_in_memory(i) for i in self.images]

    def open_call(self) -> dict[str, Any]:
        """The further arguments with their pictures in memory, as RGB."""
        return {k: _in_memory(v) for k, v in self.call.items()}


@dataclass(frozen=True)
class Group:
    """One prompt of an iteration, sampled several times.

    Attributes:
        index: Place in the iteration over all ranks. Equal prompts are different groups.
        prompt: What to generate.
    """

    index: int
    prompt: Prompt
