"""What a comparison grid shows: its axes and the models and arguments of each of its cells.

The settings are stored in the metadata of the PNG file, from which the same grid can be drawn again.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from flowgrpo.core.imports import suggest
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation.samplers import Sampler

KEY = "flowgrpo-grid"
"""Name of the text chunk of a PNG file that holds the settings as JSON."""
FORMAT = 1
MOST_IMAGES = 1000
"""Images of the largest picture. At 256 pixels it has 65 million pixels; beyond 89 million, Pillow warns
of a decompression bomb when it opens the file."""
MOST_IN_SHEET = 5000
"""Images of the largest contact sheet. At 256 pixels it has about 50 MB."""
PICTURES, SHEETS = (".png", ".webp"), (".html",)
"""Endings of the files in which a grid can be written."""
BLOCK = re.compile(rb'<script type="application/json" id="flowgrpo-grid">(.*?)</script>', re.DOTALL)
"""The settings in a contact sheet."""
DESCRIPTION = 0x010E
"""EXIF tag (ImageDescription) of a WebP file that holds the settings as JSON."""
CHECKPOINTS = ("base", "best", "last")
NO_LORA = "none"
"""Value of the axis ``lora`` that stands for the model without an adapter."""

KINDS: Mapping[str, str] = {
    "model": "models or run directories",
    "checkpoint": "of a run: base, best, best:NAME, last or a number of iterations",
    "lora": "adapters, as --lora; 'none' for the model alone",
    "scale": "scales of the one adapter",
    "guidance": "guidance scales",
    "steps": "denoising steps",
    "seed": "seeds of the initial noise",
    "sampler": "ode, dpm_2m, a transition with or without its strength, such as flow_sde or cps:0.5; shipped, the pipeline's own scheduler, or a class of diffusers, such as UniPCMultistepScheduler",
    "base_after": "of a run: shares of the steps (below 1) or numbers of steps after which the model before training takes over",
}
"""The axes of a grid, and their values."""


@dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Attributes:
        kind: One of :data:`KINDS`.
        values: Its values: texts, whole numbers or numbers, by its kind.
    """

    kind: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """Read ``KIND=VALUE,VALUE,...``.

        Raises:
            ValueError: If the kind is unknown or a value is wrong.
        """
        kind, equals, rest = text.partition("=")
        kind, parts = kind.strip(), [p.strip() for p in rest.split(",")]
        if kind not in KINDS:
            raise ValueError(f"--axis {text}: expected KIND=VALUE,... with one of {', '.join(KINDS)}{suggest(kind, KINDS)}")  # fmt: skip
        if not equals or not all(parts):
            raise ValueError(f"--axis {text}: expected KIND=VALUE,VALUE,... without empty values")
        if len(set(parts)) < len(parts):
            raise ValueError(f"--axis {text}: a value is there twice")
        return cls(kind, tuple(_value(kind, p) for p in parts))


@dataclass(frozen=True)
class Cell:
    """The model of one cell of a grid and how it is sampled; None is the model's own value.

    Attributes:
        model: A model or a run directory.
        checkpoint: Of a run: ``base``, ``best``, ``best:NAME``, ``last`` or a number of iterations.
        loras: Adapters as ``PATH`` or ``PATH:SCALE``.
        guidance: Guidance scale.
        steps: Denoising steps.
        seed: Seed of the initial noise.
        sampler: As :meth:`flowgrpo.evaluation.samplers.Sampler.parse` reads it.
        base_after: Where the model before training takes over, as ``evaluation.base_after``.
    """

    model: str
    checkpoint: str | None
    loras: tuple[str, ...]
    guidance: float | None
    steps: int | None
    seed: int
    sampler: str = "ode"
    base_after: float | None = None

    def at(self, kind: str, value: Any) -> "Cell":
        """The cell with another value of one axis."""
        if kind == "lora":
            return replace(self, loras=() if value == NO_LORA else (value,))
        if kind == "scale":
            return replace(self, loras=tuple(f"{path}:{value!r}" for path in self.loras))
        return replace(self, **{kind: value})

    @property
    def weights(self) -> tuple[str, str | None, tuple[str, ...]]:
        """What the cells have in common that one loaded model draws."""
        return self.model, self.checkpoint, self.loras


