"""``flowgrpo grid`` with axes: which cell shows what, the settings in the picture, and refusals."""

import base64
import io
import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowgrpo import config as configuration
from flowgrpo.cli import grid
from flowgrpo.cli.main import main
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation import comparison_grid
from flowgrpo.evaluation.comparison_grid import ComparisonGrid, write_grid
from flowgrpo.evaluation.contact_sheet import media_uri
from flowgrpo.evaluation.grid_drawing import GridRow
from flowgrpo.evaluation.grid_settings import (
    KEY,
    Axis,
    Cell,
    GridSettings,
    prompt_of,
    prompt_record,
)
from flowgrpo.evaluation.samplers import Sampler
from flowgrpo.policy import PipelinePolicy, Sampling, other_scheduler
from flowgrpo.training import checkpoints

UNIPC = "UniPCMultistepScheduler"
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
        ("sampler=cpss", "did you mean 'cps'"),
        ("sampler=ode,cps:1.5", "above 0 and at most 1"),
        ("sampler=flow_sde:x", "above 0 and at most 10"),
        ("sampler=dpm_2m:0.5", "has no strength"),
        ("sampler=UniPCMultistepScheduler:1", "a scheduler of diffusers has no strength"),
        (
            "sampler=UniPCMultiStepScheduler",
            "no such scheduler; did you mean 'UniPCMultistepScheduler'",
        ),
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
        (
            settings_of("seed=1,2,3", samples=40),
            r"1200 images, more than the 1000 of a picture: what fits is --samples 33 \(990 images\) or --rows 8 \(960 images\)",
        ),
        (
            settings_of("seed=1,2,3", samples=40),
            "or axes with at most 2 cells, or --out FILE.html, which holds 5000",
        ),
    ],
)
def test_grids_that_cannot_be_drawn_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        settings.check(10)
    settings_of("seed=1,2", samples=50).check(10)
    settings_of("seed=1,2,3", samples=40).check(10, sheet=True)


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


def test_a_sampler_takes_its_steps_and_the_noise_is_the_same(tiny):
    prompts, samples = [Prompt("a cat"), Prompt("a dog")], 2
    policy = PipelinePolicy.from_pretrained(str(tiny("sd3")), sampling=Sampling(num_steps=3))
    drawn = ComparisonGrid(prompts, samples, 4)

    def images(name: str) -> torch.Tensor:
        return drawn.generate_with(policy, policy.sampling, Sampler.parse(name))

    noise = SampleNoise([Random(4).at("grid", 1, 0)])
    (single,) = policy.run([prompts[1]], noise, stochastic=(0, 1), transition=CPS(noise_level=0.5))
    assert torch.allclose(images("cps:0.5")[2], single.media[0], atol=1e-5)
    ode = images("ode")
    assert torch.equal(ode, policy.images(drawn.expanded, drawn._noise))
    assert torch.allclose(images("cps:0.000001"), ode, atol=1e-4)
    assert not torch.equal(images("dpm_2m"), ode)
    for other in ("cps", "flow_sde:0.7"):
        assert not torch.allclose(images(other), ode, atol=1e-3), other


