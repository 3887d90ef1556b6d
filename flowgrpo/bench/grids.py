"""Grids of the images of one prompt, which some official scorers read instead of single images."""

from collections.abc import Sequence
from pathlib import Path

from flowgrpo.bench.base import BenchError
from flowgrpo.bench.files import write_atomically
from flowgrpo.core.text import counted

COLUMNS = 2


def write_grid(path: Path, tiles: Sequence[Path]) -> None:
    """Write images of one size as a grid of two columns: top left, top right, bottom left, ...

    A grid that is newer than its images is kept.

    Raises:
        BenchError: If an image cannot be read, or their sizes differ.
    """
    if path.is_file() and path.stat().st_mtime >= max(t.stat().st_mtime for t in tiles):
        return
    from PIL import Image

    from flowgrpo.data.pictures import as_rgb, png_of

    pictures: list[Image.Image] = []
    for tile in tiles:
        try:
            with Image.open(tile) as image:
                pictures.append(as_rgb(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise BenchError(f"{tile} cannot be read: {error}") from error
    width, height = pictures[0].size
    if odd := [t for t, p in zip(tiles, pictures, strict=True) if p.size != (width, height)]:
        raise BenchError(
            f"{odd[0]} has another size than {tiles[0]}: a grid needs images of one size"
        )
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        grid.paste(picture, (column * width, row * height))
    write_atomically(path, png_of(grid))


def tile_box(size: tuple[int, int], number: int, count: int) -> tuple[int, int, int, int]:
    """The place of image ``number`` of ``count`` in a grid of ``size``: left, top, right, bottom.

    Raises:
        BenchError: If the grid's width or height is not a multiple of its tiles.
    """
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    if size[0] % columns or size[1] % rows:
        raise BenchError(
            f"an image of {size[0]}x{size[1]} is no grid of {columns}x{counted(rows, 'image')}"
        )
    width, height = size[0] // columns, size[1] // rows
    row, column = divmod(number, columns)
    return column * width, row * height, (column + 1) * width, (row + 1) * height
