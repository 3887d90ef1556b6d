"""Makes the images of a benchmark: resumable at any moment, by any number of processes.

The noise of an image depends on (seed, prompt id, sample) alone. Images are made in batches that
are the same for any number of processes and for a resumed run, so that the pictures are the same to
the last bit; a process that is killed loses the batch that it was working on, and nothing else.
"""

import inspect
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from flowgrpo.bench.base import BenchError, Benchmark, Entry, Picture
from flowgrpo.bench.files import read_json, refuse_changes, write_atomically, write_json
from flowgrpo.bench.models import Subject, call_settings, sampler_settings, versions
from flowgrpo.bench.pictures import Finder, check_whole, header_size, is_whole
from flowgrpo.bench.progress import Progress
from flowgrpo.bench.videos import encode_mp4
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.secrets import redact_command
from flowgrpo.data.pictures import encode_png
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.arguments import call_key

SETTINGS = "generation.json"
SEED_RULE = "flowgrpo.core.random.Random(seed).at('bench', prompt id, sample)"
PENDING = 4
"""Batches that may wait to be written while the next one is sampled."""
WAIT = 600.0
"""Seconds that a process waits for the first one to write the settings."""


@dataclass(frozen=True)
class Item:
    """One image to be made."""

    entry: Entry
    sample: int
    path: Path


@dataclass(frozen=True)
class Plan:
    """The images to generate into a benchmark folder.

    Attributes:
        folder: The benchmark folder.
        benchmark: Says the layout.
        entries: The prompts, all or a part of the benchmark's.
        subject: The model.
        seed: For the noise.
        batch: Images in one call of the pipeline.
        rank: This process, of ``num_ranks``.
        num_ranks: Each process takes every ``num_ranks``-th batch.
    """

    folder: Path
    benchmark: Benchmark
    entries: Sequence[Entry]
    subject: Subject
    seed: int = 0
    batch: int = 16
    rank: int = 0
    num_ranks: int = 1

    @property
    def images(self) -> Path:
        """The root of the images."""
        return self.folder / self.benchmark.root(self.subject.label)

    def items(self) -> list[list[Item]]:
        """All images in batches; each holds prompts that can share a call of the pipeline."""
        alike: dict[Any, list[Item]] = {}
        for entry in self.entries:
            for sample in range(self.benchmark.samples):
                name = self.benchmark.files(entry, sample)[0]
                item = Item(entry, sample, self.images / name)
                alike.setdefault(call_key(entry.prompt), []).append(item)
        return [
            items[start : start + self.batch]
            for items in alike.values()
            for start in range(0, len(items), self.batch)
        ]


def generate(plan: Plan) -> None:
    """Make the images that are missing. The folder must be locked.

    Raises:
        BenchError: If the folder was made with other settings, holds a damaged image, or the disk
            is full.
    """
    mine = [b for i, b in enumerate(plan.items()) if i % plan.num_ranks == plan.rank]
    policy: PipelinePolicy | None = None
    try:
        identity = plan.subject.identity()
    except BenchError:
        policy = plan.subject.load()  # downloads it
        identity = plan.subject.identity()
    settings = settings_of(plan, identity)
    check_settings(plan, settings)
    total = sum(map(len, mine))
    todo = sum(not i.path.exists() for batch in mine for i in batch)
    check_existing(plan, [i for batch in mine for i in batch if i.path.exists()])
    if not todo:
        return
    policy = policy or plan.subject.load()
    record_sampler(plan, policy)
    title = "videos" if plan.benchmark.video_fps else "images"
    if plan.num_ranks > 1:
        title += f" (process {plan.rank})"
    progress = Progress(title, total, total - todo)
    make_missing(plan, policy, mine, progress)
    seconds = progress.close()
    if plan.rank == 0:
        table = read_json(plan.folder / SETTINGS)
        table["speed"] = {"images": todo, "seconds": round(seconds, 3)}
        write_json(plan.folder / SETTINGS, table)


