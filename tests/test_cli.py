"""The command line as a whole: commands are found, misuse is answered, and help is quick."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowgrpo
from flowgrpo.algorithms import VGPO
from flowgrpo.cli import main
from flowgrpo.cli.common import prompts_of
from flowgrpo.cli.main import commands, parser
from flowgrpo.config import Config
from flowgrpo.config.reference import json_schema
from flowgrpo.data.prompt_files import SUFFIXES, PromptError

ROOT = Path(__file__).parents[1]


def test_every_file_is_a_command_and_explains_itself(capsys):
    names = {p.stem.replace("_", "-") for p in (ROOT / "flowgrpo" / "cli").glob("*.py")}
    assert {*commands()} == names - {"--init--", "common", "local-pages", "main"}
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, command in commands().items():
        assert f" {name} {command.SUMMARY}" in text
        line = command.EXAMPLE.splitlines()[0]
        program, *arguments = shlex.split(line)
        assert program == "flowgrpo"
        assert parser(commands()).parse_args(arguments)


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 2
    assert "first steps:" in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"flowgrpo {flowgrpo.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "quickstart"], "unknown command 'trian'; did you mean 'train'?"),
        (["serve_reward", "x"], "unknown command 'serve_reward'; did you mean 'serve-reward'?"),
        (["train"], "required: config"),
        (
            ["train", "quickstart_flow_grpo", "--dryrun"],
            "unrecognized arguments: --dryrun; did you mean '--dry-run'?",
        ),
        (["sample", "m", "a", "--out", "x", "--step=3", "--sede=1"], "did you mean '--seed'?"),
        (["export", "run", "--out", "x", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["export", "run", "--out", "x", "--format", "comfui"], "did you mean 'comfyui'?"),
        (["config", "explian", "train.lr"], "did you mean 'explain'?"),
    ],
)
def test_arguments_that_cannot_be_parsed(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "show"], "config show needs a configuration"),
        (["config", "explain"], "config explain needs a key"),
        (["sample", "shapes", "a cat", "--out", "x", "--samples", "0"], "--samples must be at"),
        (["sample", "shapes", "a cat", "--out", "x", "--size", "big"], "--size must be WIDTHxHEI"),
        (["doctor", "shapes", "--call", "eta"], "--call expected KEY=VALUE, got 'eta'"),
        (
            ["doctor", "shapes", "--call", "guidance_scale=3"],
            "--call guidance_scale: use --guidance",
        ),
        (["sample", "shapes", "a cat", "--out", "x", "--steps", "0"], "--steps must be at least 1"),
        (["sample", "shapes", " ", "--out", "x"], "a prompt is empty"),
        (["train", "quickstart_flow_grpo", "--memory-gb", "24"], "--memory-gb is for --dry-run"),
        (["grid", "run", "--out", "x.pgn"], "--out must end in .png, .webp or .html, got 'x.pgn'"),
        (["grid", "run", "--out", "x.png", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["inspect", "run", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["bench", "shapes"], "bench needs --model"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("serve-reward", "--dry-run", "--reward-option", "comfyui"):
        assert word in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_configuration_is_answered_with_status_1(capsys):
    assert main(["train", "quickstart_flow_grpo", "--set", "train.iteration=3"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flowgrpo: --set train.iteration=3: unknown key 'train.iteration'; did")


QUICK = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from flowgrpo.cli import main
with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    for command in {commands!r}:
        try:
            main(command)
        except SystemExit:
            pass
found = {{{packages}}} & {{*sys.modules}}
assert not found, found
"""


@pytest.mark.parametrize(
    ("commands", "packages"),
    [
        (
            [["--help"], ["train", "--help"], ["sample", "--help"], ["trian"], ["config", "list"]],
            "'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'rich', 'pydantic_core', 'flowgrpo.config.schema'",
        ),
        (
            [["config", "explain", "train.lr"]],
            "'torch', 'diffusers', 'numpy', 'rich', 'pydantic_core'",
        ),
        (
            [["config", "show", "quickstart"], ["train", "quickstart_flow_grpo", "--set", "x=1"]],
            "'torch', 'diffusers', 'transformers', 'jaxtyping', 'numpy', 'PIL', 'rich', 'pydantic'",
        ),
    ],
    ids=["help", "explain", "read"],
)
def test_answers_without_a_model_import_nothing_heavy(commands, packages):
    code = QUICK.format(commands=commands, packages=packages)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FOREIGN = """
from dataclasses import dataclass
from flowgrpo.losses.base import Loss

@dataclass(frozen=True)
class NoPart:
    size: int = 1

@dataclass(frozen=True)
class NoFormula(Loss):
    pass
"""
ANSWERS = {
    "algorithm={kind = 'foreign:NoPart'}": "flowgrpo: algorithm: NoPart has no group_size, transition, ",
    "algorithm.transition={kind = 'foreign:NoPart'}": "flowgrpo: algorithm.transition: NoPart has no __call__",
    "loss={kind = 'foreign:NoPart'}": "flowgrpo: loss: NoPart has no __call__, metrics, ",
    "loss={kind = 'foreign:NoFormula'}": "flowgrpo: loss: NoFormula has no __call__; inherit from ",
    "rewards=[{model = 'jpeg_siz'}]": "flowgrpo: rewards[0].model: unknown reward 'jpeg_siz'; did you mean",
    "prompts.train=nowhere.txt": "flowgrpo: prompts.train: no such file: nowhere.txt",
}


