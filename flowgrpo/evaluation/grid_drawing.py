"""Draws labelled grids of images or videos: one prompt per row, one model per block of columns.

Images at the same place of two blocks share their noise. Nothing here knows models or rewards; see
:mod:`flowgrpo.evaluation.comparison_grid`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from flowgrpo.core.text import counted
from flowgrpo.data.pictures import picture_of
from flowgrpo.evaluation.grid_text import OWN_FONT, Paragraph, missing_glyphs

TICK, CROSS = "✓", "✗"
"""A note that begins with one of these is drawn as a green or red mark on the image."""

SMALLEST_TILE, LARGEST_TILE, LARGEST_FRAME = 96, 256, 128
"""Limits of the longer side of an image, and of a video's frame, in pixels."""
TOLERANCE = 1e-3
"""Distance by which values may leave [0, 1], since decoders overshoot by rounding errors."""

MARGIN, LABEL_WIDTH, LABEL_GAP = 32, 208, 24
TILE_GAP, VIDEO_GAP, BLOCK_GAP, ROW_GAP, FRAME_GAP = 6, 16, 32, 22, 2
NARROWEST_BLOCK = 132
CONDITION_HEIGHT, CONDITION_GAP = 72, 8
TITLE_HEIGHT = 28
"""Height of a block's title in a narrow grid."""
INK, SOFT, FAINT, PAPER = "#15171c", "#656b76", "#dfe2e7", "#ffffff"
ACCENTS = ("#9aa1ad", "#3b6fe0", "#8b5cd6", "#d97a1f", "#12907f")
GOOD, BAD = "#1a9c52", "#d93a3a"
Box = tuple[int, int, int, int]
"""Left, top, right and bottom edge in pixels."""
Media = Float[Tensor, "_samples *_frames _channels _height _width"]
"""Axes whose sizes are not checked by annotation, because :func:`draw_grid` names the block that
differs."""


@dataclass(frozen=True)
class GridRow:
    """One row of a grid, with the images of one prompt.

    Attributes:
        label: The prompt's text; it is cut with an ellipsis if it does not fit next to the images.
        blocks: One tensor per column, images ``(S, C, H, W)`` or videos ``(S, F, C, H, W)`` in
            [0, 1] with 1 or 3 channels.
        notes: One text per image: "✓" and "✗" become marks, other text is drawn below the image.
        conditions: Condition images (editing, image-to-video); the first three are drawn below the
            label.
    """

    label: str
    blocks: Sequence[Media]
    notes: Sequence[Sequence[str]] | None = None
    conditions: Sequence[Image.Image] = ()


@dataclass(frozen=True)
class RowBoxes:
    """Where the images of a row are in a picture, without borders and captions.

    Attributes:
        blocks: For each block and sample; the box of a video holds its frames side by side.
        conditions: For each condition image that is drawn.
    """

    blocks: Sequence[Sequence[Box]]
    conditions: Sequence[Box]


def draw_grid(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str,
    scale: int | None = None,
    narrow: bool = False,
) -> Image.Image:
    """Draw rows of prompts and blocks of samples as one labelled RGB image.

    Args:
        rows: One row per prompt; all media have the same shape.
        columns: One title per block, such as "base" and "after 300 iterations".
        title: Headline.
        subtitle: How the images were generated: sampler, steps, guidance, resolution, seed.
        scale: Integer factor by which images are enlarged. By default small images are enlarged by
            the smallest factor that makes their longer side at least 96 pixels, and large ones are
            reduced to 256 pixels.
        narrow: Draw the label above the images and the blocks below each other, for the screen of a
            phone.

    Returns:
        The picture. A video is shown by its first, middle and last frame side by side.

    Raises:
        ValueError: If there is nothing to draw, counts or shapes differ, or a value is NaN or
            outside [0, 1].
    """
    _check(rows, columns, scale)
    canvas, _ = _drawn(rows, columns, title, subtitle, scale, narrow)
    return canvas


def tile_boxes(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str,
    narrow: bool = False,
) -> "list[RowBoxes]":
    """Where :func:`draw_grid` puts the images of each row.

    Args:
        rows: As in :func:`draw_grid`, and so are the other arguments.
        columns: One title per block.
        title: Headline.
        subtitle: How the images were generated.
        narrow: As in :func:`draw_grid`.
    """
    _, bodies, layout = _placed(rows, columns, title, subtitle, None, narrow)
    width, height = layout.tile_width, layout.frame[1]

    def box(left: int, top: int) -> Box:
        return left, top, left + width, top + height

    return [
        RowBoxes(
            [
                [box(layout.left(b, s), top + body.tops[b]) for s in range(layout.samples)]
                for b in range(layout.blocks)
            ],
            body.condition_boxes(top),
        )
        for body, top in bodies
    ]