def make_missing(
    plan: Plan,
    policy: PipelinePolicy,
    batches: Sequence[Sequence[Item]],
    progress: Progress,
    check: Callable[[], None] = lambda: None,
    once: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> None:
    """Make the images of some of a plan's batches that are not there yet, with their text files.

    Args:
        plan: The plan.
        policy: The model.
        batches: Batches of the plan.
        progress: Counts images.
        check: Called before each batch; what it raises ends the work.
        once: Does the work on files in one of several processes that compute the images together, and
            returns its result in all of them.

    Raises:
        BenchError: If an image cannot be written, or the pipeline makes videos.
    """
    missing = once(lambda: _prepared(plan, batches))
    with Writer(plan.benchmark.video_fps) as writer:
        for batch, rows in zip(batches, missing, strict=True):
            if rows:
                check()
                # The whole batch, although some of it may be there: its composition decides the
                # last bits of floating-point arithmetic.
                media = sample(policy, plan, batch)
                once(partial(writer.put, [(batch[row].path, media[row]) for row in rows]))
                progress.step(len(rows))


def _prepared(plan: Plan, batches: Sequence[Sequence[Item]]) -> list[list[int]]:
    """Write the text files of missing images; which images of each batch are missing."""
    missing = [[n for n, item in enumerate(b) if not item.path.exists()] for b in batches]
    absent = [b[n] for b, rows in zip(batches, missing, strict=True) for n in rows]
    write_sidecars(plan, [item.entry for item in absent])
    return missing


def sample(
    policy: PipelinePolicy, plan: Plan, batch: Sequence[Item]
) -> Float[Tensor, "batch *frames 3 height width"]:
    """The images of one batch, in [0, 1]; videos have another axis, frames, after the first.

    Raises:
        BenchError: If the pipeline makes videos and the benchmark is about images, or the reverse.
    """
    streams = [Random(plan.seed).at("bench", i.entry.key, i.sample) for i in batch]
    sampling = plan.subject.sampling
    prompts = [in_ratio(policy, i.entry.prompt, sampling) for i in batch]
    media = policy.images(prompts, SampleNoise(streams), sampling)
    made, wanted = media.ndim == 5, plan.benchmark.video_fps > 0
    if made != wanted:
        names = ("images", "videos")
        raise BenchError(
            f"{type(policy.pipeline).__name__} makes {names[made]}, and {plan.benchmark.name} is about "
            f"{names[wanted]}"
        )
    return media


def in_ratio(policy: PipelinePolicy, prompt: Prompt, sampling: Sampling) -> Prompt:
    """A prompt with the sides of its image, where a pipeline scales the sides it is given to an area.

    FLUX Kontext makes squares otherwise, which a judge would see stretched to the size of the source.
    A size that is given is kept, and so is the size that another pipeline chooses.
    """
    call = inspect.signature(inspect.unwrap(type(policy.pipeline).__call__)).parameters
    sides = (sampling.height, sampling.width, prompt.height, prompt.width)
    if not prompt.images or "max_area" not in call or any(s is not None for s in sides):
        return prompt
    image = prompt.open_images()[0]
    area = sampling.call.get("max_area", call["max_area"].default)
    return replace(
        prompt, height=image.height, width=image.width, call={**prompt.call, "max_area": area}
    )


def settings_of(plan: Plan, identity: Any) -> dict[str, Any]:
    """Everything that decides the images, in a form that JSON holds."""
    data = plan.benchmark.data()
    return {
        "benchmark": plan.benchmark.name,
        "data_sha256": data.sha256,
        "samples": plan.benchmark.samples,
        **{k: v for k, v in identity.items() if k != "adapters"},
        "adapters": identity.get("adapters", []),
        "call": call_settings(plan.subject.sampling),
        "dtype": plan.subject.dtype,
        "seed": plan.seed,
        "seed_rule": SEED_RULE,
        "label": plan.subject.label,
        **({"fps": plan.benchmark.video_fps} if plan.benchmark.video_fps else {}),
    }


def check_settings(plan: Plan, settings: dict[str, Any]) -> None:
    """Compare the settings with the folder's, or store them in a new folder.

    Raises:
        BenchError: If they differ, or the first process does not store them.
    """
    path = plan.folder / SETTINGS
    deadline = time.monotonic() + WAIT
    while plan.rank and not path.exists():
        if time.monotonic() > deadline:
            raise BenchError(f"the first process has not written {path} for {WAIT:g} s")
        time.sleep(0.1)
    if path.exists():
        kept = read_json(path).get("settings", {})
        refuse_changes(path, _flat(kept), _flat(settings), ignored=("call",))
        return
    if any(item.path.exists() for batch in plan.items() for item in batch):
        raise BenchError(
            f"{plan.folder} holds images but no {SETTINGS}, so the settings that they were made with are unknown: "
            "score them with 'flowgrpo bench score', or choose another --out"
        )
    command = redact_command(["flowgrpo", *sys.argv[1:]])
    table = {
        "settings": settings,
        "benchmark": made_by(plan.benchmark, plan.subject.label),
        "batch": plan.batch,
        "versions": versions(),
        "command": command,
    }
    write_json(path, table)


def made_by(benchmark: Benchmark, label: str) -> dict[str, Any]:
    """The benchmark's name and settings, from which ``bench score`` makes it again."""
    assert is_dataclass(benchmark)
    kind = type(benchmark)
    builtin = kind.__module__.startswith("flowgrpo.bench.benchmarks.")
    name = kind.__module__.rsplit(".", 1)[-1] if builtin else f"{kind.__module__}:{kind.__name__}"
    return {"name": name, "settings": asdict(benchmark), "label": label}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with each argument of the call as a key, so that an error names the argument."""
    return {**settings, **{f"call.{k}": v for k, v in settings.get("call", {}).items()}}


def record_sampler(plan: Plan, policy: PipelinePolicy) -> None:
    """Store what only a loaded pipeline knows; compare it if it is stored already."""
    found = sampler_settings(policy)
    if plan.rank:
        return
    path = plan.folder / SETTINGS
    table = read_json(path)
    if "sampler" in table:
        refuse_changes(path, table["sampler"], found)
        return
    write_json(path, {**table, "sampler": found})


def check_existing(plan: Plan, items: Sequence[Item]) -> None:
    """Refuse images that are damaged, or of another size than the others.

    Raises:
        BenchError: Naming the file.
    """
    sizes: dict[tuple[int, int], Path] = {}
    sampling = plan.subject.sampling
    given = sampling.height is not None and sampling.width is not None
    # An editing pipeline may choose the size by the image that it edits.
    fixed = all(
        i.entry.prompt.size == (None, None, None) and (given or not i.entry.prompt.images)
        for i in items
    )
    for item in items:
        check_whole(item.path)
        size = header_size(item.path)
        if size is not None and fixed:
            sizes.setdefault(size, item.path)
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise BenchError(
            f"{first} is {one[0]}x{one[1]} and {second} is {other[0]}x{other[1]}: one of them is not "
            "of this run; delete it, and it is made again"
        )


def write_sidecars(plan: Plan, entries: Sequence[Entry]) -> None:
    """Write the text files of the official layout."""
    for entry in {e.key: e for e in entries}.values():
        for name, text in plan.benchmark.sidecars(entry).items():
            if not (plan.images / name).exists():
                write_atomically(plan.images / name, text.encode())


class Writer:
    """Encodes and writes images or videos in the background. Use as a context manager."""

    def __init__(self, fps: int = 0) -> None:
        """
        Args:
            fps: Frames per second of videos.
        """
        self._fps = fps
        self._most = 1 if fps else PENDING  # a batch of videos takes gigabytes
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()

    def put(self, images: Sequence[tuple[Path, Float[Tensor, "*frames 3 height width"]]]) -> None:
        """Write images as PNG, videos as MP4, soon; waits while too many wait already.

        Raises:
            BenchError: If an earlier one could not be written.
        """
        self._pending.append(self._worker.submit(_write, list(images), self._fps))
        while len(self._pending) > self._most or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(wait=True)
        if error[0] is None:
            for future in self._pending:
                future.result()


def _write(images: Sequence[tuple[Path, Tensor]], fps: int) -> None:
    for path, image in images:
        if not bool(image.isfinite().all()):
            raise BenchError(
                f"the image for {path} holds values that are not finite: try --dtype bfloat16 or float32"
            )
        image = image.clamp(0, 1)
        write_atomically(path, encode_mp4(image, fps) if fps else encode_png(image))


def wait_for_others(plan: Plan) -> None:
    """Wait until all processes have written their images; only the first process calls it."""
    while plan.num_ranks > 1:
        if all(item.path.exists() for batch in plan.items() for item in batch):
            return
        time.sleep(0.5)


def pictures_in(
    benchmark: Benchmark, entries: Sequence[Entry], images: Path
) -> tuple[list[Picture], list[tuple[Entry, int]]]:
    """The images of a folder, and those that are missing."""
    found, missing, finder = [], [], Finder(images)
    for entry in entries:
        for number in range(benchmark.samples):
            path = finder.find(benchmark.files(entry, number))
            if path is None:
                missing.append((entry, number))
            else:
                found.append(Picture(entry, number, path))
    return found, missing


__all__ = [
    "Item",
    "Plan",
    "Writer",
    "generate",
    "is_whole",
    "pictures_in",
    "wait_for_others",
]
