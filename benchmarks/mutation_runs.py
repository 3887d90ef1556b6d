"""Runs tests once for each mutation, in forked processes: a plugin of pytest for :mod:`benchmarks.mutations`.

The modules and the tests are imported once. Each mutation gets a process of its own, in which the code
of the functions that it changes is exchanged, so that a run takes no longer than its tests.
"""

import builtins
import gc
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from benchmarks.executed_lines import NOTE, ExecutedLines, by_file, failed, seconds_of, tests_of
from flowgrpo.data import strict_json


@dataclass(frozen=True)
class Trial:
    """A mutation to try.

    Attributes:
        path: The file, from the root.
        lines: The lines that change.
        source: The file's text.
        mutated: The text with the mutation in it.
        row: What is noted about the mutation in the results.
    """

    path: str
    lines: range
    source: str
    mutated: str
    row: Mapping[str, Any]


class MutationRuns:
    """The plugin. It takes the place of pytest's loop over the tests.

    Args:
        name: The area, for messages.
        sources: The files whose lines are recorded.
        trials: The mutations.
        folder: A copy of the repository, in whose files the mutations are made.
        results: The JSON-lines file to which a line for each mutation is appended.
        most_seconds: Time of the tests of a mutation, by the time that they take without one.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path],
        trials: Sequence[Trial],
        folder: Path,
        results: Path,
        most_seconds: float,
    ):
        self.name, self.sources, self.trials = name, sources, trials
        self.folder, self.results, self.most_seconds = folder, results, most_seconds
        self.recorded = folder / ".executed.json"
        self.items: dict[str, pytest.Item] = {}
        self.functions: dict[tuple[str, str], list[FunctionType]] = {}
        self.usual, self.noticed_by = 0.0, ""
        self.said = os.dup(1)  # pytest takes what is printed.

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the first test that fails."""
        if report.failed and not self.noticed_by:
            self.noticed_by = report.nodeid

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Record what the tests execute, then try the mutations."""
        self.items = {item.nodeid: item for item in session.items}
        self.functions = functions_of({str(source) for source in self.sources})
        # Collections in the children would copy the memory that they share with this process.
        gc.collect()
        gc.freeze()
        self._record(session)
        self._say(f"{len(self.trials)} mutations; the tests take {self.usual:.0f} s")
        for test in failed(self.recorded):
            self._say(f"left out, because it fails without any mutation: {test}")
            del self.items[test]
        # Compiled files are told apart by whole seconds and size, so every version gets its own time.
        times = itertools.count(int(time.time()) + 10)
        for trial in self.trials:
            file = self.folder / trial.path
            write_at(file, trial.mutated, next(times))
            began = time.monotonic()
            by = self._noticed_by(trial)
            write_at(file, trial.source, next(times))
            taken = round(time.monotonic() - began, 1)
            row = {**trial.row, "caught": bool(by), "by": by, "seconds": taken}
            with self.results.open("a") as stream:
                stream.write(strict_json.dumps(row) + "\n")
            if not by:
                self._say(f"survived: {trial.path}:{trial.lines.start} {row['old']!r} -> {row['new']!r}")  # fmt: skip
        return True

    def pytest_internalerror(self, excrepr: object) -> None:
        """Say what went wrong, which pytest would print to nowhere."""
        self._say(str(excrepr))

    def _say(self, text: str) -> None:
        os.write(self.said, f"{self.name}: {text}\n".encode())

    def _record(self, session: pytest.Session) -> None:
        """Run all tests once without a mutation."""
        began = time.monotonic()
        recorder = ExecutedLines(self.recorded)
        codes = {}
        for path in self.sources:
            name = str(path.relative_to(self.folder))
            marked = recorder.marked(name, path.read_text("utf-8"))
            codes[str(path)] = _functions(compile(marked, str(path), "exec", dont_inherit=True))

        def work() -> str:
            setattr(builtins, NOTE, recorder.executed.add)
            for (file, name), found in self.functions.items():
                code = codes[file].get(name)
                for function in found:
                    if code is not None and code.co_freevars == function.__code__.co_freevars:
                        function.__code__ = code
            session.config.pluginmanager.register(recorder)
            run(list(self.items.values()), lambda: False)
            recorder.write()
            return ""

        if problem := in_child(work, self.folder, 3600):
            raise SystemExit(f"{self.name}: the tests do not run without any mutation: {problem}")
        self.usual = time.monotonic() - began

    def _noticed_by(self, trial: Trial) -> str:
        """The first test that notices a mutation that is on the disk; empty if none does."""
        file = str(self.folder / trial.path)
        own = [test for test in tests_of(self.recorded, trial.path, trial.lines) if test in self.items]  # fmt: skip
        while len(own) > 1 and seconds_of(self.recorded, own) > self.most_seconds:
            own.pop()
        limit = 3 * (seconds_of(self.recorded, own) if own else self.usual) + 60
        changed = changed_code(trial.source, trial.mutated, file)
        own_functions = {name: self.functions.get((file, name), []) for name in changed or ()}
        # Functions inside of others are made when these run.
        absent = [n for n, found in own_functions.items() if not found and ".<locals>." not in n]
        if changed is None or absent:
            # Outside of functions, or in one that tests load in another way; both are rare.
            return in_new_process(self.folder, own or [*self.items], limit)
        # Lines that no test executes may run in other processes.
        items = [self.items[test] for test in by_file(self.recorded, own)] or [*self.items.values()]

        def work() -> str:
            for name, found in own_functions.items():
                for function in found:
                    function.__code__ = changed[name]
            run(items, lambda: bool(self.noticed_by))
            return self.noticed_by

        return in_child(work, self.folder, limit)


def run(items: Sequence[pytest.Item], is_enough: Callable[[], bool]) -> None:
    """Run tests, with their fixtures."""
    for index, item in enumerate(items):
        following = items[index + 1] if index + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if is_enough():
            return


def in_child(work: Callable[[], str], folder: Path, limit: float) -> str:
    """Do work in a forked process; its result, or a word for a process that did not come to its end."""
    output = folder / ".output"
    output.write_text("ended")
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            output.write_text(work())
        except BaseException:
            output.write_text(traceback.format_exc(limit=-2))
        finally:
            os._exit(0)
    began = time.monotonic()
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() - began > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "out of time"
        time.sleep(0.02)
    return output.read_text()


def in_new_process(folder: Path, tests: Sequence[str], limit: float) -> str:
    """The first of some tests that fails in a process that imports everything anew."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "out of time"
    found = [t for t in done.stdout.splitlines() if t.startswith(("FAILED", "ERROR"))]
    return "" if done.returncode == 0 else (found or [f"exit code {done.returncode}"])[0][:200]


