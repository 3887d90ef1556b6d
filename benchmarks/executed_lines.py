"""Which tests execute which lines, and how to run only these: plugins of pytest for :mod:`benchmarks.mutations`."""

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest


class ExecutedLines:
    """Writes the seconds of each test and the lines that it executes, its fixtures included.

    Lines that run in another process are not seen. A fixture that several tests share is counted for the
    first of them only. The file holds ``{"tests": {id: {"seconds": s, "failed": bool, "lines": {path: [line,
    ...]}}}, "modules": [name, ...]}``; the modules are those that the tests have imported.

    Args:
        root: The folder that paths are relative to.
        sources: The files whose lines are recorded.
        file: The JSON file, written at the end of the session.
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

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps({"tests": self.tests, "modules": list(sys.modules)}))

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


class Selected:
    """Leaves tests out; ``only`` names those that stay, in the order in which they run."""

    def __init__(self, only: Sequence[str] | None = None, without: Collection[str] = ()):
        self.only, self.without = only, without

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.without]
        if self.only is not None:
            by_name = {item.nodeid: item for item in items}
            items[:] = [by_name[name] for name in self.only if name in by_name]


def _tests(file: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())["tests"]
    return found


def modules_of(file: Path) -> list[str]:
    """The modules that the tests have imported, in the order of their imports."""
    return list(json.loads(file.read_text())["modules"])


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
