"""T2I-CompBench++: eight categories of compositions (arXiv:2307.06350); layout and results.

The official scorers of seven categories (BLIP-VQA with spaCy, UniDet, depth) run in an environment of
their own. flowgrpo makes the images in the official layout and summarises the official results with
intervals. The category ``non_spatial`` is scored here: it is the cosine of CLIP ViT-B/32.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowgrpo.bench.base import (
    About,
    BenchError,
    Benchmark,
    Data,
    Entry,
    Json,
    Judge,
    Metric,
    Points,
    Reference,
)
from flowgrpo.bench.data import open_data
from flowgrpo.bench.reward_judge import RewardJudge, rewards_of
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt

__all__ = ["T2ICompBench"]

Category = Literal[
    "color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"
]
PUBLISHED_FILES: Mapping[str, str] = {
    "color": "sha256:1634259756dbc77d",
    "shape": "sha256:37e1a276906c7ea9",
    "texture": "sha256:fbb5363515b4a280",
    "spatial": "sha256:8707a1d7e42ce300",
    "3d_spatial": "sha256:c9953597315f36a5",
    "numeracy": "sha256:dad8df141604b70b",
    "non_spatial": "sha256:04c56cc9ac441dc9",
    "complex": "sha256:1b808018b8d9916d",
}
"""Of the file ``{category}_val.txt`` of the official repository."""
SCORE = "mean over images"
HOW = (
    "It is the folder examples/dataset of github.com/Karine-Huang/T2I-CompBench (MIT), with files such "
    "as color_val.txt"
)


@dataclass(frozen=True, kw_only=True)
class T2ICompBench(Benchmark):
    """The settings of a T2I-CompBench++ run; each category is a run of its own."""

    data_file: str = ""
    """The folder with ``color_val.txt`` and its kin, or one of these files."""
    category: Category = "color"
    """Which of the eight."""
    samples: int = 10
    """Images per prompt; the official number is 10, and papers that use 1 score higher."""
    any_data: bool = False
    """Accept a file that is not the published one."""
    clip: Mapping[str, Any] = field(
        default_factory=lambda: {"model": "ViT-B-32", "pretrained": "openai"}
    )
    """Arguments of :class:`reward_models.clip_score.CLIPScore`, for ``non_spatial``."""

    about = About(
        summary="compositions: 8 categories of 300 prompts x 10 images; layout and results",
        judge="the official scorers in their own environment; non_spatial by CLIP here",
        calls="3,000 images per category",
        licence="MIT",
        source="--data examples/dataset of github.com/Karine-Huang/T2I-CompBench",
    )

    name = "t2i_compbench"

    @property
    def title(self) -> str:
        """With the category."""
        return f"T2I-CompBench++ {self.category}"

    def _open(self) -> tuple[Path, Data]:
        folder = Path(self.data_file)
        file = str(folder / f"{self.category}_val.txt") if folder.is_dir() else self.data_file
        published = {PUBLISHED_FILES[self.category]: f"{self.category}_val.txt"}
        return open_data(file, published, self.any_data, HOW)

    def data(self) -> Data:
        """The category's file."""
        return self._open()[1]

    def entries(self) -> Sequence[Entry]:
        """The prompts, numbered from 0.

        Raises:
            BenchError: If a prompt cannot be part of a file name, which the official scorer needs.
        """
        path = self._open()[0]
        texts = [t.strip() for t in path.read_text(encoding="utf-8-sig").split("\n") if t.strip()]
        for text in texts:
            if "/" in text or "_" in text or len(text.encode()) > 240:
                raise BenchError(f"{path}: {text!r} cannot be the name of a file")
        return [
            Entry(f"{i:03d}", Prompt(t, metadata={"number": i}), (SCORE,))
            for i, t in enumerate(texts)
        ]

    def root(self, label: str) -> str:
        """``images/<category>/samples``: each category in a folder of its own, as officially."""
        return f"images/{self.category}/samples"

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{prompt}_{number:06d}.png`` with a number that runs over all images of the category."""
        number = self.samples * int(entry.key) + sample
        return (f"{entry.prompt.text}_{number:06d}.png",)

    def check_judge(self) -> None:
        """Refuse, for seven categories, to make images that nothing here can judge."""
        if self.category != "non_spatial":
            raise BenchError(
                f"{self.category} is judged by the official scorer: make the images with 'flowgrpo bench "
                "generate t2i_compbench', run the scorer on images/<category> in its own environment, and "
                "summarise its vqa_result.json with 'flowgrpo bench score vqa_result.json --benchmark "
                f"t2i_compbench --data {self.data_file} --set category={self.category}'"
            )

    def judge(self) -> Judge:
        """CLIP for ``non_spatial``.

        Raises:
            BenchError: For the other categories; says what to do.
        """
        self.check_judge()
        reward = {"model": "clip_score", "name": SCORE, "options": dict(self.clip)}
        return RewardJudge(rewards_of([reward]), 16, "CLIP ViT-B/32")

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """One point per image."""
        return [(SCORE, j["scores"][SCORE]) for j in judgements]

    def metrics(self) -> Sequence[Metric]:
        """The mean over all images, in [0, 1]."""
        return (Metric(SCORE, ((SCORE,),), headline=True, percent=False),)

    def references(self) -> Sequence[Reference]:
        """Published results on this category, by the official scorers."""
        return [
            Reference(model, {SCORE: row[self.category]}, source, {}, "official scorer")
            for model, source, row in PUBLISHED
            if self.category in row
        ]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The scores in an official ``vqa_result.json``: a list of ``question_id`` and ``answer``.

        Raises:
            BenchError: If it is none, or has images that this run has not.
        """
        entries = self.entries()
        try:
            rows = json.loads(path.read_text())
            found = [(int(row["question_id"]), float(row["answer"])) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path} is no vqa_result.json of the official scorer: {error!r}") from error  # fmt: skip
        for number, value in found:
            if not 0 <= number < self.samples * len(entries):
                raise BenchError(
                    f"{path}: image {number} is beyond the {counted(len(entries), 'prompt')} x {counted(self.samples, 'image')}; "
                    "give the number of images per prompt with --samples"
                )
            place, sample = divmod(number, self.samples)
            yield entries[place], sample, {"scores": {SCORE: value}}


FLOW_GRPO = "Flow-GRPO, arXiv:2505.05470"
PUBLISHED: Sequence[tuple[str, str, Mapping[str, float]]] = (
    ("SD3.5-M", FLOW_GRPO, {"color": 0.7994, "shape": 0.5669, "texture": 0.7338, "spatial": 0.2850, "3d_spatial": 0.3739, "numeracy": 0.5927, "non_spatial": 0.3146}),
    ("SD3.5-M + Flow-GRPO (GenEval)", FLOW_GRPO, {"color": 0.8379, "shape": 0.6130, "texture": 0.7236, "spatial": 0.5447, "3d_spatial": 0.4471, "numeracy": 0.6752, "non_spatial": 0.3195}),
)  # fmt: skip
