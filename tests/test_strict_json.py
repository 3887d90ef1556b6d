"""All JSON that flowgrpo writes is accepted by other parsers: there is no NaN in it."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from flowgrpo.bench.comparison import Measured
from flowgrpo.bench.files import Log
from flowgrpo.data import files, strict_json
from flowgrpo.evaluation.hacking import changes_between
from flowgrpo.evaluation.records import Records
from flowgrpo.training import checkpoints
from flowgrpo.training.run_list import summarise
from tests.strict import strictly

ROOT = Path(__file__).parents[1]
NAN, INF = math.nan, math.inf
NOT_WRITTEN = {
    "benchmarks/device/results.py": 1,
    "benchmarks/kill_and_resume.py": 1,
    "benchmarks/reward_throughput.py": 1,
    "flowgrpo/bench/benchmarks/_unigenbench_files.py": 1,
    "flowgrpo/bench/benchmarks/geneval.py": 2,
    "flowgrpo/bench/chat.py": 1,
    "flowgrpo/bench/files.py": 2,
    "flowgrpo/bench/report.py": 1,
    "flowgrpo/bench/sources.py": 1,
    "flowgrpo/config/evidence.py": 1,
    "flowgrpo/config/methods.py": 1,
    "flowgrpo/config/reader.py": 2,
    "flowgrpo/config/without_effect.py": 1,
    "flowgrpo/data/votes.py": 1,
    "flowgrpo/doctor/verify.py": 1,
    "flowgrpo/evaluation/grid_settings.py": 1,
    "flowgrpo/evaluation/run_history.py": 1,
    "flowgrpo/rewards/named.py": 1,
    "flowgrpo/rewards/prompt_use.py": 1,
    "flowgrpo/training/checkpoints.py": 2,
    "flowgrpo/training/run_changes.py": 1,
    "flowgrpo/training/run_folder.py": 1,
    "reward_models/shared/chat.py": 1,
}
"""Calls of :func:`json.dumps` by file, whose text is hashed, compared, printed, a TOML value, or of numbers
that are known. Everything else that is written goes through :mod:`flowgrpo.data.strict_json`."""


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": [1.5, NAN, {"b": (INF, -INF, "NaN", None, True, 7)}], 3: {NAN: 1}}
    text = strict_json.dumps(value, sort_keys=False)
    assert strictly(text) == {"a": [1.5, None, {"b": [None, None, "NaN", None, True, 7]}], "3": {"nan": 1}}  # fmt: skip
    assert strict_json.dumps({"b": 1, "a": "é"}, ensure_ascii=False, indent=1) == json.dumps({"b": 1, "a": "é"}, ensure_ascii=False, indent=1)  # fmt: skip
    with pytest.raises(ValueError, match="NaN is not JSON"):
        strictly(json.dumps(NAN))


def writes_loosely(file: Path) -> int:
    """Calls of ``json.dump`` and ``json.dumps`` in a file that allow NaN."""
    calls = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call)]
    return sum(
        ast.unparse(call.func) in ("json.dump", "json.dumps")
        and not any(k.arg == "allow_nan" for k in call.keywords)
        for call in calls
    )


def test_json_is_written_by_the_strict_writer_only() -> None:
    folders = ("flowgrpo", "reward_models", "benchmarks", "scripts")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 300
    found = {str(p.relative_to(ROOT)): writes_loosely(p) for p in paths}
    assert {k: v for k, v in found.items() if v} == NOT_WRITTEN


def evaluation(iteration: int, missing: float | None, score: float) -> dict[str, Any]:
    """A line of ``evaluations.jsonl`` of a run with a reward that was not computed, and one of 0 and 1."""
    return {
        "iteration": iteration, "images": 2, "reward": missing, "scores": {"gone": missing, "there": score},
        "errors": {"gone": missing, "there": 0.1}, "metrics": {"length": missing}, "artefacts": {"grid": missing},
        "by_class": {"red": {"gone": missing, "there": score, "errors": {"gone": missing, "there": 0.1}, "images": 2}},
        "per_image": {"prompt": [0, 1], "class": ["red", "red"], "scores": {"gone": [missing, 1.0], "there": [score, score]}},
    }  # fmt: skip


def read_everywhere(folder: Path, lines: list[dict[str, Any]]) -> dict[str, str]:
    """What the readers of a run make of its evaluations, as text in which NaN equals itself."""
    records, summary = Records(folder), summarise(folder)
    compared = [Measured.of("a", line) for line in lines]
    return {
        "changes": repr([records.change(name) for name in ("gone", "there")]),
        "task": repr(records.change("gone", "red")),
        "metrics": repr(records.held_out_metrics()),
        "hacking": repr(changes_between(*lines)),
        "list": repr((summary.first, summary.last, summary.best)),
        "compared": repr([(m.scores, m.metrics) for m in compared]),
    }


def test_readers_take_null_and_the_nan_of_earlier_versions_alike(tmp_path: Path) -> None:
    lines = [evaluation(0, NAN, 0.25), evaluation(4, NAN, 0.75)]
    found = []
    for name in ("now", "before"):
        (folder := tmp_path / name).mkdir()
        (folder / "config.toml").write_text("")
        for line in lines:
            if name == "now":
                files.append(folder / "evaluations.jsonl", line)
            else:
                with (folder / "evaluations.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
        texts = (folder / "evaluations.jsonl").read_text().splitlines()
        assert ("NaN" in texts[0]) == (name == "before")
        found.append(read_everywhere(folder, [json.loads(t) for t in texts]))
    assert found[0] == found[1]
    assert "nan" in found[0]["changes"]
    assert "nan" in found[0]["compared"]


def test_a_reward_of_zero_is_a_reward(tmp_path: Path) -> None:
    for iteration, reward in enumerate((-1.0, 0.0, NAN)):
        line = {"iteration": iteration, "scores": {"a": reward}, "reward": reward}
        files.append(tmp_path / "evaluations.jsonl", line)
    (tmp_path / "config.toml").write_text("")
    found = summarise(tmp_path)
    assert found.best is not None
    assert (found.best.iteration, found.best.reward) == (1, 0.0)


def test_digests_are_those_of_what_is_read_back(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", {"format": 1})
    log.append({"score": NAN, "others": [INF, 0.5]})
    log.close()
    again = Log(tmp_path / "log.jsonl", {"format": 1})
    assert again.records == log.records == [{"score": None, "others": [None, 0.5]}]
    again.close()
    checkpoints.save(tmp_path / "one", {}, {"iteration": 3, "best": NAN})
    assert checkpoints.load(tmp_path / "one")[1] == {"iteration": 3, "best": None}
    for text in (tmp_path / "one" / "state.json").read_text(), *(tmp_path / "log.jsonl").read_text().splitlines():  # fmt: skip
        strictly(text)
