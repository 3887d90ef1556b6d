"""A run directory: one process at a time, killed at any operation, resumed with other keys."""

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import flowgrpo
from flowgrpo import cli
from flowgrpo.config import ConfigError
from flowgrpo.config.changes import CHANGEABLE, differences, may_change
from flowgrpo.core.errors import DivergenceError, LostRankError
from flowgrpo.data import files
from flowgrpo.evaluation.report import write_report
from flowgrpo.training import checkpoints, lock, run_changes, run_folder
from flowgrpo.training.explained import explained
from flowgrpo.training.learner import Learner
from flowgrpo.training.lock import RunLock
from flowgrpo.training.logs import LogError
from flowgrpo.training.session import Session
from tests.processes import ranks

METRICS = {"reward": 0.5, "group/zero_variance": 0.0, "group/diversity": 0.1, "grad_norm": 1.0}
SETTINGS = [
    "train.iterations=2",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=1",
    "run.device=cpu",
    "run.trackers=[]",
]


class Counter(Learner):
    """In place of a learner: its weights are the number of its updates."""

    def __init__(self):
        self.weights = torch.zeros(3)

    def state(self):
        return {"weights": {"w": self.weights}}, {"num_updates": int(self.weights[0])}

    def restore(self, parts, state):
        self.weights = parts["weights"]["w"].clone()
        assert state["num_updates"] == int(self.weights[0])


def config(folder, *more):
    return flowgrpo.load("quickstart_flow_grpo", [*SETTINGS, f"run.folder={folder}", *more])


def run(folder, *more, between=lambda: None, given=None, kept=()):
    """All that a run writes, without its model; ``between`` is called in the second rollout."""
    settings, learner = given or config(folder, *more), Counter()
    with Session(settings, kept) as session, explained(session):
        session.console.rich.quiet = True
        if session.is_finished:
            return
        session.restore(learner)
        for iteration in range(session.iteration, settings.train.iterations):
            with session.rescue(learner, iteration):
                scores = {"iteration": iteration, "scores": {"a": 0.1 * iteration}, "metrics": {}}
                session.log_evaluation(scores)
                session.save_best(learner, iteration, 0.1 * iteration)
                if iteration == 1:
                    between()
                session.gather(torch.ones(1))
            learner.weights += 1
            with session.phase("rollout"):
                pass
            session.log(iteration, METRICS | {"reward": float(learner.weights[0])}, 0.0)
            session.save_if_due(learner, iteration + 1)
        run_folder.mark_finished(settings)


