"""WISE: prompts that name their subject by what one must know about it (arXiv:2503.07265).

Two protocols share the names of their files. ``verified`` is the default of the official repository
since April 2026: revised prompts, and a judge that says 0 or 1. ``legacy`` is the paper's: three marks
from 0 to 2, whose weighted sum is the WiScore. Only the judge may see the explanation of a prompt.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    Result,
)
from flowgrpo.bench.chat import picture_bytes
from flowgrpo.bench.data import open_data, read_jsonl
from flowgrpo.bench.endpoint import EndpointJudge, EndpointSettings, named_note
from flowgrpo.bench.files import fingerprint, write_atomically
from flowgrpo.bench.wording import Wording
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt

__all__ = ["WISE"]

Protocol = Literal["verified", "legacy"]
OVERALL = "overall WiScore"
CATEGORIES = {
    "Cultural knowledge": "culture",
    "time": "time",
    "Space": "space",
    "Biology": "biology",
    "Physical Knowledge": "physics",
    "Chemistry": "chemistry",
}
"""Names in the data -> names in tables."""
WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "verified": (0.4, 0.12, 0.12, 0.12, 0.12, 0.12),
    "legacy": (0.4, 0.167, 0.133, 0.1, 0.1, 0.1),
}
"""Of the categories in the overall score, in the order of ``CATEGORIES``."""
MARKS = ("consistency", "realism", "aesthetic_quality")
MARK_WEIGHTS = (0.7, 0.2, 0.1)
PUBLISHED: Mapping[str, Mapping[str, str]] = {
    "verified": {
        "cultural_common_sense_verified.json": "sha256:23482925266e2784",
        "spatio-temporal_reasoning_verified.json": "sha256:42c0b9d829365e39",
        "natural_science_verified.json": "sha256:6f346c336f16f611",
    },
    "legacy": {
        "cultural_common_sense.json": "sha256:7a59216c76869828",
        "spatio-temporal_reasoning.json": "sha256:e27d797885ad86e6",
        "natural_science.json": "sha256:b262fae58e413c7a",
    },
}
"""The files of each protocol at commit eb51174 of the official repository."""
JUDGES = {"verified": "Qwen3.5-35B-A3B", "legacy": "gpt-4o-2024-05-13"}
PROMPTS = 1000
HOW = (
    "It is the folder data_verified (or WISE_legacy/data with --set protocol=legacy) of "
    "github.com/PKU-YuanGroup/WISE, whose licence is not stated"
)


@dataclass(frozen=True, kw_only=True)
class WISE(EndpointSettings, Benchmark):
    """The settings of a WISE run."""

    data_file: str = ""
    """The folder with the three JSON files of the protocol."""
    protocol: Protocol = "verified"
    """``verified`` (one binary score) or ``legacy`` (three marks, WiScore)."""
    samples: int = 1
    """Images per prompt; the published number is 1."""
    judge_prompt: str = ""
    """The official wording: ``vllm_eval.py`` of the benchmark's repository, or
    ``WISE_legacy/gpt_eval.py``, which is read, never run. Empty takes a wording of ours, whose scores
    are not comparable."""
    any_data: bool = False
    """Accept files that are not the published ones."""

    about = About(
        summary="world knowledge: 1,000 prompts x 1 image, six categories; verified or legacy protocol",
        judge="Qwen3.5-35B-A3B on vLLM (70 GB in bfloat16); legacy: gpt-4o-2024-05-13",
        calls="1,000",
        licence="not stated for the prompts",
        source="--data data_verified of github.com/PKU-YuanGroup/WISE",
    )

    name = "wise"

    @property
    def title(self) -> str:
        """With the protocol, because both call their files alike."""
        return "WISE Verified" if self.protocol == "verified" else "WISE (legacy)"

    def _files(self) -> list[tuple[Path, Data]]:
        if not self.data_file:
            raise BenchError(f"this benchmark needs its data: give --data FOLDER. {HOW}")
        folder, names = Path(self.data_file), PUBLISHED[self.protocol]
        return [
            open_data(str(folder / name), {digest: name}, self.any_data, HOW)
            for name, digest in names.items()
        ]

    def data(self) -> Data:
        """The three files as one."""
        found = [data for _, data in self._files()]
        notes = tuple(dict.fromkeys(n for d in found for n in d.notes))
        digest = fingerprint({"files": [d.sha256 for d in found]})
        names = ", ".join(d.name for d in found if d.name)
        return Data(self.data_file, digest, names if not notes else "", notes)

    def entries(self) -> Sequence[Entry]:
        """The prompts by their id; only the judge gets the explanation."""
        entries = [e for path, _ in self._files() for e in _read(path)]
        keys = [e.key for e in entries]
        if len(set(keys)) < len(keys):
            raise BenchError(f"{self.data_file}: a prompt_id stands there twice")
        if len(keys) != PROMPTS and not self.any_data:
            raise BenchError(
                f"{self.data_file}: {counted(len(keys), 'prompt')} instead of {PROMPTS}"
            )
        return sorted(entries, key=lambda e: int(e.key))

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{prompt_id}.png``, as the official script reads it; with several images, numbered."""
        numbered = f"{entry.key}_{sample}.png"
        return (f"{entry.key}.png", numbered) if self.samples == 1 else (numbered,)

    def judge(self) -> "KnowledgeJudge":
        """Connect to the judge."""
        return KnowledgeJudge(self)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """Per image the WiScore, in its category, and for the legacy protocol the three marks."""
        for judgement in judgements:
            yield entry.dimensions[0], wiscore(judgement)
            yield from ((m, float(judgement[m]) / 2) for m in MARKS if m in judgement)

    def metrics(self) -> Sequence[Metric]:
        """The weighted mean of the categories, each category, and the legacy marks."""
        names = tuple(CATEGORIES.values())
        parts = tuple((n,) for n in names)
        return [
            Metric(OVERALL, parts, headline=True, weights=WEIGHTS[self.protocol]),
            *(Metric(n, ((n,),), radar=True) for n in names),
            *(Metric(m.replace("_", " "), ((m,),)) for m in MARKS),
        ]

    def references(self) -> Sequence[Reference]:
        """The leaderboard of the protocol."""
        source, rows = LEADERBOARDS[self.protocol]
        judge = JUDGES[self.protocol]
        return [Reference(m, {OVERALL: v}, source, {}, judge) for m, v in rows.items()]

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``scores.jsonl`` as the official script writes it, for the official ``calculate`` script."""
        lines = []
        for result in results:
            if result.judgement is None:
                continue
            row: dict[str, Any] = {
                "prompt_id": int(result.entry.key),
                "Subcategory": result.entry.prompt.metadata["subcategory"],
            }
            keys = ("score",) if self.protocol == "verified" else MARKS
            row.update({k: result.judgement[k] for k in keys})
            lines.append(strict_json.dumps(row, ensure_ascii=False) + "\n")
        write_atomically(folder / "scores.jsonl", "".join(lines).encode())
        return [folder / "scores.jsonl"]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The scores of official ``..._scores_results.jsonl`` files, which may be joined into one.

        Raises:
            BenchError: If it is of the other protocol, or damaged.
        """
        entries = {e.key: e for e in self.entries()}
        keys = ("score",) if self.protocol == "verified" else MARKS
        highest = 1 if self.protocol == "verified" else 2
        seen: set[str] = set()
        for number, row in enumerate(read_jsonl(path), start=1):
            where = f"{path}, line {number}"
            key = str(row.get("prompt_id"))
            if key not in entries or key in seen:
                raise BenchError(f"{where}: prompt_id {key} is unknown or stands there twice")
            seen.add(key)
            values = [row.get(k) for k in keys]
            if not all(_is_mark(v, highest) for v in values):
                raise BenchError(
                    f"{where}: no {', '.join(keys)} from 0 to {highest}: is it of the other protocol "
                    "(--set protocol=legacy or verified)?"
                )
            yield entries[key], 0, dict(zip(keys, values, strict=True))


