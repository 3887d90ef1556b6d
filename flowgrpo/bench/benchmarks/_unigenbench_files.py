"""UniGenBench's files: the prompts' CSV, the official wording, the official results."""

import ast
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowgrpo.bench.base import BenchError, Entry, Json, Result
from flowgrpo.bench.files import write_atomically
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt

DIMENSIONS = (
    "Style", "World Knowledge", "Attribute", "Action", "Relationship", "Logical Reasoning",
    "Grammar", "Compound", "Entity Layout", "Text Generation",
)  # fmt: skip
"""The ten dimensions, in the leaderboard's order."""
CHINESE = dict(
    zip(
        ("风格", "世界知识", "属性", "动作", "关系", "逻辑推理", "语法", "复合考点", "实体布局", "文本生成"),
        DIMENSIONS,
        strict=True,
    )
)  # fmt: skip
KEYS = {
    "en": ("Testpoints", "Testpoint Description", "Primary Categories"),
    "zh": ("考点", "考点对应描述", "一级垂类"),
}
HEADERS = {
    "en": ("Checkpoints Defination", "Checkpoints Description"),  # spelt so in the official wording
    "zh": ("考点说明", "考点描述说明"),
}
COLUMNS = ("index", "prompt", "testpoint", "output", "result_json", "img_path")


def primary(point: str) -> str:
    """The dimension of a test point, in English: the text before the first dash."""
    name = point.split("-", 1)[0].strip()
    return CHINESE.get(name, name)


def read_entries(
    path: Path, language: Literal["en", "zh"]
) -> tuple[Sequence[Entry], Sequence[str]]:
    """The prompts of a set, and notes on repaired rows.

    One row of the published ``en_long`` lacks a comma. It is repaired, because the leaderboard
    counted it. A prompt can have the same test point twice; both count.

    Raises:
        BenchError: Naming the row that cannot be used.
    """
    points_key, texts_key, theme_key = KEYS[language]
    entries, notes = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            where = f"{path}, line {number}"
            try:
                index, text = str(int(row["index"])), row[f"prompt_{language}"]
                raw = row[f"sub_dims_{language}"]
            except (KeyError, TypeError, ValueError) as error:
                raise BenchError(
                    f"{where}: needs the columns index, prompt_{language} and sub_dims_{language} "
                    f"({error!r})"
                ) from error
            table, repaired = _loads(raw, where)
            if repaired:
                notes.append(
                    f"row {index} of {path.name} is malformed JSON and was repaired: the leaderboard "
                    "counted it, and the published script stops on it"
                )
            points, texts = table.get(points_key), table.get(texts_key)
            if not points or not isinstance(texts, list) or len(points) != len(texts):
                raise BenchError(
                    f"{where}: {points_key} and {texts_key} must be lists of one length"
                )
            if unknown := [p for p in points if primary(p) not in DIMENSIONS]:
                raise BenchError(f"{where}: unknown test point {unknown[0]!r}")
            points = [p.strip() for p in points]
            metadata = {"theme": str(table.get(theme_key, "")), "descriptions": texts}
            entries.append(Entry(index, Prompt(text, metadata=metadata), tuple(points)))
    if not entries:
        raise BenchError(f"{path}: no prompts in it")
    return entries, notes


def _loads(text: str, where: str) -> tuple[dict[str, Any], bool]:
    """A row's JSON, repaired if that helps, and whether it was."""
    try:
        return json.loads(text), False
    except ValueError as error:
        try:
            # A missing comma between two strings of a list.
            return json.loads(re.sub(r'"\s+"', '", "', text)), True
        except ValueError:
            raise BenchError(f"{where}: not valid JSON, and not to be repaired: {error}") from error


