"""DPG-Bench: questions about 1,065 long prompts (arXiv:2403.05135, section 5.1).

Every prompt has yes/no questions that form a graph: a question counts only if its parents were
answered with yes. The published judge, mPLUG through modelscope, runs in an environment of its own;
flowgrpo makes the images and the grids that the official scorer reads, and summarises its results.
Any vision-language model behind an endpoint can answer the questions instead, under its own name.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

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
)
from flowgrpo.bench.data import HUB, open_data
from flowgrpo.bench.endpoint import EndpointJudge, EndpointSettings
from flowgrpo.bench.grids import tile_box, write_grid
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt

__all__ = ["DPGBench"]

SCORE = "DPG-Bench score"
ITEMS = 1065
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
HOW = (
    "It is dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA (Apache-2.0), or the folder "
    "dpg_bench with its prompts"
)
OFFICIAL = (
    "make the images with 'flowgrpo bench generate dpg_bench', run dpg_bench/dist_eval.sh of "
    "github.com/TencentQQGYLab/ELLA on images/grids, and summarise its results with 'flowgrpo bench "
    "score RESULTS.txt --benchmark dpg_bench --data dpg_bench.csv'; or ask a vision-language model with "
    "--judge MODEL --judge-url URL, whose scores are not comparable"
)
ANSWER = "Answer with one word, yes or no."


@dataclass(frozen=True, kw_only=True)
class DPGBench(EndpointSettings, Benchmark):
    """The settings of a DPG-Bench run."""

    data_file: str = ""
    """``dpg_bench.csv``, or the folder that holds it and ``prompts``."""
    samples: int = 4
    """Images per prompt: 4 officially, or 1."""

    about = About(
        summary="long prompts: 1,065 prompts x 4 images, about 13 yes/no questions each",
        judge="mPLUG VQA by the official scorer in its own environment; or any vision-language model "
        "behind an endpoint (not comparable)",
        calls="questions of dpg_bench.csv x 4",
        licence="Apache-2.0",
        source="--data dpg_bench.csv or dpg_bench/ of github.com/TencentQQGYLab/ELLA",
    )

    name = "dpg_bench"
    title = "DPG-Bench"

    def _open(self) -> tuple[Path, Path | None, Data]:
        """The CSV file, the folder of prompts if it was given, and the description of the data."""
        if self.samples not in (1, 4):
            raise BenchError(
                f"the official scorer reads 1 or 4 images per prompt, got {self.samples}"
            )
        source = self.data_file
        folder = Path(source) if source and not source.startswith(HUB) else None
        prompts = None
        if folder is not None and folder.is_dir():
            source, prompts = str(folder / "dpg_bench.csv"), folder / "prompts"
            if not prompts.is_dir():
                raise BenchError(f"{folder} has no folder 'prompts'; or give {source} itself")
        path, data = open_data(source, {}, how=HOW)
        items = len(_items(path, data.sha256))
        notes = (
            []
            if items == ITEMS
            else [f"{counted(items, 'prompt')} instead of the published {ITEMS}"]
        )
        return path, prompts, Data(data.source, data.sha256, data.name, (*data.notes, *notes))

    def data(self) -> Data:
        """The file of questions."""
        return self._open()[2]

    def entries(self) -> Sequence[Entry]:
        """The prompts in the file's order; an entry's key is the official item."""
        path, prompts, data = self._open()
        return [_entry(k, v, prompts) for k, v in _items(path, data.sha256).items()]

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{item}_{sample}.png``; read too is ``{item}.png``, a grid of four or one image."""
        grid = f"{entry.key}.png"
        return (f"{entry.key}_{sample}.png", grid, f"grids/{grid}")

    def assemble(self, images: Path, entries: Sequence[Entry]) -> None:
        """Write ``grids/{item}.png``: two rows of two images, as the official scorer reads them."""
        for entry in entries:
            tiles = [images / self.files(entry, s)[0] for s in range(self.samples)]
            write_grid(images / "grids" / f"{entry.key}.png", tiles)

    def check_judge(self) -> None:
        """Refuse to make images that nobody will judge."""
        if not self.judge_model:
            raise BenchError(f"the published judge is no part of flowgrpo: {OFFICIAL}")

    def judge(self) -> "QuestionJudge":
        """Connect to the judge."""
        self.check_judge()
        return QuestionJudge(self, OFFICIAL)

    def num_calls(self, entry: Entry) -> int:
        """Each question on its own."""
        return len(entry.prompt.metadata["questions"])

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """Per image the score, and each question by its category where answers are known."""
        for judgement in judgements:
            if "answers" not in judgement:
                yield SCORE, float(judgement["score"])
                continue
            answers = {int(k): bool(v) for k, v in judgement["answers"].items()}
            yield SCORE, score(entry.prompt.metadata["questions"], answers)
            for question in entry.prompt.metadata["questions"]:
                yield question["category"], float(answers[question["id"]])

    def metrics(self) -> Sequence[Metric]:
        """The score, categories of the first level (such as entity) and of the second."""
        second = sorted({d for e in self.entries() for d in e.dimensions} - {SCORE})
        first = sorted({_first_level(c) for c in second})
        return [
            Metric(SCORE, ((SCORE,),), headline=True),
            *(
                Metric(
                    f"{f} (all images)",
                    (tuple(c for c in second if _first_level(c) == f),),
                    radar=True,
                )
                for f in first
            ),
            *(Metric(c, ((c,),)) for c in second if c != _first_level(c)),
        ]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The scores in an official results file, or the answers in its ``_detail.txt``.

        Raises:
            BenchError: If it is neither, or has items or questions that the data has not.
        """
        entries = {e.key: e for e in self.entries()}
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise BenchError(f"{path} cannot be read: {error}") from error
        read = _details if any(DETAIL.match(line) for line in lines) else _scores
        found = list(read(lines, entries, path))
        if not found:
            raise BenchError(
                f"{path} holds no results of the official scorer: give dpg-bench_..._results.txt, or its "
                "_detail.txt, which has the categories too"
            )
        for entry, sample, judgement in found:
            if sample >= self.samples:
                raise BenchError(
                    f"{path}: more than {counted(self.samples, 'image')} of {entry.key}: give their number with --samples"
                )
            yield entry, sample, judgement


def _first_level(category: str) -> str:
    """``entity`` of ``entity - whole``, as the official script splits it."""
    return category.split("-")[0].strip()


@lru_cache(maxsize=4)
def _items(path: Path, _sha256: str) -> Mapping[str, Sequence[Mapping[str, str]]]:
    """The rows of each item, in the file's order.

    Raises:
        BenchError: If a column is missing, or a row is malformed; names the line.
    """
    items: dict[str, list[Mapping[str, str]]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            absent = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if absent:
                raise BenchError(f"{path} has no column {absent[0]!r}. {HOW}")
            for row in reader:
                if not all(row[c] for c in COLUMNS):
                    raise BenchError(f"{path}, line {reader.line_num}: an empty cell")
                items.setdefault(row["item_id"], []).append(row)
    except (OSError, ValueError, csv.Error) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    return items


def _entry(item: str, rows: Sequence[Mapping[str, str]], prompts: Path | None) -> Entry:
    """An item with its questions.

    Raises:
        BenchError: If a number is none, a parent is missing, or there is no prompt.
    """
    questions: list[dict[str, Any]] = []
    try:
        for row in rows:
            parents = [int(p) for p in row["dependency"].split(",")]
            category = row["tuple"].split("(")[0].strip()
            question = {
                "id": int(row["proposition_id"]),
                "parents": [p for p in parents if p != 0],
                "category": category,
                "text": row["question_natural_language"],
            }
            questions.append(question)
    except ValueError as error:
        raise BenchError(f"dpg_bench.csv, item {item}: {error}") from error
    known = {q["id"] for q in questions}
    if lost := [p for q in questions for p in q["parents"] if p not in known]:
        raise BenchError(
            f"dpg_bench.csv, item {item}: question {lost[0]} is a parent and is not there"
        )
    text = rows[0]["text"].strip()
    if prompts is not None:
        try:
            text = (prompts / f"{item}.txt").read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise BenchError(f"the prompt of {item} cannot be read: {error}") from error
    dimensions = (SCORE, *(q["category"] for q in questions))
    return Entry(item, Prompt(text, metadata={"questions": questions}), dimensions)


def score(questions: Sequence[Mapping[str, Any]], answers: Mapping[int, bool]) -> float:
    """The share of questions answered with yes, where no parent counts as answered with no.

    In the official order: a question whose parent was set to no before becomes no itself.
    """
    kept = dict(answers)
    for question in questions:
        if not all(kept[p] for p in question["parents"]):
            kept[question["id"]] = False
    return sum(kept.values()) / len(kept)


RESULT = re.compile(r"(.*\.[A-Za-z]\w*), ((?:[\d.e-]+, )+)([\d.e-]+)$")
"""A line of the results: path, a score for each image, their mean."""
DETAIL = re.compile(r"(.*), \((\d+), (\d+), (\d+), (\d+)\), (.*), ([^,]*)$")
"""A line of the details: path, left, top, right, bottom, question, answer."""

Found = Iterator[tuple[Entry, int, Json]]


def _item(path: str, entries: Mapping[str, Entry], source: Path) -> Entry:
    item = path.rsplit("/", 1)[-1].split(".")[0]
    if item not in entries:
        raise BenchError(f"{source}: {item!r} is no item of dpg_bench.csv")
    return entries[item]


def _scores(lines: Sequence[str], entries: Mapping[str, Entry], source: Path) -> Found:
    for line in lines:
        match = RESULT.match(line)
        if match is None:
            continue
        try:
            values = [float(v) for v in match[2].split(", ")[:-1]]
            mean = float(match[3])
        except ValueError:
            raise BenchError(f"{source}: damaged line {line[:120]!r}") from None
        if abs(sum(values) / len(values) - mean) > 1e-6:
            raise BenchError(f"{source}: damaged line {line[:120]!r}: the last number is no mean")
        entry = _item(match[1], entries, source)
        for sample, value in enumerate(values):
            yield entry, sample, {"score": value}


def _details(lines: Sequence[str], entries: Mapping[str, Entry], source: Path) -> Found:
    answers: dict[tuple[str, int], dict[str, bool]] = {}
    for line in lines:
        match = DETAIL.match(line)
        if match is None:
            continue
        entry = _item(match[1], entries, source)
        left, top, right, bottom = (int(match[i]) for i in range(2, 6))
        sample = 2 * (top // (bottom - top)) + left // (right - left)
        texts = {q["text"]: str(q["id"]) for q in entry.prompt.metadata["questions"]}
        if match[6] not in texts:
            raise BenchError(f"{source}: {match[6]!r} is no question about {entry.key}")
        yes = match[7].strip() == "yes"
        found = answers.setdefault((entry.key, sample), {})
        for question in entry.prompt.metadata["questions"]:
            if question["text"] == match[6]:  # the same question can stand there twice
                found[str(question["id"])] = yes
    for (key, sample), found in answers.items():
        if len(found) == len(entries[key].prompt.metadata["questions"]):
            yield entries[key], sample, {"answers": found}


def parse_yes_no(text: str) -> bool | None:
    """Whether an answer is yes; None if it is neither yes nor no."""
    match = re.match(r"\W*(yes|no)\b", text.strip(), re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


class QuestionJudge(EndpointJudge):
    """Asks the questions of a prompt one by one."""

    kind = "dpg_bench"

    @property
    def notes(self) -> Sequence[str]:
        """The judge is never the published one."""
        return (
            f"the published judge is mPLUG; {self.settings.judge_model} answers differently, so scores "
            "are not comparable with published ones",
        )

    def wording(self) -> Json:
        """The text after a question."""
        return {"answer": ANSWER, "image": "png"}

    def judgement(self, picture: Picture) -> Json:
        """``answers``: whether each question was answered with yes."""
        image = _tile(picture, getattr(self.settings, "samples", 1))
        answers = {
            str(q["id"]): self.ask([image, f"{q['text']} {ANSWER}"], parse_yes_no, 16)
            for q in picture.entry.prompt.metadata["questions"]
        }
        return {"answers": answers}


def _tile(picture: Picture, samples: int) -> bytes:
    """One image as PNG: a file of its own, or its part of a grid."""
    from PIL import Image

    from flowgrpo.data.pictures import as_rgb, png_of

    try:
        with Image.open(picture.path) as image:
            rgb = as_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"{picture.path} cannot be read: {error}") from error
    if samples > 1 and picture.path.stem == picture.entry.key:
        rgb = rgb.crop(tile_box(rgb.size, picture.sample, samples))
    return png_of(rgb)