def from_diffusers(folder: Path, scheduler: str, changes: dict, prompts: list[str]) -> torch.Tensor:
    """Media of diffusers' own pipeline and scheduler, from the initial noise of a grid with seed 4."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    kind = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config({**pipeline.scheduler.config, **changes})
    noise = SampleNoise([Random(4).at("grid", row, 0) for row in range(len(prompts))])
    made = pipeline(prompts, num_inference_steps=3, generator=noise.initial(), output_type="pt")
    return made.images


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("family", "scheduler", "changes"),
    [
        ("sd15", "DDIMScheduler", {}),
        ("sd15", "HeunDiscreteScheduler", {}),
        ("sd15", "EulerAncestralDiscreteScheduler", {}),
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}),
        # The tiny SD3 has the shift 3 of the published one.
        ("sd3", "UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
        ("sd3", "DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    ],
)
def test_a_scheduler_of_diffusers_samples_as_in_its_own_pipeline(tiny, family, scheduler, changes):
    folder, prompts = tiny(family), ["a cat", "a dog"]
    policy = PipelinePolicy.from_pretrained(str(folder), sampling=Sampling(num_steps=3))
    drawn = ComparisonGrid([Prompt(p) for p in prompts], 1, 4)
    ode = drawn.generate_with(policy, policy.sampling, Sampler.parse("ode"))
    media = drawn.generate_with(policy, policy.sampling, Sampler.parse(scheduler))
    expected = from_diffusers(folder, scheduler, changes, prompts)
    assert torch.allclose(media, expected, atol=2e-5)
    assert torch.equal(
        drawn.generate_with(policy, policy.sampling, Sampler.parse(scheduler)), media
    )
    # The policy's own sampler is in place again.
    assert torch.equal(drawn.generate_with(policy, policy.sampling, Sampler.parse("ode")), ode)
    shipped = drawn.generate_with(policy, policy.sampling, Sampler.parse("shipped"))
    own = "PNDMScheduler" if family == "sd15" else "FlowMatchEulerDiscreteScheduler"
    assert torch.allclose(shipped, from_diffusers(folder, own, {}, prompts), atol=2e-5)


@pytest.mark.parametrize(
    ("family", "scheduler", "reason"),
    [
        ("sd3", "DDIMScheduler", "made for a rectified-flow model; those that may, if the pipeline.s call accepts them: DPMSolver.*UniPC"),
        ("sd3", "DEISMultistepScheduler", "made for a rectified-flow model; those that may, if the pipeline.s call accepts them: DPMSolver"),
        ("sd15", "EDMEulerScheduler", "made for a diffusion model; those that may, if the pipeline.s call accepts them: DDIMScheduler, "),
        ("sd15", "FlowMatchEulerDiscreteScheduler", "made for a diffusion model; those that may, if the pipeline.s call accepts them: DDIMScheduler, "),
        ("flux", "FlowMatchHeunDiscreteScheduler", "FluxPipeline cannot be sampled with FlowMatchHeun.*custom sigmas"),
    ],
)  # fmt: skip
def test_a_scheduler_that_does_not_fit_is_refused(tiny, family, scheduler, reason, tmp_path, capsys):  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = ["grid", str(tiny(family)), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--samples", "1"]  # fmt: skip
    out = tmp_path / "grid.png"
    assert main([*arguments, "--axis", f"sampler=ode,{scheduler}", "--out", str(out)]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(reason, said), said
    assert "Traceback" not in said
    assert not out.exists()


def test_schedulers_that_are_offered_end_without_noise():
    """By diffusers' own grids of a flow; those that are left out repeat their smallest noise at the end."""
    shipped = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    left_out = [getattr(diffusers, n).from_config(flow) for n in other_scheduler.LEAVING_NOISE]
    offered = [other_scheduler.compatible(shipped, n) for n in other_scheduler.compatible_names(shipped)]  # fmt: skip
    assert len(offered) > 4
    for scheduler, ends in [*((s, True) for s in offered), *((s, False) for s in left_out)]:
        scheduler.set_timesteps(10)
        assert (float(scheduler.sigmas[-1]) == 0) == ends, type(scheduler).__name__


def test_a_grid_of_noise_levels_is_refused_where_diffusers_ignores_it(tiny):
    policy = PipelinePolicy.from_pretrained(str(tiny("flux")), sampling=Sampling(num_steps=2))
    levels = Sampling(num_steps=2, sigmas=(1.0, 0.5))
    drawn = ComparisonGrid([Prompt("a cat")], 1, 4)
    with pytest.raises(ValueError, match=r"sampling\.sigmas would be ignored"):
        drawn.generate_with(policy, levels, Sampler.parse("UniPCMultistepScheduler"))


