"""GenEval: objects, counts, colours and places in 553 prompts, by a detector (arXiv:2310.11513).

Prompts and rule are the official ones (djghosh13/geneval, MIT). The default detector is not: it is
Mask2Former through transformers, another training of the official one, so results are called
"GenEval (HF detector)".
"""

import json
import re
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
    Judged,
    Metric,
    Picture,
    Points,
    Reference,
    Result,
)
from flowgrpo.bench.data import open_data, read_jsonl, require_model
from flowgrpo.bench.files import write_atomically
from flowgrpo.bench.judging import in_batches
from flowgrpo.core.imports import import_path
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt

__all__ = ["GenEval"]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OVERALL, SAMPLES = "overall (mean over tasks)", "overall (mean over samples)"
ANY, IMAGES = "% correct prompts (any image)", "any image correct"
REWARD = "reward_models.geneval:GenEval"
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:\w+")
PUBLISHED = {
    "md5:9a0ed515640279a48ed3380d90aec0ed": "evaluation_metadata.jsonl of djghosh13/geneval",
}


@dataclass(frozen=True, kw_only=True)
class GenEval(Benchmark):
    """The settings of a GenEval run."""

    data_file: str = "prompts/geneval.jsonl"
    """The prompts with their metadata; the file that comes with flowgrpo equals the official one."""
    samples: int = 4
    """Images per prompt."""
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    """Hub id or folder of a Mask2Former for COCO instances, or ``package.module:name`` of a detector
    (an object, or a class without arguments) as :class:`flowgrpo.core.geneval.Detector`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of :class:`reward_models.geneval.GenEval`, such as ``color_pretrained``."""
    batch: int = 8
    """Images in one call of the detector."""
    any_data: bool = False
    """Accept prompts that are not the published ones."""

    about = About(
        summary="objects, counts, colours, positions: 553 prompts x 4 images, six tasks",
        judge="Mask2Former (0.3 GB) and CLIP ViT-L/14 (0.9 GB) through transformers and open_clip",
        calls="2,212 detections",
        licence="prompts MIT; detector's card: other; CLIP MIT",
        source="comes with flowgrpo",
    )

    name = "geneval"
    title = "GenEval"

    def data(self) -> Data:
        """The prompts' file; raises BenchError if it is not the published one."""
        return open_data(self.data_file, PUBLISHED, self.any_data)[1]

    def entries(self) -> Sequence[Entry]:
        """The prompts; an entry's key is its line, counted from 0, as five digits."""
        return read_entries(open_data(self.data_file, PUBLISHED, self.any_data)[0])

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """The official name, and those of other generators."""
        return image_names(entry, sample)

    def sidecars(self, entry: Entry) -> Mapping[str, str]:
        """``00000/metadata.jsonl``, as the official evaluator reads it."""
        return {f"{entry.key}/metadata.jsonl": strict_json.dumps(record_of(entry)) + "\n"}

    def check_judge(self) -> None:
        """Refuse a detector that is neither here nor on a hub that answers."""
        if not IMPORT_PATH.fullmatch(self.detector):
            require_model(self.detector, "--set detector=FOLDER")

    def judge(self) -> "DetectorJudge":
        """Load the detector and the colour classifier."""
        return DetectorJudge(self.detector, self.options, self.batch)

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """One point per image, and one per prompt for "any image correct"."""
        return task_points(entry, judgements)

    def metrics(self) -> Sequence[Metric]:
        """Each task, and both overall means."""
        return task_metrics()

    def references(self) -> Sequence[Reference]:
        """Published results, all with the official detector."""
        return REFERENCES

    def official(self, folder: Path, label: str, results: Sequence[Result]) -> Sequence[Path]:
        """``results.jsonl`` and ``summary.txt`` as the official scripts write them."""
        lines = [official_line(r) for r in results if r.judgement is not None]
        rows = folder / "results.jsonl"
        write_atomically(rows, "".join(strict_json.dumps(line) + "\n" for line in lines).encode())
        write_atomically(folder / "summary.txt", official_summary(lines).encode())
        return [rows, folder / "summary.txt"]

    def read_results(self, path: Path) -> Iterator[tuple[Entry, int, Json]]:
        """The judgements in a results file of the official evaluator."""
        return read_official(path, self.entries())


