"""ImgEdit-Bench, basic suite: 737 edits of nine types (arXiv:2505.20275).

A judge gives each edit three scores from 1 to 5, by questions of its type. The score of an image is
their mean, rounded to two digits as in the official script; the overall score is the mean over types.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    Reference,
    Result,
)
from flowgrpo.bench.data import open_data
from flowgrpo.bench.endpoint import EndpointJudge, EndpointSettings, named_note
from flowgrpo.bench.files import fingerprint, write_json
from flowgrpo.bench.sources import sent_bytes
from flowgrpo.data.prompts import Prompt

__all__ = ["ImgEditBench"]

TYPES = (
    "add",
    "adjust",
    "extract",
    "replace",
    "remove",
    "background",
    "style",
    "compose",
    "action",
)
OVERALL = "overall (mean over types)"
PUBLISHED = {"sha256:5ee9b7d61e918692": "basic_edit.json"}
WORDING = "f9468dc848776ee0"
"""Beginning of the SHA-256 of the official ``prompts.json``."""
JUDGES = ("gpt-4.1",)
PLACE = "<edit_prompt>"
LOWEST, HIGHEST, MARKS = 1, 5, 3
HOW = (
    "It is Benchmark/Basic/basic_edit.json of github.com/PKU-YuanGroup/ImgEdit, whose licence is not "
    "stated"
)


@dataclass(frozen=True, kw_only=True)
class ImgEditBench(EndpointSettings, Benchmark):
    """The settings of an ImgEdit-Bench run."""

    data_file: str = ""
    """``basic_edit.json``."""
    sources: str = ""
    """The folder of the source images, which holds ``animal`` and ``style``: from ``Benchmark.tar`` of
    the dataset ``sysuyy/ImgEdit`` on the hub."""
    samples: int = 1
    """Images per edit; the published number is 1."""
    judge_prompt: str = ""
    """The official questions: ``prompts.json`` of the benchmark's repository. Empty takes a wording of
    ours, whose scores are not comparable."""
    any_data: bool = False
    """Accept a file that is not the published one."""

    about = About(
        summary="edits of nine types: 737 instructions x 1 image",
        judge="gpt-4.1 (the leaderboard's), or any vision-language model behind an endpoint",
        calls="737",
        licence="not stated",
        source="--data basic_edit.json of github.com/PKU-YuanGroup/ImgEdit; --set sources=FOLDER with "
        "the images of Benchmark.tar of sysuyy/ImgEdit on the hub",
    )

    name = "imgedit_bench"
    task = "image-to-image"
    title = "ImgEdit-Bench"

    def _open(self) -> tuple[Path, Data]:
        return open_data(self.data_file, PUBLISHED, self.any_data, HOW)

    def data(self) -> Data:
        """The file of edits."""
        return self._open()[1]

    def entries(self) -> Sequence[Entry]:
        """The edits in the file's order, each with its source image.

        Raises:
            BenchError: If a record is malformed, or a source image is missing.
        """
        path, _ = self._open()
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            items = list(table.items())
        except (OSError, ValueError, AttributeError) as error:
            raise BenchError(f"{path} is no basic_edit.json: {error}") from error
        return [_entry(key, record, path, Path(self.sources)) for key, record in items]

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{key}.png``; with several images, numbered."""
        numbered = f"{entry.key}_{sample}.png"
        return (f"{entry.key}.png", numbered) if self.samples == 1 else (numbered,)

    def judge(self) -> "EditTypeJudge":
        """Connect to the judge."""
        return EditTypeJudge(self)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """One point per image, from 1 to 5, in its type."""
        for judgement in judgements:
            scores = judgement["scores"]
            yield f"score: {entry.dimensions[0]}", round(sum(scores) / len(scores), 2)

    def metrics(self) -> Sequence[Metric]:
        """The mean over types, and each type."""
        parts = tuple((f"score: {t}",) for t in TYPES)
        return [
            Metric(OVERALL, parts, headline=True, percent=False),
            *(Metric(t, ((f"score: {t}",),), percent=False) for t in TYPES),
        ]

    def references(self) -> Sequence[Reference]:
        """The leaderboard, by GPT-4.1."""
        return [Reference(m, {OVERALL: v}, SOURCE, {}, "gpt-4.1") for m, v in LEADERBOARD.items()]

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``result.json`` (key -> answer), the input of ``step1_get_avgscore.py``."""
        rows = {r.entry.key: r.judgement["output"] for r in results if r.judgement is not None}
        write_json(folder / "result.json", rows)
        return [folder / "result.json"]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The answers in an official ``result.json``; an entry that is an error is left out.

        Raises:
            BenchError: If it is none, or has keys that the data has not.
        """
        entries = {e.key: e for e in self.entries()}
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchError(f"{path} cannot be read: {error}") from error
        if not isinstance(rows, dict) or not set(rows) <= set(entries):
            raise BenchError(f"{path} is no result.json about {self.data_file}")
        for key, answer in rows.items():
            found = parse_scores(answer) if isinstance(answer, str) else None
            if found is not None:
                yield entries[key], 0, found


