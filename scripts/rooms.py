"""Prints the size and the import depth of each part of ``flowgrpo/``.

    python -m scripts.rooms [CHECKOUT]

For a checkout of the repository: the entries at the top of the package, the longest chains of imports
between entries and between modules, cycles of imports, and files and lines by entry. Imports inside of
functions count; those of the package's ``__init__``, which re-exports names on demand, do not.
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import cache
from pathlib import Path

Graph = Mapping[str, Set[str]]
"""The modules that each module imports."""


def import_graph(root: Path, package: str) -> Graph:
    """Imports between the modules of a package or folder of modules.

    Args:
        root: Folder that contains the package.
        package: Its name.
    """
    files = {module_name(root, path): path for path in (root / package).rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = {_longest_known(target, files) for target in imported_names(path)}
        graph[name] = {f for f in found if f is not None and f != name}
    return graph


def module_name(root: Path, path: Path) -> str:
    """The dotted name of a file's module."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}, line {node.lineno}: relative imports are not followed")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _longest_known(name: str, known: Iterable[str]) -> str | None:
    """The module that a dotted name names or lies in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def cycles(graph: Graph) -> list[list[str]]:
    """The sets of modules that import each other, directly or through others."""
    reached = {name: _reachable(graph, name) for name in graph}
    mutual = {frozenset(m for m in reached[n] if n in reached[m]) for n in graph if n in reached[n]}
    return sorted(sorted(group) for group in mutual)


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def longest_chain(graph: Graph) -> list[str]:
    """A longest chain of imports, the importing module first. Modules of a cycle count once."""
    group = {name: members[0] for members in cycles(graph) for name in members}
    merged: dict[str, set[str]] = {}
    for name, targets in graph.items():
        own = group.get(name, name)
        merged.setdefault(own, set()).update(group.get(t, t) for t in targets)
    below = {name: targets - {name} for name, targets in merged.items()}

    @cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max((chain(t) for t in sorted(below[name])), key=len, default=()))

    return list(max((chain(name) for name in sorted(below)), key=len, default=()))


def by_entry(graph: Graph, package: str) -> Graph:
    """The imports between the entries at the top of a package."""
    merged: dict[str, set[str]] = {}
    for name, targets in graph.items():
        own = name.removeprefix(f"{package}.").split(".")[0]
        merged.setdefault(own, set()).update(
            t.removeprefix(f"{package}.").split(".")[0] for t in targets
        )
    return {name: targets - {name} for name, targets in merged.items()}


def entries(package: Path) -> list[str]:
    """The modules and subpackages at the top of a package, without ``__init__`` and ``__main__``."""
    found = {p.stem for p in package.glob("*.py") if not p.stem.startswith("__")}
    folders = {p.name for p in package.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    return sorted(found | folders)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.rooms", description=__doc__.splitlines()[0]
    )
    here = Path(__file__).parents[1]
    parser.add_argument("checkout", type=Path, nargs="?", default=here, help="default: this one")
    root: Path = parser.parse_args().checkout.resolve()
    package = root / "flowgrpo"
    files, lines = Counter[str](), Counter[str]()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        entry = parts[0] if len(parts) > 1 else path.stem
        files[entry] += 1
        lines[entry] += len(path.read_text("utf-8").splitlines())
    top = {"flowgrpo", "flowgrpo.__main__"}
    graph = {k: v - top for k, v in import_graph(root, "flowgrpo").items() if k not in top}
    names = entries(package)
    print(f"entries at the top: {len(names)}")
    for kind, found in (("entries", by_entry(graph, "flowgrpo")), ("modules", graph)):
        chain = [name.removeprefix("flowgrpo.") for name in longest_chain(found)]
        print(f"longest chain of imports between {kind}: {len(chain)} ({' > '.join(chain)})")
    print(f"cycles between modules: {'; '.join(', '.join(c) for c in cycles(graph)) or 'none'}")
    circles = cycles(by_entry(graph, "flowgrpo"))
    print(f"cycles between entries: {'; '.join(', '.join(c) for c in circles) or 'none'}")
    print(f"files: {files.total()}, lines: {lines.total()}")
    for name in sorted(files, key=lambda n: (n not in names, n)):
        print(f"{name:>20} {files[name]:>4} files {lines[name]:>6} lines")


if __name__ == "__main__":
    main()
