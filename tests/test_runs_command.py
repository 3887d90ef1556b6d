"""``flowgrpo runs``: the state, progress and scores of run directories, read without a model."""

import json
from pathlib import Path

import pytest
import torch

from flowgrpo.cli.main import main
from flowgrpo.training import checkpoints, lock
from flowgrpo.training.logs import Logs

CONFIG = """
[model]
path = "shapes"
[algorithm]
kind = "vgpo"
[train]
iterations = 3
[run]
seed = 7
"""


def make(folder: Path, rewards=(0.25, 0.75, 0.5), finished: bool = False) -> Path:
    """A run of two iterations, evaluated before, between and after them, with a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    logs = Logs(folder)
    logs.append("metrics", {"iteration": 0, "reward": 0.1})
    logs.append("metrics", {"iteration": 1, "reward": 0.2})
    for iteration, reward in enumerate(rewards):
        line = {"iteration": iteration, "reward": reward, "scores": {}}
        guided = {"regimes": {"guidance_1p5": {"reward": reward + 0.125}}} if iteration != 1 else {}
        logs.append("evaluations", line | guided)
    (folder / "sessions.jsonl").write_text('{"started": "2026-01-02 03:04:05"}\n')
    counts = logs.counts()
    state = {"iteration": 2, "lines": counts, "lines_sha256": logs.digests(counts)}
    parts = {"weights": {"w": torch.zeros(1)}}
    checkpoints.save(folder / "checkpoints" / "000002", parts, state)
    if finished:
        (folder / "finished.json").write_text('{"iterations": 3}')
    return folder


def listed(capsys, folder: Path) -> dict[str, dict]:
    capsys.readouterr()
    assert main(["runs", str(folder), "--json"]) == 0
    return {Path(r["folder"]).name: r for r in json.loads(capsys.readouterr().out)}


def test_a_run_is_listed_with_its_progress_and_scores(tmp_path, capsys, monkeypatch):
    make(tmp_path / "deep" / "one")
    (tmp_path / "no_run").mkdir()
    (tmp_path / "no_run" / "config.toml").write_text(CONFIG)
    (one,) = listed(capsys, tmp_path).values()
    assert one["state"] == "stopped"
    assert (one["iteration"], one["iterations"], one["seed"]) == (2, 3, 7)
    assert (one["algorithm"], one["model"]) == ("vgpo", "shapes")
    assert one["started"] == "2026-01-02 03:04:05"
    assert one["held_out_reward"] == {
        "first": {"iteration": 0, "reward": 0.25, "scores": {}},
        "last": {"iteration": 2, "reward": 0.5, "scores": {}},
        "best": {"iteration": 1, "reward": 0.75, "scores": {}},
    }
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["runs", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stopped 2/3 0.5 0.75@1 vgpo shapes" in shown
    assert "deep/one, guidance 1.5: 0.375 → 0.625@2" in shown
    assert one["regimes"] == {
        "guidance_1p5": [{"iteration": 0, "reward": 0.375}, {"iteration": 2, "reward": 0.625}]
    }


def test_keys_and_scores_of_a_sweep(tmp_path, capsys, monkeypatch):
    for name, lr, seed in (("a", "1e-4", 0), ("b", "3e-4", 1)):
        folder = make(tmp_path / name, ())
        Logs(folder).append("evaluations", {"iteration": 2, "reward": lr, "scores": {"ocr": 0.5}})
        table = CONFIG.replace("seed = 7", f"seed = {seed}").replace("[run]", f"lr = {lr}\n[run]")
        extra = '[[rewards]]\nmodel = "ocr"\n' if name == "a" else ""
        (folder / "config.toml").write_text(table + extra)
    command = ["runs", str(tmp_path), "--key", "train.lr", "--key", "run.seed"]
    assert main([*command, "--key=rewards.0.model", "--csv"]) == 0
    rows = [row.split(",") for row in capsys.readouterr().out.splitlines()]
    assert rows[0][4:] == ["train.lr", "run.seed", "rewards.0.model", "evaluated", "reward", "score/ocr"]  # fmt: skip
    assert sorted(row[:1] + row[4:] for row in rows[1:]) == [
        ["a", "0.0001", "0", "ocr", "2", "0.0001", "0.5"],
        ["b", "0.0003", "1", "", "2", "0.0003", "0.5"],
    ]
    monkeypatch.setenv("COLUMNS", "160")
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "date train.lr run.seed" in shown
    assert "0.0003 1" in shown
    assert main([*command, "--json"]) == 0
    found = {r["folder"][-1]: r for r in json.loads(capsys.readouterr().out)}
    assert found["b"]["keys"] == {"train.lr": 3e-4, "run.seed": 1}
    assert found["b"]["held_out_reward"]["last"]["scores"] == {"ocr": 0.5}
    assert main([*command, "--key", "train.rl"]) == 2
    assert "no run has the key 'train.rl'; did you mean 'train.lr'?" in capsys.readouterr().err


def test_states(tmp_path, capsys):
    make(tmp_path / "done", finished=True)
    make(tmp_path / "new", rewards=())
    (tmp_path / "new" / "metrics.jsonl").unlink()
    checkpoint = make(tmp_path / "without_weights") / "checkpoints" / "000002"
    (checkpoint / "weights.safetensors").unlink()
    broken = make(tmp_path / "broken_log") / "metrics.jsonl"
    broken.write_text("{" + broken.read_text())
    (make(tmp_path / "broken_config") / "config.toml").write_text("[model")
    # Half a line after those that the checkpoint counts is what a kill leaves, and is no damage.
    with (make(tmp_path / "killed") / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "rew')
    held = lock.RunLock(make(tmp_path / "busy"))
    found = listed(capsys, tmp_path)
    held.release()
    assert {n: r["state"] for n, r in found.items()} == {
        "done": "finished",
        "new": "damaged",
        "without_weights": "damaged",
        "broken_log": "damaged",
        "broken_config": "damaged",
        "killed": "stopped",
        "busy": "running",
    }
    assert "weights.safetensors is missing" in found["without_weights"]["problem"]
    assert "metrics.jsonl" in found["new"]["problem"]
    assert "line 1" in found["broken_log"]["problem"]
    assert found["new"]["held_out_reward"] == {"first": None, "last": None, "best": None}
    assert found["killed"]["iteration"] == 2
    assert listed(capsys, tmp_path / "busy")["busy"]["state"] == "stopped"


def test_the_lock_can_be_taken_after_it_was_looked_at(tmp_path):
    first = lock.RunLock(tmp_path)
    assert lock.holder(tmp_path)["pid"] > 0
    with pytest.raises(lock.ConfigError, match="in use"):
        lock.RunLock(tmp_path)
    first.release()
    assert lock.holder(tmp_path) is None
    lock.RunLock(tmp_path).release()


def test_folders_without_runs(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run directories" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err