def in_a_process(folder, failpoint=None):
    """Run in a forked process; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            files.failpoint = failpoint
            run(folder)
            status = 0
        except OSError as error:
            # While the directory is claimed there is no run yet that could be safe.
            status = 28 if "is full." in str(error) or error.errno == errno.ENOSPC else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def on_two_ranks(folder, lost, number):
    """A run on two gloo processes, of which one sends itself a signal in its second iteration.

    Returns the exit status and the error of the other; waits for both.
    """

    def work(rank):
        act = (lambda: os.kill(os.getpid(), number)) if rank == lost else (lambda: None)
        try:
            run(folder, "run.rank_timeout_minutes=0.08", "run.checkpoint_every=9", between=act)
        except LostRankError as error:
            (folder / "error").write_text(str(error))
            return 75
        return 0

    processes = ranks(work)
    processes[1 - lost].communicate()
    processes[lost].send_signal(signal.SIGKILL)
    processes[lost].communicate()
    status = processes[1 - lost].returncode
    return status, (folder / "error").read_text()


@pytest.mark.parametrize(
    ("lost", "number", "words"),
    [
        (1, signal.SIGSTOP, "has not answered for 0.08 minutes (run.rank_timeout_minutes)"),
        (0, signal.SIGKILL, "another process of the run has ended"),
    ],
)
def test_a_process_that_is_lost_does_not_hold_the_others(tmp_path, lost, number, words):
    folder = tmp_path / "run"
    status, error = on_two_ranks(folder, lost, number)
    assert status == 75, error
    assert words in error
    # The process that writes saves the last iteration, although no checkpoint was due.
    assert ("000001 is safe" in error) == (lost == 1), error
    assert saved(folder) == (["000001"] if lost == 1 else [])
    assert in_a_process(folder) == 0
    assert json.loads((folder / "sessions.jsonl").read_text().splitlines()[0])["processes"] == 2


def test_a_lost_process_asks_to_run_the_same_command_again(monkeypatch, capsys):
    """Through the command, whose status schedulers see."""

    def train(config, kept):
        raise LostRankError("another process of the run has ended")

    def leave(status):
        raise KeyError(status)

    monkeypatch.setattr("flowgrpo.training.loop.train", train)
    monkeypatch.setattr("flowgrpo.cli.train._leave", leave)
    with pytest.raises(KeyError, match="75"):
        cli.main(["train", "quickstart_flow_grpo"])
    assert capsys.readouterr().err == "flowgrpo: another process of the run has ended\n"


def saved(folder):
    return [p.name for p in checkpoints.complete(folder / "checkpoints")]


def contents(folder):
    names = ("metrics.jsonl", "evaluations.jsonl", "config.toml")
    found = {n: (folder / n).read_text().replace(str(folder), "") for n in names}
    for name in ("000002", "best"):
        parts, state = checkpoints.load(folder / "checkpoints" / name)
        found[name] = (parts["weights"]["w"].tolist(), state)
    found["folders"] = sorted(p.name for p in (folder / "checkpoints").iterdir())
    return found


def at(number, act):
    """A failpoint that acts at the operation of this number."""
    seen = []

    def failpoint(operation, path):
        seen.append(operation)
        if len(seen) == number + 1:
            act(operation, path)

    return failpoint


def kill(operation, path):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(operation, path):
    """Write a part of what was to be written, and die."""
    if operation == "write":
        with path.open("a") as file:
            file.write('{"iteration": 1, "rew')
    kill(operation, path)


def fill(operation, path):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone, and its operations on files."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    listed = folder.with_name("operations")

    def note(operation, path):
        with listed.open("a") as file:
            file.write(f"{operation} {path}\n")

    assert in_a_process(folder, note) == 0
    return folder, listed.read_text().splitlines()


def test_the_failpoints_are_at_all_kinds_of_operations(whole):
    _, operations = whole
    assert len(operations) > 50
    assert {o.split()[0] for o in operations} == {"write", "sync", "rename", "delete"}
    # The lines that a checkpoint counts are on the disk before it is complete.
    number = next(
        i for i, o in enumerate(operations) if o.startswith("rename") and ".000001.tmp" in o
    )
    assert any(o.startswith("sync") and o.endswith("metrics.jsonl") for o in operations[:number])


@pytest.mark.parametrize(
    ("act", "status", "only"),
    [(kill, -9, ""), (tear, -9, "write"), (fill, 28, "write")],
    ids=["killed", "torn", "full"],
)
def test_a_run_that_fails_at_any_operation_ends_like_one_that_was_left_alone(
    whole, tmp_path, act, status, only
):
    straight, operations = whole
    expected = contents(straight)
    for number, operation in enumerate(operations):
        if operation.startswith(only):
            folder = tmp_path / str(number)
            assert in_a_process(folder, at(number, act)) == status, operation
            if number % 4 == 0:  # The process that recovers may fail as well.
                assert in_a_process(folder, at(number % 23, act)) in (status, 0), operation
            assert in_a_process(folder) == 0, operation
            assert contents(folder) == expected, operation


def test_a_run_is_used_by_one_process_at_a_time(tmp_path):
    held = RunLock(tmp_path)
    code = f"from pathlib import Path; from flowgrpo.training.lock import RunLock; RunLock(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"is in use by process {os.getpid()} on" in done.stderr
    with pytest.raises(ConfigError, match="is in use by process"):  # nor by another thread
        run(tmp_path)
    held.release()
    run(tmp_path)
    assert run_folder.is_finished(config(tmp_path))


def test_a_crash_frees_the_lock_and_another_host_is_named(tmp_path, monkeypatch):
    if os.fork() == 0:
        RunLock(tmp_path)
        os._exit(9)
    os.wait()
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
    assert "did not end by itself" in RunLock(tmp_path).warning


def test_a_file_system_that_cannot_lock_is_named(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", cannot)
    assert "cannot lock ([Errno 37] No locks available)" in RunLock(tmp_path).warning


@pytest.mark.parametrize("broken", ["[1", "", "17"])
def test_lost_and_broken_log_lines_are_found_before_training(tmp_path, broken):
    run(tmp_path / "a")
    file = tmp_path / "a" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("".join(f"{line}\n" for line in [broken, *lines[1:]]))
    more = "train.iterations=3"
    with pytest.raises(LogError, match=r"metrics\.jsonl, line 1 is broken"):
        run(tmp_path / "a", more)
    file.write_text("".join(f"{line}\n" for line in lines).replace("0.1", "0.2"))
    with pytest.raises(LogError, match="one of its first 2 lines is not what was logged"):
        run(tmp_path / "a", more)
    file.write_text(lines[0] + "\n")
    with pytest.raises(LogError, match=r"has 1 line, but .*000002 was written after 2"):
        run(tmp_path / "a", more)


def test_keys_that_may_change_are_recorded_and_others_refused_by_name(tmp_path):
    run(tmp_path / "a")
    allowed = [
        "train.iterations=3",
        "train.lr=3e-5",
        "train.train_batch=7",
        "memory.decode_batch=2",
        "run.threads=1",
    ]
    run(tmp_path / "a", *allowed)
    last = json.loads((tmp_path / "a" / "sessions.jsonl").read_text().splitlines()[-1])
    assert last["checkpoint"] == "000002"
    assert last["changed"]["train.lr"] == {"from": 1.5e-4, "to": 3e-5}
    assert last["changed"].keys() == {
        "train.iterations", "train.lr", "train.train_batch", "memory.decode_batch", "run.threads",
    }  # fmt: skip
    for key, value in [("train.groups", 24), ("run.seed", 5), ("rewards.0.weight", 3.0)]:
        with pytest.raises(ConfigError, match=rf"{key} is .* there and {value} now"):
            run(tmp_path / "a", *allowed, f"{key}={value}")
    with pytest.raises(ConfigError, match="has already trained 3 iterations, more than"):
        run(tmp_path / "a", *allowed, "train.iterations=2")


def test_a_run_is_extended_and_stays_extended(tmp_path, capsys):
    """``--resume-with`` stays in force for the command that started the run, which has the old values."""
    folder = tmp_path / "a"
    run(folder)
    longer, kept = run_changes.extend(folder, ["train.iterations=4", "train.lr=1e-5"])
    assert kept == ["train.iterations", "train.lr"]
    run(folder, given=longer, kept=kept)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    before = flowgrpo.load(str(folder / "history" / "000002.toml"))
    assert (before.train.iterations, before.train.lr) == (2, 1.5e-4)
    assert run_changes.extend(folder, ["train.iterations=4"])[1] == []  # the command again
    # The first command again: it has neither, and both stay in force.
    merged, notes = run_changes.in_force(config(folder))
    assert (merged.train.iterations, merged.train.lr) == (4, 1e-5)
    assert (
        "train.iterations = 4, as this run was extended; the configuration that was given has 2"
        in notes[0]
    )
    assert run_folder.is_finished(merged)
    # A third value is a change of its own.
    merged, notes = run_changes.in_force(config(folder, "train.lr=7e-5"))
    assert (merged.train.iterations, merged.train.lr, len(notes)) == (4, 7e-5, 1)
    again, kept = run_changes.extend(folder, ["train.iterations=5"])
    run(folder, given=again, kept=kept)
    assert run_changes.in_force(config(folder))[0].train.iterations == 5
    assert run_changes.in_force(config(folder, "train.iterations=4"))[0].train.iterations == 5
    changes = [(n, set(c)) for n, c in run_changes.history(folder)]
    assert changes == [(2, {"train.iterations", "train.lr"}), (4, {"train.iterations"})]
    page = write_report(folder).read_text()
    assert "<td>4</td><td>train.iterations</td><td>4</td><td>5</td>" in page
    assert cli.main(["train", str(folder), "--dry-run"]) == 0
    assert "finished: the run would do nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.groups=24"], "train.groups may not change in a run: the iterations before and after"),
        (["rewards.0.weight=3.0"], "--set model.path=MODEL, with the change as a further --set"),
        (["model.weights.kind=lora"], "model.weights.kind may not change in a run: the checkpoint holds"),
        (["run.folder=b"], "a run stays in its directory"),
        (["train.iteration=3"], "did you mean 'iterations'?"),
        (["train.iterations=1"], "has already trained 2 iterations, more than"),
        (["train.lr=1e-5", "--set", "train.iterations=9"], "give every change to --resume-with"),
    ],
)  # fmt: skip
def test_a_key_that_may_not_change_is_answered_with_what_to_do(tmp_path, capsys, arguments, words):
    run(tmp_path / "a")
    before = (tmp_path / "a" / "sessions.jsonl").read_text()
    assert cli.main(["train", str(tmp_path / "a"), "--resume-with", *arguments]) in (1, 2)
    assert words in capsys.readouterr().err
    assert (tmp_path / "a" / "sessions.jsonl").read_text() == before


def test_only_a_run_that_exists_is_extended(tmp_path, capsys):
    given = ["train", "quickstart_flow_grpo", "--set", f"run.folder={tmp_path}/b", "--resume-with", "train.lr=1e-5"]  # fmt: skip
    assert cli.main(given) == 1
    assert "/b is none; to start one, use --set" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_prompt_file_may_move_but_not_change(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("a circle\na square\n")
    other.write_text(one.read_text())
    files_of = "prompts.held_out={}"
    run(tmp_path / "a", files_of.format(one))
    run(tmp_path / "a", "train.iterations=3", files_of.format(other))
    other.write_text("a circle\n")
    with pytest.raises(ConfigError, match=r"contents of prompts\.held_out have changed"):
        run(tmp_path / "a", "train.iterations=4", files_of.format(other))
    with pytest.raises(ConfigError, match=r"prompts\.held_out is "):
        run(
            tmp_path / "a",
            "train.iterations=4",
            files_of.format(one.with_name("other.txt").rename(tmp_path / "third.txt")),
        )


def test_paths_mean_the_same_from_any_directory(tmp_path, monkeypatch):
    """A run started with relative paths and ``~`` is resumed from another directory, and after a move."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    (work / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for file in (work / "mine.txt", home / "theirs.txt"):
        file.write_text("a red circle\n")
    mine = (
        "model.path=model",
        "model.adapters=[{path='mine.txt'}, {path='~/theirs.txt', scale=0.5}]",
        "model.weights={kind='lora', init='~/theirs.txt'}",
        "prompts.train=mine.txt",
        "prompts.balance=''",
    )
    assert config("~/r").run.folder == str(home / "r")
    run("run", *mine)
    monkeypatch.chdir(home)
    there = flowgrpo.load(str(work / "run" / "config.toml"))
    assert there.model.path == str(work / "model")
    assert [a.path for a in there.model.adapters] == [
        str(work / "mine.txt"),
        str(home / "theirs.txt"),
    ]
    assert there.model.weights.init == str(home / "theirs.txt")
    assert there.prompts.train == str(work / "mine.txt")
    # What comes with flowgrpo keeps its name, as do hub ids.
    assert there.prompts.held_out == "prompts/shapes_held_out.jsonl"
    (work / "run").rename(home / "moved")
    moved = flowgrpo.load("moved/config.toml", ["train.iterations=3"])
    assert moved.run.folder == "moved"
    monkeypatch.chdir(work)
    run(home / "moved", *mine, "train.iterations=3")
    with pytest.raises(ConfigError, match=r"model\.path is '.*' there and 'me/model' now"):
        run(home / "moved", *mine, "model.path=me/model", "train.iterations=3")


