"""The documentation is true: examples run, code blocks equal them, every metric, name and link exists."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, get_args, get_type_hints

import nbclient
import nbformat
import pytest
import torch
from torch import Tensor

import flowgrpo
from flowgrpo.config import Config
from flowgrpo.config.reference import documentation, explain
from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes.architecture import build_pipeline
from scripts import credit_picture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
READMES = [ROOT / folder / "README.md" for folder in ("prompts", "benchmarks", "scripts")]
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *READMES])
MODEL = ROOT / "flowgrpo" / "shapes" / "model"

WRITTEN = ("metrics.jsonl", "timings.jsonl", "evaluations.jsonl")


class Learning:
    """A reward that says what it learns, for a metric that others do not write."""

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return media.flatten(1).mean(1)

    def update(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
        return {"loss": 0.0}

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.zeros(1)}

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


TINY = [
    "train.iterations=2",
    "train.groups=6",
    "train.updates=2",
    "algorithm.group_size=2",
    "sampling.num_steps=3",
    "algorithm.steps={kind='all'}",
    "loss.kl_coef=0.01",
    f'rewards=[{{model="jpeg_size"}}, {{model="{__name__}:Learning"}}, {{model="jpeg_size", name="measured", weight=0.0}}]',
    "guard.kl='uncertain'",
    "guard.novelty='relative'",
    "guard.reset_every=1",
    "evaluation.every=1",
    "evaluation.images=12",
    "evaluation.images_during=6",
    "evaluation.grid_prompts=1",
    "evaluation.grid_samples=2",
    "evaluation.bench=[{name='shapes', limit=3, settings={samples=1}}]",
    "evaluation.regimes=[{guidance_scale=3.0, images=6}]",
    "run.trackers=[]",
    "run.threads=1",
]

RUN_ALL = """
import json, runpy, sys, traceback

def run(path):
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception:
        return traceback.format_exc()
    return ""

print("\\n" + json.dumps({path: run(path) for path in sys.argv[1:]}))
"""
"""Runs files one after the other in one process, which imports torch once."""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The traceback of each example, or nothing. They run without the type checks of the tests."""
    if not (MODEL / "model_index.json").exists():
        pytest.skip("flowgrpo/shapes/model is not there yet")
    paths = os.pathsep.join([str(ROOT), str(DOCS / "examples")])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *map(str, EXAMPLES)],
        cwd=tmp_path_factory.mktemp("examples"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, errors):
    assert not errors[str(path)], errors[str(path)]


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    assert "settings = []" in parameters.source
    sizes = [s for s in TINY if not s.startswith(("algorithm.steps", "guard.", "run."))]
    parameters.source = parameters.source.replace("settings = []", f"settings = {sizes}")
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    shown = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())
    ]
    assert sum("image/png" in data for data in shown) == 3
    assert (tmp_path / "runs" / "notebook" / "report.html").exists()


def test_the_site_builds(tmp_path: Path) -> None:
    """Every page is in the navigation, every link leads somewhere, every API page can be rendered."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*command, tmp_path], cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    losses = (tmp_path / "api" / "flowgrpo.losses" / "index.html").read_text()
    assert "LossInputs" in losses
    assert ":class:" not in losses
    assert "quickstart.png" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short(path):
    lines = path.read_text().splitlines()
    if path.stem == "python_api":
        assert len(lines) <= 60
    else:
        assert len([line for line in lines if line.strip()]) <= 30


def test_code_blocks_equal_the_examples():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    assert blocks == [(DOCS / "examples" / f"{n}.py").read_text() for n in shown()]


def shown() -> list[str]:
    """The examples in the order in which extending.md links to them."""
    return re.findall(r"\]\(examples/(\w+)\.py\)", (DOCS / "extending.md").read_text())


def test_every_example_is_shown_or_linked():
    assert {*shown(), "python_api"} == {p.stem for p in EXAMPLES}


def data_flow() -> list[str]:
    """The functions in the tables of data_flow.md, from top to bottom."""
    text = (DOCS / "data_flow.md").read_text()
    rows = re.findall(r"^\| `(flowgrpo[\w.]+)` \|(.*)\|$", text, re.MULTILINE)
    return [name for name, columns in rows if columns.count(" | ") == 2]


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence[CodeType]]:
    """A run with everything that is logged: its folder, and its calls of functions of the data flow."""
    folder = tmp_path_factory.mktemp("docs")
    build_pipeline().save_pretrained(folder / "model")
    places = [f"model.path={folder / 'model'}", f"run.folder={folder / 'run'}"]
    watched = {code_of(name) for name in data_flow()}
    calls: list[CodeType] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in watched:
            calls.append(frame.f_code)

    sys.setprofile(profile)
    try:
        result = flowgrpo.train(flowgrpo.load("quickstart_flow_grpo", [*TINY, *places]))
    finally:
        sys.setprofile(None)
    return result.folder, calls


@pytest.fixture(scope="module")
def tiny_run(watched_run: tuple[Path, Sequence[CodeType]]) -> Path:
    return watched_run[0]


def test_a_run_calls_the_functions_of_the_data_flow_in_the_order_of_the_page(watched_run):
    names, calls = data_flow(), watched_run[1]
    assert len(names) > 15
    (collect,) = (code_of(name) for name in names if name.endswith(".collect"))
    second = calls.index(collect, calls.index(collect) + 1)
    rest = iter(calls[:second])  # Loading, the first iteration, and the evaluation after it.
    for name in names:
        assert code_of(name) in rest, f"docs/data_flow.md: {name} is not called where the page says"


def code_of(name: str) -> CodeType:
    """The code of a dotted function, or of a dotted class's ``__call__``."""
    found: Any = resolve(name)
    found = found.__call__ if isinstance(found, type) else found
    code: CodeType = inspect.unwrap(found).__code__
    return code


