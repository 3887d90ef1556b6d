"""A short version of the study, and its statistics."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

import flowgrpo
from benchmarks.study import report, results
from benchmarks.study.__main__ import main
from benchmarks.study.entries import ALGORITHMS, OVEROPTIMISED
from tests.processes import command

ROOT = Path(__file__).parents[1]


start = subprocess.run


def forked(program, *others, **options):
    """In place of ``subprocess.run``: the same command of flowgrpo, without importing torch again."""
    if program[:3] != [sys.executable, "-m", "flowgrpo"]:
        return start(program, *others, **options)
    process = command(*program[3:])
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    return None


@pytest.fixture
def study(monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "run", forked)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["study", *arguments])
        main()
        return str(capsys.readouterr().out)

    return run


def test_a_short_study_runs_resumes_and_reports(study, tmp_path):
    page = tmp_path / "study.md"
    page.write_text("Before.\n<!-- study: begin -->\nold\n<!-- study: end -->\nAfter.\n")
    small = [
        "train.groups=4", "train.rollout_batch=64", "evaluation.images=24",
        "evaluation.images_during=24", "evaluation.grid_prompts=1", "evaluation.grid_samples=1",
    ]  # fmt: skip
    arguments = [
        "--folder", str(tmp_path / "runs"), "--only", "Flow-GRPO-Fast", "Win rates, near",
        "--seeds", "0", "--seconds", "1e-3", "--evaluations", "1000",
        *(f"--set={s}" for s in small),
    ]  # fmt: skip
    study("run", *arguments)
    finished = sorted((tmp_path / "runs").rglob("runs/*/0/report.html"))
    assert len(finished) == 2
    times = [f.stat().st_mtime_ns for f in finished]
    study("run", *arguments)
    assert [f.stat().st_mtime_ns for f in finished] == times, "finished runs are run again"

    printed = study("report", *arguments, "--write", str(page))
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert "| Flow-GRPO-Fast (quick start) | 1 |" in printed
    assert "| Win rates, near scores tie | 1 |" in text
    assert {p.name for p in (tmp_path / "study").iterdir()} == {"gain.png", "diversity.png"}


def test_a_curve_is_read_between_its_evaluations_and_not_beyond():
    curve = results.Curve([0, 10, 20], {"strict": [0.3, 0.4, 0.6]})
    assert curve.gain("strict", 15) == pytest.approx(0.2)
    assert curve.gain("strict", 20) == pytest.approx(0.3)
    assert math.isnan(curve.gain("strict", 21))
    assert report.points([0.1, math.nan]) == "not reached"


def test_intervals_are_those_of_students_t():
    # Of 1, 2, 3: deviation 1, t = 4.303 with 2 degrees of freedom, over the root of 3.
    assert results.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert report.points([0.1]) == "+10.0"
    assert report.points([0.1, 0.1]) == "+10.0 ± 0.0"


def test_differences_between_seeds_are_not_noise():
    """Against the formula by hand: rows differ by 1, columns by 10, residuals of +-0.1."""
    gains = [[0.1, 9.9, 20.0], [1.0, 11.1, 20.9], [1.9, 12.0, 22.1]]
    grand = sum(map(sum, gains)) / 9
    rows, columns = [sum(r) / 3 for r in gains], [sum(c) / 3 for c in zip(*gains, strict=True)]
    square = sum(
        (gains[i][j] - rows[i] - columns[j] + grand) ** 2 for i in range(3) for j in range(3)
    )
    # t with 4 degrees of freedom is 2.776.
    expected = 2.7764 * math.sqrt(square / 4) * math.sqrt(2 / 3)
    assert results.difference(gains) == pytest.approx(expected, rel=1e-4)
    assert results.difference([*gains, [1.0, math.nan, 2.0]]) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(results.difference([[0.1], [0.2]]))


def test_budgets_are_in_iterations():
    budgets = results.Budgets(seconds=120, evaluations=30_000)
    assert budgets.iterations(results.Cost(seconds=2.0, evaluations=1500)) == (60, 20)


def test_every_entry_is_a_configuration_that_can_run():
    for entry in (*ALGORITHMS, *OVEROPTIMISED):
        flowgrpo.load("quickstart_flow_grpo", entry.settings).check()
    slugs = [e.slug for e in (*ALGORITHMS, *OVEROPTIMISED)]
    assert len(set(slugs)) == len(slugs)