def _read(path: Path) -> Iterator[Entry]:
    """The prompts of one file.

    Raises:
        BenchError: Naming the record that is malformed.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            category = CATEGORIES[row["Category"]]
            metadata = {"explanation": row["Explanation"], "subcategory": row["Subcategory"]}
            text, key = row["Prompt"], str(int(row["prompt_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(f"{path}, record {number}: no record of WISE: {error!r}") from error
        yield Entry(key, Prompt(text, metadata=metadata), (category,), category)


def wiscore(judgement: Json) -> float:
    """The binary score, or ``(0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2``."""
    if "score" in judgement:
        return float(judgement["score"])
    marks = (float(judgement[m]) for m in MARKS)
    return sum(w * m for w, m in zip(MARK_WEIGHTS, marks, strict=True)) / 2


def _is_mark(value: object, highest: int) -> bool:
    return isinstance(value, int | float) and value in range(highest + 1)


def _without_thoughts(text: str) -> str:
    return re.sub(r"</think>\s*", "", re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL))


def parse_score(text: str) -> Json | None:
    """``Score: 0`` or ``Score: 1``, or the one line that is 0 or 1 alone; None for another answer."""
    text = _without_thoughts(text)
    match = re.search(r"\bscore\W{0,6}([01])\b(?!\.\d|/)", text, re.IGNORECASE)
    alone = re.findall(r"(?m)^\s*([01])\s*$", text)
    found = match[1] if match else alone[0] if len(alone) == 1 else None
    return None if found is None else {"score": int(found)}


def parse_marks(text: str) -> Json | None:
    """The three marks by name, or three lines that are a number alone; None for another answer."""
    text = _without_thoughts(text)
    found: dict[str, int] = {}
    for name in MARKS:
        label = name.replace("_", r"[ _]")
        match = re.search(rf"\b{label}\W{{0,6}}([0-2])\b(?!\.\d)", text, re.IGNORECASE)
        if match:
            found[name] = int(match[1])
    alone = re.findall(r"(?m)^\s*([0-2])\s*$", text)
    if not found and len(alone) == len(MARKS):
        found = dict(zip(MARKS, map(int, alone), strict=True))
    return found if len(found) == len(MARKS) else None


class KnowledgeJudge(EndpointJudge):
    """Asks whether an image shows what a prompt means, given its explanation."""

    kind = "wise"

    def __init__(self, settings: WISE):
        self.protocol: Protocol = settings.protocol
        self.published = JUDGES[settings.protocol]
        self.official: Wording | None = None
        if settings.judge_prompt:
            fields = {
                "prompt_data['Prompt']": "prompt",
                "prompt_data['Explanation']": "explanation",
            }
            path = Path(settings.judge_prompt)
            self.official = Wording.read(path, "build_evaluation_messages", fields)
            asked = "binary" if settings.protocol == "verified" else "Aesthetic Quality"
            if asked not in self.official.template:
                raise BenchError(f"judge_prompt: {path} is the script of the other protocol")
        super().__init__(settings, f"--judge MODEL, such as {self.published}, and --judge-url")

    def extra(self) -> Mapping[str, Any]:
        """The official request of the verified protocol turns Qwen's thinking off."""
        if self.protocol == "verified" and "qwen3" in self.settings.judge_model.lower():
            off = {"chat_template_kwargs": {"enable_thinking": False}}
            return {**off, **self.settings.extra}
        return self.settings.extra

    @property
    def title(self) -> str:
        """The judge's name, marked where the wording is not the official one."""
        return super().title if self.official else f"{super().title}, own wording"

    @property
    def notes(self) -> Sequence[str]:
        """Why scores are not comparable, where they are not."""
        own = (
            "the judge's instructions are ours, not the official ones: scores are not comparable with "
            "published ones; give --set judge_prompt=vllm_eval.py of the official repository",
        )
        note = () if self.official else own
        return (*note, *named_note(self.settings.judge_model, [self.published]))

    def wording(self) -> Json:
        """Protocol, instructions and image format."""
        text = self.official.sha256 if self.official else fingerprint({"text": OWN[self.protocol]})
        return {"protocol": self.protocol, "wording": text, "image": "png"}

    def judgement(self, picture: Picture) -> Json:
        """``score``, or the three marks."""
        prompt = picture.entry.prompt
        values = {"prompt": prompt.text, "explanation": str(prompt.metadata["explanation"])}
        if self.official:
            question, system = self.official.fill(**values), self.official.system
        else:
            question, system = OWN[self.protocol].format(**values), ""
        image = picture_bytes(picture.path, "file")
        parse = parse_score if self.protocol == "verified" else parse_marks
        max_tokens = 500 if self.protocol == "verified" else 2000
        return self.ask([question, image], parse, max_tokens, system)


OWN = {
    "verified": """A picture was made for a prompt that does not name its subject directly. The explanation says what the picture has to show.

Prompt: {prompt}
Explanation: {explanation}

Answer 1 if the picture shows what the explanation describes, with all objects, states and relations that matter, and can be recognised without doubt. Otherwise answer 0. Beauty does not matter.

Answer with one line, "Score: 0" or "Score: 1".""",
    "legacy": """A picture was made for a prompt that does not name its subject directly. The explanation says what the picture has to show.

Prompt: {prompt}
Explanation: {explanation}

Give three marks from 0 to 2, where 2 is rare and stands for no fault at all: consistency (does the picture show what prompt and explanation describe), realism (could it be a photograph) and aesthetic quality.

Answer with three lines in this form:
Consistency: 0
Realism: 0
Aesthetic Quality: 0""",
}
"""Our instructions, by protocol."""

LEADERBOARDS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "verified": (
        "leadboard.md of PKU-YuanGroup/WISE",
        {
            "SD1.5": 30.9,
            "SDXL-0.9": 36.4,
            "SD3-M": 38.5,
            "SD3.5-M": 37.6,
            "SD3.5-L": 40.4,
            "FLUX.1-schnell": 36.4,
            "FLUX.1-dev": 41.6,
            "FLUX.2-klein-9B": 44.0,
            "Z-Image": 45.3,
            "Qwen-Image": 51.0,
            "Qwen-Image-2512": 49.9,
            "FLUX.2-dev": 56.5,
            "BAGEL with reasoning": 62.8,
            "GPT-Image-1.5": 82.5,
            "Nano Banana Pro": 87.6,
        },
    ),
    "legacy": (
        "repository PKU-YuanGroup/WISE",
        {
            "SD1.5": 32.0,
            "SDXL": 43.0,
            "SD3.5-M": 45.0,
            "SD3.5-L": 46.0,
            "FLUX.1-dev": 50.0,
            "Qwen-Image": 62.0,
            "GPT-4o": 80.0,
        },
    ),
}