def animate_grid(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    *,
    title: str,
    subtitle: str,
    scale: int | None = None,
    narrow: bool = False,
) -> Iterator[Image.Image]:
    """Draw the frames of a grid of videos, in which all videos play at the same time.

    Args:
        rows: One row per prompt; all media are videos of one shape.
        columns: As in :func:`draw_grid`, and so are the other arguments.
        title: Headline.
        subtitle: How the videos were generated.
        scale: Integer factor by which videos are enlarged.
        narrow: As in :func:`draw_grid`.

    Returns:
        One picture per frame, all of one size, with an even width and height.

    Raises:
        ValueError: As :func:`draw_grid`, or if the media are images.
    """
    _check(rows, columns, scale)
    shape = rows[0].blocks[0].shape
    if len(shape) != 5:
        raise ValueError(f"only videos can be animated, got media of shape {tuple(shape)}")
    first, bodies = _drawn(_at_frame(rows, 0), columns, title, subtitle, scale, narrow)
    still = Image.new(
        "RGB", (first.width + first.width % 2, first.height + first.height % 2), PAPER
    )
    still.paste(first)
    for frame in range(shape[1]):
        canvas = still.copy()
        for row, (body, top) in zip(_at_frame(rows, frame), bodies, strict=True):
            body.draw_tiles(canvas, top, row.blocks)
        yield canvas


def _at_frame(rows: Sequence[GridRow], frame: int) -> list[GridRow]:
    """The rows with one frame of each video as an image."""
    return [replace(r, blocks=[b[:, frame] for b in r.blocks]) for r in rows]


def _drawn(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    title: str,
    subtitle: str,
    scale: int | None,
    narrow: bool,
) -> "tuple[Image.Image, list[tuple[_Row, int]]]":
    """The picture, and its rows with their upper edges."""
    head, placed, layout = _placed(rows, columns, title, subtitle, scale, narrow)
    height = head.height + sum(b.height for b, _ in placed) + ROW_GAP * len(placed) + MARGIN // 2
    canvas = Image.new("RGB", (layout.width, height), PAPER)
    head.draw(canvas)
    for index, (body, top) in enumerate(placed):
        if index:
            rule = top - ROW_GAP // 2
            ImageDraw.Draw(canvas).line((MARGIN, rule, layout.width - MARGIN, rule), fill=FAINT)
        body.draw(canvas, top)
    return canvas, placed


def _placed(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    title: str,
    subtitle: str,
    scale: int | None,
    narrow: bool,
) -> "tuple[_Heading, list[tuple[_Row, int]], _Layout]":
    """The heading, and the rows with their upper edges, before they are drawn."""
    shape = rows[0].blocks[0].shape
    layout = _Layout(shape[0], len(columns), _tile_size(shape, scale), len(_frames(shape)), narrow)
    absent = missing_glyphs([title, subtitle, *columns, *(r.label for r in rows)])
    if absent:
        subtitle += (
            f". No installed font has {' '.join(f'U+{ord(c):04X}' for c in absent)}: install one, such as Noto Sans CJK, or name a font file in "
            f"{OWN_FONT}"
        )
    head = _Heading(title, subtitle, columns, layout)
    top, placed = head.height, []
    for row in rows:
        body = _Row(row, layout, columns)
        placed.append((body, top))
        top += body.height + ROW_GAP
    return head, placed, layout


def _check(rows: Sequence[GridRow], columns: Sequence[str], scale: int | None) -> None:
    if not rows or not columns:
        raise ValueError(f"a grid needs rows and columns, got {len(rows)} and {len(columns)}")
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    shape = tuple(rows[0].blocks[0].shape) if rows[0].blocks else ()
    for row in rows:
        if len(row.blocks) != len(columns):
            raise ValueError(
                f"{row.label!r}: {counted(len(row.blocks), 'block')} for {counted(len(columns), 'column')}"
            )
        for column, block in zip(columns, row.blocks, strict=True):
            where = f"{row.label!r}, {column!r}"
            if block.ndim not in (4, 5) or block.shape[-3] not in (1, 3) or 0 in block.shape:
                raise ValueError(f"{where}: not images or videos: shape {tuple(block.shape)}")
            if tuple(block.shape) != shape:
                raise ValueError(f"{where}: shape {tuple(block.shape)} differs from {shape}")
            least, most = (float(v) for v in block.detach().float().aminmax())
            if not (least >= -TOLERANCE and most <= 1 + TOLERANCE):  # NaN fails every comparison
                raise ValueError(
                    f"{where}: values must be in [0, 1], got {least:.4g} to {most:.4g}"
                )
        counts = None if row.notes is None else [len(notes) for notes in row.notes]
        if counts is not None and counts != [shape[0]] * len(columns):
            raise ValueError(
                f"{row.label!r}: {counted(len(columns), 'block')} of {counted(shape[0], 'sample')} need as many notes, "
                f"got {counts}"
            )