def changed_code(source: str, mutated: str, file: str) -> dict[str, CodeType] | None:
    """The functions that a mutation changes, by their qualified names.

    None if it changes more than the bodies of functions.
    """
    before, after = (dict(_codes(compile(text, file, "exec", dont_inherit=True))) for text in (source, mutated))  # fmt: skip
    if before.keys() != after.keys():
        return None
    changed = {name: code for name, code in after.items() if not _equal(before[name], code)}
    # What changes in a function inside of another is exchanged in both.
    for name in [*changed]:
        if not before[name].co_flags & 2 or before[name].co_freevars != after[name].co_freevars:
            return None  # a class or the module itself; or the closure has other cells
        if ".<locals>." not in name and ("#" in name or f"{name}#1" in after):
            return None  # two functions of one name
        while ".<locals>." in name:
            name = name.rpartition(".<locals>.")[0]
            if name in after:
                changed[name] = after[name]
    return changed


def functions_of(files: Collection[str]) -> dict[tuple[str, str], list[FunctionType]]:
    """All functions of some files, by file and qualified name, also those that decorators have wrapped."""
    found: dict[tuple[str, str], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename in files:
            key = thing.__code__.co_filename, thing.__code__.co_qualname
            found.setdefault(key, []).append(thing)
    return found


def _functions(code: CodeType) -> dict[str, CodeType]:
    """The functions in a code object by their qualified names, without those that share a name."""
    found = dict(_codes(code))
    return {
        name: one for name, one in found.items() if f"{name}#1" not in found and "#" not in name
    }


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """A code object and all inside it; equal names are numbered."""
    numbers: dict[str, int] = {}
    stack = [code]
    while stack:
        one = stack.pop()
        number = numbers[one.co_qualname] = numbers.get(one.co_qualname, -1) + 1
        yield one.co_qualname if not number else f"{one.co_qualname}#{number}", one
        stack += [c for c in one.co_consts if isinstance(c, CodeType)]


def _equal(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects are equal, without those inside them and without their lines."""

    def essence(code: CodeType) -> tuple[Any, ...]:
        constants = [(type(c), repr(c)) for c in code.co_consts if not isinstance(c, CodeType)]
        return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars

    return essence(one) == essence(other)


def write_at(file: Path, text: str, seconds: int) -> None:
    """Write a file and set the time of its last change."""
    file.write_text(text, "utf-8")
    os.utime(file, (seconds, seconds))
