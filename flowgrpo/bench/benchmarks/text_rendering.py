"""Text rendering: OCR accuracy as in Flow-GRPO (arXiv:2505.05470), and two further metrics.

The accuracy counts a text as right as soon as it occurs in all that was read, so that pages full of
text score high. ``exact`` and ``similarity`` do not: they compare with all that was read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import (
    About,
    Benchmark,
    Data,
    Entry,
    Failure,
    Json,
    Judged,
    Metric,
    Picture,
    Points,
    Reference,
    Result,
)
from flowgrpo.bench.data import open_data
from flowgrpo.bench.files import write_json
from flowgrpo.bench.judging import in_batches
from flowgrpo.core.imports import import_path
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data.prompt_files import read_prompts

__all__ = ["TextRendering"]

ACCURACY, EXACT, SIMILARITY = "OCR accuracy", "exact", "similarity"
OCR, WANTED_TEXT, EDIT_DISTANCE = (
    f"reward_models.ocr:{name}" for name in ("OCR", "wanted_text", "edit_distance")
)


@dataclass(frozen=True, kw_only=True)
class TextRendering(Benchmark):
    """The settings of a text-rendering run."""

    data_file: str = "prompts/text_rendering_held_out.jsonl"
    """Prompts with a text in double quotes or in the metadata ``text``; Flow-GRPO's is the file
    ``dataset/ocr/test.txt`` of its repository."""
    samples: int = 1
    """Images per prompt."""
    reader: str = ""
    """``package.module:name`` of another OCR engine: a function from an RGB array to lines of text."""
    longest_side: int = 320
    """Size to which an image is shrunk to find the text; the default engine only."""
    batch: int = 8
    """Images that are read at once from the disk."""

    about = About(
        summary="a quoted text to be rendered: 200 prompts of ours, or Flow-GRPO's 1,018",
        judge="PP-OCRv6 through rapidocr (in its wheel), or any OCR engine by import path",
        calls="one per image",
        licence="prompts Apache-2.0 (Flow-GRPO's: MIT); models Apache-2.0",
        source="comes with flowgrpo; --data PATH for Flow-GRPO's",
    )

    name = "text_rendering"
    title = "Text rendering"

    def data(self) -> Data:
        """The prompts' file."""
        return open_data(self.data_file, {})[1]

    def entries(self) -> Sequence[Entry]:
        """The prompts, numbered from 0."""
        wanted_text = import_path(WANTED_TEXT)
        prompts = read_prompts(open_data(self.data_file, {})[0])
        for prompt in prompts:
            wanted_text(prompt)
        return [Entry(f"{i:05d}", p, (ACCURACY, EXACT, SIMILARITY)) for i, p in enumerate(prompts)]

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """Ours, and those of other generators."""
        number = int(entry.key)
        return (
            f"{number:05d}_{sample}.png",
            f"{number}_{sample}.png",
            f"p{number:05d}_s{sample}.png",
        )

    def judge(self) -> "OCRJudge":
        """Load the OCR engine."""
        return OCRJudge(self.reader, self.longest_side, self.batch)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """Three points per image."""
        for judgement in judgements:
            yield from ((name, judgement[name]) for name in (ACCURACY, EXACT, SIMILARITY))

    def metrics(self) -> Sequence[Metric]:
        """The mean over images of each."""
        return (
            Metric(ACCURACY, ((ACCURACY,),), headline=True),
            Metric(EXACT, ((EXACT,),)),
            Metric(SIMILARITY, ((SIMILARITY,),)),
        )

    def references(self) -> Sequence[Reference]:
        """Published results on Flow-GRPO's prompts, by PaddleOCR."""
        return REFERENCES

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``read.json``: image -> the text that was read, and its scores."""
        rows = {r.path: dict(r.judgement) for r in results if r.judgement is not None}
        write_json(folder / "read.json", rows)
        return [folder / "read.json"]


class OCRJudge:
    """Reads each image once and compares with the wanted text in three ways."""

    def __init__(self, reader: str, longest_side: int, batch: int):
        """
        Raises:
            ImportError: If the default engine is not installed.
        """
        self.reader, self.longest_side, self.batch = reader, longest_side, batch
        own: Any = import_path(reader) if reader else None
        ocr: Any = import_path(OCR)
        self.ocr: Any = ocr(reader=own) if own else ocr(longest_side=longest_side)

    @property
    def title(self) -> str:
        """The engine's name."""
        return self.reader or "rapidocr"

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the official judge."""
        return ("Flow-GRPO's numbers are by PaddleOCR 2.9.1; another engine reads other texts",)

    def identity(self) -> Json:
        """The engine with its version and settings."""
        if self.reader:
            return {"judge": "ocr", "reader": self.reader}
        from importlib.metadata import version

        size = self.longest_side
        return {"judge": "ocr", "reader": f"rapidocr {version('rapidocr')}", "longest_side": size}

    def version(self) -> str:
        """Nothing runs elsewhere."""
        return ""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """The recognised text and its scores in [0, 1]."""
        return in_batches(pictures, self.batch, self._read)

    def _read(
        self, images: Float[Tensor, "batch 3 height width"], pictures: Sequence[Picture]
    ) -> Sequence[Json | Failure]:
        arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return [self._one(a, p) for a, p in zip(arrays, pictures, strict=True)]

    def _one(self, image: Any, picture: Picture) -> Json | Failure:
        edit_distance, wanted_text = import_path(EDIT_DISTANCE), import_path(WANTED_TEXT)
        try:
            lines = list(self.ocr.read(image))
        except Exception as error:  # engines raise anything
            return Failure(f"the OCR engine failed: {error}")
        read, target = (
            "".join(t.split()).lower() for t in ("".join(lines), wanted_text(picture.entry.prompt))
        )
        longer = max(len(read), len(target))
        return {
            "read": lines,
            ACCURACY: self.ocr.score(read, target),
            EXACT: float(read == target),
            SIMILARITY: 1 - edit_distance(read, target) / longer,
        }


def _reference(model: str, accuracy: float, source: str, **settings: Any) -> Reference:
    return Reference(model, {ACCURACY: 100 * accuracy}, source, settings, "PaddleOCR")


PAPER, NFT = "Flow-GRPO, arXiv:2505.05470", "DiffusionNFT, arXiv:2509.16117"
REFERENCES = (
    _reference("SDXL", 0.14, NFT),
    _reference("SD3.5-M", 0.59, PAPER, num_steps=40, guidance_scale=4.5, height=512, width=512),
    _reference("SD3.5-M without guidance", 0.12, NFT, guidance_scale=1.0, height=512, width=512),
    _reference("SD3.5-L", 0.68, NFT),
    _reference("FLUX.1-dev", 0.59, NFT),
    _reference(
        "SD3.5-M + Flow-GRPO", 0.92, PAPER, num_steps=40, guidance_scale=4.5, height=512, width=512
    ),
)