def test_mistakes_in_training_are_answered_in_one_line_before_torch_is_imported(tmp_path):
    # In a process of its own, where no type checker of the tests comes first.
    (tmp_path / "foreign.py").write_text(FOREIGN)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from flowgrpo.cli import main\n"
        f"for setting in {[*ANSWERS]}:\n"
        "    assert main(['train', 'quickstart_flow_grpo', '--set', setting]) == 1\n"
        "assert not {'torch', 'diffusers', 'numpy'} & {*sys.modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for line, start in zip(lines, ANSWERS.values(), strict=True):
        assert line.startswith(start)


def test_a_reader_that_stops_early_is_no_error():
    code = "import sys; from flowgrpo.cli import main; sys.exit(main(['config', 'schema']))"
    program = [sys.executable, "-c", code]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.stderr is not None
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_config_list_show_explain_and_schema(tmp_path, capsys):
    assert main(["config", "list"]) == 0
    listed = capsys.readouterr().out
    assert "quickstart               Trains the model" in listed
    assert ": [" not in listed
    assert main(["config", "show", "quickstart", "--set", "train.lr=0.5"]) == 0
    (tmp_path / "shown.toml").write_text(capsys.readouterr().out)
    assert flowgrpo.load(str(tmp_path / "shown.toml")) == flowgrpo.load("quickstart", ["train.lr=0.5"])  # fmt: skip
    assert main(["config", "explain", "train.lr"]) == 0
    assert "Peak learning rate" in capsys.readouterr().out
    assert main(["config", "explain", "algorithm.kind"]) == 0
    assert f"    {VGPO.__doc__.splitlines()[0]}\n    allowed: 'vgpo'" in capsys.readouterr().out
    assert main(["config", "schema", "--out", str(tmp_path / "schema.json")]) == 0
    assert json.loads((tmp_path / "schema.json").read_text()) == json_schema(Config)
    capsys.readouterr()
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(Config)


# Prompts on the command line.
def write_prompts(path: Path) -> Path:
    rows = [{"prompt": "a red cube", "tag": "colors"}, {"prompt": "two dogs", "tag": "counting"}]
    if path.suffix == ".txt":
        path.write_text("a red cube\ntwo dogs\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif path.suffix == ".csv":
        path.write_text("prompt,tag\na red cube,colors\ntwo dogs,counting\n")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_prompt_file_is_read(suffix, tmp_path):
    path = write_prompts(tmp_path / f"prompts{suffix}")
    prompts = prompts_of(["a blue ball", str(path)])
    assert [p.text for p in prompts] == ["a blue ball", "a red cube", "two dogs"]


def test_a_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a red cube"}]).save_to_disk(tmp_path / "saved")
    assert [p.text for p in prompts_of([f"hf:{tmp_path / 'saved'}"])] == ["a red cube"]


def test_a_file_of_another_kind_is_no_prompt(tmp_path):
    (tmp_path / "prompts.tsv").write_text("a red cube\n")
    with pytest.raises(PromptError, match=r"unknown ending '.tsv'; known: .txt"):
        prompts_of([str(tmp_path / "prompts.tsv")])
    with pytest.raises(PromptError, match="the prompt has an unpaired surrogate"):
        prompts_of(["a \udc80 dog"])


@pytest.mark.parametrize("name", [*(f"nowhere{s}" for s in SUFFIXES), "hf:/no/such/dataset:train"])
def test_a_missing_prompt_file_is_no_prompt(name):
    with pytest.raises((FileNotFoundError, PromptError), match=r"nowhere|cannot be loaded"):
        prompts_of([name])


def test_sample_refuses_a_missing_prompt_file_before_it_loads_a_model(tmp_path, capsys):
    out = tmp_path / "images"
    assert main(["sample", "no-such-model", "nowhere.parquet", "--out", str(out)]) == 1
    assert "no such file: nowhere.parquet" in capsys.readouterr().err
    assert not out.exists()
