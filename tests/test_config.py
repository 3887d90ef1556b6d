"""Configuration files: all that come with flowgrpo are sound, and wrong ones are refused clearly."""

import dataclasses
import importlib.util
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

import flowgrpo
from flowgrpo.config import Config, ConfigError, find, load, override, save
from flowgrpo.config.bounds import BOUNDS
from flowgrpo.config.files import line_of
from flowgrpo.config.geometry import geometry
from flowgrpo.config.reader import read
from flowgrpo.config.reference import dataclasses_in, documentation, explain, json_schema
from flowgrpo.config.renamed import MOVED_MODULES, RENAMED_KEYS, old_names
from flowgrpo.core.imports import import_path

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.toml"))

MINIMAL = """
[model]
path = "shapes"
[algorithm]
kind = "flow_grpo"
group_size = 4
[[rewards]]
model = "jpeg_size"
[prompts]
train = "train.txt"
held_out = "held_out.txt"
[train]
iterations = 3
groups = 6
[run]
folder = "runs/x"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_loads_checks_and_round_trips(name, tmp_path):
    config = load(str(ROOT / "configs" / name))
    config.check()
    save(config, tmp_path / "config.toml")
    assert load(str(tmp_path / "config.toml")) == config


OWN_PICTURES = {
    "qwen_image_edit_dance.toml", "skyreels_i2v_dance.toml", "sd15_dpo.toml", "sdxl_dpo.toml",
}  # fmt: skip
"""Recipes whose prompts have pictures, which are the user's; their first lines say so."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_names_prompts_that_exist(name):
    config = load(str(ROOT / "configs" / name))
    if name in OWN_PICTURES:
        assert "none come with flowgrpo" in find(name.removesuffix(".toml")).read_text()
        return
    assert find(config.prompts.train).is_file()
    assert find(config.prompts.held_out).is_file()


def test_a_round_trip_keeps_what_is_not_default(minimal, tmp_path):
    settings = [
        "rewards.0.options.quality=80",
        "sampling.guidance_scale=4.5",
        "evaluation.num_steps=28",
        "algorithm.kind=dance_grpo",
        "algorithm.transition.kind=cps",
        "algorithm.steps.kind=random_steps",
        'model.weights={kind = "lora", rank = 4, targets = ["to_q", "to_k"]}',
        'run.trackers=["wandb", "tensorboard"]',
    ]
    config = load(minimal, settings)
    save(config, tmp_path / "again.toml")
    again = load(str(tmp_path / "again.toml"))
    assert again == config
    assert again.rewards[0].options == {"quality": 80}
    assert again.evaluation_sampling().num_steps == 28
    assert again.run.trackers == ("wandb", "tensorboard")