@dataclass(frozen=True)
class OfficialPrompt:
    """The official instructions to the judge, read from the benchmark's own source.

    Attributes:
        template: With the fields ``prompt``, ``testpoint``, ``explanation``, ``test_explanation``.
        definitions: Of each test point.
        language: Of the set.
        sha256: Of template and definitions.
    """

    template: str
    definitions: Mapping[str, str]
    language: Literal["en", "zh"]
    sha256: str

    @classmethod
    def read(cls, path: Path, language: Literal["en", "zh"]) -> "OfficialPrompt":
        """Find the constants in ``eval/src/eval_common.py``; the file is parsed, never run.

        Raises:
            BenchError: If they are not there.
        """
        names = (
            f"SYSTEM_PROMPT_{language.upper()}_TEMPLATE",
            f"EXPLANATION_DICT_{language.upper()}",
        )
        found: dict[str, Any] = {}
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise BenchError(f"judge_prompt: {path} cannot be read: {error}") from error
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in names:
                    try:
                        found[name] = ast.literal_eval(node.value)
                    except ValueError as error:
                        raise BenchError(f"judge_prompt: {path}: {name} is no constant") from error
        template, definitions = (found.get(n) for n in names)
        if not isinstance(template, str) or not isinstance(definitions, dict):
            raise BenchError(
                f"judge_prompt: {path} defines no {' and '.join(names)}: give eval/src/eval_common.py "
                "of the benchmark's repository"
            )
        content = json.dumps([template, definitions], ensure_ascii=False, sort_keys=True)
        return cls(template, definitions, language, hashlib.sha256(content.encode()).hexdigest())

    def fill(self, prompt: str, points: list[str], texts: Sequence[str]) -> str:
        """The question about one prompt.

        Raises:
            BenchError: If a test point has no definition.
        """
        if unknown := [p for p in points if p not in self.definitions]:
            raise BenchError(f"judge_prompt defines no {unknown[0]!r}")
        first, second = HEADERS[self.language]
        defined = "".join(f"\n{p}: {self.definitions[p]}" for p in points)
        described = "".join(f"\n{p}: {t}" for p, t in zip(points, texts, strict=True))
        return self.template.format(
            prompt=prompt,
            testpoint=points,
            explanation=f"{first}:「{defined}\n」",
            test_explanation=f"{second}:「{described}\n」",
        )


def write_official(folder: Path, name: str, results: Sequence[Result]) -> Sequence[Path]:
    """The official CSV (a row per image, failed ones without a result) and JSON summary."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for result in results:
        points, judgement = list(result.entry.dimensions), result.judgement
        kept = ""
        if judgement is not None:
            score = [int(s) if s == int(s) else s for s in judgement["score"]]
            table = {"prompt": result.entry.prompt.text, "testpoint": points, "score": score}
            kept = strict_json.dumps(table, ensure_ascii=False, indent=4)
        output = "" if judgement is None else judgement.get("output", "")
        writer.writerow(
            [result.entry.key, result.entry.prompt.text, str(points), output, kept, result.path]
        )
    table_file, summary = folder / f"{name}.csv", folder / f"{name}.json"
    write_atomically(table_file, text.getvalue().encode())
    content = strict_json.dumps(official_summary(results), ensure_ascii=False, indent=4)
    write_atomically(summary, content.encode())
    return [table_file, summary]


def official_summary(results: Sequence[Result]) -> dict[str, dict[str, Json]]:
    """Correct, total and accuracy by dimension and sub-dimension.

    Dimensions are named as the official script does it: by the text before the first dash, with the
    blank that stands before it.
    """
    groups: dict[str, dict[str, list[int]]] = {"primary_dimensions": {}, "sub_dimensions": {}}
    for result in results:
        if result.judgement is None:
            continue
        for point, value in zip(result.entry.dimensions, result.judgement["score"], strict=True):
            for group, name in (
                ("primary_dimensions", point.split("-", 1)[0]),
                ("sub_dimensions", point),
            ):
                counts = groups[group].setdefault(name, [0, 0])
                counts[0] += value == 1
                counts[1] += 1
    return {
        group: {
            name: {"correct": right, "total": total, "accuracy": round(right / total, 4)}
            for name, (right, total) in sorted(names.items())
        }
        for group, names in groups.items()
    }


def read_official(path: Path, entries: Sequence[Entry]) -> Iterator[tuple[Entry, int, Json]]:
    """Judgements from an official results CSV; rows without a result are left out.

    Raises:
        BenchError: Naming the row, if it is of another version of the set.
    """
    by_key = {e.key: e for e in entries}
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            where = f"{path}, line {number}"
            entry = by_key.get(str(row.get("index", "")).split(".")[0])
            if entry is None or row.get("prompt") != entry.prompt.text:
                raise BenchError(
                    f"{where}: row {row.get('index')!r} is of another version of the set"
                )
            match = re.search(rf"(?:^|[/\\]){entry.key}_(\d+)\.\w+$", row.get("img_path") or "")
            sample = int(match[1]) if match else seen.get(entry.key, 0)
            seen[entry.key] = sample + 1
            if not row.get("result_json"):
                continue
            score = _scores(row["result_json"], where)
            if len(score) != len(entry.dimensions):
                raise BenchError(
                    f"{where}: {len(score)} scores for {len(entry.dimensions)} test points"
                )
            yield entry, sample, {"score": score, "output": row.get("output") or ""}


def _scores(text: str, where: str) -> list[float]:
    """The scores in a ``result_json``, which is JSON or, in older files, a Python literal."""
    for read in (json.loads, ast.literal_eval):
        try:
            return [float(s == 1) for s in read(text)["score"]]
        except (ValueError, SyntaxError, KeyError, TypeError):
            continue
    raise BenchError(f"{where}: result_json cannot be read: {text[:80]!r}")
