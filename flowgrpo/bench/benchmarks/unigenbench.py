"""UniGenBench and UniGenBench++: 27 test points in 600 prompts, by a vision-language model.

Papers: arXiv:2508.20751 and arXiv:2510.18701; data by Tencent, CC BY 4.0. There are four sets:
English and Chinese, short and long. A judge reads an image once and scores each test point of its
prompt with 0 or 1. Accuracy is over all (image, test point) pairs; the overall score is the
unweighted mean of the ten dimensions.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from flowgrpo.bench.base import (
    About,
    BenchError,
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
from flowgrpo.bench.benchmarks._unigenbench_files import (
    DIMENSIONS,
    OfficialPrompt,
    primary,
    read_entries,
    read_official,
    write_official,
)
from flowgrpo.bench.benchmarks._unigenbench_leaderboard import leaderboard
from flowgrpo.bench.chat import ChatModel, picture_bytes
from flowgrpo.bench.data import open_data
from flowgrpo.bench.files import fingerprint
from flowgrpo.bench.judging import in_flight
from flowgrpo.core.text import counted

__all__ = ["UniGenBench"]

Split = Literal["en", "en_long", "zh", "zh_long"]
OVERALL = "overall (mean over dimensions)"
PUBLISHED = {
    "en": {"sha256:f82e8ce854985ef9": "test_prompts_en.csv"},
    "en_long": {"sha256:5d2c3d642cc49235": "test_prompts_en_long.csv"},
    "zh": {"sha256:7ff2d2131e68e618": "test_prompts_zh.csv"},
    "zh_long": {"sha256:6e281a5781878584": "test_prompts_zh_long.csv"},
}
HOW = (
    "It is data/test_prompts_<set>.csv of github.com/CodeGoat24/UniGenBench (CC BY 4.0); a copy on the "
    "hub can be named as hf:owner/name:file"
)
LEADERBOARD_JUDGE = "gemini-2.5-pro"
TUNED = ("UniGenBench-EvalModel-qwen-72b-v1", "UniGenBench-EvalModel-qwen3vl-32b-v1")


@dataclass(frozen=True, kw_only=True)
class UniGenBench(Benchmark):
    """The settings of a UniGenBench run."""

    split: Split = "en"
    """Which of the four sets; ``en`` and ``zh`` are the short ones."""
    data_file: str = ""
    """The set's CSV file: a path, or ``hf:owner/name:file``."""
    samples: int = 4
    """Images per prompt."""
    judge_model: str = ""
    """The judge, as its server calls it: ``gemini-2.5-pro`` (the leaderboard's), or a published tuned
    model on vLLM. Another one gives scores that are not comparable."""
    judge_url: str | Sequence[str] = "http://127.0.0.1:8080/v1"
    """One or several OpenAI-compatible servers."""
    judge_key_env: str = ""
    """Environment variable with the key; empty for none."""
    judge_prompt: str = ""
    """The official wording: ``eval/src/eval_common.py`` of the benchmark's repository, which is read,
    never run. Empty takes a wording of ours, whose scores are not comparable."""
    concurrency: int = 32
    """Requests in flight at each server."""
    attempts: int = 3
    """Answers to ask for before an image counts as failed; the official script allows 11."""
    max_tokens: int = 4096
    """Longest answer."""
    timeout: float = 180.0
    """Seconds that one request may take."""
    patience: float = 300.0
    """Seconds over which a request is tried again while the server is away."""
    cache: str = ""
    """Folder for answers that several benchmark folders share."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More keys of each request, such as ``temperature``, which is 0 otherwise."""
    any_data: bool = False
    """Accept a file that is not the published one."""

    about = About(
        summary="UniGenBench(++): 27 test points, 600 prompts x 4 images, en/zh, short/long",
        judge="Gemini 2.5 Pro through its OpenAI-compatible API, or the published 72B or 32B judge on "
        "vLLM (4 or 1-2 GPUs)",
        calls="2,400 per set",
        licence="prompts CC BY 4.0 (Tencent); licence of the judges not stated",
        source="--data test_prompts_en.csv from github.com/CodeGoat24/UniGenBench",
    )

    name = "unigenbench"

    @property
    def title(self) -> str:
        """With the set."""
        return f"UniGenBench {self.split}"

    @property
    def language(self) -> Literal["en", "zh"]:
        """Of the prompts."""
        return "zh" if self.split.startswith("zh") else "en"

    def data(self) -> Data:
        """The set's file, with a note on repaired rows."""
        _, data = self._open()
        notes = tuple(_entries(*self._source())[1])
        return Data(data.source, data.sha256, data.name, (*data.notes, *notes))

    def _open(self) -> tuple[Path, Data]:
        if self.split not in PUBLISHED:
            raise BenchError(f"split must be one of {', '.join(PUBLISHED)}, got {self.split!r}")
        return open_data(self.data_file, PUBLISHED[self.split], self.any_data, HOW)

    def _source(self) -> tuple[Path, Literal["en", "zh"], str]:
        path, data = self._open()
        return path, self.language, data.sha256

    def entries(self) -> Sequence[Entry]:
        """The prompts; an entry's key is the official index."""
        return _entries(*self._source())[0]

    def root(self, label: str) -> str:
        """``images/en/<model>``: ``images`` is the official ``--eval_data_dir``."""
        return f"images/{self.split}/{label}"

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{index}_{sample}.png``."""
        return (f"{entry.key}_{sample}.png", f"p{int(entry.key):05d}_s{sample}.png")

    def judge(self) -> "PointJudge":
        """Connect to the judge."""
        if not self.judge_model:
            raise BenchError(
                "unigenbench needs a judge: --judge MODEL, such as gemini-2.5-pro, and --judge-url; "
                "docs/benchmarks.md says how to start one"
            )
        return PointJudge(self)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """One point per image and test point, by sub-dimension and by theme."""
        theme = f"theme: {entry.prompt.metadata['theme']}"
        for judgement in judgements:
            for name, value in zip(entry.dimensions, judgement["score"], strict=True):
                yield name, float(value == 1)
                yield theme, float(value == 1)

    def metrics(self) -> Sequence[Metric]:
        """Overall, ten dimensions, sub-dimensions of those that have several, themes."""
        entries = self.entries()
        subs = sorted({d for e in entries for d in e.dimensions})
        parts = {p: tuple(s for s in subs if primary(s) == p) for p in DIMENSIONS}
        parts = {p: s for p, s in parts.items() if s}
        themes = sorted({str(e.prompt.metadata["theme"]) for e in entries})
        return [
            Metric(OVERALL, tuple(parts.values()), headline=True),
            *(Metric(p, (s,), radar=True) for p, s in parts.items()),
            *(Metric(s, ((s,),)) for p in parts for s in parts[p] if "-" in s),
            *(Metric(f"theme: {t}", ((f"theme: {t}",),)) for t in themes),
        ]

    def references(self) -> Sequence[Reference]:
        """The leaderboard's overall scores, by Gemini 2.5 Pro."""
        return leaderboard(self.split, OVERALL, LEADERBOARD_JUDGE)

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``{model}_{set}.csv`` and ``.json`` as the official scripts write them."""
        return write_official(folder, f"{label}_{self.split}", results)

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The judgements in an official results CSV."""
        return read_official(path, self.entries())


