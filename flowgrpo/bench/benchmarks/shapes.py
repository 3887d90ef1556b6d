"""The embedded benchmark: GenEval's six tasks in a world of coloured shapes, without downloads.

It runs the whole code path in about a minute on two CPU cores: layout, rule and summary are those of
GenEval; the judge reads images by colour and outline.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowgrpo.bench.base import (
    About,
    Benchmark,
    Data,
    Entry,
    Failure,
    Json,
    Judged,
    Metric,
    Picture,
    Points,
    Result,
)
from flowgrpo.bench.benchmarks.geneval import (
    image_names,
    official_line,
    official_summary,
    read_entries,
    record_of,
    task_metrics,
    task_points,
)
from flowgrpo.bench.data import open_data
from flowgrpo.bench.files import write_atomically
from flowgrpo.bench.judging import in_batches
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data import strict_json

__all__ = ["Shapes"]

DATA = "prompts/shapes_held_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class Shapes(Benchmark):
    """The settings of a run on the embedded world."""

    data_file: str = DATA
    """The held-out prompts of the embedded world."""
    samples: int = 16
    """Images per prompt."""

    about = About(
        summary="the embedded world: 39 prompts x 16 images, GenEval's six tasks",
        judge="colour segmentation and outlines; no weights",
        calls="624 images",
        licence="Apache-2.0",
        source="comes with flowgrpo",
    )

    name = "shapes"
    title = "shapes"

    def data(self) -> Data:
        """The prompts' file."""
        return open_data(self.data_file, {})[1]

    def entries(self) -> Sequence[Entry]:
        """The held-out prompts."""
        return read_entries(open_data(self.data_file, {})[0])

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """As GenEval."""
        return image_names(entry, sample)

    def sidecars(self, entry: Entry) -> Mapping[str, str]:
        """As GenEval."""
        return {f"{entry.key}/metadata.jsonl": strict_json.dumps(record_of(entry)) + "\n"}

    def judge(self) -> "Verifier":
        """The verifier needs no weights."""
        return Verifier()

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """As GenEval."""
        return task_points(entry, judgements)

    def metrics(self) -> Sequence[Metric]:
        """As GenEval."""
        return task_metrics()

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """A summary in GenEval's form."""
        lines = [official_line(r) for r in results if r.judgement is not None]
        write_atomically(folder / "summary.txt", official_summary(lines).encode())
        return [folder / "summary.txt"]


class Verifier:
    """GenEval's strict rule on the objects that the embedded verifier finds."""

    title = "embedded verifier"

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the official judge."""
        return ()

    def identity(self) -> Json:
        """The verifier has no settings."""
        return {"judge": "shapes", "rule": "strict", "version": 1}

    def version(self) -> str:
        """Nothing runs elsewhere."""
        return ""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """``correct`` and a list of the objects seen."""
        return in_batches(pictures, 32, self._verdicts)

    def _verdicts(
        self, images: Float[Tensor, "batch 3 height width"], pictures: Sequence[Picture]
    ) -> Sequence[Json | Failure]:
        from flowgrpo.shapes.rewards import detections
        from flowgrpo.shapes.verifier import strict

        return [
            {
                "correct": strict(found, dict(picture.entry.prompt.metadata)) == 1.0,
                "reason": ", ".join(f"{d.color} {d.shape}" for d in found if d.genuine),
            }
            for picture, found in zip(pictures, detections(images), strict=True)
        ]