@dataclass(frozen=True)
class GridSettings:
    """Everything that determines a grid.

    Attributes:
        start: The values of everything that is on no axis.
        axes: None, one or two: the columns, and the rows of each prompt.
        samples: Images per cell and prompt.
        prompts: The prompts as JSON; None if they cannot be stored.
        rewards: ``model``, ``name`` and ``options`` of each reward that scores the images.
        narrow: Whether the columns are below each other, for a phone.
        digests: The SHA-256 of the state of each checkpoint, by ``MODEL@CHECKPOINT``.
    """

    start: Cell
    axes: tuple[Axis, ...]
    samples: int
    prompts: Sequence[Mapping[str, Any]] | None
    rewards: Sequence[Mapping[str, Any]]
    narrow: bool
    digests: Mapping[str, str]

    def cells(self) -> Iterator[tuple[int, int, Cell]]:
        """Row (of each prompt) and column of each cell, and the cell."""
        columns = self.axes[0].values if self.axes else (None,)
        inner = self.axes[1].values if len(self.axes) > 1 else (None,)
        # A scale applies to an adapter that another axis may name, so it is set last.
        for (row, r), (column, c) in product(enumerate(inner), enumerate(columns)):
            given = list(zip(self.axes, (c, r), strict=False))
            cell = self.start
            for axis, value in sorted(given, key=lambda pair: pair[0].kind == "scale"):
                cell = cell.at(axis.kind, value)
            yield row, column, cell

    def check(self, number: int, sheet: bool = False) -> None:
        """Refuse axes that contradict each other, and grids too large to draw.

        Args:
            number: Number of prompts.
            sheet: Whether a contact sheet is drawn, which may have more images than a picture.

        Raises:
            ValueError: With the remedy.
        """
        if len(self.axes) > 2:
            raise ValueError(f"a grid has at most two axes, got {len(self.axes)}")
        kinds = [a.kind for a in self.axes]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"both axes are {kinds[0]}: give all values in one --axis")
        if "lora" in kinds and self.start.loras:
            raise ValueError("--axis lora names the adapters: remove --lora")
        cells = [c for _, _, c in self.cells()]
        if "scale" in kinds and any(len(c.loras) != 1 for c in cells):
            raise ValueError("--axis scale needs exactly one adapter in each cell: --lora PATH or --axis lora=...")  # fmt: skip
        total, most = number * len(cells) * self.samples, MOST_IN_SHEET if sheet else MOST_IMAGES
        if total > most:
            raise ValueError(
                f"a grid of {counted(number, 'prompt')}, {counted(len(cells), 'cell')} and {counted(self.samples, 'sample')} has {total} "
                f"images, more than the {most} of {'a contact sheet' if sheet else 'a picture'}: "
                f"{_that_fits(number, len(cells), self.samples, most)}"
                + (
                    f", or --out FILE.html, which holds {MOST_IN_SHEET}"
                    if most < total <= MOST_IN_SHEET
                    else ""
                )
            )

    def to_json(self) -> str:
        """The settings as JSON for the metadata of a picture."""
        return strict_json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_picture(cls, path: Path) -> "GridSettings":
        """Read the settings that a grid's file holds: PNG, WebP or a contact sheet.

        Raises:
            ValueError: If it is no grid, or one of a newer version.
        """
        text = _stored(path)
        if text is None:
            raise ValueError(
                f"{path} has no settings of a grid: it was not drawn by 'flowgrpo grid', or another program "
                "saved it again without its metadata"
            )
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the settings in {path} are damaged: {error}") from error
        if found.pop("format", None) != FORMAT:
            raise ValueError(
                f"{path} was drawn by another version of flowgrpo: draw it with that one"
            )
        start = found.pop("start")
        axes = tuple(Axis(a["kind"], tuple(a["values"])) for a in found.pop("axes"))
        cell = Cell(**{**start, "loras": tuple(start["loras"])})
        return cls(start=cell, axes=axes, **found)


def _that_fits(number: int, cells: int, samples: int, most: int) -> str:
    """The nearest smaller grids, in words."""
    found = []
    if (fewer := most // (number * cells)) >= 1:
        found.append(f"--samples {fewer} ({counted(number * cells * fewer, 'image')})")
    if (fewer := most // (cells * samples)) >= 1:
        found.append(f"--rows {fewer} ({counted(cells * samples * fewer, 'image')})")
    if (fewer := most // (number * samples)) >= 1:
        found.append(f"axes with at most {counted(fewer, 'cell')}")
    return f"what fits is {' or '.join(found)}" if found else "reduce --rows and --samples"


def _stored(path: Path) -> str | None:
    """The JSON text in a grid's file; None if there is none.

    Raises:
        ValueError: If the file cannot be read.
    """
    from PIL import Image

    from flowgrpo.data.pictures import UNREADABLE

    if path.suffix.lower() in SHEETS:
        block = BLOCK.search(path.read_bytes())
        return block[1].decode() if block else None
    try:
        with Image.open(path) as picture:
            picture.load()
            description = picture.getexif().get(DESCRIPTION)
            text: str | None = getattr(picture, "text", {}).get(KEY, description)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    return text if text and text.startswith("{") else None


def prompt_record(prompt: Prompt) -> dict[str, Any] | None:
    """A prompt as JSON; None if it has pictures in memory or in arguments of the call."""
    if not all(isinstance(i, Path) for i in prompt.images):
        return None
    record = {
        "text": prompt.text,
        "negative": prompt.negative,
        "metadata": dict(prompt.metadata),
        "images": [str(Path(i).resolve()) for i in prompt.images if isinstance(i, Path)],
        "height": prompt.height,
        "width": prompt.width,
        "num_frames": prompt.num_frames,
        "call": dict(prompt.call),
    }
    try:
        return record if json.loads(json.dumps(record)) == record else None
    except (TypeError, ValueError):
        return None


def prompt_of(record: Mapping[str, Any]) -> Prompt:
    """The prompt of :func:`prompt_record`."""
    return Prompt(**{**record, "images": [Path(i) for i in record["images"]]})


def _value(kind: str, text: str) -> Any:
    """One value of an axis.

    Raises:
        ValueError: If it is wrong for the kind.
    """
    if kind in ("model", "lora"):
        return text
    if kind == "checkpoint":
        named = text in CHECKPOINTS or text.isdecimal() or text.startswith("best:")
        if not named:
            raise ValueError(f"--axis checkpoint: expected {KINDS[kind]}, got {text!r}{suggest(text, CHECKPOINTS)}")  # fmt: skip
        return text
    if kind == "sampler":
        Sampler.parse(text)
        return text
    try:
        value: float = int(text) if kind in ("steps", "seed") else float(text)
    except ValueError:
        value = math.nan
    least = {"steps": 1, "seed": 0, "base_after": 0}.get(kind, -math.inf)
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"--axis {kind}: expected {KINDS[kind]}, got {text!r}")
    return value
