"""A prompt with everything that belongs to it, and a group of samples of one prompt."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = ["Group", "Image", "Prompt"]

# Configurations are read without PIL, as without torch; see :mod:`flowgrpo.core.tensors`.
if TYPE_CHECKING or "torch" in sys.modules:
    from PIL.Image import Image
else:
    Image = Any


@dataclass(frozen=True)
class Prompt:
    """The input of the pipeline for one sample.

    Attributes:
        text: The caption.
        negative: The negative prompt; ``None`` uses the pipeline's default.
        metadata: Data that rewards need, such as GenEval's ``tag``, ``include`` and ``exclude``.
        images: Input images of an editing or image-to-video pipeline: files, or pictures in memory.
        height: Pixels; ``None`` uses the configuration's value. Likewise ``width``.
        num_frames: Frames of a video; ``None`` uses the configuration's value.
        call: Further arguments of the pipeline's call for this prompt, by their names there. Pictures
            (``control_image``, ``mask_image``, ``last_image``) are files or in memory.
        targets: Files of the pictures that are trained on: one, or the chosen and the rejected picture
            of a pair. None where pictures are sampled.
        weight: Weight of the picture in training.

    Example:
        ``Prompt("a photo of two circles", metadata={"tag": "counting", "include": [...]})``
    """

    text: str
    negative: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Path | Image] = ()
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[Path] = ()
    weight: float = 1.0

    @property
    def size(self) -> tuple[int | None, int | None, int | None]:
        """Height, width and number of frames. Only prompts of one size can share a batch."""
        return self.height, self.width, self.num_frames

    def open_images(self) -> "list[Image]":
        """The input images in memory, as RGB."""
        return [_in_memory(i) for i in self.images]

    def open_targets(self) -> "list[Image]":
        """The pictures that are trained on in memory, as RGB. They are not kept in memory."""
        return [_read(p) for p in self.targets]

    def open_call(self) -> dict[str, Any]:
        """The further arguments of the call, with their pictures in memory, as RGB."""
        return {k: _in_memory(v) for k, v in self.call.items()}


@dataclass(frozen=True)
class Group:
    """One prompt of an iteration, sampled ``group_size`` times.

    Attributes:
        index: Index in the iteration over all processes. Equal prompts are different groups.
        prompt: The prompt.
    """

    index: int
    prompt: Prompt


def _in_memory(value: Any) -> Any:
    """A picture as RGB, from its file or from memory; any other value unchanged."""
    from PIL.Image import Image as Picture

    from flowgrpo.data.pictures import as_rgb

    if isinstance(value, Picture):
        return as_rgb(value)
    return _open(value) if isinstance(value, Path) else value


@lru_cache(maxsize=64)
def _open(path: Path) -> "Image":
    return _read(path)


def _read(path: Path) -> "Image":
    from PIL.Image import open as open_image

    from flowgrpo.data.pictures import as_rgb

    with open_image(path) as image:
        return as_rgb(image)