def resolve(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, rest = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), rest)
    except ModuleNotFoundError:
        return getattr(resolve(module), rest)


@pytest.mark.parametrize("name", WRITTEN)
def test_every_key_that_a_run_writes_is_documented_and_the_reverse(name, tiny_run):
    lines = [json.loads(line) for line in (tiny_run / name).read_text().splitlines()]
    written = {key for line in lines for key in flat(line)}
    patterns = {key: pattern(key) for key in documented(name)}
    unknown = [k for k in written if not any(p.fullmatch(k) for p in patterns.values())]
    unwritten = [k for k, p in patterns.items() if not any(p.fullmatch(w) for w in written)]
    assert not unknown, f"{name}: not explained in docs/metrics.md: {unknown}"
    assert not unwritten, f"docs/metrics.md explains what {name} does not have: {unwritten}"


def test_the_metrics_of_every_loss_are_documented():
    text = (DOCS / "metrics.md").read_text() + (DOCS / "pictures.md").read_text()
    kinds = get_args(get_type_hints(Config)["loss"])
    found = {m.name for loss in kinds for m in getattr(loss, "metrics", ())}
    assert len(found) > 5
    assert not {name for name in found if f"`{name}`" not in text}


def documented(name: str) -> list[str]:
    """The keys in the first column of a file's table in metrics.md."""
    text = (DOCS / "metrics.md").read_text()
    (section,) = re.findall(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)  # fmt: skip
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def pattern(key: str) -> re.Pattern[str]:
    """A documented key with ``<placeholders>`` as an expression; a placeholder has no dots."""
    return re.compile(re.sub(r"<\w+>", "[^.]+", key.replace(".", r"\.")))


def flat(line: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted keys of nested tables."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def mentions(expression: str) -> list[tuple[str, str]]:
    """(page, text) of everything in backticks that matches, outside of code blocks."""
    found = []
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        spans = re.findall(r"`([^`\n]+)`", prose)
        found += [(page.name, s) for s in spans if re.fullmatch(expression, s)]
    assert found
    return found


def test_the_picture_of_credit_shows_what_the_algorithms_collect():
    assert (DOCS / "credit.svg").read_text() == credit_picture.picture()


def test_every_whole_configuration_of_the_pages_is_valid(tmp_path: Path) -> None:
    """Blocks with a model and a run directory are meant to be run as they are."""
    pages = {p.name: p.read_text() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    whole = [
        (name, block)
        for name, text in pages.items()
        for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
        if re.search(r"^\[model\]$", block, re.M) and re.search(r"^\[run\]$", block, re.M)
    ]
    assert {name for name, _ in whole} >= {"pictures.md"}
    assert any('path = "shapes"' in block for _, block in whole)
    for number, (name, block) in enumerate(whole):
        file = tmp_path / f"{number}_{name}.toml"
        file.write_text(block)
        flowgrpo.load(str(file)).check()


def test_the_lists_of_programs_are_complete() -> None:
    missing = {
        f"{folder}/{file.name}"
        for folder in ("benchmarks", "scripts")
        for file in (ROOT / folder).glob("[!_]*.py")
        if not re.search(rf"\b{file.stem}\b", (ROOT / folder / "README.md").read_text())
    }
    assert missing == set()


def test_every_name_exists():
    missing = [m for m in mentions(r"flowgrpo(\.\w+)+") if not exists(m[1])]
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one, down to a dataclass's fields."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            here: Any = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            if part in getattr(here, "__dataclass_fields__", {}):
                return part == parts[-1]
            if not hasattr(here, part):
                return False
            here = getattr(here, part)
        return True
    return False


def test_every_path_exists():
    folders = "flowgrpo|reward_models|configs|prompts|docs|tests|benchmarks|scripts"
    missing = [
        m for m in mentions(rf"(?:{folders}|\.ci)/[\w./]*") if not (ROOT / m[1]).exists()
    ]  # fmt: skip
    assert not missing


def test_every_configuration_key_exists():
    hints = get_type_hints(Config)
    tables = "|".join(hints)
    missing = []
    for page, key in mentions(rf"(?:{tables})(?:\.\w+)+(?<!\.py)"):
        try:
            explain(Config, key)
        except ValueError as error:
            missing.append((page, key, str(error)))
    assert not missing


def test_every_table_and_kind_is_in_the_configuration_page():
    text = (DOCS / "configuration.md").read_text()
    for name in documentation(Config):
        assert f"`[{name}]`" in text or f"`[[{name}]]`" in text, name
    for kind in kinds(Config):
        assert f"`{kind}`" in text, kind


def kinds(hint: Any) -> set[str]:
    """Every ``kind`` that can be chosen below a dataclass."""
    if not hasattr(hint, "__dataclass_fields__"):
        return {k for member in get_args(hint) for k in kinds(member)}
    inside = {k for h in get_type_hints(hint).values() for k in kinds(h)}
    field = hint.__dataclass_fields__.get("kind")
    return inside | ({field.default} if field is not None else set())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
