"""Which tests execute which lines: a plugin of pytest for :mod:`benchmarks.mutation_runs`."""

import ast
import json
from collections import defaultdict
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowgrpo.data import strict_json

NOTE = "__note_execution__"
"""The built-in function that marked code calls."""


class ExecutedLines:
    """Writes the seconds of each test and the lines that it executes, its fixtures included.

    Lines are noted by code that :meth:`marked` adds, which costs little; tracing would double the time of
    all other code. Lines that run in another process are not seen. A fixture that several tests share is
    counted for the first of them only. The file maps the id of a test to
    ``{"seconds": s, "failed": bool, "lines": {path: [line, ...]}}``.

    Args:
        file: The JSON file, for :meth:`write`.
    """

    def __init__(self, file: Path):
        self.file = file
        self.statements: list[tuple[str, range]] = []
        self.executed: set[int] = set()
        self.tests: dict[str, dict[str, Any]] = {}

    def marked(self, path: str, source: str) -> ast.Module:
        """A module whose functions note which of their statements run.

        Args:
            path: Name of the module in the results.
            source: Its text.
        """
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = self._marked(path, node.body)
        return ast.fix_missing_locations(tree)

    def _marked(self, path: str, body: list[ast.stmt]) -> list[ast.stmt]:
        """Statements with a call before each; functions inside have their own turn."""
        found: list[ast.stmt] = []
        for index, statement in enumerate(body):
            inner = [getattr(statement, name, None) for name in ("body", "orelse", "finalbody")]
            is_plain = not any(inner) or isinstance(
                statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            )
            last = statement.end_lineno if is_plain else inner[0][0].lineno - 1  # type: ignore[index]
            lines = range(statement.lineno, max(last or 0, statement.lineno) + 1)
            if not is_plain:
                for name in ("body", "orelse", "finalbody"):
                    if getattr(statement, name, None):
                        setattr(statement, name, self._marked(path, getattr(statement, name)))
                for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                    part.body = self._marked(path, part.body)
            is_docstring = index == 0 and isinstance(
                getattr(statement, "value", None), ast.Constant
            )
            if not is_docstring:
                number = ast.Constant(len(self.statements))
                self.statements.append((path, lines))
                call = ast.Expr(ast.Call(ast.Name(NOTE, ast.Load()), [number], []))
                found.append(ast.copy_location(call, statement))
            found.append(statement)
        return found

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.executed.clear()
        try:
            return (yield)
        finally:
            lines: dict[str, set[int]] = defaultdict(set)
            for number in sorted(self.executed):
                path, own = self.statements[number]
                lines[path].update(own)
            self._test(item.nodeid)["lines"] = {p: sorted(own) for p, own in lines.items()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._test(report.nodeid)
        test["seconds"] += report.duration
        test["failed"] |= report.failed

    def write(self) -> None:
        """Write the file."""
        self.file.write_text(strict_json.dumps(self.tests))

    def _test(self, name: str) -> dict[str, Any]:
        return self.tests.setdefault(name, {"seconds": 0.0, "failed": False, "lines": {}})


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
