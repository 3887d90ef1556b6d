"""Image files as others left them: finding, checking and reading them."""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flowgrpo.bench.base import BenchError
from flowgrpo.core.tensors import Float, Tensor, torch

PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Finder:
    """Finds files in a folder, which is listed once: asking for thousands of files takes seconds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[Path, set[str]] = {}

    def find(self, names: Sequence[str]) -> Path | None:
        """The first file of several possible names, with any of the usual endings."""
        for name in names:
            path = self.folder / name
            for other in (path, *(path.with_suffix(suffix) for suffix in SUFFIXES)):
                if other.name in self._names(other.parent):
                    return other
        return None

    def _names(self, folder: Path) -> set[str]:
        if folder not in self._listed:
            self._listed[folder] = set()
            with suppress(OSError), os.scandir(folder) as entries:
                self._listed[folder] = {e.name for e in entries if e.is_file()}
        return self._listed[folder]


def is_whole(path: Path) -> bool:
    """Whether a PNG or JPEG has its beginning and its end; cheap, and true for other formats."""
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] != PNG[:4] and head[:3] != JPEG:
            return path.suffix.lower() not in (".png", ".jpg", ".jpeg") and len(head) == 8
        size = file.seek(0, 2)
        file.seek(max(0, size - 64))
        tail = file.read()
    return tail.endswith(PNG_END) if head == PNG else JPEG_END in tail


def check_whole(path: Path) -> None:
    """Raise BenchError if an image is truncated or is no image."""
    if not is_whole(path):
        raise BenchError(f"{path} is truncated or no image: delete it, and it is made again")


def header_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a PNG, from its header; None for another format."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(PNG):
        return None
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def read_image(path: Path) -> Float[Tensor, "3 height width"]:
    """An image as RGB in [0, 1].

    Raises:
        BenchError: If it is missing, truncated or no image.
    """
    import numpy as np
    from PIL import Image

    from flowgrpo.data.pictures import UNREADABLE, as_rgb

    try:
        with Image.open(path) as image:
            pixels = np.asarray(as_rgb(image))
    except UNREADABLE as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
