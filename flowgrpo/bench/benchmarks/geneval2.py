"""GenEval 2: Soft-TIFA over 6,012 questions about 800 prompts (arXiv:2512.16853).

Each prompt has 3 to 11 questions with a known answer. A vision-language model is asked each one, and
the probability of the right answer as its first token is the score of that atom. Two means must never
be mixed up: AM is the arithmetic mean over a prompt's atoms, GM the geometric mean, which is 0 as
soon as one atom is 0; both are then averaged over prompts.

Data and evaluation are CC BY-NC 4.0: not part of flowgrpo, and not for commercial use.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import (
    About,
    BenchError,
    Benchmark,
    Data,
    Entry,
    Failure,
    Json,
    Judge,
    Judged,
    Metric,
    Picture,
    Points,
    Reference,
    Result,
)
from flowgrpo.bench.chat import ChatModel, picture_bytes
from flowgrpo.bench.data import open_data, read_jsonl
from flowgrpo.bench.files import write_atomically, write_json
from flowgrpo.bench.judging import in_flight
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.data.pictures import picture_of
from flowgrpo.data.prompts import Prompt

__all__ = ["GenEval2"]

AM, GM = "Soft-TIFA AM", "Soft-TIFA GM"
PUBLISHED = {"md5:94bae0b5": "geneval2_data.jsonl of facebookresearch/GenEval2"}
HOW = "It is geneval2_data.jsonl of github.com/facebookresearch/GenEval2 (CC BY-NC 4.0, non-commercial)"
PUBLISHED_JUDGE = "Qwen/Qwen3-VL-8B-Instruct"
DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}


@dataclass(frozen=True, kw_only=True)
class GenEval2(Benchmark):
    """The settings of a GenEval 2 run."""

    data_file: str = ""
    """``geneval2_data.jsonl``: a path, or ``hf:owner/name:file``."""
    samples: int = 1
    """Images per prompt; the published number is 1."""
    judge_model: str = PUBLISHED_JUDGE
    """The judge: a hub id or folder, or with ``judge_url`` the name at the server."""
    judge_url: str | Sequence[str] = ""
    """OpenAI-compatible servers with log-probabilities; empty runs the judge here by transformers."""
    judge_key_env: str = ""
    """Environment variable with the key; empty for none."""
    concurrency: int = 32
    """Images in flight at each server."""
    timeout: float = 180.0
    """Seconds that one request may take."""
    patience: float = 300.0
    """Seconds over which a request is tried again while the server is away."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More keys of each request."""
    dtype: str = "bfloat16"
    """Precision of a judge that runs here."""
    device: str = "auto"
    """Where it runs."""
    any_data: bool = False
    """Accept a file that is not the published one."""

    about = About(
        summary="Soft-TIFA (arithmetic and geometric): 800 prompts x 1 image, 6,012 questions",
        judge="Qwen3-VL-8B through transformers (17 GB in bfloat16), or behind an endpoint",
        calls="6,012 one-token answers",
        licence="prompts CC BY-NC 4.0: non-commercial",
        source="--data geneval2_data.jsonl from github.com/facebookresearch/GenEval2",
    )

    name = "geneval2"
    title = "GenEval 2"

    def data(self) -> Data:
        """The prompts' file, with its licence."""
        data = open_data(self.data_file, PUBLISHED, self.any_data, HOW)[1]
        note = "the prompts are CC BY-NC 4.0: non-commercial use only"
        return Data(data.source, data.sha256, data.name, (*data.notes, note))

    def entries(self) -> Sequence[Entry]:
        """The prompts, numbered from 0; dimensions are the skills of their atoms."""
        path = open_data(self.data_file, PUBLISHED, self.any_data, HOW)[0]
        return [_entry(i, r, path) for i, r in enumerate(read_jsonl(path))]

    def judge(self) -> "Judge":
        """Load the judge, or connect to it."""
        return EndpointJudge(self) if self.judge_url else LocalJudge(self)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """Per image: AM and GM, each atom by its skill, and GM by the number of atoms."""
        for judgement in judgements:
            atoms = judgement["atoms"]
            geometric = _geometric(atoms)
            yield AM, sum(atoms) / len(atoms)
            yield GM, geometric
            yield f"GM, {counted(entry.prompt.metadata['atom_count'], 'atom')}", geometric
            yield from ((f"AM, {s}", a) for s, a in zip(entry.dimensions, atoms, strict=True))

    def metrics(self) -> Sequence[Metric]:
        """Both means, AM by skill, GM by number of atoms."""
        entries = self.entries()
        skills = dict.fromkeys(s for e in entries for s in e.dimensions)
        counts = sorted({e.prompt.metadata["atom_count"] for e in entries})
        return [
            Metric(GM, ((GM,),), headline=True),
            Metric(AM, ((AM,),), headline=True),
            *(Metric(f"AM, {s}", ((f"AM, {s}",),), radar=True) for s in skills),
            *(
                Metric(f"GM, {counted(c, 'atom')}", ((f"GM, {counted(c, 'atom')}",),))
                for c in counts
            ),
        ]

    def references(self) -> Sequence[Reference]:
        """GM of SD3.5-M in several settings: steps and guidance alone span 8 to 22."""
        return REFERENCES

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``images.json`` (prompt -> image, the official input) and ``scores.json`` (atoms)."""
        first = [r for r in results if r.sample == 0]
        images = {r.entry.prompt.text: r.path for r in first if r.path}
        write_json(folder / "images.json", images)
        scores = [[] if r.judgement is None else list(r.judgement["atoms"]) for r in first]
        write_atomically(folder / "scores.json", strict_json.dumps(scores).encode())
        return [folder / "images.json", folder / "scores.json"]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The atoms' scores in an official output file, a list per prompt in the data's order."""
        entries = self.entries()
        try:
            rows = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BenchError(f"{path} cannot be read: {error}") from error
        if not isinstance(rows, list) or len(rows) != len(entries):
            raise BenchError(
                f"{path}: expected a list for each of the {counted(len(entries), 'prompt')}"
            )
        for entry, row in zip(entries, rows, strict=True):
            if row and len(row) != len(entry.dimensions):
                raise BenchError(
                    f"{path}: {len(row)} scores for the {counted(len(entry.dimensions), 'question')} of prompt "
                    f"{entry.key}: it is of another version or method than soft_tifa"
                )
            if row:
                yield entry, 0, {"atoms": [float(v) for v in row]}