def test_the_table_of_changeable_keys_names_keys_and_is_in_the_docs():
    settings = config("nowhere")
    for key in CHANGEABLE:
        table, _, name = key.partition(".")
        assert name == "*" or hasattr(getattr(settings, table), name.removesuffix(".*")), key
    assert may_change("train.early_stopping.patience")
    assert may_change("rewards.0.ignores_prompt")
    assert not may_change("run.seed")
    assert not may_change("memory.quantize")
    assert not may_change("memory.arithmetic")
    assert not may_change("train.groups")
    assert differences(settings, config("elsewhere")) == {}
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    for key, effect in CHANGEABLE.items():
        assert f"| `{key}` | {effect} |" in page


@pytest.mark.parametrize(
    ("error", "saved"),
    [
        (RuntimeError("out of memory"), ["000001"]),
        (ValueError("a defect"), ["000001"]),
        (DivergenceError("NaN"), []),
        (KeyboardInterrupt(), []),
    ],
    ids=repr,
)
def test_any_error_in_a_rollout_saves_the_last_iteration(tmp_path, error, saved):
    settings, learner = config(tmp_path / "run", "run.checkpoint_every=100"), Counter()
    learner.weights += 1
    with Session(settings) as session:
        session.console.rich.quiet = True
        with pytest.raises(type(error)), session.rescue(learner, 1):
            raise error
    assert [p.name for p in checkpoints.complete(tmp_path / "run" / "checkpoints")] == saved
    if saved:
        parts, _ = checkpoints.load(tmp_path / "run" / "checkpoints" / saved[0])
        assert parts["weights"]["w"].tolist() == learner.weights.tolist()
