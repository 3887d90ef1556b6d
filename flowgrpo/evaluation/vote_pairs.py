"""The pairs of pictures that people vote on, from comparison grids and from folders of images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flowgrpo.core.win_rates import pairs_of
from flowgrpo.data.pictures import UNREADABLE, as_rgb
from flowgrpo.data.votes import (
    BALLOT,
    PICTURES,
    Ballot,
    Pair,
    Shown,
    file_name,
    read_ballot,
    save_picture,
)
from flowgrpo.evaluation.tiles import open_picture, read_tiles

INDEX = "index.jsonl"
"""List of the images of a folder, as ``flowgrpo sample`` writes it."""
MARKS = ("✓", "✗")
OPPONENTS = 2
"""Reach of the ring in which the samples of one prompt are paired: each is compared with at most four."""


@dataclass(frozen=True)
class Picture:
    """A picture of a prompt."""

    prompt: str
    image: Image.Image


@dataclass(frozen=True)
class Source:
    """Pictures of one model, or of one folder.

    Attributes:
        name: For tables.
        pictures: The pictures; those of a prompt are in a fixed order.
    """

    name: str
    pictures: Sequence[Picture]

    def by_prompt(self) -> dict[str, list[Picture]]:
        """The pictures of each prompt."""
        found: dict[str, list[Picture]] = {}
        for one in self.pictures:
            found.setdefault(one.prompt, []).append(one)
        return found


def newest_grid(folder: Path) -> Path | None:
    """The comparison grid of a run's last evaluation after training began; None if there is none."""
    grids = sorted((folder / "grids").glob("*.png"))
    return next((g for g in reversed(grids) if g.stem.isdecimal() and int(g.stem) > 0), None)


def from_grid(path: Path, base: str, tuned: str) -> tuple[Source, Source] | None:
    """The pictures of the first and the last column of a comparison grid.

    Args:
        path: The grid.
        base: Name of the first column's source.
        tuned: Name of the last column's source.

    Returns:
        None if the grid does not say where its images are, or has marks drawn on them: voters would see
        which picture a reward prefers.
    """
    picture = open_picture(path)
    rows = [] if picture is None else read_tiles(picture)
    tiles = [t for r in rows for b in r.blocks for t in b]
    if picture is None or not tiles or any(t.note.startswith(MARKS) for t in tiles):
        return None
    columns: list[list[Picture]] = [[], []]
    for row in rows:
        for column, block in zip(columns, (row.blocks[0], row.blocks[-1]), strict=True):
            column += [Picture(row.label, picture.crop(t.box).convert("RGB")) for t in block]
    return Source(base, columns[0]), Source(tuned, columns[1])


def from_folder(folder: Path, name: str) -> Source:
    """The images of a folder with ``index.jsonl``, as ``flowgrpo sample`` writes it.

    Raises:
        FileNotFoundError: If there is no index, or an image is missing.
        ValueError: If a line of the index is wrong, or a file is no image that can be read.
    """
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} is neither a run directory (config.toml) nor a folder of 'flowgrpo sample' ({INDEX}): "
            "give one of these"
        )
    pictures = []
    for number, line in enumerate(index.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            file, prompt = folder / str(record["file"]), str(record["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{index}, line {number}: expected an object with file and prompt"
            ) from error
        if file.suffix.lower() == ".mp4":
            raise ValueError(
                f"{file} is a video, and people vote on pictures here: give folders of images"
            )
        try:
            with Image.open(file) as image:
                pictures.append(Picture(prompt, as_rgb(image)))
        except FileNotFoundError:
            raise FileNotFoundError(f"{index}, line {number}: no picture {file}") from None
        except UNREADABLE as error:
            raise ValueError(f"{file} is not a picture that can be read: {error}") from error
    return Source(name, pictures)


def pair_up(sources: Sequence[Source]) -> list[tuple[str, Picture, str, Picture, str]]:
    """Prompt, first picture and its source, second picture and its source, of each pair.

    Two sources and more: pictures at the same place of the same prompt, of every two sources. One source:
    the samples of each prompt, each with at most four others. Pictures without a difference are left out.

    Raises:
        ValueError: If the sources share no prompt, or no prompt has two different samples.
    """
    found: list[tuple[str, Picture, str, Picture, str]] = []
    if len(sources) == 1:
        name = sources[0].name
        for prompt, images in sources[0].by_prompt().items():
            for i, j in pairs_of(len(images), OPPONENTS):
                found.append((prompt, images[i], name, images[j], name))
    for i, one in enumerate(sources):
        for other in sources[i + 1 :]:
            theirs = other.by_prompt()
            for prompt, images in one.by_prompt().items():
                for a, b in zip(images, theirs.get(prompt, []), strict=False):
                    found.append((prompt, a, one.name, b, other.name))
    different = [f for f in found if f[1].image.tobytes() != f[3].image.tobytes()]
    if different:
        return different
    names = " and ".join(s.name for s in sources)
    if found:
        raise ValueError(f"all pictures of {names} are equal, so there is nothing to vote on")
    if len(sources) > 1:
        raise ValueError(
            f"{names} have no prompt in common: sample them with the same prompts, for instance by "
            "'flowgrpo sample MODEL prompts.txt --out FOLDER'"
        )
    raise ValueError(
        f"{names} has one picture per prompt: sample at least two with --samples, or give a second folder"
    )


def check_free(folder: Path) -> None:
    """Check that votes can be put into a folder; an interrupted start may have left pictures there.

    Raises:
        ValueError: If it has other files in it.
    """
    if (folder / BALLOT).is_file() or not folder.exists():
        return
    if not folder.is_dir() or {p.name for p in folder.iterdir()} - {PICTURES}:
        raise ValueError(f"{folder} has other files in it: choose a new or empty folder with --out")


def make_ballot(folder: Path, sources: Sequence[Source], seed: int, most: int) -> Ballot:
    """Choose the pairs at random, copy their pictures, and write the ballot.

    If the folder has a ballot already, it must have the same pairs; then voting goes on.

    Args:
        folder: The folder of the votes.
        sources: Where the pictures come from.
        seed: Decides the choice and the order of the pairs, and the sides.
        most: Most pairs; 0 for no limit.

    Raises:
        ValueError: If the folder has a ballot with other pairs.
    """
    pairs = pair_up(sources)
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[i] for i in (order[:most] if most else order)]
    check_free(folder)
    earlier = read_ballot(folder) if (folder / BALLOT).is_file() else None
    made = Ballot(
        folder,
        seed,
        [
            Pair(prompt, Shown(a_name, file_name(a.image)), Shown(b_name, file_name(b.image)))
            for prompt, a, a_name, b, b_name in chosen
        ],
    )
    if earlier is None:
        for _, a, _, b, _ in chosen:
            save_picture(folder, a.image)
            save_picture(folder, b.image)
        made.write()
    elif earlier.digest != made.digest:
        raise ValueError(
            f"{folder} has votes on other pairs than these sources give (their pictures have changed since, or "
            f"--seed or --pairs differ): go on with 'flowgrpo vote --out {folder}' alone, or choose another --out"
        )
    return made