def _entry(number: int, record: Mapping[str, Any], path: Path) -> Entry:
    """A record as an entry."""
    where = f"{path}, line {number + 1}"
    try:
        questions, skills = record["vqa_list"], record["skills"]
        metadata = {"atom_count": int(record["atom_count"]), "vqa_list": questions}
        text = str(record["prompt"])
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{where}: no record of GenEval 2: {error!r}") from error
    if not questions or len(questions) != len(skills):
        raise BenchError(f"{where}: 'vqa_list' and 'skills' must be lists of one length")
    return Entry(f"{number:05d}", Prompt(text, metadata=metadata), tuple(skills))


def _geometric(atoms: Sequence[float]) -> float:
    """The geometric mean; 0 if any atom is."""
    if min(atoms) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, atoms)) / len(atoms))


def question_of(text: str) -> str:
    """A question as the official script asks it."""
    return f"{text} Answer in one word."


def accepted(answer: str) -> tuple[str, ...]:
    """The first tokens that count as an answer, without a leading blank, which may stand there."""
    word = answer.strip().lower()
    forms = (word, word.capitalize(), *((DIGITS[word],) if word in DIGITS else ()))
    return tuple(dict.fromkeys(forms))


class EndpointJudge:
    """Soft-TIFA by the first token's probabilities from a server."""

    def __init__(self, settings: GenEval2):
        self.settings = settings
        self.model = ChatModel.of(settings)

    @property
    def title(self) -> str:
        """The judge's name; an endpoint gives other numbers than full probabilities."""
        return f"{self.settings.judge_model.rsplit('/', 1)[-1]}, endpoint"

    @property
    def notes(self) -> Sequence[str]:
        """Why scores differ from published ones."""
        return (
            "a server returns the 20 most likely tokens: the right answer counts 0 when it is not among "
            "them, which lowers GM",
            *other_judge(self.settings.judge_model),
        )

    def identity(self) -> Json:
        """Model and request."""
        return {
            "judge": "soft_tifa",
            "model": self.settings.judge_model,
            "probabilities": "20 most likely",
            "request": {"temperature": 0, **self.settings.extra},
        }

    def version(self) -> str:
        """Model and version as the servers report them."""
        return self.model.version()

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """``atoms``: the probability of the right answer to each question."""
        return in_flight(pictures, self.model.concurrency, self._one)

    def _one(self, picture: Picture) -> Json | Failure:
        try:
            image = picture_bytes(picture.path, "file")
            atoms = []
            for question, answer in picture.entry.prompt.metadata["vqa_list"]:
                found = self.model.first_token([image, question_of(question)])
                if found is None:
                    return Failure("an answer without log-probabilities")
                forms = accepted(answer)
                # Tokenizers mark a leading blank as U+2581 or U+0120.
                right = [p for t, p in found.items() if t.lstrip(" \u2581\u0120") in forms]
                atoms.append(float(sum(right)))
        except (BenchError, RuntimeError, OSError) as error:
            return Failure(str(error))
        return {"atoms": atoms}


