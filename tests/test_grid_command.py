"""``flowgrpo grid`` with axes: which cell shows what, the settings in the picture, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowgrpo import config as configuration
from flowgrpo.cli import grid
from flowgrpo.cli.main import main
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation.grid_settings import (
    KEY,
    Axis,
    Cell,
    GridSettings,
    prompt_of,
    prompt_record,
)
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.training import checkpoints

START = Cell("m", "last", (), None, None, 0)


def settings_of(*axes: str, start: Cell = START, samples: int = 1) -> GridSettings:
    return GridSettings(start, tuple(Axis.parse(a) for a in axes), samples, None, [], False, {})


def test_the_first_axis_is_the_columns_and_the_second_the_rows():
    found = {(r, c): cell for r, c, cell in settings_of("guidance=1,3.5", "seed=7,8,9").cells()}
    assert len(found) == 6
    assert (found[2, 1].guidance, found[2, 1].seed) == (3.5, 9)
    assert (found[0, 1].guidance, found[0, 1].seed) == (3.5, 7)


@pytest.mark.parametrize("order", [("scale=0,0.5", "lora=a,b"), ("lora=a,b", "scale=0,0.5")])
def test_a_scale_applies_to_the_adapter_of_the_other_axis(order):
    found = [cell.loras for _, _, cell in settings_of(*order).cells()]
    assert sorted(found) == [("a:0.0",), ("a:0.5",), ("b:0.0",), ("b:0.5",)]
    (without, given) = [c.loras for _, _, c in settings_of("lora=none,a").cells()]
    assert (without, given) == ((), ("a",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gidance=1", "did you mean 'guidance'"),
        ("guidance", "without empty values"),
        ("guidance=1,,2", "without empty values"),
        ("guidance=1,x", "got 'x'"),
        ("guidance=1,nan", "got 'nan'"),
        ("steps=0", "got '0'"),
        ("seed=1.5", "got '1.5'"),
        ("checkpoint=lst", "did you mean 'last'"),
        ("seed=1,1", "there twice"),
    ],
)
def test_wrong_axes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Axis.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_of("seed=1", "steps=1", "guidance=1"), "at most two"),
        (settings_of("seed=1", "seed=2"), "both axes are seed"),
        (settings_of("scale=1"), "exactly one adapter"),
        (settings_of("lora=a", start=Cell("m", "last", ("x",), None, None, 0)), "remove --lora"),
        (settings_of("seed=1,2,3", samples=40), "1200 images, more than 1000"),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.check(10)
    settings_of("seed=1,2", samples=50).check(10)


def test_prompts_are_stored_unless_they_have_pictures_in_memory(tmp_path):
    picture = Image.new("RGB", (4, 4))
    picture.save(tmp_path / "a.png")
    prompt = Prompt("x", metadata={"tag": "t", "n": [1]}, images=[tmp_path / "a.png"], height=64)
    record = prompt_record(prompt)
    assert prompt_of(json.loads(json.dumps(record))) == prompt
    assert prompt_record(Prompt("x", images=[picture])) is None
    assert prompt_record(Prompt("x", call={"mask_image": tmp_path / "a.png"})) is None


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_grid_shows_its_cells_and_is_drawn_again_from_its_file(tiny, tmp_path, capsys):
    model = str(tiny("sd3"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog <b>\n")
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    arguments = [model, "--prompts", str(tmp_path / "prompts.txt"), "--samples", "2", "--reward"]
    arguments += ["size=jpeg_size", "--axis", "steps=1,2", "--axis", "seed=3,4"]
    assert main(["grid", *arguments, "--out", str(first)]) == 0
    (tmp_path / "prompts.txt").unlink()
    assert main(["grid", "--from", str(first), "--out", str(again)]) == 0
    assert (pixels(first) == pixels(again)).all()
    assert Image.open(first).text == Image.open(again).text
    settings = GridSettings.from_picture(again)
    assert [p["text"] for p in settings.prompts] == ["a cat", "a dog <b>"]
    prompts = [prompt_of(p) for p in settings.prompts]
    images, _ = grid._images(settings, prompts)
    assert sorted(images) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    policy = PipelinePolicy.from_pretrained(model, sampling=Sampling(num_steps=2))
    noise = SampleNoise([Random(4).at("grid", row, s) for row in (0, 1) for s in (0, 1)])
    expected = policy.images([p for p in prompts for _ in (0, 1)], noise)
    assert torch.allclose(images[1, 1], expected, atol=1e-5)
    assert not torch.allclose(images[1, 0], expected, atol=1e-4)
    assert not torch.allclose(images[0, 1], expected, atol=1e-4)
    capsys.readouterr()
    assert main(["grid", "--from", str(first), "--out", str(again), "--steps", "3"]) == 2
    assert "remove --steps" in capsys.readouterr().err


def run_with_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    configuration.save(configuration.load("quickstart", [f"run.folder={folder}"]), folder / "config.toml")  # fmt: skip
    checkpoints.save(folder / "checkpoints" / "000012", {"weights": {}}, {"iteration": 12})
    return folder


def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "_load", lambda *_: pytest.fail("a model was loaded"))
    run = str(run_with_checkpoint(tmp_path / "run"))
    plain, newer, changed = (tmp_path / f"{n}.png" for n in ("plain", "newer", "changed"))
    picture = Image.new("RGB", (4, 4))
    picture.save(plain)

    def save(path: Path, text: str) -> None:
        info = PngInfo()
        info.add_itxt(KEY, text)
        picture.save(path, pnginfo=info)

    save(newer, '{"format": 99}')
    record = [prompt_record(Prompt("a cat"))]
    start = Cell(run, "12", (), None, None, 0)
    digests = {f"{run}@12": "another"}
    drawn = GridSettings(start, (Axis("seed", (1, 2)),), 1, record, [], False, digests)
    save(changed, drawn.to_json())
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ([], "needs a run or a model"),
        ([run, "--axis", "model=a,b"], "remove the other one"),
        (["shapes"], "shapes is not a run directory"),
        (["shapes", "--axis", "seed=1,2"], "give --prompts FILE"),
        ([run, "--axis", "checkpoint=base,7"], "no checkpoint after 7 iterations (there: 12)"),
        ([run, "--axis", "seed=1,2", "--samples", "200"], "cannot be drawn"),
        (["--axis", f"model={run},{tmp_path / 'empty'}"], "neither a run directory"),
        (["--axis", f"model={run},shapes", "--axis", "checkpoint=12,base"], "shapes is none"),
        ([run, "--reward-option", "a.b=1"], "is for a --reward"),
        (["--from", str(plain)], "has no settings of a grid"),
        (["--from", str(newer)], "another version of flowgrpo"),
        (["--from", str(changed)], "is not the one of"),
        (["--from", str(changed), "--narrow"], "remove --narrow"),
        ([run, "--from", str(changed)], "remove a model"),
        (["--from", str(tmp_path / "absent.png")], "absent.png"),
    ]:
        assert main(["grid", *arguments, "--out", str(tmp_path / "x.png")]) in (1, 2), arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