def read_entries(path: Path) -> list[Entry]:
    """GenEval records as entries; an entry's stratum and dimension is its task."""
    entries = []
    for number, record in enumerate(read_jsonl(path)):
        tag, text = record.get("tag"), record.get("prompt")
        if not isinstance(tag, str) or not isinstance(text, str):
            raise BenchError(f"{path}, line {number + 1}: needs the keys 'tag' and 'prompt'")
        metadata = {k: v for k, v in record.items() if k != "prompt"}
        entries.append(Entry(f"{number:05d}", Prompt(text, metadata=metadata), (tag,), tag))
    return entries


def record_of(entry: Entry) -> dict[str, Any]:
    """The official record of a prompt, its keys in the official order."""
    return {**entry.prompt.metadata, "prompt": entry.prompt.text}


def image_names(entry: Entry, sample: int) -> Sequence[str]:
    """``00000/samples/0000.png``; the official generator writes five digits, UniRL ``p00000_s0``."""
    number = int(entry.key)
    return (
        f"{number:05d}/samples/{sample:04d}.png",
        f"{number:05d}/samples/{sample:05d}.png",
        f"p{number:05d}_s{sample}.png",
        f"{number}_{sample}.png",
        f"{number:05d}_{sample}.png",
    )


def task_points(entry: Entry, judgements: Sequence[Json]) -> Points:
    """The points of a prompt: one per image, and whether any image is correct."""
    yield from ((entry.stratum, float(j["correct"])) for j in judgements)
    yield IMAGES, float(any(j["correct"] for j in judgements))


def task_metrics() -> Sequence[Metric]:
    """GenEval's summary: tasks, both overall means, and prompts with a correct image."""
    return (
        *(Metric(t, ((t,),), radar=True) for t in TASKS),
        Metric(OVERALL, tuple((t,) for t in TASKS), headline=True),
        Metric(SAMPLES, (TASKS,), headline=True),
        Metric(ANY, ((IMAGES,),)),
    )


class DetectorJudge:
    """GenEval's rule on what a detector finds."""

    def __init__(self, detector: str, options: Mapping[str, Any], batch: int):
        """
        Raises:
            ValueError: If the detector or an option does not exist.
        """
        given: Any = detector
        if IMPORT_PATH.fullmatch(detector):
            given = import_path(detector)
            given = given() if isinstance(given, type) else given
        self.detector, self.options, self.batch = detector, dict(options), batch
        self.reward: Any = import_path(REWARD)(mode="strict", detector=given, **self.options)

    @property
    def title(self) -> str:
        """The detector's name, such as ``HF detector``."""
        return str(self.reward.detector.name)

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the official judge."""
        return (
            "the official detector is mmdet's Mask2Former; this one is another, so scores come near the "
            "official ones but do not equal them",
        )

    def identity(self) -> Json:
        """The detector, the colour model and the rule's thresholds."""
        reward = self.reward
        return {
            "judge": "geneval",
            "rule": "strict",
            "detector": self.detector,
            "detector_name": reward.detector.name,
            "options": {k: str(v) for k, v in self.options.items()},
            "threshold": reward.threshold,
            "counting_threshold": reward.counting_threshold,
            "max_objects": reward.max_objects,
        }

    def version(self) -> str:
        """Nothing runs elsewhere."""
        return ""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """``correct`` and ``reason`` for each picture."""
        return in_batches(pictures, self.batch, self._verdicts)

    def _verdicts(
        self, images: Float[Tensor, "batch 3 height width"], pictures: Sequence[Picture]
    ) -> Sequence[Json | Failure]:
        verdicts = self.reward.verdicts(images, [p.entry.prompt for p in pictures])
        return [{"correct": v.correct, "reason": "\n".join(v.reasons)} for v in verdicts]


def official_line(result: Result) -> dict[str, Any]:
    """A row of the official evaluator's ``results.jsonl``."""
    assert result.judgement is not None
    record = record_of(result.entry)
    return {
        "filename": result.path,
        "tag": record["tag"],
        "prompt": record["prompt"],
        "correct": bool(result.judgement["correct"]),
        "reason": result.judgement.get("reason", ""),
        "metadata": strict_json.dumps(record),
        "details": result.judgement.get("details", "{}"),
    }


