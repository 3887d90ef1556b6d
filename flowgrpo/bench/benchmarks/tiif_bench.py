"""TIIF-Bench: instructions of 39 types, each short and long, by yes/no questions (arXiv:2506.02161).

A vision-language model answers all questions about an image at once. Accuracy is over the questions of
a type; nine groups are means over their types, and the overall score is the mean over the groups,
apart for short and long instructions.
"""

import ast
import hashlib
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
    Reference,
)
from flowgrpo.bench.chat import picture_bytes
from flowgrpo.bench.data import read_jsonl
from flowgrpo.bench.endpoint import EndpointJudge, EndpointSettings, named_note
from flowgrpo.bench.files import fingerprint, read_json
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt

__all__ = ["TIIFBench"]

LENGTHS = ("short", "long")
REASONING = ("numeracy", "comparison", "differentiation", "negation")
GROUPS: Mapping[str, Sequence[str]] = {
    "basic attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "basic relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "basic reasoning": ("numeracy", "negation", "differentiation", "comparison"),
    "advanced attribute+relation": (
        "action+color", "action+texture", "color+2d", "color+3d", "shape+2d", "shape+3d", "texture+2d",
        "texture+3d",
    ),
    "advanced attribute+reasoning": tuple(f"{r}+{a}" for r in REASONING for a in ("color", "texture")),
    "advanced relation+reasoning": tuple(f"{r}+{a}" for r in REASONING for a in ("2d", "3d")),
    "advanced text": ("text",),
    "advanced style": ("style",),
    "real world": ("real_world",),
}  # fmt: skip
"""The groups of ``eval/summary_dimension_results.py``; it names a type that no file has."""
TYPES = tuple(t for types in GROUPS.values() for t in types)
FOLDERS = {"testmini": ("testmini_prompts", "testmini_eval_prompts"),
           "full": ("test_prompts", "test_eval_prompts")}  # fmt: skip
PUBLISHED = {"testmini": "a4bb833c49a67552", "full": "b073d99b98f31b52"}
"""Beginnings of the SHA-256 over both folders' files, at commit 3aae750 of the official repository."""
JUDGES = ("gpt-4o", "Qwen2.5-VL-72B-Instruct")
SYSTEM = "You are a professional image critic."
PLACE = "##YNQuestions##"
WORDINGS = ("raw_prompt", "raw_prompt_1", "raw_prompt_2")
"""Names of the official questions, of which the official script draws one at random."""
HOW = "It is the folder data of github.com/A113N-W3I/TIIF-Bench, whose licence is not stated"


