"""The single images inside of a picture, whose places, prompts and notes are in its metadata.

Reports cut the images out of comparison grids, so that a run keeps one file per evaluation.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrpo.data import strict_json
from flowgrpo.data.pictures import UNREADABLE

KEY = "flowgrpo-tiles"
"""Name of the text chunk of a PNG file that holds the tiles as JSON."""
LONGEST = 256
"""Longer side of an embedded image in pixels."""
LOSSLESS = 128
"""Images with a longer side of at most this are embedded without loss: they are small anyway, and often
enlarged pixels."""
QUALITY = 88
"""WebP quality of larger images."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge in pixels."""


@dataclass(frozen=True)
class Tile:
    """One image of a picture.

    Attributes:
        box: Left, top, right and bottom edge in pixels.
        note: Its mark or its scores.
    """

    box: Box
    note: str


@dataclass(frozen=True)
class TileRow:
    """The images of one prompt.

    Attributes:
        label: The prompt.
        blocks: The images of each column.
        conditions: The boxes of the prompt's own pictures (editing, image-to-video).
    """

    label: str
    blocks: Sequence[Sequence[Tile]]
    conditions: Sequence[Box] = ()


def tiles_to_json(rows: Sequence[TileRow]) -> str:
    """The tiles as JSON for the metadata of a picture."""
    found = [
        {
            "label": r.label,
            "blocks": [[[*t.box, t.note] for t in b] for b in r.blocks],
            "conditions": r.conditions,
        }
        for r in rows
    ]
    return strict_json.dumps(found, ensure_ascii=False)


def read_tiles(picture: Image.Image) -> list[TileRow]:
    """The tiles of an open PNG file; none if it has no metadata about them.

    Raises:
        ValueError: If the metadata is damaged.
    """
    text = getattr(picture, "text", {}).get(KEY, "[]")
    try:
        return [
            TileRow(
                str(row["label"]),
                [[Tile(_box(t), str(t[4])) for t in b] for b in row["blocks"]],
                [_box(c) for c in row["conditions"]],
            )
            for row in json.loads(text)
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the metadata {KEY} is damaged: {error!r}") from error


def _box(values: Sequence[Any]) -> Box:
    left, top, right, bottom = values[:4]
    return int(left), int(top), int(right), int(bottom)


def open_picture(path: Path) -> Image.Image | None:
    """A PNG file with its metadata; None if it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except UNREADABLE:
        return None


def data_uri(picture: Image.Image) -> str:
    """A picture as a ``data:`` address of a WebP file, reduced to :data:`LONGEST`."""
    picture = picture.convert("RGB")
    lossless = max(picture.size) <= LOSSLESS
    if max(picture.size) > LONGEST:
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", lossless=lossless, quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
