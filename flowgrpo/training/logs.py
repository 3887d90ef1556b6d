"""The logs of a run: files of one JSON object per line, whose lines a checkpoint counts."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowgrpo.core.text import counted
from flowgrpo.data import files

OnLog = Callable[[str, Mapping[str, Any]], None]
"""A user's function of the name of a log and of a record of it."""
NAMES = ("metrics", "timings", "evaluations")
REPRODUCIBLE = ("metrics", "evaluations")
"""Logs that are equal in every repetition of a run; checksums of the others would not be."""


class LogError(RuntimeError):
    """Log lines that a checkpoint counts are lost or broken."""


class Logs:
    """Appends to the logs, and cuts them to the lines that a checkpoint counts."""

    def __init__(self, folder: Path):
        """The logs of a run directory; nothing is read or written."""
        self.folder = folder

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record to a log."""
        files.append(self._file(name), record)

    def read(self, name: str) -> list[Mapping[str, Any]]:
        """All records of a log."""
        return [json.loads(line) for line in self._lines(name)]

    def counts(self) -> dict[str, int]:
        """The number of lines of each log, all of which are on the disk when this returns."""
        for name in NAMES:
            if self._file(name).exists():
                files.sync(self._file(name))
        files.sync(self.folder)
        return {name: len(self._lines(name)) for name in NAMES}

    def digests(self, counts: Mapping[str, int]) -> dict[str, str]:
        """The SHA-256 of the first lines of each reproducible log, as many as ``counts`` says."""
        found = {n: self._lines(n)[:number] for n, number in counts.items() if n in REPRODUCIBLE}
        return {name: _digest(lines) for name, lines in found.items()}

    def check(self, counts: Mapping[str, int], digests: Mapping[str, str], source: str) -> None:
        """Check that the lines that a checkpoint counts are there and are the same.

        Args:
            counts: Lines by log, as :meth:`counts` returned them.
            digests: The SHA-256 of these lines by log; logs that it lacks are only read.
            source: The checkpoint, for the message.

        Raises:
            LogError: With the file and the line.
        """
        advice = f"restore the file, or delete {source} to go back to an earlier checkpoint"
        for name, number in counts.items():
            lines = self._lines(name)
            if len(lines) < number:
                raise LogError(
                    f"{self._file(name)} has {counted(len(lines), 'line')}, but {source} was written after {number}: "
                    f"lines are lost; {advice}"
                )
            for row, line in enumerate(lines[:number], 1):
                if not _is_object(line):
                    raise LogError(f"{self._file(name)}, line {row} is broken; {advice}")
            if name in digests and digests[name] != _digest(lines[:number]):
                raise LogError(
                    f"{self._file(name)}: one of its first {counted(number, 'line')} is not what was logged (the SHA-256 "
                    f"of {source} differs); {advice}"
                )

    def cut(self, counts: Mapping[str, int]) -> None:
        """Remove the lines after those of a checkpoint; the iterations are repeated and log them again."""
        for name in NAMES:
            lines, number = self._lines(name), counts.get(name, 0)
            file = self._file(name)
            if file.exists() and (len(lines) > number or not _ends_with_line(file)):
                files.write_whole(file, "".join(f"{line}\n" for line in lines[:number]))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def _lines(self, name: str) -> list[str]:
        file = self._file(name)
        text = file.read_bytes().decode("utf-8", errors="replace") if file.exists() else ""
        # Not splitlines, which also splits at characters that JSON strings may contain.
        return text.removesuffix("\n").split("\n") if text else []


def _ends_with_line(file: Path) -> bool:
    content = file.read_bytes()
    return not content or content.endswith(b"\n")


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
