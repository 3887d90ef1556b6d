"""GEdit-Bench: 606 edits of real users' photos, in English and in Chinese (arXiv:2504.17761).

A judge gives each edit two scores for semantics and two for quality, from 0 to 10; the lower one of
each pair counts. The overall score of an image is their geometric mean, and the benchmark's scores
are means over the eleven tasks of the mean within a task.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from flowgrpo.bench.base import (
    About,
    BenchError,
    Benchmark,
    Data,
    Entry,
    Json,
    Metric,
    Picture,
    Points,
    Result,
)
from flowgrpo.bench.benchmarks._viescore import PERCEPTION, SEMANTICS, edit_images, parse_pair
from flowgrpo.bench.endpoint import EndpointJudge, EndpointSettings, named_note
from flowgrpo.bench.files import fingerprint, write_atomically
from flowgrpo.bench.sources import extract, open_dataset
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt

__all__ = ["GEditBench"]

TASKS = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change",
    "subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer",
)  # fmt: skip
ITEMS = 606
SCORES = ("G_SC", "G_PQ", "G_O")
"""Semantic consistency, perceptual quality, overall."""
SHARED = " (intersection)"
"""Marks scores over the instructions that every model of the paper could handle."""
JUDGES = ("gpt-4.1", "Qwen2.5-VL-72B-Instruct-AWQ")
HOW = "It is --data hf:stepfun-ai/GEdit-Bench (MIT), or a folder that this dataset was saved to"
TEXTS = {
    "task_type": str,
    "key": str,
    "instruction": str,
    "instruction_language": str,
    "Intersection_exist": bool,
}
IMAGES = ("input_image", "input_image_raw")
FIELDS = (
    "source_image", "edited_image", "instruction", "sementics_score", "quality_score",
    "intersection_exist", "instruction_language",
)  # fmt: skip
"""Columns of the official results, spelt as there."""


@dataclass(frozen=True, kw_only=True)
class GEditBench(EndpointSettings, Benchmark):
    """The settings of a GEdit-Bench run; each language is a run of its own."""

    data_file: str = ""
    """``hf:stepfun-ai/GEdit-Bench``, or a folder with this dataset."""
    language: Literal["en", "cn"] = "en"
    """Of the instructions."""
    samples: int = 1
    """Images per instruction; the published number is 1."""
    source: Literal["input_image_raw", "input_image"] = "input_image_raw"
    """What the model edits: the user's photo, or its copy at about 512 x 512 pixels, which the judge
    sees in both cases."""
    sources: str = ""
    """Folder for the source images; empty for the assets cache of huggingface_hub."""

    about = About(
        summary="edits of photos: 606 instructions x 1 image in English, as many in Chinese",
        judge="gpt-4.1, or Qwen2.5-VL-72B-Instruct-AWQ on vLLM (one 80 GB GPU)",
        calls="1,212 per language (two an image)",
        licence="MIT; the judge's questions Apache-2.0",
        source="--data hf:stepfun-ai/GEdit-Bench",
    )

    name = "gedit_bench"
    task = "image-to-image"

    @property
    def title(self) -> str:
        """With the language."""
        return f"GEdit-Bench {self.language}"

    def _records(self) -> tuple[Sequence[Mapping[str, Any]], str]:
        return _load(self.data_file, self.sources)

    def data(self) -> Data:
        """The dataset, identified by the contents of its records and images."""
        records, digest = self._records()
        found = sum(r["instruction_language"] == self.language for r in records)
        notes = (
            ()
            if found == ITEMS
            else (f"{counted(found, 'instruction')} instead of the published {ITEMS}",)
        )
        return Data(self.data_file, digest, notes=notes)

    def entries(self) -> Sequence[Entry]:
        """The instructions of the language, each with its source image."""
        records, _ = self._records()
        found = [
            _entry(r, self.source) for r in records if r["instruction_language"] == self.language
        ]
        if not found:
            raise BenchError(f"{self.data_file} has no instruction in {self.language}")
        if len({e.key for e in found}) < len(found):
            raise BenchError(f"{self.data_file}: a key stands twice in one task")
        return found

    def root(self, label: str) -> str:
        """``images/<model>/fullset``; ``images`` is the official ``--save_path``."""
        return f"images/{label}/fullset"

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{task}/{language}/{key}.png``; with several images, numbered."""
        name = f"{_folder(entry)}.png" if self.samples == 1 else f"{_folder(entry)}_{sample}.png"
        return (name, f"fullset/{name}")

    def assemble(self, images: Path, entries: Sequence[Entry]) -> None:
        """Write ``{key}_SRCIMG.png``, the source that the official judge compares with."""
        from flowgrpo.data.pictures import png_of

        for entry in entries:
            path = images / f"{_folder(entry)}_SRCIMG.png"
            if not path.is_file():
                (image,) = Prompt("", images=[entry.prompt.metadata["judged_source"]]).open_images()
                write_atomically(path, png_of(image))

    def judge(self) -> "EditJudge":
        """Connect to the judge."""
        return EditJudge(self, "--judge MODEL, such as gpt-4.1, and --judge-url")

    def num_calls(self, entry: Entry) -> int:
        """Semantics and quality."""
        return 2

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """Per image three scores in its task, from 0 to 10; again for the intersection."""
        task, shared = entry.prompt.metadata["task"], entry.prompt.metadata["intersection"]
        for judgement in judgements:
            semantics, quality = min(judgement["semantics"]), min(judgement["quality"])
            values = (semantics, quality, math.sqrt(semantics * quality))
            for score, value in zip(SCORES, values, strict=True):
                yield f"{task}: {score}", value
                if shared:
                    yield f"{task}: {score}{SHARED}", value

    def metrics(self) -> Sequence[Metric]:
        """Means over tasks, on all instructions and on the intersection; each task."""

        def mean(score: str, end: str) -> Metric:
            parts = tuple((f"{t}: {score}{end}",) for t in TASKS)
            return Metric(f"{score}{end}", parts, headline=not end, percent=False)

        overall = [mean(s, end) for end in ("", SHARED) for s in SCORES]
        each = [
            Metric(f"{t}: {s}", ((f"{t}: {s}",),), percent=False) for t in TASKS for s in SCORES
        ]
        return [*overall, *each]

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """The official CSV files, one per task and one with all, for ``calculate_statistics.py``."""
        rows = [
            (r.entry.prompt.metadata["task"], _row(r)) for r in results if r.judgement is not None
        ]
        paths = []
        for task in (*TASKS, "combined"):
            text = io.StringIO()
            writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for own, row in rows if task in (own, "combined"))
            paths.append(folder / f"{label}_{task}_gpt_score.csv")
            write_atomically(paths[-1], text.getvalue().encode())
        return paths

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The scores in an official ``..._combined_gpt_score.csv``; rows of the other language are left out.

        Raises:
            BenchError: If it is none, or has images that the data has not.
        """
        entries = {_folder(e): e for e in self.entries()}
        seen: set[str] = set()
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error) as error:
            raise BenchError(f"{path} cannot be read: {error}") from error
        for number, row in enumerate(rows, start=2):
            where = f"{path}, line {number}"
            if row.get("instruction_language") not in ("en", "cn"):
                raise BenchError(f"{where}: no row of {{model}}_combined_gpt_score.csv")
            if row["instruction_language"] != self.language:
                continue
            place = "/".join(Path(row["edited_image"]).with_suffix("").parts[-3:])
            if place not in entries or place in seen:
                raise BenchError(f"{where}: {place} is unknown or stands there twice")
            seen.add(place)
            try:
                scores = [float(row[f]) for f in ("sementics_score", "quality_score")]
            except (KeyError, TypeError, ValueError) as error:
                raise BenchError(f"{where}: no scores: {error!r}") from error
            if not all(0 <= s <= 10 for s in scores):
                raise BenchError(f"{where}: a score outside of 0 to 10")
            yield entries[place], 0, {"semantics": [scores[0]], "quality": [scores[1]]}


@lru_cache(maxsize=4)
def _load(source: str, folder: str) -> tuple[Sequence[Mapping[str, Any]], str]:
    rows = open_dataset(source, "train", HOW)
    return extract(source, rows, folder, "gedit_bench", TEXTS, IMAGES)


def _entry(record: Mapping[str, Any], source: str) -> Entry:
    """A record as an entry.

    Raises:
        BenchError: If its task is unknown, or its key cannot be the name of a file.
    """
    task, key, language = (record[k] for k in ("task_type", "key", "instruction_language"))
    if task not in TASKS or not re.fullmatch(r"[\w.-]+", key):
        raise BenchError(f"GEdit-Bench has no task {task!r} with the key {key!r}")
    metadata = {
        "task": task,
        "language": language,
        "key": key,
        "intersection": record["Intersection_exist"],
        "judged_source": record["input_image"],
    }
    prompt = Prompt(record["instruction"], metadata=metadata, images=[record[source]])
    dimensions = (task, *(f"{task}: {s}" for s in SCORES))
    return Entry(f"{task}/{language}/{key}", prompt, dimensions, task)


def _folder(entry: Entry) -> str:
    """The official path without its ending: ``{task}/{language}/{key}``."""
    return entry.key


def _row(result: Result) -> dict[str, Any]:
    """A row of the official results."""
    assert result.judgement is not None
    metadata, path = result.entry.prompt.metadata, Path(result.path or f"{result.entry.key}.png")
    values = (
        str(path.with_name(f"{metadata['key']}_SRCIMG.png")),
        str(path),
        result.entry.prompt.text,
        min(result.judgement["semantics"]),
        min(result.judgement["quality"]),
        metadata["intersection"],
        metadata["language"],
    )
    return dict(zip(FIELDS, values, strict=True))


class EditJudge(EndpointJudge):
    """Asks the two questions of VIEScore about an edit."""

    kind = "viescore"

    @property
    def form(self) -> str:
        """The official script sends GPT the text and then JPEG, Qwen PNG and then the text."""
        return "png" if "qwen" in self.settings.judge_model.lower() else "jpeg"

    @property
    def notes(self) -> Sequence[str]:
        """Whether the judge is a published one."""
        return named_note(self.settings.judge_model, JUDGES)

    def wording(self) -> Json:
        """The official questions, the order of the content and the image format."""
        return {
            "wording": fingerprint({"semantics": SEMANTICS, "quality": PERCEPTION}),
            "order": "image, text" if self.form == "png" else "text, image",
            "image": "png" if self.form == "png" else "jpeg 75",
        }

    def judgement(self, picture: Picture) -> Json:
        """``semantics`` and ``quality``: two scores each, from 0 to 10."""
        prompt = picture.entry.prompt
        images = edit_images(prompt.metadata["judged_source"], picture.path, self.form)
        semantics = SEMANTICS.replace("<instruction>", prompt.text)
        return {
            "semantics": self._scores(semantics, images),
            "quality": self._scores(PERCEPTION, images[1:]),
        }

    def _scores(self, question: str, images: Sequence[bytes]) -> list[float]:
        content: list[str | bytes] = (
            [*images, question] if self.form == "png" else [question, *images]
        )
        return self.ask(content, parse_pair, 1400)
