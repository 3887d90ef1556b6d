"""Data flows one way: imports point up the list, modules and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flowgrpo
from scripts.rooms import cycles, entries, import_graph, imported_names, longest_chain, module_name

ROOT = Path(__file__).parents[1]
ORDER = [
    "core", "losses", "data", "policy", "rewards", "algorithms", "config", "shapes", "evaluation", "bench", "training",
    "memory", "doctor", "cli", "__main__",
]  # fmt: skip
"""A module may import only from earlier ones, or from its own package."""
SHARED_WITH_REWARDS = {
    "flowgrpo.data.prompts", "flowgrpo.data.pictures", "flowgrpo.data.audio", "flowgrpo.data.rubrics",
    "flowgrpo.core.geneval", "flowgrpo.data.strict_json", "flowgrpo.rewards.serving.protocol",
    "flowgrpo.rewards.serving.client",
}  # fmt: skip
"""What reward models may import: types and pictures, a scoring rule that has tests of its own, and the
wire format with its client, because both ends must agree on every byte."""
HEAVY = {"diffusers", "transformers", "accelerate", "peft"}
MODULES = sorted(p for d in ("flowgrpo", "reward_models") for p in (ROOT / d).rglob("*.py"))


def part(module: str) -> str:
    """The entry of ORDER that ``flowgrpo.<part>...`` belongs to; empty for the package itself."""
    return module.removeprefix("flowgrpo").strip(".").split(".")[0]


def test_every_module_has_a_place_in_the_order():
    names = [module_name(ROOT, p) for p in MODULES]
    assert {part(n) for n in names if n.startswith("flowgrpo")} <= {"", *ORDER}


def points_down(own: str, name: str) -> bool:
    """Whether one module may not import a name."""
    if name.split(".")[0] == "reward_models":  # which flowgrpo finds by import path
        return own.startswith("flowgrpo")
    # The package itself passes on names from everywhere, on demand, so nothing may import it.
    if name.split(".")[0] != "flowgrpo" or name == "flowgrpo.__version__":
        return False
    if own.startswith("reward_models"):
        return not any(name == s or name.startswith(f"{s}.") for s in SHARED_WITH_REWARDS)
    return bool(part(own)) and ORDER.index(part(name)) > ORDER.index(part(own))


def test_imports_point_up():
    pairs = [(module_name(ROOT, p), n) for p in MODULES for n in imported_names(p)]
    assert len(pairs) > 1000
    assert [pair for pair in pairs if points_down(*pair)] == []


@pytest.mark.parametrize(
    ("own", "name", "expected"),
    [
        ("flowgrpo.core.steps", "flowgrpo.data.prompts", True),
        ("flowgrpo.data.prompts", "flowgrpo.core.steps", False),
        ("flowgrpo.cli.train", "reward_models.ocr", True),
        ("reward_models.ocr", "flowgrpo.data.prompts.Prompt", False),
        ("reward_models.ocr", "flowgrpo.rewards.scorer", True),
        ("reward_models.ocr", "torch", False),
    ],
)
def test_imports_that_point_down_are_found(own, name, expected):
    assert points_down(own, name) is expected


def test_modules_that_reward_models_use_know_no_rewards():
    files = {module_name(ROOT, p): p for p in MODULES}
    reached, left = set(), sorted(SHARED_WITH_REWARDS)
    while left:
        name = left.pop()
        # A name imported from a package may be one of its modules, and loads the packages above it.
        above = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        for found in {name, *above} - reached:
            reached.add(found)
            if found in files and found != "flowgrpo":
                left += [n for n in imported_names(files[found]) if n.split(".")[0] == "flowgrpo"]
    others = {n for n in reached if n.startswith("flowgrpo.rewards.")}
    assert all(n.startswith("flowgrpo.rewards.serving") for n in others), others
    assert {part(n) for n in reached} <= {"", "core", "data", "rewards"}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("flowgrpo.rewards.scorer, flowgrpo.rewards.pairs, flowgrpo.rewards.frames", "httpx reward_models"),
        ("flowgrpo.training.loop", ""),
    ],
)  # fmt: skip
def test_training_loads_no_library_of_servers_and_judges(modules, absent):
    names = {"fastapi", "starlette", "uvicorn", "python_multipart", "openai", *absent.split()}
    code = f"import {modules}, sys; found = {names} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


EXTRAS = """
import sys
from importlib import import_module
hidden = dict.fromkeys(("fastapi", "uvicorn", "python_multipart", "httpx", "openai"))
sys.modules.update(hidden)
for module, extra in {
    "flowgrpo.rewards.serving.server": "serve",
    "flowgrpo.rewards.serving.client": "remote",
    "reward_models.shared.chat": "judge",
}.items():
    try:
        import_module(module)
    except ImportError as error:
        assert f"pip install 'flowgrpo[{extra}]'" in str(error), (module, error)
    else:
        raise AssertionError(module)
