"""Dividing one prompt file into training prompts and held-out prompts."""

import csv
import io
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowgrpo.core.random import Random
from flowgrpo.core.tensors import torch
from flowgrpo.data.files import write_whole
from flowgrpo.data.prompt_files import PromptError, read_prompts, text_of
from flowgrpo.data.prompt_sets import PromptSet, identity


@dataclass(frozen=True)
class PromptSplit:
    """A prompt file, and which of its records are held out.

    Attributes:
        path: The file: ``.txt``, ``.jsonl`` or ``.csv``.
        held_out: One flag per record.
        counts: By the value of the balance key, or ``""`` without one: the records to train on, and those
            that are held out.
    """

    path: Path
    held_out: Sequence[bool]
    counts: Mapping[str, tuple[int, int]]

    @property
    def files(self) -> tuple[Path, Path]:
        """The files of :meth:`write`, beside the prompt file, so that paths of images stay valid."""
        stem, suffix = self.path.stem, self.path.suffix
        return self.path.with_name(f"{stem}_train{suffix}"), self.path.with_name(f"{stem}_held_out{suffix}")  # fmt: skip

    def write(self) -> None:
        """Write both files; the records are those of the prompt file, in its order.

        Raises:
            FileExistsError: If one of them is there already. Nothing is written then.
        """
        for file in self.files:
            if file.exists():
                raise FileExistsError(f"{file} is there already; move or delete it first")
        head, records = _records(self.path)
        for file, side in zip(self.files, (False, True), strict=True):
            chosen = [r for r, out in zip(records, self.held_out, strict=True) if out == side]
            write_whole(file, "".join([head, *chosen]))


def split_prompts(path: Path, number: int, balance: str = "", seed: int = 0) -> PromptSplit:
    """Choose the prompts to hold out. The choice depends on the prompts, the number and the seed alone.

    Records with equal prompts (text and input images) are on the same side, so that more records than
    ``number`` can be held out.

    Args:
        path: The prompt file.
        number: Different prompts to hold out.
        balance: Metadata key whose values are held out in equal numbers, as far as there are enough; empty
            for none.
        seed: Of the draw.

    Raises:
        PromptError: If the file cannot be used, or has not enough different prompts to leave one of each
            value to train on.
        FileNotFoundError: If there is no such file.
    """
    if path.suffix.lower() not in (".txt", ".jsonl", ".csv"):
        raise PromptError(f"{path}: only .txt, .jsonl and .csv files can be divided")
    prompts = read_prompts(path)
    if balance:
        PromptSet.load(path, balance)  # every prompt has the key
    classes = dict[str, dict[Hashable, None]]()
    seen = set[Hashable]()
    for prompt in prompts:
        value = str(prompt.metadata[balance]) if balance else ""
        distinct = classes.setdefault(value, {})
        if identity(prompt) not in seen:
            distinct[identity(prompt)] = None
        seen.add(identity(prompt))
    most = sum(max(len(distinct) - 1, 0) for distinct in classes.values())
    if not 1 <= number <= most:
        each = f", one of each {balance}" if balance else ""
        raise PromptError(
            f"{path} has {len(seen)} different prompts: from 1 to {most} of them can be held out while at least "
            f"one{each} is left to train on; got {number}"
        )
    queues = []
    for value, distinct in classes.items():
        order = torch.randperm(len(distinct), generator=Random(seed).generator("split", value))
        keys = list(distinct)
        queues.append([keys[i] for i in order.tolist()][: max(len(keys) - 1, 0)])
    rounds = max(map(len, queues))
    chosen = [q[turn] for turn in range(rounds) for q in queues if turn < len(q)][:number]
    out = set(chosen)
    flags = [identity(p) in out for p in prompts]
    values = [str(p.metadata[balance]) if balance else "" for p in prompts]
    pairs = list(zip(values, flags, strict=True))
    counts = {v: (pairs.count((v, False)), pairs.count((v, True))) for v in classes}
    return PromptSplit(path, flags, counts)


def _records(path: Path) -> tuple[str, list[str]]:
    """What precedes the records of a file, and the text of each record."""
    text = text_of(path)
    if path.suffix.lower() != ".csv":
        return "", [f"{line}\n" for line in text.split("\n") if line.strip()]
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    lines = []
    for row in rows:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerow(row)
        lines.append(stream.getvalue())
    return lines[0], lines[1:]
