"""The example algorithm of the documentation, by its import path: no other file knows it."""

import json
from pathlib import Path

import pytest
import torch

import flowgrpo
from flowgrpo.algorithms.base import check_interface
from flowgrpo.cli import main
from flowgrpo.core.random import Random
from flowgrpo.shapes.architecture import build_pipeline

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SETTINGS = [
    'algorithm={kind = "algorithm:WinRate", group_size = 3}',
    'rewards=[{model="jpeg_size", ignores_prompt=true}]',
    "sampling.num_steps=4",
    "train.iterations=1",
    "train.groups=2",
    "prompts.balance=''",
    "evaluation.images=2",
    "evaluation.grid_prompts=1",
    "evaluation.grid_samples=1",
    "run.trackers=[]",
    "run.threads=1",
    "run.device='cpu'",
]


def test_it_has_a_dry_run_with_its_cost_trains_and_is_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    build_pipeline().save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    settings = [*SETTINGS, f"model.path='{tmp_path / 'model'}'", f"run.folder='{run}'"]

    options = [f"--set={s}" for s in settings]
    assert main(["train", "quickstart_flow_grpo", "--dry-run", *options]) == 0
    # Step 0 once for the group, then 3 samples for 3 steps.
    assert "10 denoiser evaluations, 3 decodes" in capsys.readouterr().out

    config = flowgrpo.load("quickstart_flow_grpo", settings)
    assert list(config.algorithm.trained_steps(4, 0, Random(0))) == [0, 1]
    assert config.steps_by_density() == [0, 1]
    assert flowgrpo.train(config).finished
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["nfe_per_prompt"] == 10
    assert "<h2>Credit</h2>" in (run / "report.html").read_text()

    page = tmp_path / "inspect.html"
    assert main(["inspect", str(run), "--number", "1", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<h4>sample") == 3
    assert "vs. others" in text


def test_an_algorithm_without_a_part_is_told_which() -> None:
    class Bare:
        group_size, transition = 2, None

        def collect(self) -> None: ...

        def advantages(self) -> torch.Tensor: ...

        def check(self) -> None: ...

    with pytest.raises(ValueError, match=r"Bare has no .*cost.*; inherit from .*AlgorithmBase"):
        check_interface(Bare())