class LocalJudge:
    """Soft-TIFA by a vision-language model of transformers, over the whole vocabulary."""

    def __init__(self, settings: GenEval2):
        """
        Raises:
            BenchError: If the model is not there.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.settings = settings
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.processor = AutoProcessor.from_pretrained(settings.judge_model)
            model = AutoModelForImageTextToText.from_pretrained(
                settings.judge_model, dtype=getattr(torch, settings.dtype)
            )
        except (OSError, ValueError) as error:
            raise BenchError(
                f"the judge {settings.judge_model!r} cannot be loaded: {error}"
            ) from error
        self.model = model.to(device).eval().requires_grad_(False)

    @property
    def title(self) -> str:
        """The judge's name."""
        return self.settings.judge_model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def notes(self) -> Sequence[str]:
        """Why scores differ from published ones."""
        return other_judge(self.settings.judge_model)

    def identity(self) -> Json:
        """Model and precision."""
        model = self.settings.judge_model
        return {
            "judge": "soft_tifa",
            "model": model,
            "probabilities": "all",
            "dtype": self.settings.dtype,
        }

    def version(self) -> str:
        """The commit of the model's snapshot, if it has one."""
        return str(getattr(self.model.config, "_commit_hash", None) or "")

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """``atoms``: the probability of the right answer to each question."""
        from flowgrpo.bench.judging import in_batches

        return in_batches(pictures, 1, self._atoms)

    def _atoms(
        self, images: Float[Tensor, "1 3 height width"], pictures: Sequence[Picture]
    ) -> Sequence[Json | Failure]:
        image = picture_of(images[0])
        atoms = []
        for question, answer in pictures[0].entry.prompt.metadata["vqa_list"]:
            probabilities = self._first_token(image, question_of(question))
            atoms.append(float(probabilities[self.tokens(answer)].sum()))
        return [{"atoms": atoms}]

    def _first_token(self, image: Any, question: str) -> Float[Tensor, " vocabulary"]:
        """Probabilities of the first token of the answer, from raw logits in fp32.

        A repetition penalty in the model's generation settings plays no part.
        """
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(text=[text], images=[image], return_tensors="pt")
        inputs = inputs.to(self.model.device)
        for name, values in inputs.items():
            if torch.is_tensor(values) and values.is_floating_point():
                inputs[name] = values.to(self.model.dtype)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -1]
        return logits.float().softmax(-1).cpu()

    def tokens(self, answer: str) -> list[int]:
        """The ids of the tokens that are a whole accepted form, with or without a leading blank.

        A form that begins with a lone blank or a part of a word is left out, since such a token may
        begin any answer.
        """
        tokenizer = self.processor.tokenizer
        found: dict[int, None] = {}
        for form in accepted(answer):
            for text in (form, f" {form}"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                if ids and tokenizer.decode(ids[:1]).strip() == form:
                    found[ids[0]] = None
        if not found:
            raise BenchError(f"the judge's tokenizer has no token for {answer!r}")
        return list(found)


def other_judge(model: str) -> tuple[str, ...]:
    """The note on a judge that is not the published one."""
    if model.rstrip("/").endswith(PUBLISHED_JUDGE.rsplit("/", 1)[-1]):
        return ()
    return (f"{model} is not the published judge, {PUBLISHED_JUDGE}: scores are not comparable",)


def _reference(value: float, steps: int, guidance: float, size: int) -> Reference:
    settings = {"num_steps": steps, "guidance_scale": guidance, "height": size, "width": size}
    name = f"SD3.5-M ({counted(steps, 'step')}, guidance {guidance:g}, {size})"
    return Reference(name, {GM: value}, "UniRL issue 221", settings, "Qwen3-VL-8B-Instruct")


REFERENCES = (
    _reference(20.4, 28, 7.0, 1024),
    _reference(19.0, 10, 4.0, 512),
    _reference(12.4, 40, 1.0, 512),
    _reference(7.9, 10, 1.0, 512),
)
