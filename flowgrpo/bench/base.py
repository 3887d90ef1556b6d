"""The parts of a benchmark: prompts, folder layout, judge and metrics.

A benchmark is a frozen dataclass; its fields are its settings. It needs no base class:
:class:`Benchmark` is a protocol, and :func:`load_benchmark` finds a benchmark by the name of its
file in ``flowgrpo/bench/benchmarks`` or by an import path ``"package.module:name"``.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

from flowgrpo.core.imports import import_path, suggest
from flowgrpo.data.prompts import Prompt

Json = Mapping[str, Any]
"""Anything that JSON can hold."""
Points = Iterable[tuple[str, float]]
"""Pairs of a dimension and a value, such as ``("counting", 1.0)``."""


class BenchError(RuntimeError):
    """Raised if a benchmark cannot continue; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One prompt of a benchmark.

    Attributes:
        key: The prompt's id in the benchmark, unique; noise and file names depend on it.
        prompt: The caption, with the metadata that the judge needs.
        dimensions: The dimensions that an image of this prompt is judged on, with repetitions: a
            binary judgement that fails for good counts as wrong on each of them in the strict score.
        stratum: Prompts are resampled within strata; empty for none.
    """

    key: str
    prompt: Prompt
    dimensions: tuple[str, ...] = ()
    stratum: str = ""


@dataclass(frozen=True)
class Picture:
    """One image of a benchmark: sample ``sample`` of a prompt, in the file ``path``."""

    entry: Entry
    sample: int
    path: Path


@dataclass(frozen=True)
class Failure:
    """A picture that was not judged, and why. It is judged again when scoring is resumed."""

    reason: str


Judged = tuple[Picture, Json | Failure]


@runtime_checkable
class Judge(Protocol):
    """Judges pictures. Made when scoring begins, so that its weights are loaded only then."""

    @property
    def title(self) -> str:
        """The name of the judge in tables, such as ``HF detector``."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the official judge, printed with the results."""
        ...

    def identity(self) -> Json:
        """Everything on this side that decides the judgements: model, settings, wording."""
        ...

    def version(self) -> str:
        """The version of the model or server that answers; empty if unknown.

        Asked again while pictures are judged: a change ends the benchmark.
        """
        ...

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """Judgements in any order, each as soon as it is made. ``pictures`` is read lazily."""
        ...


@dataclass(frozen=True)
class Metric:
    """A number in the summary: the mean over ``parts`` of the mean over a part's points.

    Attributes:
        name: Such as ``overall (mean over tasks)``.
        parts: Each part is a set of dimensions whose points are averaged together. One part gives
            the mean over points; several parts give the unweighted mean of their means.
        weights: One weight for each part, for the weighted mean of their means. A metric with
            weights has no value unless each of its parts has points.
        headline: Whether it is a main result.
        percent: Whether it is printed times 100.
        radar: Whether it is a spoke of the report's radar plot.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    headline: bool = False
    percent: bool = True
    radar: bool = False
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reference:
    """A published result.

    Attributes:
        model: Such as ``FLUX.1-dev``.
        values: Metric name -> value, in the units in which the metric is printed.
        source: Where it was published.
        settings: The sampler's settings that it was measured with, if they are known:
            ``num_steps``, ``guidance_scale``, ``height``, ``width``.
        judge: The judge's title.
    """

    model: str
    values: Mapping[str, float]
    source: str
    settings: Mapping[str, Any]
    judge: str


@dataclass(frozen=True)
class Data:
    """The file that a benchmark's prompts come from.

    Attributes:
        source: As the user named it.
        sha256: Of its bytes.
        name: The published file that it equals; empty if it is another one.
        notes: Repairs and differences from the published file, printed with the results.
    """

    source: str
    sha256: str
    name: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """The description of a benchmark in ``flowgrpo bench list``."""

    summary: str
    judge: str
    """The judge and its requirements."""
    calls: str
    """Judgements of a full run, such as ``2,212 detections``."""
    licence: str
    """Licence of the prompts and, if there are any, of the judge's weights."""
    source: str = ""
    """Where the prompts come from."""


