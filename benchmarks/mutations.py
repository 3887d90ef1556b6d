"""The share of small random mistakes in the code that the tests notice, by area.

A mutation is one small change that a person could make: a sign, an index that is off by one, the wrong
direction of a comparison, ``or`` for ``and``, two arguments swapped, one parameter in place of another, a
statement that is left out. Its place and its kind are drawn from a seed. The program makes it in a copy
of the repository, runs those tests of the area that execute the changed line, the fastest files first
(all tests if none does), and notes whether one of them fails (:mod:`benchmarks.mutation_runs`). A test
that only reads what another one has computed with that line is not run, so that the share is rather too
low than too high. Tests that fail without a mutation are left out.

Not mutated are messages (in ``raise``, ``assert``, f-strings and calls that print), annotations,
defaults of settings and constants of modules: a test of these would only repeat their values.

Each result is a line of a JSON-lines file, so that a later run continues where this one ended. A
mutation that does not change what the program does cannot be noticed. Mark such a survivor by adding
``"equivalent": "<reason>"`` to its line; the second share of the table leaves these out.

    python -m benchmarks.mutations --area learner scorer --per-area 30 --results mutations.jsonl
"""

import argparse
import ast
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutation_runs import MutationRuns, Trial

ROOT = Path(__file__).parents[1]
COPIED = (
    "flowgrpo",
    "reward_models",
    "tests",
    "benchmarks",
    "scripts",
    "configs",
    "prompts",
    "docs",
)
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md")


@dataclass(frozen=True)
class Area:
    """Source files, as patterns from the root, and the test files that have to notice mistakes there.

    The fastest test files come first, because a run ends at the first failure.
    """

    sources: Sequence[str]
    tests: Sequence[str]


AREAS = {
    "core": Area(
        ["flowgrpo/core/*.py"],
        ["steps", "random", "text", "tensors", "advantages", "win_rates", "geneval_rule", "transitions",
         "solvers", "secrets", "guard"],
    ),
    "losses": Area(["flowgrpo/losses/*.py"], ["limits", "losses", "matching", "learner", "objectives"]),
    "algorithms": Area(
        ["flowgrpo/algorithms/*.py"],
        ["limits", "step_credit", "step_advantages", "find", "matching", "guard", "collect", "whole_samples",
         "step_algorithms"],
    ),
    "learner": Area(
        ["flowgrpo/training/learner.py", "flowgrpo/training/optimizer.py", "flowgrpo/training/replay.py",
         "flowgrpo/training/stored_outputs.py", "flowgrpo/training/metrics.py"],
        ["learner", "objectives", "guard"],
    ),
    "sessions": Area(
        ["flowgrpo/training/session.py", "flowgrpo/training/*checkpoint*.py", "flowgrpo/training/run_changes.py"],
        ["checkpoints", "session", "setup"],
    ),
    "scorer": Area(
        ["flowgrpo/rewards/scorer.py", "flowgrpo/rewards/pairs.py", "flowgrpo/rewards/settings.py"],
        ["scorer", "win_rates", "combinators"],
    ),
    "evaluation": Area(
        ["flowgrpo/evaluation/*.py", "flowgrpo/training/evaluator.py"],
        ["charts", "report_numbers", "report", "card", "grid", "inspection", "evaluation", "grid_command"],
    ),
    "config": Area(
        ["flowgrpo/config/*.py"],
        ["config_meaning", "plan", "config_files", "config", "wrong_inputs", "best_and_stop", "staleness"],
    ),
    "serving": Area(
        ["flowgrpo/rewards/serving/*.py"], ["serving_parts", "served_conditions", "serving"]
    ),
}  # fmt: skip
"""Test files by the middle of their names: ``learner`` is ``tests/test_learner.py``."""

