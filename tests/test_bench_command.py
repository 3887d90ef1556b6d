"""``flowgrpo bench`` from the command line, and the page's benchmark of one's own."""

import json
import re
import sys
from pathlib import Path

import pytest

from flowgrpo.bench.base import available, benchmark_class, load_benchmark
from flowgrpo.cli import main
from flowgrpo.config import load
from flowgrpo.training.loop import train
from tests.test_docs import TINY

ROOT = Path(__file__).parents[1]
QUICK = ["--steps", "2", "--guidance", "1", "--samples", "2", "--limit", "6", "--device", "cpu"]


def bench(*words: str) -> int:
    return main(["bench", *words])


def result(folder: Path, name: str = "bench.json") -> dict:
    return json.loads((folder / name).read_text())


def test_one_command_does_all_and_its_parts_do_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert bench("shapes", "--model", "shapes", "--out", str(whole), *QUICK) == 0
    printed = capsys.readouterr().out
    assert "shapes (embedded verifier): shapes" in printed
    assert "overall (mean over tasks)" in printed
    assert "only 6 of 39 prompts" in printed
    assert bench("generate", "shapes", "--model", "shapes", "--out", str(parts), *QUICK) == 0
    assert not (parts / "bench.json").exists()
    assert bench("score", str(parts), "--limit", "6") == 0
    assert result(parts)["metrics"] == result(whole)["metrics"]
    assert result(parts)["generation"]["settings"] == result(whole)["generation"]["settings"]
    index = result(whole)["model_index"][0]
    assert index["results"][0]["metrics"][0]["value"] == next(
        m["value"] for m in result(whole)["metrics"] if m["headline"]
    )
    assert bench("report", str(whole), str(parts), "--out", str(tmp_path / "page.html")) == 0
    assert "noise" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().count("<table>") == 3


def test_a_run_is_measured_before_and_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "mine"
    train(load("quickstart_flow_grpo", [*TINY, "train.lr=0.01", f'run.folder="{run}"']))
    monkeypatch.chdir(tmp_path)
    common = ["--samples", "1", "--limit", "6", "--device", "cpu"]
    assert bench("compare", "shapes", "--model", str(run), *common) == 0
    base, last = (Path("bench/shapes") / f"mine-{w}" for w in ("base", "last"))
    printed = capsys.readouterr().out
    assert bench("compare", str(base), str(last)) == 0
    again = capsys.readouterr().out
    (table,) = re.findall(r"second minus first.*?comparison\.html", again, re.DOTALL)
    assert table in printed
    assert main(["compare", str(base), f"after={last}", "--out", "both"]) == 0
    (pair,) = result(Path("both"), "comparison.json")["pairs"]
    assert (pair["first"], pair["second"]) == ("mine-base", "after")
    for row in pair["rows"]:
        before, after = (
            next(m["value"] for m in result(f)["metrics"] if m["name"] == row["reward"])
            for f in (base, last)
        )
        scale = 100 if row["in_points"] else 1
        assert scale * row["difference"] == pytest.approx(after - before, abs=1e-4)
        assert row["low"] is None or row["low"] <= row["difference"] <= row["high"]
    assert main(["compare", str(base), str(run), "--out", "both"]) == 2
    assert "has no bench.json" in capsys.readouterr().err
    settings = [result(f)["generation"]["settings"] for f in (base, last)]
    assert (
        settings[0]["call"]
        == settings[1]["call"]
        == {"num_inference_steps": 3, "guidance_scale": 1.0}
    )
    assert settings[0]["sha256"] == settings[1]["sha256"]
    assert len(settings[1]["checkpoint_sha256"]) == 64
    images = [(f / "images/00000/samples/0000.png").read_bytes() for f in (base, last)]
    assert images[0] != images[1]
    for name, label in (("best:jpeg_size", "best-jpeg_size"), ("2", "2")):
        options = ["--checkpoint", name, "--weights", name, *common]
        assert bench("generate", "shapes", "--model", str(run), *options) == 0
        chosen = Path("bench/shapes") / f"mine-{label}"
        assert (chosen / "generation.json").exists()
    assert (chosen / "images/00000/samples/0000.png").read_bytes() == images[1]
    assert bench("generate", "shapes", "--model", str(run), "--checkpoint", "1") == 1
    assert "no checkpoint after 1 iteration (there: 0, 2)" in capsys.readouterr().err