@lru_cache(maxsize=8)
def _entries(
    path: Path, language: Literal["en", "zh"], _sha256: str
) -> tuple[Sequence[Entry], Sequence[str]]:
    return read_entries(path, language)


class PointJudge:
    """Asks a vision-language model to score the test points of each picture."""

    def __init__(self, settings: UniGenBench):
        self.settings = settings
        self.model = ChatModel.of(settings, settings.cache)
        self.official: OfficialPrompt | None = None
        if settings.judge_prompt:
            self.official = OfficialPrompt.read(Path(settings.judge_prompt), settings.language)
        # The official scripts send Gemini the text and then the PNG file, vLLM a JPEG and then the text.
        self.text_first = settings.judge_model.startswith("gemini")

    @property
    def title(self) -> str:
        """The judge's name, marked where the wording is not the official one."""
        name = self.settings.judge_model.rsplit("/", 1)[-1]
        return name if self.official else f"{name}, own wording"

    @property
    def notes(self) -> Sequence[str]:
        """Why scores are not comparable, where they are not."""
        notes = []
        if not self.official:
            notes.append(
                "the judge's instructions are ours, not the official ones: scores are not comparable with published ones; give --set judge_prompt=eval/src/eval_common.py"
            )
        known = self.settings.judge_model == LEADERBOARD_JUDGE or any(
            t in f"{self.settings.judge_model} {self.version()}" for t in TUNED
        )
        if not known:
            notes.append(
                f"{self.settings.judge_model} is none of the published judges: scores are not comparable with published ones"
            )
        elif self.settings.judge_model != LEADERBOARD_JUDGE:
            notes.append(
                "the leaderboard's scores are by Gemini 2.5 Pro; the tuned judge agrees with it in about 94 % of the points"
            )
        return notes

    def identity(self) -> Json:
        """Model, wording, order of the content, image format and decoding."""
        return {
            "judge": "unigenbench",
            "model": self.settings.judge_model,
            "wording": self.official.sha256 if self.official else fingerprint({"text": OWN}),
            "order": "text, image" if self.text_first else "image, text",
            "image": "png" if self.text_first else "jpeg 95",
            "max_tokens": self.settings.max_tokens,
            "request": {"temperature": 0, **self.settings.extra},
        }

    def version(self) -> str:
        """Model and version as the servers report them."""
        return self.model.version()

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """``score`` (a number per test point) and ``output`` (the answer) for each picture."""
        return in_flight(pictures, self.model.concurrency, self._one)

    def _one(self, picture: Picture) -> Json | Failure:
        entry = picture.entry
        number = len(entry.dimensions)

        def parse(text: str) -> Json | None:
            score = parse_scores(text, number)
            return None if score is None else {"score": score, "output": text}

        reason = ""
        try:
            image = picture_bytes(picture.path, "file" if self.text_first else "jpeg")
            content: list[str | bytes] = [self._question(entry), image]
            for _ in range(self.settings.attempts):
                found = self.model.ask(
                    content if self.text_first else content[::-1], parse, self.settings.max_tokens
                )
                if found is not None:
                    return found
            reason = f"no usable answer in {counted(self.settings.attempts, 'attempt')}"
        except (BenchError, RuntimeError, OSError) as error:
            reason = str(error)
        return Failure(reason)

    def _question(self, entry: Entry) -> str:
        points, texts = list(entry.dimensions), list(entry.prompt.metadata["descriptions"])
        if self.official:
            return self.official.fill(entry.prompt.text, points, texts)
        listed = "\n".join(
            f"{i}. {p}: {t}" for i, (p, t) in enumerate(zip(points, texts, strict=True), start=1)
        )
        return OWN.format(prompt=entry.prompt.text, points=listed, number=len(points))


OWN = """You check whether a generated picture shows what its prompt asks for.

Prompt: {prompt}

Check each of these {number} points on its own, by what can be seen in the picture alone:
{points}

Write one sentence about each point. Then end your answer with a list of {number} numbers in the order of the points, 1 if the picture meets the point and 0 if it does not or if it cannot be seen, in this form:
<score>[1, 0]</score>"""


def parse_scores(text: str, number: int) -> list[float] | None:
    """The list in the last ``<score>`` of an answer; None if it is not ``number`` numbers.

    The official script also needs an ``<analysis>`` list to parse, which it does not use, and which
    fails on quotation marks; here it is not looked at.
    """
    found = re.findall(r"<score>(.*?)</score>", text, re.DOTALL)
    if not found:
        return None
    try:
        values = ast.literal_eval(found[-1].strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(values, list | tuple) or len(values) != number:
        return None
    if not all(isinstance(v, bool | int | float) for v in values):
        return None
    return [float(v) for v in values]
