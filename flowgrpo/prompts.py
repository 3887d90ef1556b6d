"""Prompt sets: reading them from files, and the reproducible order in which they are trained on."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowgrpo.core.random import Random
from flowgrpo.experience import Group, Prompt

TEXT_KEYS = ("prompt", "negative_prompt")


class PromptError(ValueError):
    """A prompt file that cannot be used; the message names the file, the line and why."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: At least one.
        balance: Metadata key whose values are drawn equally often; empty for none.
    """

    prompts: Sequence[Prompt]
    balance: str = ""

    @classmethod
    def load(cls, path: Path, balance: str = "") -> "PromptSet":
        """Read ``.txt`` (one prompt per line), ``.jsonl`` (an object per line) or ``.csv``.

        ``prompt`` and ``negative_prompt`` are taken as such, a ``metadata`` object and all other
        keys become metadata.

        Raises:
            PromptError: On a broken line, an empty file, an unknown ending or a missing balance key.
        """
        readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
        if path.suffix not in readers:
            raise PromptError(
                f"{path}: unknown ending {path.suffix!r}; known: {', '.join(readers)}"
            )
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {path}")
        prompts = list(readers[path.suffix](path))
        if not prompts:
            raise PromptError(f"{path}: no prompts in it")
        if balance:
            for number, prompt in enumerate(prompts, start=1):
                if balance not in prompt.metadata:
                    raise PromptError(
                        f"{path}: prompts.balance = {balance!r}, but prompt {number} ({prompt.text!r}) has no such metadata"
                    )
        return cls(prompts, balance)

    def classes(self) -> list[list[Prompt]]:
        """The prompts by the value of the balance key; one class without it."""
        if not self.balance:
            return [list(self.prompts)]
        values: dict[Any, list[Prompt]] = {}
        for prompt in self.prompts:
            values.setdefault(str(prompt.metadata[self.balance]), []).append(prompt)
        return list(values.values())

    def groups(self, iteration: int, number: int, random: Random) -> list[Group]:
        """The prompts of an iteration, indexed from 0.

        Each class is taken in a shuffled order, over and over, and the classes by turns. The result
        depends only on the arguments, so that a resumed run goes on with the right prompts.
        """
        classes = self.classes()
        result = []
        for index in range(number):
            turn, which = divmod(iteration * number + index, len(classes))
            prompts = classes[which]
            epoch, place = divmod(turn, len(prompts))
            order = torch.randperm(len(prompts), generator=random.generator("order", which, epoch))
            result.append(Group(index, prompts[int(order[place])]))
        return result

    def spread(self, number: int) -> list[tuple[Prompt, int]]:
        """``number`` (prompt, sample) pairs for an evaluation, spread evenly over the classes.

        Sample 0 of every prompt comes before sample 1 of any prompt of its class.
        """
        classes = self.classes()
        pairs = []
        for index in range(number):
            turn, which = divmod(index, len(classes))
            sample, place = divmod(turn, len(classes[which]))
            pairs.append((classes[which][place], sample))
        return pairs


def _read_txt(path: Path) -> Iterator[Prompt]:
    for line in path.read_text(encoding="utf-8-sig").split("\n"):
        if line.strip():
            yield Prompt(line.strip())


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}, line {number}: not valid JSON: {error}") from error
        yield _from_record(record, f"{path}, line {number}")


def _read_csv(path: Path) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows: Iterable[dict[str, Any]] = csv.DictReader(file)
        for number, row in enumerate(rows, start=2):
            yield _from_record(row, f"{path}, line {number}")


def _from_record(record: Any, where: str) -> Prompt:
    if not isinstance(record, dict):
        raise PromptError(f"{where}: expected an object with a key 'prompt', got {record!r}")
    text, negative = record.get("prompt"), record.get("negative_prompt")
    if not isinstance(text, str) or not text.strip():
        raise PromptError(
            f"{where}: needs a key 'prompt' with some text; keys there: {', '.join(map(str, record))}"
        )
    metadata = record.get("metadata", {})
    if not isinstance(metadata, dict):
        raise PromptError(f"{where}: 'metadata' must be an object, got {metadata!r}")
    rest = {k: v for k, v in record.items() if k not in (*TEXT_KEYS, "metadata")}
    return Prompt(text, negative or None, {**rest, **metadata})
