"""Edits verified principle by principle with any vision-language model, after Edit-R1 (arXiv:2604.27505)."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt
from reward_models.shared.answers import Answer
from reward_models.shared.chat import Chat
from reward_models.shared.pictures import source_picture
from reward_models.shared.templates import Content, Template, check_pictures, pictures_of

__all__ = ["EditVerifier"]

KINDS = ("follow", "keep", "quality")
VERDICT = re.compile(r"verdict\W*\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Principle:
    """A condition on an edit, of one kind: ``follow`` the instruction, ``keep`` the rest, ``quality``."""

    kind: str
    text: str


@dataclass(frozen=True)
class Check:
    """The model's verdict on one principle."""

    kind: str
    text: str
    holds: bool
    reason: str


class EditVerifier:
    """The share of an edit's principles that hold, in [0, 1].

    The model splits an instruction into principles, once for each instruction. Each principle is
    one question about the pictures before and after the edit, which the model answers with a reason
    and a verdict. ``aggregate``: ``mean`` of all, ``kinds`` (the mean over kinds of the mean within
    each, so that a kind with many principles does not outweigh the others), or ``all`` (1 if all
    hold, else 0).

    The score is NaN if the instruction could not be split or a check has no verdict. ``last`` holds
    the checks of the last batch; the checks of all batches are appended to the file ``reasons``.

    Edit-R1 trains a model for this task; this reward uses a vision-language model without such
    training.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = "http://127.0.0.1:8000/v1",
        aggregate: Literal["mean", "kinds", "all"] = "kinds",
        source_key: str = "image",
        reasons: str = "",
        split_template: str = "edit_split",
        check_template: str = "edit_check",
        longest_side: int = 0,
        max_tokens: int = 1024,
        api_key_env: str = "",
        timeout: float = 120.0,
        patience: float = 300.0,
        concurrency: int = 16,
        cache: str = "",
        extra: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            model: Name of the model at the server.
            base_url: One server or several equal ones.
            aggregate: How checks are combined; see above.
            source_key: Metadata key of the file with the picture before the edit, for prompts
                without a condition image.
            reasons: A ``.jsonl`` file for instructions, checks, reasons and scores; empty for none.
            split_template: A template with ``$prompt``. Prompts with metadata ``principles`` (a
                list of objects with ``kind`` and ``text``) are not split by the model.
            check_template: A template with ``$source``, ``$edited``, ``$prompt`` and ``$rubric``.
            longest_side: Larger pictures are shrunk to this length; 0 keeps them.
            max_tokens: Longest answer.
            api_key_env, timeout, patience, concurrency, cache, extra: As for
                :class:`reward_models.shared.chat.Chat`.

        Raises:
            ValueError: If an option or a template is invalid, the key is refused, or the server
                does not have the model.
            FileNotFoundError: If there is no such template.
        """
        if aggregate not in ("mean", "kinds", "all"):
            raise ValueError(f"aggregate must be 'mean', 'kinds' or 'all', got {aggregate!r}")
        check_pictures(1, longest_side, max_tokens)
        self.aggregate, self.source_key = aggregate, source_key
        self.reasons = Path(reasons) if reasons else None
        self.split = Template.load(split_template, ("prompt",), ())
        self.question = Template.load(check_template, ("prompt", "rubric"), ("source", "edited"))
        self.longest_side, self.max_tokens = longest_side, max_tokens
        self.chat = Chat(
            model, base_url, api_key_env, timeout, patience, concurrency, cache, extra
        )  # fmt: skip
        self.last: list[list[Check]] = []
        self._known: dict[str, list[Principle]] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one has no picture before the edit, or principles of a wrong form.
            OSError: If the picture cannot be read.
        """
        for prompt in prompts:
            source_picture(prompt, self.source_key)
            _own_principles(prompt)

    def __call__(
        self, media: Float[Tensor, "batch 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt does not name its picture, or has principles of a wrong form.
            FileNotFoundError: If the picture is not there.
            RuntimeError: If every question failed; names the first error.
        """
        principles = self._principles(prompts)
        questions: list[Content] = []
        owners: list[tuple[int, Principle]] = []
        for row, prompt in enumerate(prompts):
            source = pictures_of(source_picture(prompt, self.source_key), 1, self.longest_side)
            if not bool(media[row].isfinite().all()):
                continue
            edited = pictures_of(media[row], 1, self.longest_side)
            for principle in principles[row]:
                texts = {"prompt": prompt.text, "rubric": principle.text}
                questions.append(self.question.fill(texts, {"source": source, "edited": edited}))
                owners.append((row, principle))
        found = self.chat.ask_all(questions, _verdict, max_tokens=self.max_tokens)
        self.last = [[] for _ in prompts]
        failed = {row for row, p in enumerate(principles) if not p}
        for (row, principle), answer in zip(owners, found, strict=True):
            if answer is None:
                failed.add(row)
            else:
                self.last[row].append(Check(principle.kind, principle.text, *answer))
        scores = [
            math.nan if row in failed or not checks else self._score(checks)
            for row, checks in enumerate(self.last)
        ]
        self._write(prompts, scores)
        return torch.tensor(scores, dtype=torch.float32)

    def _score(self, checks: Sequence[Check]) -> float:
        if self.aggregate == "all":
            return float(all(c.holds for c in checks))
        if self.aggregate == "mean":
            return sum(c.holds for c in checks) / len(checks)
        kinds = {c.kind: [d.holds for d in checks if d.kind == c.kind] for c in checks}
        return sum(sum(k) / len(k) for k in kinds.values()) / len(kinds)

    def _principles(self, prompts: Sequence[Prompt]) -> list[list[Principle]]:
        """The principles of each prompt; empty if the model's answer could not be parsed."""
        given = [_own_principles(p) for p in prompts]
        texts = [p.text for p, own in zip(prompts, given, strict=True) if own is None]
        new = [t for t in dict.fromkeys(texts) if t not in self._known]
        questions = [self.split.fill({"prompt": t}, {}) for t in new]
        answers = self.chat.ask_all(questions, _split, max_tokens=self.max_tokens)
        self._known |= {t: a for t, a in zip(new, answers, strict=True) if a is not None}
        return [
            self._known.get(prompt.text, []) if own is None else own
            for prompt, own in zip(prompts, given, strict=True)
        ]

    def _write(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        if self.reasons is None:
            return
        self.reasons.parent.mkdir(parents=True, exist_ok=True)
        with self.reasons.open("a", encoding="utf-8") as file:
            for prompt, score, checks in zip(prompts, scores, self.last, strict=True):
                record = {
                    "instruction": prompt.text,
                    "score": score,
                    "checks": [asdict(c) for c in checks],
                }
                file.write(strict_json.dumps(record, ensure_ascii=False) + "\n")


def _own_principles(prompt: Prompt) -> list[Principle] | None:
    """The principles in the prompt's metadata; None if it has none.

    Raises:
        ValueError: If they have another form.
    """
    own = prompt.metadata.get("principles")
    parsed = None if own is None else parse_principles(own)
    if own is not None and parsed is None:
        raise ValueError(
            f"prompt {prompt.text!r}: principles must be a list of objects with a kind "
            f"({', '.join(KINDS)}) and a text, got {own!r}"
        )
    return parsed


def parse_principles(value: Any) -> list[Principle] | None:
    """Principles from JSON; None if it has another form."""
    if not isinstance(value, list | tuple) or not value:
        return None
    found = []
    for entry in value:
        kind, text = (
            entry.get(k) if isinstance(entry, Mapping) else None for k in ("kind", "text")
        )
        if kind not in KINDS or not isinstance(text, str) or not text.strip():
            return None
        found.append(Principle(kind, text.strip()))
    return found


def _split(answer: Answer) -> list[Principle] | None:
    start, end = answer.text.find("["), answer.text.rfind("]")
    try:
        return parse_principles(json.loads(answer.text[start : end + 1]))
    except (ValueError, RecursionError):
        return None


def _verdict(answer: Answer) -> tuple[bool, str] | None:
    """The last verdict in an answer, and the text before it as its reason."""
    found = list(VERDICT.finditer(answer.text))
    if not found:
        return None
    return found[-1][1].lower() == "yes", answer.text[: found[-1].start()].strip(" *\n")