def _entry(key: str, record: Any, path: Path, sources: Path) -> Entry:
    try:
        image, text, kind = (record[k] for k in ("id", "prompt", "edit_type"))
    except (KeyError, TypeError) as error:
        raise BenchError(f"{path}, {key}: no record of ImgEdit-Bench: {error!r}") from error
    if kind not in TYPES or "/" in key:
        raise BenchError(f"{path}, {key}: unknown edit_type {kind!r}")
    source = sources / image
    if not source.is_file():
        raise BenchError(
            f"the source image {source} is missing: give the folder with --set sources=FOLDER; it is in "
            "Benchmark.tar of the dataset sysuyy/ImgEdit on the hub"
        )
    return Entry(key, Prompt(text, images=[source]), (kind,), kind)


def parse_scores(text: str) -> Json | None:
    """The three scores of an answer: lines that end in a colon and a number; None for another answer.

    The official script averages as many such lines as there are; here there must be three, from 1 to 5.
    """
    scores = []
    for line in text.replace("*", "").splitlines():
        name, colon, value = line.strip().rpartition(":")
        if colon and name and value.strip().isdigit():
            scores.append(int(value))
    if len(scores) != MARKS or not all(LOWEST <= s <= HIGHEST for s in scores):
        return None
    return {"scores": scores, "output": text}


class EditTypeJudge(EndpointJudge):
    """Asks for three scores of an edit, by the questions of its type."""

    kind = "imgedit"

    def __init__(self, settings: ImgEditBench):
        self.official, self.sha256 = _wording(settings.judge_prompt)
        super().__init__(settings, "--judge MODEL, such as gpt-4.1, and --judge-url")

    @property
    def title(self) -> str:
        """The judge's name, marked where the wording is not the official one."""
        return super().title if self.official else f"{super().title}, own wording"

    @property
    def notes(self) -> Sequence[str]:
        """Why scores are not comparable, where they are not."""
        notes = list(named_note(self.settings.judge_model, JUDGES))
        if not self.official:
            notes.append(
                "the judge's questions are ours, not the official ones: scores are not comparable with "
                "published ones; give --set judge_prompt=prompts.json of the official repository"
            )
        elif not self.sha256.startswith(WORDING):
            notes.append("the judge's questions are not those of the published prompts.json")
        return notes

    def wording(self) -> Json:
        """The questions, and that the files are sent as they are."""
        return {"wording": self.sha256 or fingerprint({"text": OWN}), "image": "file"}

    def judgement(self, picture: Picture) -> Json:
        """``scores`` (three, from 1 to 5) and ``output`` (the answer)."""
        prompt, kind = picture.entry.prompt, picture.entry.dimensions[0]
        question = self.official.get(kind, OWN).replace(PLACE, prompt.text)
        (source,) = prompt.images
        assert isinstance(source, Path)
        content: list[str | bytes] = [question, sent_bytes(source), sent_bytes(picture.path)]
        return self.ask(content, parse_scores, 1024)


def _wording(file: str) -> tuple[Mapping[str, str], str]:
    """The official questions by type, and the hash of their file; nothing for no file.

    Raises:
        BenchError: If a type has no question.
    """
    if not file:
        return {}, ""
    try:
        content = Path(file).read_bytes()
        table = json.loads(content)
        lacking = [t for t in TYPES if PLACE not in table[t]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"judge_prompt: {file} is no prompts.json of ImgEdit: {error!r}"
        ) from error
    if lacking:
        raise BenchError(f"judge_prompt: {file}: the question for {lacking[0]!r} has no {PLACE}")
    return table, hashlib.sha256(content).hexdigest()


OWN = """The second picture is an edited version of the first. Judge the edit.

Instruction: <edit_prompt>

Give three scores from 1 (bad) to 5 (without fault): whether the instruction was carried out, whether the edited parts look natural, and whether everything else was kept. The second and the third score must not be higher than the first.

Answer with one sentence and then three lines in this form:
Instruction: 1
Naturalness: 1
Preservation: 1"""
"""Our question, for all types."""

SOURCE = "leaderboard of PKU-YuanGroup/ImgEdit"
LEADERBOARD = {
    "Step1X-Edit": 3.06,
    "UniWorld-V1": 3.26,
    "BAGEL": 3.42,
    "OmniGen2": 3.44,
    "FLUX.1-Kontext-dev": 3.71,
    "Ovis-U1": 3.97,
    "GPT-4o": 4.20,
}
