"""Judges a folder of images; every judgement is written as soon as it is made.

Judgements of one judge go to ``scores/<judge>-<fingerprint>.jsonl``. Another judge, or the same one
with other settings, writes another file, so judgements never mix. A picture is judged again only if
its file changed or its judgement failed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgrpo.bench.base import (
    BenchError,
    Benchmark,
    Entry,
    Failure,
    Json,
    Judge,
    Picture,
    Result,
)
from flowgrpo.bench.files import Log, fingerprint, sha256
from flowgrpo.bench.models import label_of
from flowgrpo.bench.progress import Progress

FORMAT = 1
FAILURES_IN_A_ROW = 20
"""After so many failures and no success in between, the judge is taken to be broken."""
LOOK_AGAIN = 60.0
"""Seconds between two checks of the judge's version."""


@dataclass
class Scores:
    """The judgements of a benchmark's images.

    Attributes:
        entries: The prompts that were asked for.
        judgements: By prompt id, then by sample.
        failed: Reasons, by prompt id and sample.
        missing: Images that are not there.
        title: The judge's title.
        identity: The judge's identity.
        version: The judge's version; empty if unknown.
        notes: Differences from the official judge.
        files: The images that were judged, by prompt id and sample.
    """

    entries: Sequence[Entry]
    judgements: dict[str, dict[int, Json]] = field(default_factory=dict)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    missing: Sequence[tuple[Entry, int]] = ()
    title: str = ""
    identity: Json = field(default_factory=dict)
    version: str = ""
    notes: Sequence[str] = ()
    files: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def judged(self) -> int:
        """Number of judged images."""
        return sum(map(len, self.judgements.values()))

    def by_entry(self) -> dict[str, list[Json]]:
        """The judgements of each prompt, in the order of its samples."""
        return {k: [v[s] for s in sorted(v)] for k, v in self.judgements.items()}

    def results(self, samples: int) -> list[Result]:
        """Every image of every prompt with its judgement, if there is one."""
        return [
            Result(e, s, self.files.get((e.key, s), ""), self.judgements.get(e.key, {}).get(s))
            for e in self.entries
            for s in range(samples)
        ]


def score(
    out: Path,
    benchmark: Benchmark,
    judge: Judge,
    entries: Sequence[Entry],
    pictures: Sequence[Picture],
    missing: Sequence[tuple[Entry, int]] = (),
    say: Callable[[str], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Scores:
    """Judge the pictures that have no judgement yet. ``out`` must be locked.

    Args:
        out: The benchmark folder.
        benchmark: The benchmark.
        judge: The judge.
        entries: The prompts that were asked for.
        pictures: Their images.
        missing: Images that are not there.
        say: Prints a line of progress; by default on standard error.
        check: Called after each judgement; what it raises ends the work.

    Raises:
        BenchError: If the judge changes or keeps failing, or the disk is full. Judgements made
            before are kept.
    """
    identity = dict(judge.identity())
    log = Log(score_file(out, judge.title, identity), header_of(benchmark, judge.title, identity))
    try:
        hashes = {_key(p): sha256(p.path) for p in pictures}
        known = {
            (r["key"], r["sample"]): r
            for r in log.records
            if "key" in r and hashes.get((r["key"], r["sample"])) == r["sha256"]
        }
        version = _same_version(log, judge)
        todo = [p for p in pictures if "judgement" not in known.get(_key(p), {})]
        progress = Progress("judged", len(pictures), len(pictures) - len(todo), say)
        for picture, outcome in _watched(judge, version, todo, progress):
            record = _record(picture, hashes[_key(picture)], outcome)
            log.append(record)
            known[_key(picture)] = record
            check()
        progress.close()
    finally:
        log.close()
    scores = Scores(
        entries,
        missing=missing,
        title=judge.title,
        identity=identity,
        version=version,
        notes=tuple(judge.notes),
    )
    return _collect(scores, pictures, known)


def _record(picture: Picture, sha256: str, outcome: Json | Failure) -> dict[str, Any]:
    """A line of the judge's file."""
    kept = (
        {"failed": outcome.reason} if isinstance(outcome, Failure) else {"judgement": dict(outcome)}
    )
    return {"key": picture.entry.key, "sample": picture.sample, "sha256": sha256, **kept}


def _watched(
    judge: Judge, version: str, todo: Sequence[Picture], progress: Progress
) -> Iterator[tuple[Picture, Json | Failure]]:
    """The judgements, while the judge stays the same and does not keep failing."""
    row, failures, looked = 0, 0, time.monotonic()
    stream = judge.judge(iter(todo))
    for picture, outcome in stream:
        yield picture, outcome
        failed = isinstance(outcome, Failure)
        row, failures = (row + 1 if failed else 0), failures + failed
        progress.step(note=f"{failures} failed" if failures else "")
        if row >= FAILURES_IN_A_ROW and isinstance(outcome, Failure):
            _close(stream)
            raise BenchError(
                f"{row} judgements in a row failed, the last one because: {outcome.reason}. Mend the "
                "judge and run the same command again; nothing is judged twice"
            )
        if time.monotonic() - looked > LOOK_AGAIN:
            looked = time.monotonic()
            now = judge.version()
            if version and now and now != version:
                _close(stream)
                raise BenchError(_changed(version, now))


def _same_version(log: Log, judge: Judge) -> str:
    """The judge's version, which is stored when it is first known.

    Raises:
        BenchError: If an earlier part was judged by another version.
    """
    before = next((r["version"] for r in reversed(log.records) if "version" in r), "")
    now = judge.version()
    if before and now and before != now:
        raise BenchError(f"{_changed(before, now)}; to begin anew with it, move {log.path} away")
    if now and not before:
        log.append({"version": now})
    return now or before


def _changed(before: str, now: str) -> str:
    return (
        f"the judge changed from {before!r} to {now!r}: judgements of both must not be mixed. Those "
        "already made are kept"
    )


def _close(stream: Iterator[Any]) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        with contextlib.suppress(RuntimeError):
            close()


def score_file(out: Path, title: str, identity: Json) -> Path:
    """The file of a judge's judgements."""
    return out / "scores" / f"{label_of(title.lower())}-{fingerprint(identity)}.jsonl"


def header_of(benchmark: Benchmark, title: str, identity: Json) -> dict[str, Any]:
    """The first line of a judge's file."""
    return {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "data_sha256": benchmark.data().sha256,
        "judge": title,
        "identity": dict(identity),
    }


def _key(picture: Picture) -> tuple[str, int]:
    return picture.entry.key, picture.sample


def _collect(
    scores: Scores,
    pictures: Sequence[Picture],
    known: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Scores:
    for picture in pictures:
        key = _key(picture)
        scores.files[key] = str(picture.path)
        record = known.get(key, {"failed": "not judged"})
        if "judgement" in record:
            scores.judgements.setdefault(key[0], {})[key[1]] = record["judgement"]
        else:
            scores.failed[key] = record["failed"]
    return scores


def check_sidecars(benchmark: Benchmark, entries: Sequence[Entry], images: Path) -> None:
    """Refuse a folder whose metadata are of another version of the benchmark.

    Raises:
        BenchError: Naming the file.
    """
    import json

    for entry in entries:
        for name, wanted in benchmark.sidecars(entry).items():
            path = images / name
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            try:
                same = json.loads(text) == json.loads(wanted)
            except ValueError:
                same = text.strip() == wanted.strip()
            if not same:
                raise BenchError(
                    f"{path} is not of this version of {benchmark.name}: it says {text.strip()[:120]!r} "
                    f"where prompt {entry.key} is {entry.prompt.text!r}"
                )