OPERATORS: dict[type[ast.AST], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/",)),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("%",)),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)),
    ast.Lt: ("<", ("<=", ">")),
    ast.LtE: ("<=", ("<", ">=")),
    ast.Gt: (">", (">=", "<")),
    ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
    ast.And: ("and", ("or",)),
    ast.Or: ("or", ("and",)),
}
"""Each operator as it is written, and what it is mistaken for."""
OPPOSITES = {
    "min": "max", "minimum": "maximum", "argmin": "argmax", "any": "all",
    "zeros": "ones", "zeros_like": "ones_like", "floor": "ceil",
}  # fmt: skip
OPPOSITES |= {v: k for k, v in OPPOSITES.items()} | {"mean": "sum"}
CRUDE = {"condition", "arguments"}
"""Kinds that mostly end in an exception at once; they are drawn a third as often as the others."""
QUIET = {"log", "say", "print", "warning", "info", "error", "debug", "_warn", "table", "write"}
"""Names of calls whose arguments are text for people."""


@dataclass(frozen=True)
class Mutation:
    """A replacement of one stretch of a file's text.

    Attributes:
        path: The file, from the root.
        kind: The kind of mistake.
        line: Line of the beginning, counted from 1.
        start: First character that is replaced, counted from 0.
        end: The character behind the last.
        old: The text that is replaced.
        new: The text in its place.
    """

    path: str
    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line}:{self.start}:{self.kind}:{self.new}"