def test_estimate_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert bench("shapes", "--model", "shapes", "--out", str(out), "--estimate", *QUICK) == 0
    printed = capsys.readouterr().out
    assert "6 prompts, 12 images, 12 of them to be made" in printed
    assert "s per image" in printed
    assert not list(tmp_path.rglob("*.png"))


def test_list_says_what_each_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("list") == 0
    printed = capsys.readouterr().out
    for name in available():
        assert name in printed
        assert benchmark_class(name).about.licence in printed
    assert bench("list", "unigenbench") == 0
    assert "judge_url = 'http://127.0.0.1:8080/v1'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["shapes"], "needs --model"),
        (["genevl", "--model", "shapes"], "did you mean 'geneval'"),
        (["shapes", "--model", "shapes", "--set", "sample=1"], "did you mean 'samples'"),
        (["shapes", "--model", "shapes", "--samples", "0"], "--samples must be at least 1"),
        (["shapes", "--model", "shapes", "--dimension", "color"], "did you mean 'colors'"),
        (["shapes", "--model", "shapes", "--label", "a/b"], "--label"),
        (["shapes", "--model", "shapes", "--checkpoint", "best"], "--checkpoint best is for a run directory"),
        (["unigenbench", "--model", "shapes"], "needs its data"),
        (["score", "absent"], "no such folder"),
        (["score", str(ROOT / "docs")], "--benchmark NAME"),
        (["report", str(ROOT / "docs")], "bench.json"),
        (["shapes", "geneval", "--model", "shapes"], "one benchmark at a time"),
        (["compare", "shapes", "--model", "shapes"], "bench compare needs two models"),
        (["compare", "shapes"], "bench compare needs --model"),
        (["compare"], "bench compare needs a benchmark"),
        (["compare", str(ROOT / "docs")], "bench compare needs two folders"),
    ],
)  # fmt: skip
def test_mistakes_are_said(
    words: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert bench(*words) in (1, 2)
    assert problem in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_pages_own_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/benchmarks.md").read_text(), re.DOTALL
    )
    (tmp_path / "detail.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert bench("detail:Detail", "--model", "shapes", *QUICK) == 0
    found = result(tmp_path / "bench/detail/shapes")
    values = {m["name"]: m["value"] for m in found["metrics"]}
    assert list(values) == ["fog", "city", "crowd", "mean"]
    assert values["mean"] == pytest.approx(sum(list(values.values())[:3]) / 3)
    assert sorted(p.name for p in (tmp_path / "bench/detail/shapes/images").iterdir()) == [
        f"{k}_{s}.png" for k in ("city", "crowd", "fog") for s in range(2)
    ]
    sys.modules.pop("detail")


def test_the_page_names_every_benchmark_and_setting() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name in available():
        assert f"`{name}`" in page
    for key, value in re.findall(r"--set '?([a-z_]+)[.\w]*=([^\s`']+)", page):
        owners = [n for n in available() if key in benchmark_class(n).__dataclass_fields__]
        assert owners, key
        if key == "split":
            load_benchmark("unigenbench", {"split": value})


def test_a_judge_that_cannot_be_had_is_named_before_images_are_made(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    command = ["geneval", "--model", "shapes", "--limit", "1", *QUICK]
    assert bench(*command, "--set", "detector=nobody/no-detector") == 1
    message = capsys.readouterr().err
    assert (
        "the judge nobody/no-detector is not here, and the hub does not give it (no network)"
        in message
    )
    assert "--set detector=FOLDER" in message
    assert not (tmp_path / "bench").exists()


def test_images_whose_judge_fails_to_load_are_kept_with_the_next_command(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    command = ["geneval", "--model", "shapes", "--limit", "1", *QUICK]
    assert bench(*command, "--set", f"detector={folder}") == 1
    assert "flowgrpo bench score bench/geneval/shapes" in capsys.readouterr().err
    assert len(list((tmp_path / "bench/geneval/shapes/images").rglob("*.png"))) > 0
