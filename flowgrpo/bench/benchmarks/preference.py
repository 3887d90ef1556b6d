"""Preference scores: any prompt file and any rewards, as papers report DrawBench or PartiPrompts."""

from collections.abc import Mapping, Sequence
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
    Points,
    Result,
)
from flowgrpo.bench.data import HUB, open_data
from flowgrpo.bench.files import write_json
from flowgrpo.bench.reward_judge import RewardJudge, rewards_of
from flowgrpo.config import find
from flowgrpo.data.prompt_files import read_prompts
from flowgrpo.data.prompts import Prompt

__all__ = ["Preference"]

COLUMNS = ("Prompt", "prompt", "caption", "text")
"""Names of the column with the prompts in published files: PartiPrompts writes ``Prompt``."""


@dataclass(frozen=True, kw_only=True)
class Preference(Benchmark):
    """The settings of a preference run."""

    data_file: str = ""
    """The prompts: .txt, .jsonl, .csv, .tsv (PartiPrompts), .json (a list, as HPDv2's), .parquet, or
    ``hf:owner/name:split`` for a dataset on the hub."""
    rewards: Sequence[str | Mapping[str, Any]] = ("pick_score",)
    """Rewards by name, or tables with ``model``, ``name`` and ``options``."""
    samples: int = 1
    """Images per prompt."""
    category: str = ""
    """Metadata key whose values are reported apart, such as ``Category`` for PartiPrompts."""
    batch: int = 16
    """Images in one call of a reward."""

    about = About(
        summary="any prompt file x any rewards: DrawBench, PartiPrompts, HPDv2, Pick-a-Pic, your own",
        judge="the rewards that you name, such as pick_score, hpsv2, image_reward",
        calls="one per image and reward",
        licence="of the prompts and rewards: PartiPrompts and HPDv2 Apache-2.0, DrawBench not stated, "
        "Pick-a-Pic has unsafe prompts",
        source="--data PATH or hf:owner/name:split",
    )

    name = "preference"
    title = "Preference"

    def data(self) -> Data:
        """The prompts' file; a dataset on the hub is identified by its prompts."""
        if not self.data_file.startswith(HUB):
            return open_data(self.data_file, {}, how="Any prompt file will do.")[1]
        import hashlib

        texts = "\n".join(e.prompt.text for e in self.entries())
        return Data(self.data_file, hashlib.sha256(texts.encode()).hexdigest())

    def entries(self) -> Sequence[Entry]:
        """The prompts, numbered from 0; repeated lines are prompts of their own."""
        if not self.data_file:
            self.data()
        prompts = _read(self.data_file)
        return [Entry(f"{i:05d}", p, self._dimensions(p)) for i, p in enumerate(prompts)]

    def _dimensions(self, prompt: Prompt) -> tuple[str, ...]:
        if not self.category:
            return ()
        if self.category not in prompt.metadata:
            raise BenchError(f"prompt {prompt.text!r} has no metadata {self.category!r}")
        return (str(prompt.metadata[self.category]),)

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """Ours, UniRL's, and plain numbers where there is one image per prompt."""
        number = int(entry.key)
        names = [
            f"{number:05d}_{sample}.png",
            f"p{number:05d}_s{sample}.png",
            f"{number}_{sample}.png",
        ]
        return [*names, f"{number:05d}.png", f"{number}.png"] if self.samples == 1 else names

    def judge(self) -> RewardJudge:
        """Load the rewards."""
        return RewardJudge(rewards_of(self.rewards), self.batch)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """One point per image and reward, over all prompts and in the prompt's category."""
        for judgement in judgements:
            for reward, value in judgement["scores"].items():
                yield reward, value
                yield from ((f"{reward}: {d}", value) for d in entry.dimensions)

    def metrics(self) -> Sequence[Metric]:
        """The mean of each reward, and by category."""
        labels = [r.label for r in rewards_of(self.rewards)]
        categories = (
            sorted({d for e in self.entries() for d in e.dimensions}) if self.category else []
        )
        return [
            *(Metric(r, ((r,),), headline=True, percent=False) for r in labels),
            *(
                Metric(f"{r}: {c}", ((f"{r}: {c}",),), percent=False)
                for r in labels
                for c in categories
            ),
        ]

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``scores.json``: image -> scores."""
        rows = {r.path: r.judgement["scores"] for r in results if r.judgement is not None}
        write_json(folder / "scores.json", rows)
        return [folder / "scores.json"]


def _read(source: str) -> list[Prompt]:
    """The prompts of a file in one of the forms in which prompt sets are published."""
    if source.startswith(HUB):
        return read_prompts(Path(source))
    path = find(source)
    if path.suffix == ".json":
        import json

        rows = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(rows, list) and all(isinstance(r, str) for r in rows):
            return [Prompt(r) for r in rows]
        if isinstance(rows, list) and all(isinstance(r, dict) for r in rows):
            return [_from_row(r, path) for r in rows]
        raise BenchError(f"{path}: expected a list of prompts, or of objects with a prompt")
    if path.suffix in (".tsv", ".csv"):
        import csv

        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            return [_from_row(row, path) for row in reader]
    return read_prompts(path)


def _from_row(row: Mapping[str, Any], path: Path) -> Prompt:
    column = next((c for c in COLUMNS if row.get(c)), None)
    if column is None:
        raise BenchError(
            f"{path}: no column with prompts ({', '.join(COLUMNS)}); there: {', '.join(map(str, row))}"
        )
    return Prompt(str(row[column]), metadata={str(k): v for k, v in row.items() if k != column})