def test_a_grid_over_schedulers_is_made_again_from_its_picture(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    arguments = [str(tiny("sd15")), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    axis = "sampler=ode,shipped,UniPCMultistepScheduler,EulerAncestralDiscreteScheduler"
    assert main(["grid", *arguments, "--samples", "2", "--axis", axis, "--out", str(first)]) == 0
    assert main(["grid", "--from", str(first), "--out", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    title = grid.title_of("sampler", "EulerAncestralDiscreteScheduler", None)
    assert title == "sampler EulerAncestralDiscrete"


def test_a_contact_sheet_and_a_webp_hold_their_settings(tiny, tmp_path, capsys):
    model = str(tiny("sd3"))
    evil = "</script><script>window.evil = 1</script>"
    (tmp_path / "prompts.txt").write_text(f"a cat\n{evil}\n")
    arguments = [model, "--prompts", str(tmp_path / "prompts.txt"), "--samples", "2"]
    arguments += ["--steps", "1", "--axis", "seed=3,4", "--axis", "guidance=1,2"]
    for ending in ("html", "webp"):
        first, again = (tmp_path / f"{n}.{ending}" for n in ("first", "again"))
        reward = ["--reward", "jpeg_size"] if ending == "html" else []
        assert main(["grid", *arguments, *reward, "--out", str(first)]) == 0
        assert main(["grid", "--from", str(first), "--out", str(again)]) == 0
        assert first.read_bytes() == again.read_bytes()
        assert [p["text"] for p in GridSettings.from_picture(again).prompts] == ["a cat", evil]
    page = (tmp_path / "first.html").read_text()
    assert page.count('loading="lazy"') == 16
    assert evil not in page
    assert "<h3>&lt;/script&gt;" in page


def test_videos_play_in_a_webp(tmp_path):
    videos = torch.rand(1, 3, 3, 16, 24)
    rows = [GridRow("a prompt", [videos, videos])]
    file = write_grid(rows, ["a", "b"], tmp_path / "a.webp", title="t", subtitle="s", fps=8.0, metadata={KEY: "{}"})  # fmt: skip
    with Image.open(file) as found:
        found.load()
        assert (found.n_frames, found.info["duration"]) == (3, 125)
        first = np.asarray(found.convert("RGB")).copy()
        found.seek(1)
        assert (np.asarray(found.convert("RGB")) != first).any()
    assert [p.name for p in tmp_path.iterdir()] == ["a.webp"]
    uri = media_uri(videos[0], 8.0)
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as found:
        assert (found.n_frames, found.size) == (3, (24, 16))


def test_a_grid_that_is_too_large_for_webp_is_written_as_png(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_grid, "LONGEST_WEBP", 100)
    rows = [GridRow("a prompt", [torch.rand(1, 3, 16, 16)])]
    file = write_grid(rows, ["a"], tmp_path / "a.webp", title="t", subtitle="s", fps=8.0, metadata={KEY: "{}"})  # fmt: skip
    assert file == tmp_path / "a.png"
    assert Image.open(file).text[KEY] == "{}"


def run_with_checkpoint(folder: Path, *settings: str) -> Path:
    folder.mkdir()
    settings = (f"run.folder={folder}", *settings)
    configuration.save(configuration.load("quickstart_flow_grpo", settings), folder / "config.toml")
    checkpoints.save(folder / "checkpoints" / "000012", {"weights": {}}, {"iteration": 12})
    return folder


def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid, "_load", lambda *_: pytest.fail("a model was loaded"))
    run = str(run_with_checkpoint(tmp_path / "run"))
    mixed = str(run_with_checkpoint(tmp_path / "mixed", "evaluation.base_after=4"))
    shifted = str(run_with_checkpoint(tmp_path / "shifted", "sampling.shift=3.0"))
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
        ([run, "--axis", "seed=1,2", "--samples", "200"], "what fits is --samples 83"),
        (["--axis", f"model={run},{tmp_path / 'empty'}"], "neither a run directory"),
        (["--axis", f"model={run},shapes", "--axis", "checkpoint=12,base"], "shapes is none"),
        ([run, "--reward-option", "a.b=1"], "is for a --reward"),
        ([run, "--axis", "steps=1,2", "--steps", "3"], "--axis steps gives the values: remove --steps"),
        ([run, "--axis", "checkpoint=base,12", "--checkpoint", "best"], "remove --checkpoint"),
        (["shapes", "--axis", "seed=1,2", "--checkpoint", "best"], "--checkpoint best is for a run directory"),
        ([run, "--axis", "base_after=4", "--steps", "4"], "--axis base_after: base_after must be a share"),
        ([run, "--axis", "base_after=4", "--axis", f"sampler=ode,{UNIPC}"], f"--axis base_after exchanges the model between two steps of the samplers ode and dpm_2m, and --axis sampler has {UNIPC}; use only these samplers, or remove --axis base_after"),
        ([run, "--axis", "base_after=4", "--sampler", "cps"], "and --sampler has cps; use only"),
        ([mixed, "--axis", "sampler=ode,cps"], "evaluation.base_after of the run exchanges"),
        ([shifted, "--sampler", UNIPC], f"sampling.shift of the run sets the grid of flowgrpo's own samplers, and --sampler has {UNIPC}"),
        ([run, "--axis", "lora=none,./a.safetensors"], "--axis lora: no such file or folder: ./a.safetensors"),
        ([run, "--lora", "runs/a/b:0.5"], "--lora: no such file or folder: runs/a/b"),
        ([run, "--sampler", "cps:2"], "--sampler: sampler 'cps:2': the strength must be"),
        (["--from", str(plain)], "has no settings of a grid"),
        (["--from", str(newer)], "another version of flowgrpo"),
        (["--from", str(changed)], "is not the one of"),
        (["--from", str(changed), "--narrow"], "remove --narrow"),
        ([run, "--from", str(changed)], "remove a model"),
        (["--from", str(tmp_path / "absent.png")], "absent.png"),
    ]:  # fmt: skip
        assert main(["grid", *arguments, "--out", str(tmp_path / "x.png")]) in (1, 2), arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