# Wrong keys, types and values.
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.iteration=3", r"unknown key 'train.iteration'; did you mean 'iterations'\?"),
        ("algoritm.kind=flow_grpo", r"unknown key 'algoritm'; did you mean 'algorithm'\?"),
        ("rewards.0.wieght=1", r"unknown key 'rewards\[0\].wieght'; did you mean 'weight'\?"),
        ("train.lr='fast'", r"train.lr must be a number, got 'fast' \(str\)"),
        ("train.groups=2.0", r"train.groups must be a whole number, got 2.0 \(float\)"),
        (f"run.seed={2**63}", "run.seed must be a whole number of at most 64 bits"),
        (f"train.lr={10**400}", "train.lr must be "),
        ("train.groups=true", "train.groups must be a whole number, got True"),
        ("train.lr=true", "train.lr must be a number, got True"),
        ("prompts.weights={two='3'}", r"prompts.weights.two must be a number, got '3' \(str\)"),
        ("run.folder=3", "run.folder must be a string, got 3"),
        ("algorithm.shared_noise=1", "algorithm.shared_noise must be true or false, got 1"),
        ("train.lr=nan", "train.lr must be finite, got nan"),
        ("loss.clip_range=inf", "loss.clip_range must be finite"),
        ("train=5", "train must be a table, got 5"),
        ("rewards=5", "rewards must be a list, got 5"),
        ("run.trackers=wandb", "run.trackers must be a list, got 'wandb'"),
        ("rewards.0.options=5", r"rewards\[0\].options must be a table, got 5"),
        ("loss.kl=velocty", r"loss.kl must be one of 'exact'.*did you mean 'velocity'\?"),
        ("algorithm.kind=flow_grop", r"algorithm.kind must be one of .*did you mean 'flow_grpo'\?"),
        ("algorithm.transition={noise_level = 1.0}", "algorithm.transition needs a kind: one of"),
        ("algorithm.kind=5", "algorithm.kind must be one of .* got 5"),
        (
            "algorithm.kind='nowhere:X'",
            "algorithm.kind: 'nowhere:X': there is no module 'nowhere'; run the command in the folder that contains it",
        ),
        ("algorithm.kind='..math:pi'", "algorithm.kind: '..math:pi' is no import path"),
        ("algorithm.kind='math:pi'", "algorithm.kind: 'math:pi' is not a dataclass"),
        ("algorithm.transition=cps", r"transition must be a table with a kind \('flow_sde'"),
        ("sampling.guidance_scale=high", "sampling.guidance_scale must be a number, got 'high'"),
    ],
)
def test_wrong_keys_types_and_values(minimal, setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(minimal, [setting])
    assert str(caught.value).startswith(f"--set {setting}: ")


def test_a_fault_of_the_file_is_not_the_settings(minimal):
    Path(minimal).write_text(MINIMAL.replace("iterations = 3", "iteration = 3"))
    with pytest.raises(ConfigError) as caught:
        load(minimal, ["train.lr=1e-4"])
    assert str(caught.value).startswith(f"{minimal}:13: ")
    # The missing key is the misspelt one, which is not reported a second time.
    assert len(str(caught.value).splitlines()) == 1


def test_all_faults_are_reported_each_with_its_line_or_setting(minimal):
    text = MINIMAL.replace("groups = 6", "groups = 6.5").replace('folder = "runs/x"', "sed = 1")
    Path(minimal).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(minimal, ["loss.kl=velocty"])
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        f"{minimal}:16",
        "--set loss.kl=velocty",
        f"{minimal}:14",
        f"{minimal}:15",
    ]
    assert "unknown key 'run.sed'; did you mean 'seed'?" in str(caught.value)
    assert "key 'run.folder' is missing" in str(caught.value)