"""


def test_a_missing_extra_is_answered_with_the_command_that_installs_it():
    subprocess.run([sys.executable, "-c", EXTRAS], cwd=ROOT, check=True)


def test_there_are_few_rooms():
    """A newcomer reads the list at one glance."""
    assert len(entries(ROOT / "flowgrpo")) <= 14


def test_every_room_says_what_belongs_in_it():
    files = list((ROOT / "flowgrpo").glob("*/__init__.py"))
    said = {p.parent.name: ast.get_docstring(ast.parse(p.read_text())) or "" for p in files}
    assert len(said) > 10
    assert {room for room, docstring in said.items() if len(docstring) < 80} == set()


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


SETTINGS = """
import sys
import flowgrpo.data.prompt_files, flowgrpo.data.prompt_sets
from flowgrpo import algorithms
from flowgrpo.core.random import Random

for name in algorithms.__all__:
    if not name.startswith("Algorithm"):
        settings = getattr(algorithms, name)()
        settings.check(20)
        settings.cost(20, 0, Random(0))
found = {"torch", "jaxtyping", "numpy", "PIL", "diffusers"} & set(sys.modules)
assert not found, found
"""


def test_algorithms_are_checked_and_counted_without_torch():
    subprocess.run([sys.executable, "-c", SETTINGS], cwd=ROOT, check=True)


def imports_of(room: str) -> set[tuple[str, str]]:
    """The names that the modules of a room import, with the module's name; at least a few."""
    paths = [p for p in MODULES if p.parent == ROOT / "flowgrpo" / room]
    assert len(paths) > 3
    return {(p.stem, name) for p in paths for name in imported_names(p)}


def test_algorithms_know_no_concrete_policy_or_scorer():
    concrete = ("flowgrpo.policy", "flowgrpo.rewards.scorer")
    found = {(own, name) for own, name in imports_of("algorithms") if name.startswith(concrete)}
    assert {
        pair
        for pair in found
        if not pair[1].startswith(("flowgrpo.policy.step_plan", "flowgrpo.policy.settings"))
    } == set()


def test_the_package_lists_its_names_and_is_typed():
    assert {*flowgrpo.__all__} <= {*dir(flowgrpo)}
    assert all(getattr(flowgrpo, name) is not None for name in flowgrpo.__all__)
    assert (ROOT / "flowgrpo" / "py.typed").is_file()


def test_the_core_is_pure_mathematics():
    others = HEAVY | {"os", "pathlib", "PIL", "json"}
    assert {pair for pair in imports_of("core") if pair[1].split(".")[0] in others} == set()


def test_modules_and_functions_are_short():
    long = {}
    for path in MODULES:
        source = path.read_text()
        if len(source.splitlines()) > 600:
            long[path.name] = len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long[f"{path.name}: {node.name}"] = lines
    assert long == {}


def test_the_loop_fits_on_one_screen():
    tree = ast.parse((ROOT / "flowgrpo" / "training" / "loop.py").read_text())
    both = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in ("train", "iterate")
    ]
    assert len(both) == 2
    for function in both:
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno + 1 <= 45


def test_training_treats_all_losses_alike():
    """It uses the protocol alone: no class of a loss, no look at its type or kind."""
    losses = {pair for pair in imports_of("training") if pair[1].startswith("flowgrpo.losses")}
    assert losses
    assert {pair for pair in losses if not pair[1].startswith("flowgrpo.losses.base.")} == set()
    for path in (ROOT / "flowgrpo" / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call | ast.Attribute):
                continue
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            asks = isinstance(node, ast.Call) and "isinstance" in names
            assert not (asks and "loss" in names), ast.unparse(node)
            assert not (isinstance(node, ast.Attribute) and {"loss", "kind"} <= names)
