"""Data flows one way: imports point up the list, modules and functions stay small."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "core", "losses", "data", "policy", "rewards", "algorithms", "config", "shapes", "evaluation", "bench", "training",
    "doctor", "memory", "cli", "__main__",
]  # fmt: skip
"""A module may import only from earlier ones, or from its own package."""
HEAVY = {"diffusers", "transformers", "accelerate", "peft"}
MODULES = sorted(p for d in ("flowgrpo", "reward_models") for p in (ROOT / d).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in MODULES]


def part(module: str) -> str:
    """The entry of ORDER that ``flowgrpo.<part>...`` belongs to; empty for the package itself."""
    return module.removeprefix("flowgrpo").strip(".").split(".")[0]


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; ``from flowgrpo import x`` as flowgrpo.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            if node.module == "flowgrpo":
                names = [alias.name for alias in node.names]
                yield from (f"flowgrpo.{n}" for n in names if not n.startswith("__version"))
            else:
                yield node.module


def test_every_module_has_a_place_in_the_order():
    names = [module_name(p) for p in MODULES]
    assert {part(n) for n in names if n.startswith("flowgrpo")} <= {"", *ORDER}


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_point_up(path):
    own = module_name(path)
    for name in imported(path):
        if name.split(".")[0] != "flowgrpo":
            continue
        if own.startswith("reward_models"):
            # Its types, pictures, a scoring rule that is tested apart, and how to reach a
            # server: both ends must speak of the same bytes.
            allowed = (
                "flowgrpo.data.prompts", "flowgrpo.core.geneval", "flowgrpo.data.pictures",
                "flowgrpo.rewards.serving.protocol", "flowgrpo.rewards.serving.client",
            )  # fmt: skip
            assert name.startswith(allowed), f"{own} imports {name}"
        elif part(own):  # The package itself passes on names from everywhere, on demand.
            assert ORDER.index(part(name)) <= ORDER.index(part(own)), f"{own} imports {name}"


def test_importing_the_package_imports_nothing_heavy():
    code = "import flowgrpo, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "core"], ids=lambda p: p.stem)  # fmt: skip
def test_the_core_is_pure_mathematics(path):
    roots = {name.split(".")[0] for name in imported(path)}
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