def official_summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """The text that the official summary prints, with the other mean added on a line of its own."""
    by_task: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for line in lines:
        by_task.setdefault(line["tag"], []).append(line["correct"])
        seen = by_prompt.get(line["metadata"], False)
        by_prompt[line["metadata"]] = seen or line["correct"]
    if not lines:
        return "Summary\n=======\nTotal images: 0\n"
    correct = [line["correct"] for line in lines]
    shares = {t: sum(c) / len(c) for t, c in by_task.items()}
    tasks = [t for t in TASKS if t in by_task] + [t for t in by_task if t not in TASKS]
    text = [
        "Summary",
        "=======",
        f"Total images: {len(lines)}",
        f"Total prompts: {len(by_prompt)}",
        f"% correct images: {sum(correct) / len(correct):.2%}",
        f"% correct prompts: {sum(by_prompt.values()) / len(by_prompt):.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{t:<16} = {shares[t]:.2%} ({sum(by_task[t])} / {len(by_task[t])})" for t in tasks),
        "",
        f"Overall score (avg. over tasks): {sum(shares.values()) / len(shares):.5f}",
        f"Overall score (avg. over samples): {sum(correct) / len(correct):.5f}",
    ]
    return "\n".join(text) + "\n"


def read_official(path: Path, entries: Sequence[Entry]) -> Iterator[tuple[Entry, int, Json]]:
    """Judgements from the official evaluator's results, matched by metadata, never by position.

    Raises:
        BenchError: Naming the line, if it is of another version of the prompts.
    """
    places = {json.dumps(record_of(e), sort_keys=True): e for e in entries}
    seen: dict[str, int] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            record = row["metadata"]
            record = json.loads(record) if isinstance(record, str) else record
            correct = row["correct"]
        except (KeyError, ValueError) as error:
            raise BenchError(
                f"{path}, line {number}: no row of the official evaluator: {error!r}"
            ) from error
        entry = places.get(json.dumps(record, sort_keys=True))
        if entry is None or not isinstance(correct, bool | int):
            raise BenchError(
                f"{path}, line {number}: {row.get('prompt')!r} is none of the {counted(len(entries), 'prompt')}, or "
                "of another version of the benchmark"
            )
        sample = seen.get(entry.key, 0)
        seen[entry.key] = sample + 1
        judgement = {"correct": bool(correct), "reason": row.get("reason", "")}
        yield entry, sample, {**judgement, "details": row.get("details", "{}")}


def _reference(
    model: str, overall: float, *tasks: float, source: str, **settings: Any
) -> Reference:
    values = {OVERALL: 100 * overall} | {t: 100 * v for t, v in zip(TASKS, tasks, strict=False)}
    return Reference(model, values, source, settings, "official detector")


REFERENCES = (
    _reference("SD 1.5", 0.43, 0.97, 0.38, 0.35, 0.76, 0.04, 0.06, source="geneval's README"),
    _reference("SD 2.1", 0.50, source="geneval's README"),
    _reference("SDXL", 0.55, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23, source="geneval's README"),
    _reference("IF-XL", 0.61, source="geneval's README"),
    _reference(
        "SD3.5-M", 0.63, 0.98, 0.78, 0.50, 0.81, 0.24, 0.52,
        source="Flow-GRPO, arXiv:2505.05470", num_steps=40, guidance_scale=4.5, height=512, width=512,
    ),
    _reference(
        "SD3.5-M + Flow-GRPO", 0.95, 1.00, 0.99, 0.95, 0.92, 0.99, 0.86,
        source="Flow-GRPO, arXiv:2505.05470", num_steps=40, guidance_scale=4.5, height=512, width=512,
    ),
    _reference(
        "SD3.5-M without guidance", 0.24,
        source="DiffusionNFT, arXiv:2509.16117", num_steps=40, guidance_scale=1.0, height=512, width=512,
    ),
    _reference("SD3.5-L", 0.71, source="Flow-GRPO, arXiv:2505.05470"),
    _reference(
        "FLUX.1-dev", 0.66, 0.98, 0.81, 0.74, 0.79, 0.22, 0.45, source="Flow-GRPO, arXiv:2505.05470"
    ),
)  # fmt: skip
