"""VBench: 944 prompts x 5 videos, sixteen dimensions (arXiv:2311.17982).

The sixteen models of the official package run in an environment of their own. flowgrpo makes the
videos with the official names and summarises the official results with intervals, normalised and
weighted as on the leaderboard. Video rewards can score the same videos here, under their own names.
"""

import json
import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

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
)
from flowgrpo.bench.data import open_data
from flowgrpo.bench.reward_judge import rewards_of
from flowgrpo.bench.videos import VideoRewardJudge
from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt

__all__ = ["VBench"]

log = logging.getLogger(__name__)

PUBLISHED = {"sha256:5dd2de80ee43cda7": "VBench_full_info.json"}
HOW = "It is vbench/VBench_full_info.json of github.com/Vchitect/VBench (Apache-2.0)"
QUALITY: Mapping[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC: Mapping[str, tuple[float, float, float]] = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = {**QUALITY, **SEMANTIC}
"""Dimension -> lowest value, highest value, weight, of ``scripts/constant.py``."""
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
NORMALISED = " (normalised)"
DIFFERS = 0.005
"""Largest difference between an official mean and the mean of its videos that is not mentioned."""
OFFICIAL = (
    "VBench's dimensions are measured by its own package: make the videos with 'flowgrpo bench generate "
    "vbench', run 'vbench evaluate --videos_path FOLDER/images --dimension ...' in its environment, and "
    "summarise its results with 'flowgrpo bench score NAME_eval_results.json --benchmark vbench --data "
    "VBench_full_info.json'; or score the videos here by video rewards, --set 'rewards=[\"motion\"]'"
)


@dataclass(frozen=True, kw_only=True)
class VBench(Benchmark):
    """The settings of a VBench run."""

    data_file: str = ""
    """``VBench_full_info.json``."""
    samples: int = 5
    """Videos per prompt. The official 25 for ``temporal_flickering`` need a folder of their own:
    ``--dimension temporal_flickering --samples 25``, and the official static filter."""
    fps: int = 16
    """Frames per second of the files; the model's own, such as 16 for Wan 2.1 and 8 for CogVideoX."""
    augmented: str = ""
    """A file with one longer prompt per line, in the order of VBench's ``all_dimension.txt``; files are
    named by the original prompts."""
    rewards: Sequence[str | Mapping[str, Any]] = ()
    """Video rewards by name, or tables with ``model``, ``name`` and ``options``."""
    any_data: bool = False
    """Accept a file that is not the published one."""

    about = About(
        summary="text to video: 944 prompts x 5 videos, 16 dimensions; layout, results, video rewards",
        judge="the official package in its own environment; video rewards here",
        calls="4,720 videos",
        licence="Apache-2.0",
        source="--data VBench_full_info.json of github.com/Vchitect/VBench",
    )

    name = "vbench"
    title = "VBench"

    @property
    def video_fps(self) -> int:
        """Frames per second of the files.

        Raises:
            BenchError: If it is not positive.
        """
        if self.fps < 1:
            raise BenchError(f"fps must be at least 1, got {self.fps}")
        return self.fps

    def _open(self) -> tuple[Path, Data]:
        return open_data(self.data_file, PUBLISHED, self.any_data, HOW)

    def data(self) -> Data:
        """The file of prompts, and that of longer prompts."""
        data = self._open()[1]
        if not self.augmented:
            return data
        return Data(data.source, data.sha256, data.name, (*data.notes, self._augmented_note()))

    def _augmented_note(self) -> str:
        _, own = open_data(self.augmented, {})
        return f"the videos were made from the longer prompts of {own.source} ({own.sha256[:16]}…)"

    def entries(self) -> Sequence[Entry]:
        """The prompts in the file's order; one that stands there twice is one prompt."""
        path, data = self._open()
        records = _records(path, data.sha256)
        texts = self._longer(len(records))
        dimensions: dict[str, list[str]] = {}
        places: dict[str, int] = {}
        for place, (prompt, own) in enumerate(records):
            places.setdefault(prompt, place)
            dimensions.setdefault(prompt, []).extend(own)
        return [
            Entry(
                f"{place:03d}",
                Prompt(texts[place] if texts else prompt, metadata={"prompt_en": prompt}),
                tuple(dimensions[prompt]),
            )
            for prompt, place in places.items()
        ]

    def _longer(self, number: int) -> Sequence[str]:
        if not self.augmented:
            return ()
        path, _ = open_data(self.augmented, {})
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        if len(lines) != number:
            raise BenchError(
                f"{self.augmented} has {counted(len(lines), 'line')}, and VBench_full_info.json {counted(number, 'record')}: "
                "line i must belong to record i"
            )
        return [line.strip() for line in lines]

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """``{prompt}-{sample}.mp4`` with the original prompt, as the official package reads it."""
        return (f"{entry.prompt.metadata['prompt_en']}-{sample}.mp4",)

    def check_judge(self) -> None:
        """Refuse to make videos that nothing here will score."""
        if not self.rewards:
            raise BenchError(OFFICIAL)

    def judge(self) -> Judge:
        """Load the video rewards."""
        self.check_judge()
        return _OriginalPrompts(rewards_of(self.rewards), 1)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """Points of rewards, or of official dimensions, as they are and normalised."""
        for judgement in judgements:
            yield from judgement.get("scores", {}).items()
            for dimension, values in judgement.get("dimensions", {}).items():
                low, high, _ = DIMENSIONS[dimension]
                for value in values:
                    yield dimension, value
                    yield f"{dimension}{NORMALISED}", (value - low) / (high - low)

    def metrics(self) -> Sequence[Metric]:
        """Rewards; total, quality and semantic score; the dimensions."""
        labels = [r.label for r in rewards_of(self.rewards)]
        return [
            *(Metric(r, ((r,),), headline=True, percent=False) for r in labels),
            _weighted("total score", {"quality": QUALITY_WEIGHT, "semantic": SEMANTIC_WEIGHT}),
            _weighted("quality score", {"quality": 1.0}),
            _weighted("semantic score", {"semantic": 1.0}),
            *(Metric(d, ((d,),), radar=True) for d in DIMENSIONS),
        ]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The scores per video in an official ``..._eval_results.json``, or a zip file of several.

        Raises:
            BenchError: If it is none, or has videos that are not named as officially.
        """
        entries = {e.prompt.metadata["prompt_en"]: e for e in self.entries()}
        found: dict[tuple[str, int], dict[str, list[float]]] = {}
        for name, table in _tables(path):
            for dimension, content in table.items():
                if dimension not in DIMENSIONS:
                    raise BenchError(f"{name}: {dimension!r} is no dimension of VBench")
                _collect(name, dimension, content, entries, self.samples, found)
        if not found:
            raise BenchError(f"{path} holds no scores of videos")
        by_prompt = {e.key: e for e in entries.values()}
        for (key, sample), dimensions in sorted(found.items()):
            yield by_prompt[key], sample, {"dimensions": dimensions}


def _weighted(name: str, groups: Mapping[str, float]) -> Metric:
    """A weighted mean of normalised dimensions, each group's weights summing to its own weight."""
    parts: list[tuple[str, ...]] = []
    weights: list[float] = []
    for group, share in groups.items():
        members = QUALITY if group == "quality" else SEMANTIC
        total = sum(weight for _, _, weight in members.values())
        parts += [(f"{d}{NORMALISED}",) for d in members]
        weights += [share * weight / total for _, _, weight in members.values()]
    return Metric(name, tuple(parts), headline=True, weights=tuple(weights))


@lru_cache(maxsize=4)
def _records(path: Path, _sha256: str) -> Sequence[tuple[str, Sequence[str]]]:
    """Prompt and dimensions of each record.

    Raises:
        BenchError: Naming the record that is malformed.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    found = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            prompt, own = str(row["prompt_en"]), [str(d) for d in row["dimension"]]
        except (KeyError, TypeError) as error:
            raise BenchError(f"{path}, record {number}: no record of VBench: {error!r}") from error
        if "/" in prompt or len(prompt.encode()) > 240 or not set(own) <= set(DIMENSIONS):
            raise BenchError(f"{path}, record {number}: no record of VBench: {prompt!r}, {own}")
        found.append((prompt, own))
    return found


def _tables(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The result tables in a file; in a zip file, those of all its JSON files about dimensions."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [
                    n for n in archive.namelist() if n.endswith(".json") and "__MACOSX" not in n
                ]
                loaded = [(f"{path}, {n}", json.loads(archive.read(n))) for n in names]
            # Beside the results lie ..._full_info.json files, which are lists.
            loaded = [(n, t) for n, t in loaded if isinstance(t, dict)]
        else:
            loaded = [(str(path), json.loads(path.read_text(encoding="utf-8")))]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    for name, table in loaded:
        if not isinstance(table, dict):
            raise BenchError(f"{name}: expected NAME_eval_results.json, a table of dimensions")
        yield name, table


def _collect(
    name: str,
    dimension: str,
    content: Any,
    entries: Mapping[str, Entry],
    samples: int,
    found: dict[tuple[str, int], dict[str, list[float]]],
) -> None:
    """Add the videos of one dimension to ``found``; the content is [mean, [a table per video]]."""
    total: list[float] = []
    try:
        mean, videos = float(content[0]), list(content[1])
        for video in videos:
            stem = Path(video["video_path"]).stem
            values = _values(dimension, video)
            prompt, _, number = stem.rpartition("-")
            if prompt not in entries or not number.isdigit():
                raise BenchError(
                    f"{name}: {stem!r} is not named {{prompt}}-{{number}} as officially"
                )
            if int(number) >= samples:
                raise BenchError(
                    f"{name}: {stem!r}: give the number of videos per prompt with --samples"
                )
            place = found.setdefault((entries[prompt].key, int(number)), {})
            if dimension in place:
                raise BenchError(f"{name}: {dimension} of {stem!r} stands there twice")
            place[dimension] = values
            total += values
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BenchError(f"{name}: {dimension}: no results of VBench: {error!r}") from error
    own = sum(total) / len(total) if total else float("nan")
    if not abs(own - mean) <= DIFFERS:
        log.warning(
            "%s: %s is %.4f officially and %.4f as the mean over its videos: official runs of one process "
            "weigh videos by their frames", name, dimension, mean, own,
        )  # fmt: skip


def _values(dimension: str, video: Mapping[str, Any]) -> list[float]:
    """The points of one video: one per frame where the official mean is over frames."""
    if "frame_count" in video:
        right, number = int(video["success_frame_count"]), int(video["frame_count"])
        return [1.0] * right + [0.0] * (number - right)
    if dimension in ("spatial_relationship", "appearance_style") and video.get("frame_results"):
        return [float(v) for v in video["frame_results"]]
    value = float(video["video_results"])
    return [value / 100 if dimension == "imaging_quality" else value]


class _OriginalPrompts(VideoRewardJudge):
    """Scores videos against the original prompts, also if they were made from longer ones."""

    def _scores(self, images: Any, pictures: Any) -> Any:
        from dataclasses import replace

        original = [
            replace(p, entry=replace(p.entry, prompt=Prompt(p.entry.prompt.metadata["prompt_en"])))
            for p in pictures
        ]
        return super()._scores(images, original)