@dataclass(frozen=True, kw_only=True)
class TIIFBench(EndpointSettings, Benchmark):
    """The settings of a TIIF-Bench run."""

    data_file: str = ""
    """The folder ``data`` of the official repository."""
    subset: Literal["testmini", "full"] = "testmini"
    """``testmini`` (277 instructions, the leaderboard's) or ``full`` (2,538), each short and long."""
    samples: int = 1
    """Images per instruction; the published number is 1."""
    folder: str = "model"
    """The model's name in the official layout, ``{type}/{folder}/short_description/0.png``."""
    judge_prompt: str = ""
    """The official questions: ``eval/eval_with_vlm.py`` of the benchmark's repository, which is read,
    never run. Empty takes a wording of ours, whose scores are not comparable."""
    any_data: bool = False
    """Accept files that are not the published ones."""

    about = About(
        summary="instructions of 39 types, short and long: 554 (testmini) or 5,076 x 1 image",
        judge="gpt-4o, or Qwen2.5-VL-72B-Instruct on vLLM (four 80 GB GPUs)",
        calls="554 or 5,076",
        licence="not stated",
        source="--data data of github.com/A113N-W3I/TIIF-Bench",
    )

    name = "tiif_bench"

    @property
    def title(self) -> str:
        """With the subset."""
        return f"TIIF-Bench {self.subset}"

    def _open(self) -> tuple[Path, str]:
        """The folder of data, and the hash of the subset's files."""
        if not self.data_file:
            raise BenchError(f"this benchmark needs its data: give --data FOLDER. {HOW}")
        folder = Path(self.data_file)
        total = hashlib.sha256()
        for name in FOLDERS[self.subset]:
            files = sorted((folder / name).glob("*.jsonl"))
            if not files:
                raise BenchError(f"{folder / name} holds no .jsonl files. {HOW}")
            for file in files:
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                total.update(f"{name}/{file.name} {digest}\n".encode())
        return folder, total.hexdigest()

    def data(self) -> Data:
        """The instructions and questions of the subset as one."""
        digest = self._open()[1]
        known = digest.startswith(PUBLISHED[self.subset])
        if not known and not self.any_data:
            raise BenchError(
                f"{self.data_file}: the files of {self.subset} are not the published ones. Scores on them "
                "are not comparable; accept them with --set any_data=true"
            )
        note = "the instructions are not the published ones: scores are not comparable"
        name = f"data/{FOLDERS[self.subset][0]}" if known else ""
        return Data(self.data_file, digest, name, () if known else (note,))

    def entries(self) -> Sequence[Entry]:
        """Every instruction, short and long, by type and line."""
        self.data()
        folder, digest = self._open()
        return _read(folder, self.subset, digest)

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{type}/{folder}/{short,long}_description/{line}.png``."""
        kind, length, line = entry.key.split("/")
        name = f"{kind}/{self.folder}/{length}_description/{line}"
        return (f"{name}.png",) if self.samples == 1 else (f"{name}_{sample}.png",)

    def judge(self) -> "CriticJudge":
        """Connect to the judge."""
        return CriticJudge(self)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """One point per image and question."""
        right = entry.prompt.metadata["answers"]
        for judgement in judgements:
            for dimension, said, wanted in zip(
                entry.dimensions, judgement["answers"], right, strict=True
            ):
                yield dimension, float(said == wanted)

    def metrics(self) -> Sequence[Metric]:
        """For each length the overall score, the nine groups and the types."""
        present = {d for e in self.entries() for d in e.dimensions}
        found: list[Metric] = []
        for length in LENGTHS:
            groups = {
                name: [(_dimension(t, length),) for t in types if _dimension(t, length) in present]
                for name, types in GROUPS.items()
            }
            groups = {name: parts for name, parts in groups.items() if parts}
            parts = [(part, 1 / len(g)) for g in groups.values() for part in g]
            found.append(
                Metric(
                    f"overall ({length})",
                    tuple(p for p, _ in parts),
                    headline=True,
                    weights=tuple(w for _, w in parts),
                )
            )
            found += [
                Metric(f"{name} ({length})", tuple(g), radar=length == "short")
                for name, g in groups.items()
            ]
        return [*found, *(Metric(d, ((d,),)) for d in sorted(present))]

    def references(self) -> Sequence[Reference]:
        """Scores of the judgements that the authors published, by the rule above."""
        if self.subset != "testmini":
            return ()
        return [
            Reference(
                model,
                {"overall (short)": short, "overall (long)": long},
                "eval-results of A113N-W3I/TIIF-Bench",
                {},
                judge,
            )
            for judge, rows in PUBLISHED_SCORES.items()
            for model, (short, long) in rows.items()
        ]

    def is_results(self, folder: Path) -> bool:
        """Whether a folder is ``eval_results/{model}`` of the official script."""
        return any(next((folder / t).glob("*/*.json"), None) is not None for t in TYPES)

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The answers in a folder ``eval_results/{model}``, which holds ``{type}/{length}/{line}.json``.

        Files are matched by their questions, because the published results of ``testmini`` are numbered
        as the full set.

        Raises:
            BenchError: If it is none, or asks other questions than the data.
        """
        waiting: dict[tuple[str, str, tuple[str, ...]], list[Entry]] = {}
        for entry in self.entries():
            kind, length, _ = entry.key.split("/")
            texts = tuple(entry.prompt.metadata["questions"])
            waiting.setdefault((kind, length, texts), []).append(entry)
        number = 0
        for file in sorted(path.glob("*/*/*.json")) if path.is_dir() else ():
            table, kind = read_json(file), file.parts[-3]
            asked = (kind, file.parts[-2], tuple(map(str, table.get("questions", ()))))
            entries = waiting.get(asked)
            if not entries:
                raise BenchError(
                    f"{file}: these questions are not in the {self.subset} data, or twice here"
                )
            same = [e for e in entries if e.key.endswith(f"/{file.stem}")]
            entry = (same or entries)[0]
            entries.remove(entry)
            said = [str(a).strip().lower() for a in table.get("model_pred", ())]
            if len(said) != len(entry.dimensions) or not set(said) <= {"yes", "no"}:
                raise BenchError(f"{file}: 'model_pred' must hold yes or no for each question")
            number += 1
            yield entry, 0, {"answers": said}
        if not number:
            raise BenchError(f"{path} is no folder eval_results/MODEL of the official script")


def _dimension(kind: str, length: str) -> str:
    return f"{kind} ({length})"


@lru_cache(maxsize=4)
def _read(folder: Path, subset: str, _digest: str) -> Sequence[Entry]:
    """All instructions of a subset.

    Raises:
        BenchError: If a record is malformed, or questions and instructions do not fit.
    """
    prompts, questions = (folder / name for name in FOLDERS[subset])
    found: list[Entry] = []
    for file in sorted(prompts.glob("*.jsonl")):
        kind = file.name.removesuffix("_prompts.jsonl")
        other = questions / f"{kind}_eval_prompts.jsonl"
        texts, asked = read_jsonl(file), read_jsonl(other)
        if len(texts) != len(asked):
            raise BenchError(
                f"{other} has {counted(len(asked), 'line')}, and {file} has {len(texts)}"
            )
        for length in LENGTHS:
            for line, (text, record) in enumerate(zip(texts, asked, strict=True)):
                found.append(_entry(kind, length, line, text, record, other))
    return found


