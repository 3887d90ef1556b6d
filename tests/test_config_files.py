"""Configurations that extend others, and configurations that are begun for a model."""

import json
import tomllib
from pathlib import Path

import pytest

import flowgrpo
from flowgrpo.cli import main
from flowgrpo.config import ConfigError
from flowgrpo.config.files import find
from flowgrpo.config.starter import recipes_for, similar_recipes, starter

ROOT = Path(__file__).parents[1]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_extends_another_one(tmp_path):
    write(
        tmp_path, "base.toml", 'extends = "quickstart_flow_grpo"\n[train]\nlr = 0.5\nwarmup = 3\n'
    )
    mine = write(
        tmp_path,
        "mine.toml",
        'extends = "base.toml"\n[train]\nlr = 0.25\n[run]\nfolder = "runs/mine"\n'
        '[algorithm.transition]\nkind = "cps"\nnoise_level = 0.9\n'
        '[[rewards]]\nmodel = "jpeg_size"\n',
    )
    quickstart, config = flowgrpo.load("quickstart_flow_grpo"), flowgrpo.load(mine)
    assert (config.train.lr, config.train.warmup) == (0.25, 3)
    assert config.train.groups == quickstart.train.groups
    assert config.model == quickstart.model
    # Another kind takes the place of the whole table, a list of the whole list.
    assert type(config.algorithm.transition).__name__ == "CPS"
    assert config.algorithm.transition.noise_level == 0.9
    assert [r.model for r in config.rewards] == ["jpeg_size"]
    assert flowgrpo.load(mine, ["train.lr=1.0"]).train.lr == 1.0


def test_errors_name_the_file_that_has_the_key(tmp_path):
    base = write(tmp_path, "base.toml", 'extends = "quickstart_flow_grpo"\n[train]\nlrr = 0.5\n')
    mine = write(tmp_path, "mine.toml", 'extends = "base.toml"\n[train]\ngroups = "x"\n')
    with pytest.raises(ConfigError) as caught:
        flowgrpo.load(mine)
    assert sorted(caught.value.args[0].splitlines()) == [
        f"{base}:3: unknown key 'train.lrr'; did you mean 'lr'? (known here: "
        + caught.value.args[0].split("(known here: ")[1].split(")")[0]
        + ")",
        f"{mine}:3: train.groups must be a whole number, got 'x' (str)",
    ]


def test_a_file_with_the_same_ending_is_not_suggested():
    """Recipes for editing name prompt files that do not ship with flowgrpo."""
    with pytest.raises(FileNotFoundError, match=r"^no such file: edits_train.jsonl$"):
        find("edits_train.jsonl")
    with pytest.raises(FileNotFoundError, match="did you mean 'sd35_medium_ocr'"):
        find("sd35_ocr")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            '"quikstart"',
            r"mine.toml:1: extends: no such file: quikstart; did you mean 'quickstart'",
        ),
        ('"mine.toml"', r"mine.toml:1: extends = 'mine.toml' comes back to a file that extends it"),
        ("3", r"mine.toml:1: extends must be the name of a file, got 3"),
    ],
)
def test_what_cannot_be_extended_is_said(value, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        flowgrpo.load(write(tmp_path, "mine.toml", f"extends = {value}\n"))


def test_a_configuration_is_begun_for_every_model_of_the_recipes(tmp_path):
    files = sorted((ROOT / "configs").glob("*.toml"))
    models = {flowgrpo.load(str(f)).model.path for f in files}
    for model in sorted(models):
        recipe = recipes_for(model)[0]
        text = starter(model, recipe, {"train.lr": 0.125}, ["a note"])
        path = write(tmp_path, "mine.toml", text)
        config, published = flowgrpo.load(path), flowgrpo.load(recipe)
        assert config.train.lr == 0.125
        assert (config.model, config.algorithm) == (published.model, published.algorithm)
        assert (config.sampling, config.loss) == (published.sampling, published.loss)
        assert config.rewards == published.rewards
        assert "# a note\n" in text
        # Every key of a settings class has its meaning above it.
        lines = text.splitlines()
        row = next(i for i, line in enumerate(lines) if line.startswith("groups ="))
        assert lines[row - 1].startswith("# ")
        assert all(len(line) <= 120 for line in lines if line.startswith("#"))


def test_a_folder_is_recognised_by_its_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert recipes_for(str(tmp_path))[0] == "flux1_dev_24gb"
    assert recipes_for("nobody/nothing") == []


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("black-forest-labs/FLUX.1-Kontext-dev", "flux1_dev_24gb"),
        ("black-forest-labs/FLUX.2-klein-4B", "flux2_klein_pref"),
        ("Qwen/Qwen-Image-Edit-2509", "qwen_image_edit_dance"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan21_t2v"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan21_t2v"),
        ("nobody/nothing", None),
    ],
)
def test_a_model_without_a_recipe_is_answered_with_those_of_its_family(model, recipe):
    assert recipes_for(model) == []
    assert next(iter(similar_recipes(model).values()), None) == recipe


def test_the_command(tmp_path, capsys):
    out = tmp_path / "mine.toml"
    command = ["config", "init", "shapes", "--out", str(out)]
    assert main([*command, "--set", "train.lr=0.5", "--memory-gb", "4"]) == 0
    table = tomllib.loads(out.read_text())
    assert table["train"]["lr"] == 0.5
    assert "GB, for a device of 4 GB." in out.read_text()
    assert main(command) == 2
    assert "mine.toml exists; choose another --out" in capsys.readouterr().err
    assert main(["config", "init", "nobody/nothing"]) == 2
    assert "no recipe for nobody/nothing. Begin with one for" in capsys.readouterr().err
    assert main(["config", "init", "nobody/nothing", "--recipe", "flux_fats"]) == 1
    assert "no recipe 'flux_fats'; did you mean 'flux_fast'?" in capsys.readouterr().err
    assert main(["config", "init", "nobody/nothing", "--recipe", "flux_fast"]) == 0
    assert 'path = "nobody/nothing"' in capsys.readouterr().out
    assert main(["config", "list", "--recipe", "x"]) == 2
    assert "--recipe is for config init" in capsys.readouterr().err
