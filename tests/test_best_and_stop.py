"""The best checkpoint by any number, and the end of a run that no longer improves."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import flowgrpo
from flowgrpo import cli
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.measures import MEASURES, Measured, best_of, named, waited
from flowgrpo.evaluation.hacking import SIGNS
from flowgrpo.training import checkpoints
from flowgrpo.training.run_checkpoints import find_checkpoint
from tests.processes import ranks
from tests.test_train import small

HERE = "tests.test_best_and_stop"


class Scripted:
    """A metric that follows a script, whatever the images are."""

    values = (0.1, 0.5, 0.3, 0.45, 0.9)

    def __init__(self):
        self.calls = iter(self.values)

    def __call__(self, prompts, media):
        return {"scripted": next(self.calls)}


def evaluations(*values, name="a"):
    return [{"iteration": 10 * i, "reward": 0.0, "scores": {name: v}} for i, v in enumerate(values)]


def test_numbers_are_named_and_may_be_best_where_they_are_lowest():
    line = {
        "reward": 0.5,
        "scores": {"ocr": 0.25},
        "metrics": {"diversity/color": 0.75},
        "artefacts": {"grid": 1.5},
        "bench": {"shapes": {"results": {"overall": 0.6, "colors": None}, "main": ["overall"]}},
    }
    assert named(line).keys() == {
        "reward", "ocr", "diversity/color", "artefacts/grid", "shapes/overall", "shapes/colors", "shapes",
    }  # fmt: skip
    assert Measured.parse("shapes").of(line) == 0.6
    assert math.isnan(Measured.parse("shapes/colors").of(line))
    lowest = Measured.parse("min:artefacts/grid")
    assert (lowest.of(line), lowest.gain(line), lowest.folder) == (1.5, -1.5, "best-min%3Aartefacts%2Fgrid")  # fmt: skip
    assert Measured.parse("max:ocr") == Measured.parse("ocr")
    with pytest.raises(ConfigError, match="evaluations have no number 'ocrr'; did you mean 'ocr'"):
        Measured.parse("ocrr").require(line, "evaluation.best")
    assert best_of(evaluations(1.0, 3.0, 3.0, math.nan), Measured("a"))["iteration"] == 10
    assert best_of(evaluations(1.0, 3.0), Measured("a", lower=True))["iteration"] == 0
    assert best_of(evaluations(math.nan), Measured("a")) is None
    assert tuple(s.name for s in SIGNS) == MEASURES


@pytest.mark.parametrize(
    ("values", "min_gain", "since", "expected"),
    [
        ((0.5,), 0.0, 0, 0),
        ((0.5, 0.5, 0.4), 0.0, 0, 2),  # equal is no improvement
        ((0.5, 0.4, 0.6), 0.0, 0, 0),
        ((0.5, 0.52, 0.54), 0.05, 0, 2),
        ((0.5, 0.52, 0.56), 0.05, 0, 0),  # small steps add up
        ((0.5, math.nan, 0.4), 0.0, 0, 2),
        ((0.5, 0.4, 0.4, 0.4), 0.0, 20, 1),  # extended after 20 iterations
        ((0.5, 0.4, 0.4, 0.4), 0.0, 30, 0),
    ],
)
def test_evaluations_without_an_improvement_are_counted(values, min_gain, since, expected):
    assert waited(evaluations(*values), Measured("a"), min_gain, since) == expected
    mirrored = evaluations(*(-v for v in values))
    assert waited(mirrored, Measured("a", lower=True), min_gain, since) == expected


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    settings = [
        "evaluation.every=1", f"evaluation.metrics=['{HERE}:Scripted']", "evaluation.inspected_prompts=0",
        "train.early_stopping={metric='scripted', patience=2}", "train.iterations=9", "train.updates=1",
        "evaluation.keep_best=['min:artefacts/contrast']", "evaluation.images_during=0",
        "evaluation.regimes=[]",  # the script is of one evaluation per iteration
    ]  # fmt: skip
    result = flowgrpo.train(small(folder, *settings))
    return folder, settings, result


def test_a_run_that_no_longer_improves_ends_with_its_best_weights(stopped, capsys):
    folder, settings, result = stopped
    assert result.finished
    assert [(e["iteration"], e["metrics"]["scripted"]) for e in result.evaluations] == [
        (0, 0.1), (1, 0.5), (2, 0.3), (3, 0.45), (3, 0.9),
    ]  # fmt: skip
    assert result.evaluations[-1]["weights_after"] == 1
    parts, state = checkpoints.load(folder / "checkpoints" / "best-scripted")
    assert state == {"iteration": 1, "score": 0.5}
    exported = load_file(next((folder / "export" / "transformer").glob("*.safetensors")))
    for name, tensor in parts["weights"].items():
        assert torch.equal(exported[name.removeprefix("transformer.")], tensor)
    record = json.loads((folder / "early_stop.json").read_text())
    assert (record["after"], record["best"], record["value"]) == (3, 1, 0.5)
    assert "Early stopping ended the run after 3 iterations" in (folder / "report.html").read_text()
    assert flowgrpo.train(small(folder, *settings)).finished
    assert (
        "has finished its 9 iterations, stopped early after 3: nothing to do"
        in capsys.readouterr().out
    )


def test_two_processes_that_share_a_model_stop_together(stopped, tmp_path):
    """Each reads its own part of the best weights, and all of them leave the loop."""
    folder, settings, result = stopped
    shorter = ["train.early_stopping.patience=1", "evaluation.keep_best=[]"]
    sharded = ["parallel.shard=denoiser", "run.rank_timeout_minutes=1"]
    run = small(tmp_path / "run", *settings, *shorter, *sharded)
    for process in ranks(lambda _: int(not flowgrpo.train(run).finished)):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-3000:]
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [e["iteration"] for e in found] == [0, 1, 2, 2]
    assert found[-1]["weights_after"] == result.evaluations[-1]["weights_after"] == 1
    wanted, exported = (
        load_file(next((place / "export" / "transformer").glob("*.safetensors")))
        for place in (folder, tmp_path / "run")
    )
    best, _ = checkpoints.load(tmp_path / "run" / "checkpoints" / "best-scripted")
    for name, tensor in wanted.items():
        assert torch.equal(exported[name], best["weights"][f"transformer.{name}"])
        assert (exported[name] - tensor).abs().mean() < 1e-5


def test_any_checkpoint_is_found_by_what_it_is_best_at(stopped, capsys, tmp_path):
    folder = stopped[0]
    inside = folder / "checkpoints"
    lines = [json.loads(t) for t in (folder / "evaluations.jsonl").read_text().splitlines()]
    lowest = min(lines[:4], key=lambda e: e["artefacts"]["contrast"])["iteration"]
    kept = find_checkpoint(folder, "best:min:artefacts/contrast")
    assert checkpoints.peek(kept)["iteration"] == lowest
    assert find_checkpoint(folder, "best:scripted") == inside / "best-scripted"
    assert (
        find_checkpoint(folder, "best") == find_checkpoint(folder, "best:reward") == inside / "best"
    )
    assert find_checkpoint(folder, "3") == find_checkpoint(folder, "last") == inside / "000003"
    assert find_checkpoint(folder, "1") == inside / "best-scripted"  # not kept otherwise
    out = tmp_path / "out"
    assert (
        cli.main(["export", str(folder), "--checkpoint", "best:scripted", "--out", str(out)]) == 0
    )
    assert "weights after 1 iteration:" in capsys.readouterr().out
    one, other = (next((f / "transformer").glob("*.safetensors")) for f in (out, folder / "export"))
    assert all(torch.equal(t, load_file(other)[k]) for k, t in load_file(one).items())
    half, base = tmp_path / "half", tmp_path / "base"
    for scale, to in (("0.5", half), ("0", base)):
        given = ["--checkpoint", "best:scripted", "--scale", scale, "--out", str(to)]
        assert cli.main(["export", str(folder), *given]) == 0
    assert "weights after 1 iteration, scaled by 0.5:" in capsys.readouterr().out
    tuned, halved, start = (load_file(next((f / "transformer").glob("*.safetensors"))) for f in (out, half, base))  # fmt: skip
    assert any(not torch.equal(tuned[k], start[k]) for k in start)
    for key, tensor in halved.items():
        torch.testing.assert_close(tensor, (tuned[key] + start[key]) / 2, atol=1e-7, rtol=0)
    drawn = ["sample", str(folder), "a photo of a red circle", "--samples", "1", "--out"]
    assert cli.main([*drawn, str(tmp_path / "a"), "--base-after", "0.5"]) == 0
    assert cli.main([*drawn, str(tmp_path / "b"), "--base-after", "8"]) == 1
    assert "so that both models take a step of 8; got 8" in capsys.readouterr().err
    assert cli.main(["sample", "shapes", "a photo", "--out", str(tmp_path / "b"), "--base-after", "0.5"]) == 2  # fmt: skip
    assert "--base-after is for a run directory, and shapes is none" in capsys.readouterr().err
    for name, words in [("best:scriptd", "did you mean 'scripted'?"), ("7", "there: "), ("bestt", "did you mean 'best'?")]:  # fmt: skip
        with pytest.raises(SystemExit) if name == "bestt" else pytest.MonkeyPatch.context():
            cli.main(["export", str(folder), "--checkpoint", name, "--out", str(tmp_path / "x")])
        assert words in capsys.readouterr().err


def test_the_nearest_checkpoint_is_named(stopped, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    lines = [json.loads(t) for t in (folder / "evaluations.jsonl").read_text().splitlines()]
    for line, value in zip(lines, (0.1, 0.2, 0.9, 0.3, 0.3), strict=True):
        line["scores"]["strict"] = value
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    for name in ("000001", "000002"):
        shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    for place in (folder / "checkpoints").glob("best*"):
        if checkpoints.peek(place)["iteration"] in (0, 2):
            shutil.rmtree(place)
    words = r"best strict, 0\.9, was measured after 2 iterations, and .* not kept\. The nearest is [13], with 0\.[23].*keep_best = \['strict'\]"
    with pytest.raises(FileNotFoundError, match=words):
        find_checkpoint(folder, "best:strict")
    with pytest.raises(FileNotFoundError, match="is that of the model before training"):
        find_checkpoint(folder, "best:min:strict")


def test_an_extended_run_goes_on(stopped):
    folder = stopped[0]
    before = (folder / "metrics.jsonl").read_text().splitlines()
    assert cli.main(["train", str(folder), "--resume-with", "train.iterations=4"]) == 0
    after = (folder / "metrics.jsonl").read_text().splitlines()
    assert (len(before), after[:3], len(after)) == (3, before, 4)
    assert not (folder / "early_stop.json").exists()
    assert json.loads((folder / "sessions.jsonl").read_text().splitlines()[-1])["stopped"] == 3
    # The evaluation that ended the run is made again, and does not end it again.
    lines = [json.loads(t) for t in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [e["iteration"] for e in lines] == [0, 1, 2, 3, 4]
    assert not any("weights_after" in e for e in lines)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["evaluation.best=strct"], "no reward, metric or benchmark 'strct'; did you mean 'strict'"),
        (["evaluation.keep_best=['min:artefacts/grd']"], "evaluation.keep_best.0. = 'min:artefacts/grd'"),
        (["train.early_stopping.metric=strict", "evaluation.every=0"], "evaluation.every = 0"),
        (["train.early_stopping.metric=strict", "evaluation.images_during=6"], "set evaluation.images_during = 0"),
        (["train.early_stopping.metric=strict", "train.early_stopping.patience=0"], "patience must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        small("nowhere", "evaluation.metrics=[]", *settings).check()


def test_a_metric_that_does_not_exist_is_named_by_the_first_evaluation(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluations have no number 'diversity/colour'; did you mean 'diversity/color'"):  # fmt: skip
        flowgrpo.train(small(tmp_path / "run", "evaluation.best=diversity/colour"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
