"""A whole benchmark: generation, judging, results. What the command line and Python code call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import BenchError, Benchmark, Entry, Judge, Picture, select
from flowgrpo.bench.files import locked, read_json, write_json
from flowgrpo.bench.generation import SETTINGS, Plan, generate, pictures_in, wait_for_others
from flowgrpo.bench.page import NUM_THUMBNAILS, write_html
from flowgrpo.bench.report import FILE, write_results
from flowgrpo.bench.scoring import Scores, check_sidecars, score
from flowgrpo.core.text import counted


@dataclass(frozen=True)
class Part:
    """Which part of a benchmark: at most ``limit`` prompts, and only those of some dimensions."""

    limit: int | None = None
    dimensions: Sequence[str] = ()

    def of(self, benchmark: Benchmark) -> Sequence[Entry]:
        """The prompts. Raises ValueError for an unknown dimension."""
        return select(benchmark.entries(), self.limit, self.dimensions)


def generate_folder(plan: Plan) -> None:
    """Make all images of a plan.

    Raises:
        BenchError: If another process works on the folder, or see :func:`.generation.generate`.
    """
    with locked(plan.folder):
        generate(plan)
        if plan.rank == 0:
            wait_for_others(plan)
            plan.benchmark.assemble(plan.images, plan.entries)


def score_folder(
    out: Path,
    benchmark: Benchmark,
    part: Part,
    label: str,
    images: Path | None = None,
    allow_missing: bool = False,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Judge the images of a folder and write results.

    Args:
        out: Where results go; a folder of ours, or any folder for images made elsewhere.
        benchmark: The benchmark that the images were made for.
        part: Which prompts.
        label: Names the model.
        images: The root of the images, if they were made elsewhere.
        allow_missing: Whether to score although images are missing.
        judge: The judge, if it is loaded already.

    Returns:
        The content of ``bench.json``.

    Raises:
        BenchError: If images are missing or of another benchmark, or the judge cannot be used.
    """
    entries = part.of(benchmark)
    root = images if images is not None else out / benchmark.root(label)
    with locked(out):
        check_sidecars(benchmark, entries, root)
        pictures, missing = pictures_in(benchmark, entries, root)
        require_complete(benchmark, root, pictures, missing, allow_missing)
        judge = judge or benchmark.judge()
        scores = score(out, benchmark, judge, entries, pictures, missing)
        return finish(out, benchmark, scores, label)


def require_complete(
    benchmark: Benchmark,
    root: Path,
    pictures: Sequence[Picture],
    missing: Sequence[tuple[Entry, int]],
    allow_missing: bool,
) -> None:
    """Raise BenchError if images are missing, unless that is allowed; always if all are."""
    if not missing or (allow_missing and pictures):
        return
    first = benchmark.files(*missing[0])[0]
    if not pictures:
        raise BenchError(
            f"{root} holds no image of {benchmark.name}: the first would be {first}. Is it the folder of "
            "another benchmark?"
        )
    verb = "is" if len(missing) == 1 else "are"
    raise BenchError(
        f"{len(missing)} of {counted(len(missing) + len(pictures), 'image')} {verb} missing in {root}, the first is "
        f"{first}: make them with 'flowgrpo bench generate', choose a part with --limit or --dimension, "
        "or accept it with --allow-missing"
    )


def import_results(
    out: Path, benchmark: Benchmark, file: Path, label: str, judge: str = "official evaluator"
) -> dict[str, Any]:
    """Summarise the results file of an official evaluator.

    Raises:
        BenchError: If the benchmark reads none, or the file is of another version.
    """
    read = getattr(benchmark, "read_results", None)
    if read is None:
        raise BenchError(f"{benchmark.name} reads no results of an official evaluator")
    entries = benchmark.entries()
    scores = Scores(entries, title=judge, identity={"judge": judge})
    for entry, sample, judgement in read(file):
        scores.judgements.setdefault(entry.key, {})[sample] = judgement
    present = {(k, s) for k, v in scores.judgements.items() for s in v}
    scores.missing = [
        (e, s) for e in entries for s in range(benchmark.samples) if (e.key, s) not in present
    ]
    with locked(out):
        return finish(out, benchmark, scores, label)


def finish(out: Path, benchmark: Benchmark, scores: Scores, label: str) -> dict[str, Any]:
    """Write results and the page."""
    result = write_results(out, benchmark, scores, label, len(benchmark.entries()))
    result["examples"] = _examples(out, scores)
    write_json(out / FILE, result)
    write_html([out], out / "report.html")
    return result


def _examples(out: Path, scores: Scores) -> list[dict[str, str]]:
    """Images for the page, spread over the prompts."""
    chosen = [(e, scores.files.get((e.key, 0))) for e in scores.entries]
    there = [(e, f) for e, f in chosen if f is not None]
    step = max(1, len(there) // NUM_THUMBNAILS)
    return [
        {"file": str(Path(f).resolve()), "prompt": e.prompt.text}
        for e, f in there[::step][:NUM_THUMBNAILS]
    ]


def stored(folder: Path) -> dict[str, Any] | None:
    """The benchmark that a folder of ours was made for: name, settings, label; None for others."""
    path = folder / SETTINGS
    return read_json(path)["benchmark"] if path.exists() else None