SPREAD = """\
# A comment with a.b = 1.
a = 1

[table]  # text = 3
text = \"\"\"
b = 2
\"\"\"
list = [
    {b = 1},
    # c = 5
    {c = 2},
]
inner.x.y = 1
[[entries]]
name = "first"
[[entries]]
name = "second"
[entries.options]
z = 3
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("a",), 2),
        (("table",), 4),
        (("table", "text"), 5),
        (("table", "list", 0, "b"), 9),
        (("table", "inner", "x", "y"), 13),
        (("entries", 0, "name"), 15),
        (("entries", 1, "name"), 17),
        (("entries", 1, "options", "z"), 19),
        (("entries", 1, "options", "absent"), 18),
        (("table", "absent"), 4),
        (("absent",), 1),
    ],
)
def test_the_line_of_a_key(location, line):
    assert line_of(SPREAD, location) == line


def test_a_missing_key_is_named_with_its_meaning(minimal):
    Path(minimal).write_text(MINIMAL.replace("iterations = 3", ""))
    with pytest.raises(ConfigError, match=r"'train.iterations' is missing: Rollouts"):
        load(minimal)
    Path(minimal).write_text(MINIMAL.replace('[run]\nfolder = "runs/x"', ""))
    with pytest.raises(ConfigError, match="'run' is missing"):
        load(minimal)


def test_old_names_are_answered_with_the_new_ones(minimal):
    diversity = "flowgrpo.shapes.rewards:Diversity"
    with pytest.raises(ConfigError, match=r"'evaluation.measures': it is .*'evaluation.metrics'"):
        load(minimal, [f"evaluation.measures=['{diversity}']"])
    Path(minimal).write_text(MINIMAL.replace("jpeg_size", "flowgrpo.frames:FrameMean"))
    with pytest.raises(ConfigError) as caught:
        load(minimal, ["train.lr=1e-4"])
    assert str(caught.value) == (
        f"{minimal}:8: rewards[0].model: 'flowgrpo.frames:FrameMean' has moved; "
        "write 'flowgrpo.rewards.frames:FrameMean'"
    )
    with pytest.raises(
        ConfigError, match=r"rewards\[0\].model: 'flow_grpo_server' was removed: .*; docs"
    ):
        load(minimal, ["rewards=[{model = 'flow_grpo_server'}]"])
    # Only a reward model has such a name.
    assert not [*old_names({"run": {"folder": "flow_grpo_server"}})]


def test_renamed_keys_and_modules_exist():
    for old, new in RENAMED_KEYS.items():
        assert explain(Config, new)
        with pytest.raises(ConfigError):
            explain(Config, old)
    for old, new in MOVED_MODULES.items():
        assert importlib.util.find_spec(new)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(old)


def test_bad_toml_names_the_file_and_the_line(minimal):
    Path(minimal).write_text("[model]\npath = shapes\n")
    with pytest.raises(ConfigError, match=r"minimal.toml: not valid TOML: .*line 2"):
        load(minimal)
    Path(minimal).write_text("# one\n# caf\u00e9\n", encoding="latin-1")
    with pytest.raises(ConfigError, match=r"minimal.toml:2: not UTF-8"):
        load(minimal)


def test_a_setting_that_makes_a_new_table_is_named(minimal):
    for setting in ("trian.lr.peak=1", ".lr=1"):
        with pytest.raises(ConfigError, match=rf"^--set {setting}: unknown key"):
            load(minimal, ["train.lr=1e-4", setting])


def test_a_run_directory_is_answered_with_its_configuration(minimal):
    folder = Path(minimal).parent / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("")
    with pytest.raises(IsADirectoryError, match=r"run is a folder; .* is .*run/config.toml"):
        load(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:", "module faulty cannot be imported: SyntaxError: .*faulty.py, line 1"),
        ("\n1 / 0", r"cannot be imported: ZeroDivisionError: .*\(.*faulty.py, line 2\)"),
        ("import not_here", "there is no module 'not_here', which faulty imports"),
        ("from json import nothing", "cannot import name 'nothing'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_sentence(
    minimal, tmp_path, monkeypatch, source, message
):
    (tmp_path / "faulty.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^--set algorithm=.*algorithm.kind: .*{message}"):
        load(minimal, ["algorithm={kind = 'faulty:Mine'}"])


@pytest.mark.parametrize("path", ["faulty", "faulty:", ":Mine"])
def test_a_half_import_path_is_refused(path):
    with pytest.raises(ValueError, match=r"is no import path; write 'package.module:name'"):
        import_path(path)


def test_files_are_found_by_name_from_any_folder_and_nearly_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("quickstart") == find("configs/quickstart.toml")
    with pytest.raises(FileNotFoundError, match=r"quikstart; did you mean 'quickstart'\?"):
        find("quikstart")
    with pytest.raises(FileNotFoundError, match=r"did you mean 'prompts/shapes_train.jsonl'\?"):
        find("prompts/shape_train.jsonl")


# Contradictions.
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["train.updates=4"],
            r"train.groups = 6 cannot be .* nearest that can is train.groups = 8",
        ),
        (
            ["train.updates=5", "train.split=samples", "algorithm.group_size=4"],
            "group_size = 4 cannot be divided among train.updates = 5",
        ),
        (
            ["train.updates=9", "train.split=steps", "algorithm.steps={kind='window', size=2}"],
            "cannot divide 2 trained steps among train.updates = 9",
        ),
        (["train.ema_every=0"], "train.ema_every must be at least 1, got 0"),
        (["sampling.shift=0"], "sampling.shift must be at least"),
        (["algorithm.group_size=1"], "algorithm.group_size must be at least 2, got 1"),
        (["rewards.0.weight=0"], "every weight is 0"),
        (["train.lr=0"], "train.lr must be at least"),
        (
            ["sampling.num_steps=1"],
            "at least 2, got 1: a single step ends at the data without noise",
        ),
        (["sampling.num_steps=0"], "sampling.num_steps must be at least 1, got 0"),
        (["sampling.sigmas=[1.0, 0.5]"], r"sampling.sigmas has 2 values and num_steps is 10"),
        (
            ['algorithm.steps={kind = "window", start = 3, size = 2}', "sampling.num_steps=5"],
            "algorithm: steps: .* steps 3 to 4, but with num_steps = 5 only steps 0 to 3",
        ),
        (["algorithm.kind=dance_grpo", "algorithm.best_of=3"], "best_of must be even .* got 3"),
        (
            ["algorithm.kind=dance_grpo", "algorithm.best_of=8", "algorithm.group_size=4"],
            "at most group_size = 4, got 8",
        ),
        (["algorithm.kind=dance_grpo", "algorithm.timestep_fraction=0.0"], r"in \(0, 1\], got 0.0"),
        (["loss.kl=velocity"], "loss.kl = 'velocity' is set but loss.kl_coef is 0"),
        (["loss.kl=flow_grpo"], "loss.kl = 'flow_grpo' is set but loss.kl_coef is 0"),
        (["evaluation.images_during=-1"], "evaluation.images_during must be at least 0, got -1"),
        (
            ["evaluation.regimes=[{images=4}]"],
            r"evaluation.regimes\[0\] samples like the evaluation itself; set num_steps",
        ),
        (
            ["evaluation.regimes=[{num_steps=5}, {num_steps=5, label='five'}]"],
            r"regimes\[1\] samples like evaluation.regimes\[0\]",
        ),
        (
            ["evaluation.regimes=[{num_steps=5, label='a'}, {num_steps=6, label='a'}]"],
            "two regimes 'a'; give one a label",
        ),
        (["evaluation.regimes=[{num_steps=5, label='a.b'}]"], "must consist of letters, .* 'a.b'"),
        (["evaluation.regimes=[{num_steps=0}]"], r"regimes\[0\]: num_steps must be at least 1"),
        (
            ["evaluation.regimes=[{call={num_inference_steps=5}}]"],
            r"regimes\[0\]: .*num_inference_steps",
        ),
        (["model.weights={kind='lora', rank=0}"], "model.weights.rank must be at least 1, got 0"),
        (
            ["algorithm.transition={kind='cps', noise_level=1.5}"],
            r"noise_level must be in \(0, 1\] for 'cps', got 1.5",
        ),
        (["algorithm.transition={kind='ddim', eta=2.0}"], r"eta must be in \(0, 1\] .* got 2.0"),
    ],
)
def test_contradictions_are_found_before_a_model_is_loaded(minimal, settings, message):
    config = load(minimal, settings)
    with pytest.raises(ConfigError, match=message):
        config.check()


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.transition={kind = 'ode'}",
        "algorithm.transition={kind = 'flow_sde', noise_level = 0.0}",
        "algorithm.steps={kind = 'sliding_window', every = 0}",
        "algorithm.steps={kind = 'sliding_window', stride = 0}",
        "algorithm.steps={kind = 'random_window', size = 0}",
        "algorithm.advantage.clip=0.0",
        "algorithm.advantage.epsilon=-1.0",
        "train.ema_decay=1.0",
        "train.betas=[0.9]",
        "failures.retries=-1",
    ],
)
def test_settings_that_cannot_train_are_refused(minimal, setting):
    config = load(minimal, [setting, "sampling.num_steps=10"])
    with pytest.raises(ConfigError):
        config.check()


def test_groups_must_divide_among_processes(minimal):
    config = load(minimal)
    config.check(num_processes=3)
    with pytest.raises(ConfigError, match=r"4 processes .* nearest that can is train.groups = 8"):
        config.check(num_processes=4)
    assert geometry(config, 3)["processes"] == "3, 2 groups on each"


# Settings from the command line.
def test_set_reads_toml_values_and_strings(minimal):
    config = load(minimal, ["train.lr=1e-3", "run.folder=runs/y=z", "train.groups = 8"])
    assert config.train.lr == 1e-3
    assert config.run.folder == "runs/y=z"
    assert config.train.groups == 8


def test_python_gives_settings_as_texts_or_as_a_mapping(minimal):
    settings = {
        "train.lr": 1e-4,
        "run.folder": Path("runs/'a\"b"),
        "evaluation.metrics": ("a:b",),
        "prompts.balance": "tag",
        "prompts.weights": {"x y": 2.0},
        "memory.vae_tiling": True,
        "rewards.0.options": {"fps": 8, "names": ["a"]},
    }
    config = load(minimal, settings)
    assert (config.train.lr, config.run.folder) == (1e-4, "runs/'a\"b")
    assert (config.evaluation.metrics, config.prompts.weights) == (("a:b",), {"x y": 2.0})
    assert config.memory.vae_tiling is True
    assert config.rewards[0].options == {"fps": 8, "names": ["a"]}
    with pytest.raises(ConfigError, match=r"--set train.lrr=0.5: unknown key 'train.lrr'"):
        load(minimal, {"train.lrr": 0.5})
    with pytest.raises(ConfigError, match=r"a list or a dictionary, got one text; write \['train"):
        load(minimal, "train.lr=1e-4")
    with pytest.raises(ConfigError, match=r"'train\.lr' must be a number, .* got None"):
        load(minimal, {"train.lr": None})
    with pytest.raises(TypeError, match=r"flowgrpo\.train\(flowgrpo\.load\('mine\.toml'\)\)"):
        inspect.unwrap(flowgrpo.train)("mine.toml")  # without the check of annotations of the tests


def test_set_reaches_into_lists_and_new_tables(minimal):
    config = load(minimal, ["rewards.0.weight=0.25", "loss.kl_coef=0.1"])
    assert config.rewards[0].weight == 0.25
    assert config.loss.kl_coef == 0.1


def test_setting_a_kind_drops_the_keys_of_the_old_one(minimal):
    config = load(minimal, ["algorithm.kind=dance_grpo"])
    assert config.algorithm.group_size == 12  # the new kind's own default, not the file's 4
    again = load(minimal, ["algorithm.kind=flow_grpo"])
    assert again.algorithm.group_size == 4


def test_override_leaves_its_argument_alone():
    table: dict[str, Any] = {"a": {"b": [{"c": 1}]}}
    assert override(table, ["a.b.0.c=2"]) == {"a": {"b": [{"c": 2}]}}
    assert table == {"a": {"b": [{"c": 1}]}}


@pytest.mark.parametrize(
    "setting",
    [
        "train.lr",
        "run.folder.x=1",
        "rewards.7.weight=1",
        "rewards.first.weight=1",
        "rewards.0=x",
        "rewards.².weight=1",
    ],
)
def test_settings_that_lead_nowhere_are_refused(minimal, setting):
    with pytest.raises(ConfigError, match="--set"):
        load(minimal, [setting])


# Classes from outside.
OUTSIDE = """
from collections.abc import Mapping
from dataclasses import dataclass, field
from flowgrpo.algorithms import FlowGRPO
from flowgrpo.core.transitions import Gaussian