@runtime_checkable
class Benchmark(Protocol):
    """A benchmark; its dataclass fields are its settings.

    A class that inherits from this protocol explicitly gets the methods that have a body here.
    """

    about: About

    @property
    def name(self) -> str:
        """Short name, used in paths."""
        ...

    @property
    def title(self) -> str:
        """Name in tables; the judge's title is added in parentheses."""
        ...

    @property
    def samples(self) -> int:
        """Images per prompt."""
        ...

    @property
    def task(self) -> str:
        """The task in a model card on the hub, such as ``image-to-image``."""
        return "text-to-video" if self.video_fps else "text-to-image"

    @property
    def video_fps(self) -> int:
        """Frames per second of the videos of a benchmark of videos; 0 for images."""
        return 0

    def entries(self) -> Sequence[Entry]:
        """All prompts, in the official order.

        Raises:
            BenchError: If the data is missing or is not the published file.
        """
        ...

    def data(self) -> Data:
        """The prompts' file and its hash."""
        ...

    def root(self, label: str) -> str:
        """The folder of images below a benchmark folder; ``label`` names the model."""
        return "images"

    def files(self, entry: Entry, sample: int) -> Sequence[str]:
        """Names of an image below the root: first the official one, then others that are read."""
        return (f"{entry.key}_{sample}.png",)

    def sidecars(self, entry: Entry) -> Mapping[str, str]:
        """Text files that the official layout holds for a prompt: name below the root -> content."""
        return {}

    def assemble(self, images: Path, entries: Sequence[Entry]) -> None:
        """Write the files that an official scorer needs beside the images, once all are there.

        Args:
            images: The root of the images.
            entries: The prompts that have images.
        """

    def check_judge(self) -> None:
        """Check, without loading weights, that there is a judge; called before images are made.

        Raises:
            BenchError: If the images can only be made here, not judged; says what to do.
        """

    def judge(self) -> Judge:
        """Load the judge."""
        ...

    def num_calls(self, entry: Entry) -> int:
        """Questions that a judge behind an endpoint is asked about one image, for ``--estimate``."""
        return 1

    def points(self, entry: Entry, judgements: Sequence[Json]) -> Points:
        """The points of a prompt, from the judgements of its images."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """The numbers to report, in the order of the table."""
        ...

    def references(self) -> Sequence[Reference]:
        """Published results, printed next to those of the model."""
        return ()

    def official(self, folder: Path, label: str, results: Sequence["Result"]) -> Sequence[Path]:
        """Write results in the official formats into ``folder``; returns the files."""
        return ()


@dataclass(frozen=True)
class Result:
    """A picture with its judgement; ``judgement`` is None if it failed or the image is missing."""

    entry: Entry
    sample: int
    path: str
    judgement: Json | None


def available() -> list[str]:
    """The names of the benchmarks that come with flowgrpo."""
    from flowgrpo.bench import benchmarks

    found = (m.name for m in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def benchmark_class(name: str) -> Any:
    """The class of a benchmark, by its file's name or by import path.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    if ":" in name:
        return import_path(name)
    if name not in available():
        raise ValueError(
            f"unknown benchmark {name!r}{suggest(name, available())} (known: "
            f"{', '.join(available())}; others by import path 'package.module:name')"
        )
    # Each file offers one benchmark, first in its __all__.
    module = importlib.import_module(f"flowgrpo.bench.benchmarks.{name}")
    return getattr(module, module.__all__[0])


def load_benchmark(name: str, settings: Mapping[str, Any] | None = None) -> Benchmark:
    """Make a benchmark with some settings.

    Raises:
        ValueError: If there is no such benchmark or setting; names the nearest.
    """
    kind = benchmark_class(name)
    known = [f.name for f in fields(kind)]
    for key in settings or {}:
        if key not in known:
            raise ValueError(
                f"benchmark {name!r} has no setting {key!r}{suggest(key, known)} (known: "
                f"{', '.join(known) or 'none'})"
            )
    hints = get_type_hints(kind) if settings else {}
    for key, value in (settings or {}).items():
        _check_type(f"benchmark {name!r}: {key}", value, hints[key])
    made: Benchmark = kind(**(settings or {}))
    return made


def _check_type(what: str, value: Any, hint: Any) -> None:
    """Raise ValueError if a setting is none of the allowed words, or no plain value of its type."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            allowed = [str(a) for a in get_args(hint)]
            raise ValueError(
                f"{what} must be one of {', '.join(allowed)}, got {value!r}{suggest(str(value), allowed)}"
            )
        return
    accepted: Mapping[Any, tuple[type, ...]] = {
        bool: (bool,), int: (int,), float: (int, float), str: (str,)
    }  # fmt: skip
    kinds = accepted.get(hint)
    if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool)):
        raise ValueError(f"{what} must be of type {hint.__name__}, got {value!r}")


def select(
    entries: Sequence[Entry], limit: int | None, dimensions: Sequence[str]
) -> Sequence[Entry]:
    """Part of a benchmark: the prompts with one of ``dimensions``, and ``limit`` of these.

    The limit is spread evenly over the official order, so that every task takes part.

    Raises:
        ValueError: If no prompt has one of the dimensions; names the nearest.
    """
    known = sorted({d for e in entries for d in e.dimensions})
    for wanted in dimensions:
        if wanted not in known:
            raise ValueError(
                f"no dimension {wanted!r}{suggest(wanted, known)} (known: {', '.join(known)})"
            )
    if dimensions:
        entries = [e for e in entries if set(dimensions) & set(e.dimensions)]
    if limit is None or limit >= len(entries):
        return entries
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return [entries[i * len(entries) // limit] for i in range(limit)]