def _tile_size(shape: torch.Size, scale: int | None) -> tuple[int, int]:
    """Width and height at which one image or frame is shown."""
    height, width = shape[-2:]
    longest = max(height, width)
    limit = LARGEST_TILE if len(shape) == 4 else LARGEST_FRAME
    if scale is None and longest > limit:
        return max(1, round(width * limit / longest)), max(1, round(height * limit / longest))
    factor = scale or -(-SMALLEST_TILE // longest)
    return width * factor, height * factor


def _frames(shape: torch.Size) -> list[int]:
    """Indices of the frames that are drawn: first, middle and last of a video, 0 of an image."""
    return sorted({0, shape[1] // 2, shape[1] - 1}) if len(shape) == 5 else [0]


@dataclass(frozen=True)
class _Layout:
    """Positions of the tiles in pixels; a tile is an image, or the frames of a video side by side.

    Attributes:
        samples: Tiles per block.
        blocks: Blocks per row.
        frame: Width and height of one image or frame.
        frames: Frames per tile.
        narrow: Whether the blocks of a row are below each other, and below its label.
    """

    samples: int
    blocks: int
    frame: tuple[int, int]
    frames: int
    narrow: bool = False

    @property
    def tile_width(self) -> int:
        return self.frames * (self.frame[0] + FRAME_GAP) - FRAME_GAP

    @property
    def pitch(self) -> int:
        """Distance between the left edges of neighbouring tiles."""
        return self.tile_width + (VIDEO_GAP if self.frames > 1 else TILE_GAP)

    @property
    def block_width(self) -> int:
        return max((self.samples - 1) * self.pitch + self.tile_width, NARROWEST_BLOCK)

    def left(self, block: int, sample: int = 0) -> int:
        if self.narrow:
            return MARGIN + sample * self.pitch
        start = MARGIN + LABEL_WIDTH + LABEL_GAP + block * (self.block_width + BLOCK_GAP)
        return start + sample * self.pitch

    @property
    def width(self) -> int:
        if self.narrow:
            return self.block_width + 2 * MARGIN
        return self.left(self.blocks) - BLOCK_GAP + MARGIN


class _Heading:
    """Title, subtitle and the titles of the blocks."""

    def __init__(self, title: str, subtitle: str, columns: Sequence[str], layout: _Layout):
        width = layout.width - 2 * MARGIN
        self.layout = layout
        self.title = Paragraph(title, 22, width, 3, bold=True)
        self.subtitle = Paragraph(subtitle, 14, width, 4)
        # In a narrow grid each row has the titles of its blocks.
        shown = () if layout.narrow else columns
        self.columns = [Paragraph(c, 15, layout.block_width, 2, bold=True) for c in shown]
        self.columns_bottom = (
            MARGIN + self.title.height + 4 + self.subtitle.height + (0 if layout.narrow else 26)
            + max((c.height for c in self.columns), default=0)
        )  # fmt: skip
        self.height = self.columns_bottom + 22

    def draw(self, canvas: Image.Image) -> None:
        self.title.draw(canvas, MARGIN, MARGIN, INK)
        self.subtitle.draw(canvas, MARGIN, MARGIN + self.title.height + 4, SOFT)
        pen = ImageDraw.Draw(canvas)
        for index, column in enumerate(self.columns):
            left, top = self.layout.left(index), self.columns_bottom
            column.draw(canvas, left, top - column.height, INK)
            accent = ACCENTS[index % len(ACCENTS)]
            pen.rectangle((left, top + 5, left + self.layout.block_width - 1, top + 7), fill=accent)


class _Row:
    """One prompt with its tiles, and captions below them if any note has text."""

    def __init__(self, row: GridRow, layout: _Layout, columns: Sequence[str]):
        self.row, self.layout = row, layout
        self.notes = row.notes or [[""] * layout.samples] * layout.blocks
        captions = any(_caption(note) for notes in self.notes for note in notes)
        self.caption_height = 22 if captions else 0
        tiles_height = layout.frame[1] + self.caption_height
        self.conditions = _thumbnails(row.conditions)
        strip = max((c.height + CONDITION_GAP for c in self.conditions), default=0)
        if layout.narrow:
            self.label = Paragraph(row.label, 15, layout.block_width, 6)
            titles = [Paragraph(c, 13, layout.block_width, 1, bold=True) for c in columns]
            first = self.label.height + strip
            self.titles = [
                (t, first + i * (tiles_height + TITLE_HEIGHT)) for i, t in enumerate(titles)
            ]
            self.tops = [top + TITLE_HEIGHT for _, top in self.titles]
            self.height, self.label_offset = self.tops[-1] + tiles_height, 0
            return
        self.label = Paragraph(row.label, 15, LABEL_WIDTH, max(6, (tiles_height - strip) // 21))
        label_height = self.label.height + strip
        self.height = max(tiles_height, label_height)
        self.label_offset = max(0, (layout.frame[1] - label_height) // 2)
        self.titles, self.tops = [], [0] * layout.blocks

    def draw(self, canvas: Image.Image, top: int) -> None:
        self.label.draw(canvas, MARGIN, top + self.label_offset, INK)
        pen = ImageDraw.Draw(canvas)
        boxes = self.condition_boxes(top)
        for condition, (left, upper, right, bottom) in zip(self.conditions, boxes, strict=True):
            pen.rectangle((left - 1, upper - 1, right, bottom), outline=FAINT)
            canvas.paste(condition, (left, upper))
        for title, down in self.titles:
            title.draw(canvas, MARGIN, top + down + 6, SOFT)
        self.draw_tiles(canvas, top, self.row.blocks)

    def condition_boxes(self, top: int) -> list[Box]:
        """Where the condition images are, below the label."""
        left, below = MARGIN, top + self.label_offset + self.label.height + CONDITION_GAP
        found = []
        for condition in self.conditions:
            found.append((left, below, left + condition.width, below + condition.height))
            left += condition.width + TILE_GAP
        return found

    def draw_tiles(self, canvas: Image.Image, top: int, blocks: Sequence[Media]) -> None:
        """Draw the media, in place of the row's own or the same."""
        for b, (block, notes) in enumerate(zip(blocks, self.notes, strict=True)):
            for s, (media, note) in enumerate(zip(block, notes, strict=True)):
                self._tile(canvas, media, note, (self.layout.left(b, s), top + self.tops[b]))

    def _tile(self, canvas: Image.Image, media: Tensor, note: str, at: tuple[int, int]) -> None:
        (left, top), (width, height) = at, self.layout.frame
        frames = media if media.ndim == 4 else media[None]
        pen = ImageDraw.Draw(canvas)
        for place, frame in enumerate(_frames(frames[None].shape)):
            x = left + place * (width + FRAME_GAP)
            # The border makes the edge of white images visible; it lies outside the image.
            pen.rectangle((x - 1, top - 1, x + width, top + height), outline=FAINT)
            canvas.paste(_picture(frames[frame], self.layout.frame), (x, top))
        right = left + self.layout.tile_width
        if note.startswith((TICK, CROSS)):
            badge = _badge(note.startswith(TICK))
            corner = (right - badge.width - 3, top + height - badge.height - 3)
            canvas.paste(badge, corner, badge)
        if _caption(note):
            caption = Paragraph(_caption(note), 13, self.layout.tile_width, 1)
            caption.draw(canvas, left, top + height + 5, SOFT)


def _thumbnails(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Copies of the first three images, small enough to fit side by side below a label."""
    shown = [p.convert("RGB") for p in pictures[:3]]
    side = (LABEL_WIDTH + TILE_GAP) // max(len(shown), 2) - TILE_GAP
    for picture in shown:
        picture.thumbnail((side, CONDITION_HEIGHT))
    return shown


def _caption(note: str) -> str:
    """A note without its mark, to be drawn as text."""
    return note.lstrip(TICK + CROSS).strip()


def _picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    picture = picture_of(image)
    enlarged = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


@cache
def _badge(good: bool, size: int = 19) -> Image.Image:
    """A green disc with a tick or a red disc with a cross, anti-aliased."""
    fine = 4 * size
    badge = Image.new("RGBA", (fine, fine), (255, 255, 255, 0))
    pen = ImageDraw.Draw(badge)
    pen.ellipse((0, 0, fine - 1, fine - 1), fill=PAPER)
    rim = fine // 12
    pen.ellipse((rim, rim, fine - 1 - rim, fine - 1 - rim), fill=GOOD if good else BAD)
    strokes = [(0.28, 0.52, 0.44, 0.67), (0.44, 0.67, 0.73, 0.36)]
    if not good:
        strokes = [(0.34, 0.34, 0.66, 0.66), (0.34, 0.66, 0.66, 0.34)]
    thick = fine // 10
    for stroke in strokes:
        x0, y0, x1, y1 = (fine * v for v in stroke)
        pen.line((x0, y0, x1, y1), fill=PAPER, width=thick)
        for x, y in ((x0, y0), (x1, y1)):
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=PAPER)
    return badge.resize((size, size), Image.Resampling.BOX)