def _entry(
    kind: str, length: str, line: int, text: Mapping[str, Any], asked: Mapping[str, Any], file: Path
) -> Entry:
    try:
        answers = [str(a).strip().lower() for a in asked["yn_answer_list"]]
        metadata = {"questions": [str(q) for q in asked["yn_question_list"]], "answers": answers}
        prompt = Prompt(str(text[f"{length}_description"]), metadata=metadata)
        same = text["type"] == asked["type"] == kind
    except (KeyError, TypeError) as error:
        raise BenchError(f"{file}, line {line + 1}: no record of TIIF-Bench: {error!r}") from error
    number = len(metadata["questions"])
    if kind not in TYPES or not same or not number or number != len(answers) or not set(answers) <= {"yes", "no"}:  # fmt: skip
        raise BenchError(f"{file}, line {line + 1}: no record of TIIF-Bench of type {kind!r}")
    return Entry(f"{kind}/{length}/{line}", prompt, (_dimension(kind, length),) * number, kind)


def parse_answers(text: str, number: int) -> list[str] | None:
    """The answers of the lines that begin with yes or no; None if there are not ``number`` of them."""
    lines = (line.strip() for line in text.split("\n"))
    found = [m[1].lower() for m in (re.match(r"(yes|no)\b", x, re.IGNORECASE) for x in lines) if m]
    return found if len(found) == number else None


class CriticJudge(EndpointJudge):
    """Asks all questions about an image at once."""

    kind = "tiif"

    def __init__(self, settings: TIIFBench):
        self.official = _wordings(settings.judge_prompt)
        super().__init__(settings, "--judge MODEL, such as gpt-4o, and --judge-url")

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
                "the judge's instructions are ours, not the official ones: scores are not comparable with "
                "published ones; give --set judge_prompt=eval/eval_with_vlm.py of the official repository"
            )
        if "temperature" not in self.settings.extra:
            notes.append(
                "the temperature is 0, and 1 officially: set it with --set extra.temperature=1.0"
            )
        return notes

    def wording(self) -> Json:
        """The instructions and the image format."""
        texts = self.official or (OWN,)
        return {"wording": fingerprint({"texts": list(texts)}), "image": "png"}

    def judgement(self, picture: Picture) -> Json:
        """``answers``: yes or no to each question.

        The official script draws one of its wordings at random; here the instruction decides which.
        """
        entry = picture.entry
        texts = self.official or (OWN,)
        chosen = int(hashlib.sha256(entry.key.encode()).hexdigest(), 16) % len(texts)
        questions = "\n".join(q.strip() for q in entry.prompt.metadata["questions"])
        content: list[str | bytes] = [
            texts[chosen].replace(PLACE, questions),
            picture_bytes(picture.path, "file"),
        ]
        number = len(entry.dimensions)
        answers = self.ask(content, lambda text: parse_answers(text, number), 2048, SYSTEM)
        return {"answers": answers}


def _wordings(file: str) -> tuple[str, ...]:
    """The three questions of the official script; nothing for no file.

    Raises:
        BenchError: If the script lacks one.
    """
    if not file:
        return ()
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"judge_prompt: {file} cannot be read: {error}") from error
    found = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and PLACE in str(node.value.value)
    }
    if set(found) != set(WORDINGS):
        raise BenchError(
            f"judge_prompt: {file} does not define {', '.join(WORDINGS)}: give eval/eval_with_vlm.py of the "
            "official repository"
        )
    return tuple(str(found[name]) for name in WORDINGS)


OWN = f"""Look at the picture and answer these questions:
{PLACE}

Write one line per question, in the same order. Begin each line with yes or no, and go on with the reason. Write nothing else."""

PUBLISHED_SCORES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "gpt-4o": {
        "SD1.5": (41.8, 32.7),
        "SDXL": (55.1, 42.3),
        "SD3": (67.7, 66.2),
        "SD3.5": (71.7, 67.4),
        "Janus-Pro-7B": (66.7, 65.2),
        "GPT-4o": (89.3, 88.5),
    },
    "Qwen2.5-VL-72B-Instruct": {
        "SD1.5": (39.6, 31.8),
        "SDXL": (51.1, 43.9),
        "SD3": (64.8, 64.8),
        "SD3.5": (68.7, 64.9),
        "GPT-4o": (84.2, 84.6),
    },
}
"""Judge -> model -> overall score of short and of long instructions on ``testmini``."""
