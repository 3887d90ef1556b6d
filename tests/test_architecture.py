"""Data flows one way: imports point up the list, modules and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.rooms import cycles, entries, import_graph, imported_names, longest_chain, module_name

ROOT = Path(__file__).parents[1]
ORDER = [
    "core", "losses", "data", "policy", "rewards", "algorithms", "config", "shapes", "evaluation", "training",
    "doctor", "memory", "cli", "__main__",
]  # fmt: skip
"""A module may import only from earlier ones, or from its own package."""
HEAVY = {"diffusers", "transformers", "accelerate", "peft"}
MODULES = sorted(p for d in ("flowgrpo", "reward_models") for p in (ROOT / d).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in MODULES]


def part(module: str) -> str:
    """The entry of ORDER that ``flowgrpo.<part>...`` belongs to; empty for the package itself."""
    return module.removeprefix("flowgrpo").strip(".").split(".")[0]


def test_every_module_has_a_place_in_the_order():
    names = [module_name(ROOT, p) for p in MODULES]
    assert {part(n) for n in names if n.startswith("flowgrpo")} <= {"", *ORDER}


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_up(path):
    own = module_name(ROOT, path)
    for name in imported_names(path):
        # The package itself passes on names from everywhere, on demand, so nothing may import it.
        if name.split(".")[0] != "flowgrpo" or name == "flowgrpo.__version__":
            continue
        if own.startswith("reward_models"):
            # Its types, pictures, a scoring rule that is tested apart, and how to reach a
            # server: both ends must speak of the same bytes.
            allowed = (
                "flowgrpo.data.prompts", "flowgrpo.core.geneval", "flowgrpo.data.pictures",
                "flowgrpo.rewards.serving.protocol", "flowgrpo.rewards.serving.client",
            )  # fmt: skip
            assert name.startswith(allowed), f"{own} imports {name}"
        elif part(own):
            assert ORDER.index(part(name)) <= ORDER.index(part(own)), f"{own} imports {name}"


def test_there_are_few_rooms():
    """A newcomer reads the list at one glance."""
    assert len(entries(ROOT / "flowgrpo")) <= 14


@pytest.mark.parametrize("room", sorted(p.parent.name for p in (ROOT / "flowgrpo").glob("*/__init__.py")))  # fmt: skip
def test_every_room_says_what_belongs_in_it(room):
    source = (ROOT / "flowgrpo" / room / "__init__.py").read_text()
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert len(docstring) >= 80, f"flowgrpo/{room}/__init__.py: {docstring!r}"


@pytest.mark.parametrize("package", ["flowgrpo", "reward_models", "benchmarks", "scripts"])
def test_no_modules_import_each_other(package):
    assert cycles(import_graph(ROOT, package)) == []


def test_cycles_and_chains_are_found(tmp_path):
    """Also those through an import inside of a function, and through a third module."""
    sources = {
        "__init__": "",
        "a": "from package.b import one",
        "b": "def one():\n    import package.c",
        "c": "from package import a",
        "d": "from package.a import x\nimport package.e",
        "e": "import os",
    }
    (tmp_path / "package").mkdir()
    for name, source in sources.items():
        (tmp_path / "package" / f"{name}.py").write_text(source)
    graph = import_graph(tmp_path, "package")
    assert cycles(graph) == [["package.a", "package.b", "package.c"]]
    assert longest_chain(graph)[:2] == ["package.d", "package.a"]


def test_importing_the_package_imports_nothing_heavy():
    code = "import flowgrpo, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "core"], ids=lambda p: p.stem)  # fmt: skip
def test_the_core_is_pure_mathematics(path):
    roots = {name.split(".")[0] for name in imported_names(path)}
    assert not roots & (HEAVY | {"os", "pathlib", "PIL", "json"})


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 600
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name}: {lines} lines"


def test_the_loop_fits_on_one_screen():
    tree = ast.parse((ROOT / "flowgrpo" / "training" / "loop.py").read_text())
    (train,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno + 1 <= 45
