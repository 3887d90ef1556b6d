"""Which tests execute which lines: a plugin of pytest for :mod:`benchmarks.mutation_runs`."""

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest


class ExecutedLines:
    """Writes the seconds of each test and the lines that it executes, its fixtures included.

    Lines that run in another process are not seen. A fixture that several tests share is counted for the
    first of them only. The file maps the id of a test to
    ``{"seconds": s, "failed": bool, "lines": {path: [line, ...]}}``.

    Args:
        root: The folder that paths are relative to.
        sources: The files whose lines are recorded.
        file: The JSON file, for :meth:`write`.
    """

    def __init__(self, root: Path, sources: Sequence[Path], file: Path):
        self.names = {str(path): str(path.relative_to(root)) for path in sources}
        self.file = file
        self.lines: dict[str, set[int]] = {}
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.lines = defaultdict(set)
        sys.settrace(self._call)
        threading.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            lines = {path: sorted(own) for path, own in self.lines.items()}
            self._test(item.nodeid)["lines"] = lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._test(report.nodeid)
        test["seconds"] += report.duration
        test["failed"] |= report.failed

    def write(self) -> None:
        """Write the file."""
        self.file.write_text(json.dumps(self.tests))

    def _test(self, name: str) -> dict[str, Any]:
        return self.tests.setdefault(name, {"seconds": 0.0, "failed": False, "lines": {}})

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Trace the functions of the sources line by line, and no others."""
        name = self.names.get(frame.f_code.co_filename)
        if name is None:
            return None
        lines = self.lines[name]
        lines.add(frame.f_lineno)

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        return line


def _tests(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return found


def failed(file: Path) -> list[str]:
    """The tests that failed while their lines were recorded."""
    return [name for name, one in _tests(file).items() if one["failed"]]


def tests_of(file: Path, path: str, lines: range) -> list[str]:
    """The tests that execute one of the lines of a source file, the fastest first."""
    tests = _tests(file)
    found = [name for name, one in tests.items() if set(lines) & set(one["lines"].get(path, ()))]
    return sorted(found, key=lambda name: tests[name]["seconds"])


def seconds_of(file: Path, names: Sequence[str]) -> float:
    """The seconds that tests took together while their lines were recorded."""
    tests = _tests(file)
    return float(sum(tests[name]["seconds"] for name in names))


def by_file(file: Path, names: Sequence[str]) -> list[str]:
    """Tests in the order of their files, those first whose tests take the least time.

    Fixtures that the tests of a file share are made once then.
    """
    tests = _tests(file)
    times: dict[str, float] = defaultdict(float)
    for name in names:
        times[name.split("::")[0]] += tests[name]["seconds"]
    return sorted(names, key=lambda n: (times[n.split("::")[0]], n.split("::")[0]))