@dataclass(frozen=True, kw_only=True)
class Half:
    noise_level: float = 0.5
    def __call__(self, x, prediction, step):
        return Gaussian(x, self.noise_level)

@dataclass(frozen=True, kw_only=True)
class Mine(FlowGRPO):
    kind: str = "mine"
    sizes: list[int | float] = ()
    names: Mapping[str, int] = field(default_factory=dict)
    anything: object = None
"""


def test_algorithms_and_transitions_from_outside_are_named_by_their_path(
    minimal, tmp_path, monkeypatch
):
    (tmp_path / "outside_flowgrpo.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    transition = "{kind = 'outside_flowgrpo:Half', noise_level = 0.25}"
    algorithm = f"{{kind = 'outside_flowgrpo:Mine', group_size = 6, transition = {transition}}}"
    config = load(minimal, [f"algorithm={algorithm}"])
    assert type(config.algorithm).__name__ == "Mine"
    assert config.algorithm.group_size == 6
    assert config.algorithm.transition.noise_level == 0.25
    save(config, tmp_path / "config.toml")
    assert load(str(tmp_path / "config.toml")) == config
    given = "sizes = [1, 2.5], names = {a = 1}, anything = 3"
    config = load(minimal, [f"algorithm={{kind = 'outside_flowgrpo:Mine', {given}}}"])
    assert (config.algorithm.sizes, config.algorithm.names) == ((1, 2.5), {"a": 1})
    for wrong, message in (
        ("grup_size = 6", r"unknown key 'algorithm.grup_size'; did you mean"),
        ("sizes = [1, 'b']", r"algorithm.sizes\[1\]"),
        ("names = 3", "algorithm.names must be a table, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(minimal, [f"algorithm={{kind = 'outside_flowgrpo:Mine', {wrong}}}"])


# Explanations.
def test_explain_reaches_nested_keys_and_all_kinds():
    text = explain(Config, "algorithm.transition.noise_level")
    assert "default 0.7" in text
    assert "default 0.3" in text
    assert "Angle" in text or "angle" in text
    assert "required" in explain(Config, "train.iterations")
    assert "allowed: 'exact', 'flow_grpo', 'velocity'" in explain(Config, "loss.kl")
    assert "weight" in explain(Config, "rewards")
    # A table that several kinds share is explained once.
    assert explain(Config, "algorithm.previews.num_steps").count("(Previews;") == 1


def test_explain_an_unknown_key():
    with pytest.raises(ConfigError, match=r"'train.iteration'; did you mean 'iterations'\?"):
        explain(Config, "train.iteration")
    with pytest.raises(ConfigError, match="known below the top: algorithm, "):
        explain(Config, "x")


# The JSON schema for editors.
@pytest.fixture(scope="module", params=[Draft202012Validator, Draft7Validator])
def validator(request) -> Draft202012Validator | Draft7Validator:
    """Both, because Taplo reads every schema as draft 7, which ignores keys beside a ``$ref``."""
    schema = json_schema(Config)
    request.param.check_schema(schema)
    return request.param(schema)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_file_is_valid_by_the_json_schema(name, validator):
    validator.validate(tomllib.loads((ROOT / "configs" / name).read_text()))


@pytest.mark.parametrize(
    ("setting", "valid"),
    [
        ("train.lr=1", True),
        ("algorithm={kind = 'mine:Own', whatever = 1}", True),
        ("algorithm.advantage.std='group'", True),  # without a kind, as its union has a default
        ("algorithm.transition={kind = 'cps', noise_level = 0.5}", True),
        ("train.iteration=3", False),
        ("train.lr='fast'", False),
        ("train.groups=2.5", False),
        ("loss.kl='velocty'", False),
        ("algorithm.kind='flow_grop'", False),
        ("algorithm.grup_size=3", False),
        ("algorithm.transition={noise_level = 0.5}", False),
        ("algorithm.transition={kind = 'cps', noise = 0.5}", False),
        ("rewards.0.wieght=1.0", False),
        ("rewards={model = 'jpeg_size'}", False),
    ],
)
def test_the_json_schema_is_as_strict_as_the_reader(minimal, setting, valid, validator):
    table = override(tomllib.loads(MINIMAL), [setting])
    assert validator.is_valid(table) == valid
    if "mine:Own" not in setting:
        try:
            read(Config, table)
        except ConfigError:
            assert not valid
        else:
            assert valid


def test_the_json_schema_explains_keys_and_gives_defaults():
    schema = json_schema(Config)
    train = schema["$defs"]["Train"]
    assert train["properties"]["lr"] == {
        "type": "number",
        "description": "Peak learning rate of AdamW.",
        "default": 1e-4,
    }
    assert set(train["required"]) == {"iterations", "groups"}
    assert schema["$defs"]["Evaluation"]["properties"]["num_steps"]["type"] == "integer"
    assert "default" not in train["properties"]["iterations"]
    assert "default" not in schema["$defs"]["FlowGRPO"]["properties"]["kind"]
    # A file needs all tables or another file that has them.
    validator = Draft202012Validator(schema)
    assert validator.is_valid({"extends": "quickstart", "sampling": {"num_steps": 3}})
    assert not validator.is_valid({"sampling": {"num_steps": 3}})
    assert not validator.is_valid({"extends": 3})
    assert train["description"] == "Length of the run, batch geometry and optimizer."
    json.dumps(schema)


def test_the_schema_is_imported_without_heavy_packages():
    code = (
        "import sys, flowgrpo.config.schema\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'jaxtyping', 'numpy', 'PIL'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
        "from flowgrpo.config import dump, load\n"
        "dump(load('quickstart_flow_grpo', ['algorithm.kind=vgpo']))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_torch_is_deferred_and_then_real():
    """Settings first, torch later: copies, pickles and compiled code get the module itself."""
    code = (
        "import copy, pickle, sys\n"
        "from flowgrpo.core import tensors\n"
        "from flowgrpo.losses import clipped\n"
        "deferred = tensors.torch\n"
        "assert not hasattr(deferred, '__file__') and 'torch' not in sys.modules\n"
        "x = deferred.zeros(3)\n"
        "import torch\n"
        "assert tensors.torch is clipped.torch is torch\n"
        "assert copy.deepcopy(deferred) is pickle.loads(pickle.dumps(deferred)) is torch\n"
        "compiled = torch.compile(clipped.clipped_surrogate, backend='eager', fullgraph=True)\n"
        "assert torch.equal(compiled(x, x + 1, 0.1, 0.1), clipped.clipped_surrogate(x, x + 1, 0.1, 0.1))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def config_classes() -> list[type]:
    found: list[type] = [Config]
    for cls in found:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            found += [c for c in dataclasses_in(hints[field.name]) if c not in found]
    return found


@pytest.mark.parametrize("cls", config_classes(), ids=lambda c: c.__name__)
def test_every_field_is_documented(cls):
    texts = documentation(cls)
    undocumented = [
        f.name for f in dataclasses.fields(cls) if f.name != "kind" and not texts[f.name]
    ]
    assert not undocumented
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")


LEAST = {
    "sampling.num_steps": 1, "algorithm.group_size": 1, "train.iterations": 1, "train.groups": 1,
    "train.updates": 1, "train.rollout_batch": 1, "train.train_batch": 1, "train.warmup": 0,
    "train.ema_decay": 0, "train.ema_every": 1, "train.weight_decay": 0, "train.spike_factor": 0,
    "failures.retries": 0, "failures.wait": 0, "evaluation.every": 0, "evaluation.images": 1,
    "evaluation.images_during": 0, "evaluation.grid_prompts": 1, "evaluation.grid_samples": 1,
    "evaluation.inspected_prompts": 0, "train.monitor_states": 0, "failures.max_rate": 0,
    "run.checkpoint_every": 1, "run.checkpoint_minutes": 0, "run.keep_checkpoints": 1,
    "run.rank_timeout_minutes": 0.01,
}  # fmt: skip


def test_the_smallest_allowed_values():
    """Each bound holds for its own key, at the value of this table."""
    for key, least in LEAST.items():
        assert BOUNDS[key][0] == least, key


def test_a_regime_changes_what_it_names_and_is_named_by_it():
    settings = ["sampling.call={a=1}", "evaluation.num_steps=9", "sampling.guidance_scale=1.0"]
    regimes = (
        "evaluation.regimes=[{guidance_scale=3.0, num_steps=28}, {call={b=2.5}, label='mine'}]"
    )
    config = load("quickstart_flow_grpo", [*settings, regimes])
    one, other = config.evaluation.regimes
    usual = config.evaluation_sampling()
    guided = dataclasses.replace(usual, num_steps=28, guidance_scale=3.0)
    assert (one.tag, one.sampling(usual)) == ("steps_28_guidance_3", guided)
    assert other.sampling(usual) == dataclasses.replace(usual, call={"a": 1, "b": 2.5})
    assert other.tag == "mine"
    assert dataclasses.replace(other, label="").tag == "b_2p5"
    # The quick start evaluates guidance 3, and can be trained with it.
    load("quickstart_flow_grpo", ["sampling.guidance_scale=3.0"]).check()


def test_a_loss_on_the_moving_average_needs_one():
    loss = "loss={kind='tests.test_objectives:Distances'}"
    load("quickstart_flow_grpo", [loss, "train.ema_decay=0.9"]).check()
    with pytest.raises(ConfigError, match="Distances needs a moving average of the weights"):
        load("quickstart_flow_grpo", [loss, "train.ema_decay=0"]).check()