class _Finder(ast.NodeVisitor):
    """Collects all mutations of a file."""

    def __init__(self, path: str, source: str):
        self.path, self.source, self.found = path, source, list[Mutation]()
        # ast counts columns in bytes of UTF-8; positions are characters of the whole text.
        self.lines = source.splitlines(keepends=True)
        self.begins = [0]
        for line in self.lines:
            self.begins.append(self.begins[-1] + len(line))
        self.depth = 0
        self.parameters: dict[str, str] = {}

    def at(self, line: int, column: int) -> int:
        return self.begins[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: Any) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def add(self, kind: str, start: int, end: int, new: str) -> None:
        line = self.source.count("\n", 0, start) + 1
        self.found.append(Mutation(self.path, kind, line, start, end, self.source[start:end], new))

    def between(self, kind: str, left: ast.AST, operator: ast.AST, right: ast.AST) -> None:
        """Replace the operator between two operands."""
        if type(operator) not in OPERATORS:
            return
        written, mistakes = OPERATORS[type(operator)]
        start = self.source.find(written, self.span(left)[1], self.span(right)[0])
        for mistake in mistakes if start >= 0 else ():
            self.add(kind, start, start + len(written), mistake)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not isinstance(node.left, ast.Constant | ast.JoinedStr) or not _is_text(node.left):
            self.between("arithmetic", node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            self.between("comparison", left, operator, right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            # One "or" of three would change how the others group; that is a mistake all the same.
            self.between("boolean", left, node.op, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, end = self.span(node)[0], self.span(node.operand)[0]
        if isinstance(node.op, ast.USub | ast.Invert) and self.depth:
            self.add("sign", start, end, "")
        elif isinstance(node.op, ast.Not):
            self.add("condition", start, end, "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self.span(node)
        if not self.depth:
            return
        if isinstance(node.value, bool):
            self.add("constant", start, end, str(not node.value))
        elif isinstance(node.value, int):
            self.add("off by one", start, end, str(node.value + 1))
            if node.value > 0:
                self.add("off by one", start, end, str(node.value - 1))

    def visit_If(self, node: ast.If) -> None:
        start, end = self.span(node.test)
        self.add("condition", start, end, f"not ({self.source[start:end]})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        (a, b), (c, d) = self.span(node.body), self.span(node.orelse)
        text = self.source
        self.add("condition", a, d, text[c:d] + text[b:c] + text[a:b])
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        if name in QUIET:
            return
        if name in OPPOSITES:
            end = self.span(node.func)[1]
            self.add("opposite", end - len(name), end, OPPOSITES[name])
        plain = list(itertools.takewhile(lambda a: isinstance(a, ast.Name | ast.Attribute), node.args))  # fmt: skip
        if len(plain) >= 2 and name != "isinstance":
            (a, b), (c, d) = self.span(plain[0]), self.span(plain[1])
            text = self.source
            if text[a:b] != text[c:d]:
                self.add("arguments", a, d, text[c:d] + text[b:c] + text[a:b])
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for part, other in ((node.lower, node.upper), (node.upper, node.lower)):
            if part is not None and other is None and node.step is None:
                start, end = self.span(part)
                text = self.source[start:end]
                whole = (start - 1, end) if part is node.upper else (start, end + 1)
                if self.source[whole[0] : whole[1]].strip(" ") in (f":{text}", f"{text}:"):
                    new = f"{text}:" if part is node.upper else f":{text}"
                    self.add("slice", *whole, new)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        kind = self.parameters.get(node.id)
        if isinstance(node.ctx, ast.Load) and kind:
            alike = [n for n, k in self.parameters.items() if k == kind and n != node.id]
            for other in alike[:2]:
                self.add("old for new", *self.span(node), other)

    def visit_FunctionDef(self, node: Any) -> None:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        before = self.parameters
        self.parameters = before | {
            a.arg: ast.dump(a.annotation) for a in arguments if a.annotation is not None
        }
        self.depth += 1
        for child in node.body:
            self.visit(child)
            self.drop(child)
        self.depth -= 1
        self.parameters = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def drop(self, node: ast.AST) -> None:
        """Leave out statements that have an effect: calls, and assignments to attributes and items."""
        for child in ast.walk(node):
            is_call = isinstance(child, ast.Expr) and isinstance(child.value, ast.Call)
            if is_call:
                function = child.value.func  # type: ignore[attr-defined]
                name = getattr(function, "attr", getattr(function, "id", ""))
                is_call = name not in QUIET
            targets = child.targets if isinstance(child, ast.Assign) else []
            sets = any(isinstance(t, ast.Attribute | ast.Subscript) for t in targets)
            if is_call or sets or isinstance(child, ast.AugAssign):
                self.add("left out", *self.span(child), "pass")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self.depth and node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self.depth:
            self.generic_visit(node)

    def nothing(self, node: ast.AST) -> None:
        """Not mutated."""

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = nothing


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def mutations(path: str, source: str) -> list[Mutation]:
    """All mutations of a file, each once."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    return list({one.key: one for one in finder.found}.values())


def is_change(source: str, one: Mutation) -> bool:
    """Whether a mutation is valid Python and changes the syntax tree."""
    try:
        return ast.dump(ast.parse(mutated(source, one))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def mutated(source: str, one: Mutation) -> str:
    """The source with the mutation in it."""
    return source[: one.start] + one.new + source[one.end :]


def draw(
    area: Area, number: int, seed: str, without: Collection[tuple[str, int]] = ()
) -> Iterator[Mutation]:
    """Mutations of an area in random order; a line of code comes up once at most.

    The place is drawn first and the kind second, so that kinds with many places do not crowd out the
    others.

    Args:
        area: Where to draw.
        number: How many at most.
        seed: The same seed draws the same ones, as long as the code is the same.
        without: Lines that are not drawn, by file and number.
    """
    generator = random.Random(seed)
    files = sorted({p for pattern in area.sources for p in ROOT.glob(pattern)})
    places: dict[tuple[str, int], list[Mutation]] = {}
    sources = {str(f.relative_to(ROOT)): f.read_text("utf-8") for f in files}
    for path, source in sources.items():
        for one in mutations(path, source):
            places.setdefault((path, one.line), []).append(one)
    lines = sorted(places)
    generator.shuffle(lines)
    drawn = 0
    for line in lines:
        kinds = sorted({one.kind for one in places[line]})
        weights = [1 if kind in CRUDE else 3 for kind in kinds]
        (kind,) = generator.choices(kinds, weights)
        one = generator.choice([one for one in places[line] if one.kind == kind])
        if drawn < number and line not in without and is_change(sources[one.path], one):
            drawn += 1
            yield one


def copy_repository(folder: Path) -> None:
    """Copy what the tests need."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", "*.png", "*.gif")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


def preload() -> None:
    """Import what nearly all tests import, once. Nothing of the repository may be among it."""
    import accelerate  # noqa: F401
    import diffusers
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline  # noqa: F401

    torch.set_num_threads(1)
    assert diffusers.__version__
    assert not {"flowgrpo", "tests", "reward_models"} & set(sys.modules)


def examine(
    name: str,
    number: int,
    seed: int,
    folder: Path,
    results: Path,
    most_seconds: float,
    without: Collection[tuple[str, int]],
) -> None:
    """Try the first ``number`` mutations of an area that have no result yet."""
    area = AREAS[name]
    known = {row["key"] for row in read(results)}
    trials = []
    for one in draw(area, number, f"{seed}/{name}", without):
        if one.key not in known:
            source = (folder / one.path).read_text("utf-8")
            lines = range(one.line, one.line + one.old.count("\n") + 1)
            row = {"area": name, "seed": seed, "key": one.key, **asdict(one)}
            trials.append(Trial(one.path, lines, source, mutated(source, one), row))
    if not trials:
        return
    child = os.fork()
    if child == 0:
        try:
            sources = [p for pattern in area.sources for p in sorted(folder.glob(pattern))]
            _run_area(area, MutationRuns(name, sources, trials, folder, results.resolve(), most_seconds))  # fmt: skip
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)


def _run_area(area: Area, runs: MutationRuns) -> None:
    """Run pytest in the copy of the repository, whose modules this process has not imported yet."""
    os.chdir(runs.folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    own = {"", str(ROOT)}
    sys.path[:] = [str(runs.folder), *(p for p in sys.path if p not in own)]
    os.environ["PYTHONPATH"] = str(runs.folder)
    for module in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        del sys.modules[module]
    options = ["-q", "--no-header", "--tb=no", "-n", "0", "-p", "no:cacheprovider"]
    options += [f"--basetemp={runs.folder / '.tmp'}"]
    pytest.main([*options, *(f"tests/test_{n}.py" for n in area.tests)], plugins=[runs])


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(t) for t in results.read_text().splitlines()] if results.exists() else []


def describe(row: dict[str, Any]) -> str:
    """A mutation in one line."""
    old, new = (" ".join(row[k].split())[:70] for k in ("old", "new"))
    return f"{row['path']}:{row['line']} {row['kind']}: {old!r} -> {new!r}"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Survivors, and a table of the shares by area."""
    lines = []
    for row in rows:
        if not row["caught"]:
            reason = row.get("equivalent")
            lines.append(f"{row['area']}: {describe(row)}" + (f" (equivalent: {reason})" if reason else ""))  # fmt: skip
    lines += ["", "| area | tried | caught | share | equivalent | share of the others |", "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for area in dict.fromkeys(row["area"] for row in rows):
        own = [row for row in rows if row["area"] == area]
        caught = sum(row["caught"] for row in own)
        same = sum("equivalent" in row and not row["caught"] for row in own)
        other = len(own) - same
        lines.append(
            f"| {area} | {len(own)} | {caught} | {caught / len(own):.0%} | {same} | "
            f"{caught / other if other else 1:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--area", nargs="+", choices=AREAS, default=list(AREAS), metavar="AREA")
    parser.add_argument("--per-area", type=int, default=30, help="mutations per area")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most-seconds",
        type=float,
        default=math.inf,
        help="leave out the slowest of the tests that execute a line, if they take longer together",
    )
    parser.add_argument("--results", type=Path, default=Path("mutations.jsonl"))
    parser.add_argument(
        "--unlike",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of earlier draws, whose lines are not drawn again: tests may have been written for them",
    )
    parser.add_argument(
        "--report", action="store_true", help="print the results so far, run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print the mutations, run nothing")
    options = parser.parse_args()
    without = {(row["path"], row["line"]) for file in options.unlike for row in read(file)}
    if options.list:
        for name in options.area:
            for one in draw(AREAS[name], options.per_area, f"{options.seed}/{name}", without):
                print(f"{name}: {describe(asdict(one))}")
        return
    if not options.report:
        preload()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            copy_repository(folder)
            for name in options.area:
                examine(
                    name,
                    options.per_area,
                    options.seed,
                    folder,
                    options.results,
                    options.most_seconds,
                    without,
                )
    print(report(read(options.results)))


if __name__ == "__main__":
    main()
