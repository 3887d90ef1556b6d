"""A session's bookkeeping: what a resume brings back, what a folder accepts, what is logged and when."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

import flowgrpo
import flowgrpo.config
from flowgrpo.config import ConfigError
from flowgrpo.core.errors import DivergenceError, LostRankError
from flowgrpo.core.measures import Measured
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.settings import RewardError
from flowgrpo.training import checkpoint_files, checkpoints, run_changes, trackers
from flowgrpo.training import session as sessions_module
from flowgrpo.training.ending import Result
from flowgrpo.training.learner import Learner
from flowgrpo.training.logs import LogError
from flowgrpo.training.session import Session
from flowgrpo.training.shares import Shares
from flowgrpo.training.signals import StopRequested
from tests.conftest import MakePolicy

SMALL = ["run.device=cpu", "run.threads=1", "run.trackers=[]", "train.iterations=9", "run.checkpoint_every=4"]  # fmt: skip
Start = Callable[..., Session]
METRICS = {"reward": 0.5, "group/zero_variance": 0.25, "group/diversity": 0.1, "grad_norm": 1.0}
"""What the line on the console shows of an iteration."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A session in a folder of the test; by default always the same."""
    sessions: list[Session] = []

    def make(*settings: str, folder: str = "run") -> Session:
        for earlier in sessions:  # A run directory is used by one session at a time.
            earlier.__exit__()
        config = flowgrpo.load(
            "quickstart_flow_grpo", [*SMALL, f"run.folder={tmp_path / folder}", *settings]
        )
        sessions.append(Session(config))
        return sessions[-1]

    yield make
    for session in sessions:
        session.__exit__()


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("sd3")


class Scorer:
    """The part of a scorer that a session uses."""

    def __init__(self) -> None:
        self.restored: Any = None

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"reward-judge": {"w": torch.tensor([3.0])}}

    def restore(self, parts: Any) -> None:
        self.restored = parts

    def close(self, wait: bool = True) -> None: ...


def learner_of(session: Session, policy: PipelinePolicy) -> Learner:
    return Learner(policy, session.config.train, ClippedLoss(), session.accelerator)


def lines(session: Session, name: str) -> list[dict[str, Any]]:
    file = session.folder / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def fail_after_a_line(session: Session) -> None:
    session.log_evaluation(result(2))
    raise KeyError


def result(iteration: int) -> dict[str, Any]:
    return {"iteration": iteration, "scores": {"x": 0.5}, "metrics": {"m": 1.0}, "seconds": 3.0}


def test_a_resume_brings_back_everything_that_was_saved(start: Start, policy: PipelinePolicy) -> None:  # fmt: skip
    first = start()
    first.scorer = Scorer()  # type: ignore[assignment]
    learner = learner_of(first, policy)
    first.restore(learner)
    assert (first.iteration, first.best, first.is_finished) == (0, float("-inf"), False)
    learner.optimizer.num_updates, learner.optimizer.gradient_norms = 7, [0.25, 3.5]
    for iteration in range(5):
        if iteration == 3:
            first.log_evaluation(result(3))
        first.log(iteration, METRICS, 0.5)
    first.save_best(learner, 3, 0.75)
    first.save(learner, 5)
    kept = {k: p.detach().clone() for k, p in learner.named.items()}
    # What comes after the checkpoint is lost, and so are its lines.
    for iteration in (5, 6):
        first.log(iteration, METRICS, 0.5)
    first.log_evaluation(result(6))
    first.best = 0.9
    with torch.no_grad():
        for parameter in learner.parameters:
            parameter += 1.0

    second = start()
    second.scorer = scorer = Scorer()  # type: ignore[assignment]
    again = learner_of(second, policy)
    second.restore(again)
    assert (second.iteration, second.best) == (5, 0.75)
    assert (again.optimizer.num_updates, again.optimizer.gradient_norms) == (7, [0.25, 3.5])
    assert all(torch.equal(p, kept[k]) for k, p in again.named.items())
    assert scorer.restored["reward-judge"]["w"].tolist() == [3.0]
    assert [m["iteration"] for m in lines(second, "metrics")] == [0, 1, 2, 3, 4]
    assert [m["iteration"] for m in lines(second, "timings")] == [0, 1, 2, 3, 4]
    assert [e["iteration"] for e in second.past_evaluations()] == [3]
    # Lines that the checkpoint counts must be there.
    log = second.folder / "metrics.jsonl"
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(LogError, match=r"metrics\.jsonl"):
        second.restore(again)
    log.write_text(whole)
    # The best so far is still to be beaten.
    second.save_best(again, 5, 0.75)
    assert checkpoints.load(second.checkpoints / "best")[1]["iteration"] == 3
    second.save_best(again, 6, 0.76)
    assert checkpoints.load(second.checkpoints / "best")[1] == {"iteration": 6, "score": 0.76}


def test_without_a_checkpoint_lines_are_dropped_and_the_newest_ones_are_kept(start: Start, policy: PipelinePolicy) -> None:  # fmt: skip
    session = start("run.keep_checkpoints=2")
    learner = learner_of(session, policy)
    session.log(0, METRICS, 0.0)
    session.restore(learner)
    assert lines(session, "metrics") == []
    unfinished = session.checkpoints / ".000001.tmp"
    for iteration in (1, 2, 3, 10):
        learner.optimizer.num_updates = iteration
        session.save(learner, iteration)
    assert sorted(p.name for p in session.checkpoints.iterdir()) == ["000003", "000010"]
    unfinished.mkdir()
    session.restore(learner)
    assert session.iteration == learner.optimizer.num_updates == 10
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (["run.seed=1"], r"run\.seed is 0 there and 1 now"),
        (["train.groups=12"], r"train\.groups is 18 there and 12 now"),
        (["train.lr=0.5", "train.iterations=10"], ""),
        (["run.checkpoint_every=1", "run.keep_checkpoints=5", "run.threads=1"], ""),
        ([], ""),
    ],
)
def test_a_folder_accepts_the_configuration_that_gives_the_same_numbers(settings: list[str], difference: str, start: Start) -> None:  # fmt: skip
    first = start()
    config = (first.folder / "config.toml").read_bytes()
    first.log(0, METRICS, 0.0)
    if difference:
        with pytest.raises(ConfigError, match=f"belongs to another configuration: {difference}"):
            start(*settings)
        assert (first.folder / "config.toml").read_bytes() == config
        # Before the first iteration there is nothing that could be mixed up.
        (first.folder / "metrics.jsonl").unlink()
    again = start(*settings)
    assert flowgrpo.load(str(again.folder / "config.toml")) == again.config
    environment = json.loads((again.folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["torch"])
    assert (environment["processes"], environment["device"]) == (1, "cpu")


def test_a_folder_with_other_files_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and not a run directory"):
        start(folder="thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_processes_that_are_not_connected_are_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"started 2 processes, but torch\.distributed sees 1"):
        start()
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "1")
    start()


def test_when_a_checkpoint_is_due(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Every fourth iteration, and after the ninth and last."""
    session, saved = start(), list[int]()
    monkeypatch.setattr(session, "save", lambda learner, iterations: saved.append(iterations))
    learner = learner_of(session, policy)
    assert [session.save_if_due(learner, n) for n in range(1, 10)] == [False] * 9
    assert saved == [4, 8, 9]
    assert session.grid(12) == session.folder / "grids" / "000012.png"


def test_a_checkpoint_is_due_after_minutes_or_when_a_signal_asks(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session, saved = start("run.checkpoint_minutes=2"), list[int]()
    monkeypatch.setattr(session, "save", lambda learner, iterations: saved.append(iterations))
    learner = learner_of(session, policy)
    for iterations, age in ((1, 119.0), (2, 120.5)):
        session._saved_at = time.monotonic() - age
        session.save_if_due(learner, iterations)
    assert saved == [2]
    session._saved_at = time.monotonic()
    session.signals.saving = True
    for iterations in (5, 6):
        assert not session.save_if_due(learner, iterations)
    assert saved == [2, 5], "a request is served once"
    monkeypatch.undo()
    session._saved_at = 0.0
    session.save(learner, 7)
    assert time.monotonic() - session._saved_at < 60, "the minutes count from the last checkpoint"


def test_groups_are_shared_in_order(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start()
    groups = [Group(i, Prompt(str(i))) for i in range(6)]
    assert session.share(groups) == groups
    for rank, own in ((0, [0, 1]), (1, [2, 3]), (2, [4, 5])):
        with monkeypatch.context() as patch:
            patch.setattr(session, "shares", Shares(Mock(spec=Accelerator, num_processes=3, process_index=rank)))  # fmt: skip
            assert [g.index for g in session.share(groups)] == own


def test_times_are_kept_apart_from_metrics(start: Start, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    session = start()
    for name, parts in (("rollout", 2), ("train", 1), ("evaluation", 1)):
        for _ in range(parts):
            with session.phase(name):
                pass
    session._phases = {"rollout": 2.0 + session._phases["rollout"] * 0, "train": 3.0, "evaluation": 50.0}  # fmt: skip
    with session.phase("rollout"):
        pass
    session.log(4, METRICS, 1.5)
    assert "[   5/9] reward 0.500" in capsys.readouterr().out
    (times,) = lines(session, "timings")
    assert times == pytest.approx({"iteration": 4, "rollout": 2.0, "train": 3.0, "evaluation": 50.0, "scoring": 1.5, "total": 5.0}, abs=0.1)  # fmt: skip
    assert times["rollout"] > 2
    assert lines(session, "metrics") == [{"iteration": 4, **METRICS}]
    with session.phase("train"):
        pass
    session.drop_phases()
    session.log(5, METRICS, 0.0)
    assert lines(session, "timings")[1] == {"iteration": 5, "scoring": 0.0, "total": 0}
    session.log_evaluation(result(5))
    assert lines(session, "evaluations") == [{"iteration": 5, "scores": {"x": 0.5}, "metrics": {"m": 1.0}}]  # fmt: skip


def test_trackers_get_metrics_and_scores(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start()
    tracked: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(session.accelerator, "log", lambda values, step: tracked.append((values, step)))  # fmt: skip
    session.log(2, METRICS, 0.0)
    session.log_evaluation(result(3))
    assert tracked == [(METRICS, 2), ({"held_out/x": 0.5, "m": 1.0}, 3)]


def test_the_loss_warns_once(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    session = start()
    noise = 2 * session.config.loss.clip_range  # type: ignore[union-attr]
    for iteration, value in enumerate([noise / 4, noise, noise]):
        session.log(iteration, METRICS | {"log_prob/noise": value}, 0.0)
        said = " ".join(capsys.readouterr().out.split())
        assert ("flowgrpo doctor" in said) is (iteration == 1)


def test_every_error_of_a_rollout_saves_except_divergence(start: Start, policy: PipelinePolicy, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    session = start()
    learner = learner_of(session, policy)
    with pytest.raises(DivergenceError), session.rescue(learner, 2):
        raise DivergenceError("NaN")
    assert checkpoints.newest(session.checkpoints) is None
    for iteration in (0, 1):
        session.log(iteration, METRICS, 0.0)
    with pytest.raises(KeyError), session.rescue(learner, 2):
        fail_after_a_line(session)
    assert checkpoints.newest(session.checkpoints) == session.checkpoints / "000002"
    # Lines that the rollout itself wrote are written again when the run resumes.
    counted = checkpoints.load(session.checkpoints / "000002")[1]["lines"]
    assert {k: v for k, v in counted.items() if v} == {"metrics": 2, "timings": 2}
    with pytest.raises(RewardError, match="no route"), session.rescue(learner, 3):
        raise RewardError("no route")
    assert checkpoints.newest(session.checkpoints) == session.checkpoints / "000003"
    assert "saved after 3 iterations" in capsys.readouterr().out


def test_the_second_interrupt_ends_at_once(start: Start, policy: PipelinePolicy) -> None:
    session = start()
    learner = learner_of(session, policy)
    assert session.save_if_due(learner, 1) is False
    session.signals.loading = False  # While models are loaded, the first interrupt stops at once.
    os.kill(os.getpid(), signal.SIGINT)
    assert session.stopping
    assert session.save_if_due(learner, 2) is True
    assert checkpoints.newest(session.checkpoints) == session.checkpoints / "000002"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_best_weights_are_the_average_if_there_is_one(start: Start, policy: PipelinePolicy) -> None:  # fmt: skip
    for decay, folder in ((0.0, "plain"), (0.9, "slow")):
        session = start(f"train.ema_decay={decay}", folder=folder)
        learner = learner_of(session, policy)
        expected = [p.detach().clone() for p in learner.parameters]
        if learner.ema is not None:
            for average, weight in zip(learner.ema.average, expected, strict=True):
                average += 1.0
                weight += 1.0
        session.save_best(learner, 2, 0.5)
        parts, _ = checkpoints.load(session.checkpoints / "best")
        assert list(parts) == ["weights"]
        for name, weight in zip(learner.named, expected, strict=True):
            assert torch.equal(parts["weights"][name], weight)


def test_weights_that_are_not_finite_are_never_saved(start: Start, policy: PipelinePolicy) -> None:
    session = start()
    learner = learner_of(session, policy)
    kept = learner.parameters[0].detach().clone()
    with torch.no_grad():
        learner.parameters[0].view(-1)[0] = float("nan")
    try:
        with pytest.raises(DivergenceError, match="weights contains NaN"):
            session.save_best(learner, 1, 0.5)
        with pytest.raises(DivergenceError, match="weights contains NaN"):
            session.save(learner, 1)
        assert session.best == float("-inf")
        assert not session.checkpoints.exists()
    finally:
        with torch.no_grad():
            learner.parameters[0].copy_(kept)
    session.save_best(learner, 1, float("nan"))
    assert not session.checkpoints.exists(), "a score that is not a number is not the best"


def test_damaged_checkpoints_are_set_aside_until_one_is_sound(start: Start, policy: PipelinePolicy, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    session = start("run.keep_checkpoints=2")
    learner = learner_of(session, policy)
    for iteration in (1, 2, 3, 4):
        checkpoints.save(session.checkpoints / f"{iteration:06d}", *saved_by(learner, iteration))
    for iteration in (3, 4):
        (session.checkpoints / f"{iteration:06d}" / "weights.safetensors").write_bytes(b"cut")
    session.restore(learner)
    assert (session.iteration, learner.optimizer.num_updates) == (2, 2)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("WARNING") == 2
    assert "renamed to damaged-000004" in said
    assert said.endswith(f"resuming at iteration 2 from {session.checkpoints / '000002'}")
    names = [p.name for p in sorted(session.checkpoints.iterdir())]
    assert names == ["000001", "000002", "damaged-000003", "damaged-000004"]
    # Without a sound one nothing is renamed; the message is about the newest.
    for iteration in (1, 2):
        (session.checkpoints / f"{iteration:06d}" / "state.json").write_text("{}")
    with pytest.raises(
        checkpoints.CheckpointError, match=r"000002.*No earlier checkpoint is sound"
    ):
        session.restore(learner)
    assert [p.name for p in sorted(session.checkpoints.iterdir())] == names
    # One that was being replaced comes back before it is checked.
    (session.checkpoints / "000001" / "state.json").unlink()
    checkpoints.save(session.checkpoints / "000002", *saved_by(learner, 2))
    checkpoints.save(session.checkpoints / "000004", *saved_by(learner, 4))
    (session.checkpoints / "000004" / "weights.safetensors").write_bytes(b"cut")
    (session.checkpoints / "000004").rename(session.checkpoints / ".000004.old")
    session.restore(learner)
    assert session.iteration == 2
    # More than are kept are pruned when a session begins, not only when one is saved.
    for iteration in (5, 6, 7):
        checkpoints.save(session.checkpoints / f"{iteration:06d}", *saved_by(learner, iteration))
    session.restore(learner)
    kept = [p.name for p in checkpoints.numbered(session.checkpoints)]
    assert kept == ["000006", "000007"]


def saved_by(learner: Learner, iteration: int) -> tuple[Any, dict[str, Any]]:
    """The parts and the state of a checkpoint that counts no lines."""
    parts, state = learner.state()
    state |= {"num_updates": iteration}
    return parts, {"iteration": iteration, "best": 0.0, "lines": {}, "learner": state}


def test_a_process_that_is_not_the_main_one_writes_nothing(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    first = start()
    learner = learner_of(first, policy)
    for iteration in (0, 1, 2):
        first.log(iteration, METRICS, 0.0)
    first.save(learner, 2)
    first.log(3, METRICS, 0.0)
    (first.checkpoints / "000001").mkdir()
    first.__exit__()
    monkeypatch.setattr(sessions_module.Accelerator, "is_main_process", False)
    capsys.readouterr()

    def contents() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in first.folder.rglob("*") if p.is_file()}

    before = contents()
    session = start("run.checkpoint_every=1", "run.keep_checkpoints=1")
    learner.optimizer.num_updates = 9
    session.restore(learner)
    assert (session.iteration, learner.optimizer.num_updates) == (2, 0), (
        "every process reads the checkpoint"
    )
    session.log(2, METRICS, 0.0)
    session.log_evaluation(result(2))
    session.save(learner, 3)
    assert session.save_if_due(learner, 4) is False
    session.save_best(learner, 3, 0.5)
    assert session.best == 0.5
    session.note_prompts(["a note"])
    with pytest.raises(StopRequested), session.rescue(learner, 3):
        raise StopRequested("SIGTERM")
    session.close()
    assert contents() == before
    assert capsys.readouterr().out == ""


def test_what_a_rollout_that_fails_saves(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    session = start()
    learner = learner_of(session, policy)

    def saved(iteration: int, error: BaseException, raised: type[BaseException]) -> bool:
        with pytest.raises(raised), session.rescue(learner, iteration):
            raise error
        place = session.checkpoints / f"{iteration:06d}"
        found = place.exists()
        checkpoints.files.delete(place)
        return found

    assert not saved(0, KeyError(), KeyError), "nothing has been trained"
    assert "saved after" not in capsys.readouterr().out
    assert saved(1, KeyError(), KeyError)
    # Of several processes others may be in the middle of an update, unless they stop too.
    with monkeypatch.context() as patch:
        patch.setattr(sessions_module.Accelerator, "num_processes", 2)
        assert not saved(1, KeyError(), KeyError)
        assert not saved(1, RewardError("no"), RewardError)
        assert saved(1, StopRequested("SIGTERM"), StopRequested)
        assert saved(1, LostRankError("no"), LostRankError)

    # If the state cannot be saved either, the first error counts, unless it was an expected one.
    def full(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(sessions_module.checkpoints, "save", full)
    assert not saved(1, KeyError(), KeyError)
    for error in (RewardError("no"), StopRequested("SIGTERM"), LostRankError("no")):
        assert not saved(1, error, OSError)


def test_a_stop_before_a_rollout_prevents_it_and_one_inside_waits(start: Start, policy: PipelinePolicy) -> None:  # fmt: skip
    session = start()
    learner = learner_of(session, policy)
    with session.rescue(learner, 1):
        os.kill(os.getpid(), signal.SIGTERM)  # No longer loading: it does not stop at once.
    assert session.stopping
    began = []
    with pytest.raises(StopRequested), session.rescue(learner, 2):
        began.append(1)
    assert not began
    assert checkpoints.newest(session.checkpoints) == session.checkpoints / "000002"


def test_a_stop_or_a_due_time_of_one_process_is_that_of_all(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session, saved = start("run.checkpoint_minutes=0"), list[int]()
    monkeypatch.setattr(session, "save", lambda learner, iterations: saved.append(iterations))
    learner = learner_of(session, policy)
    session._saved_at = time.monotonic() - 1e6  # 0 minutes: never by time
    assert session.save_if_due(learner, 1) is False
    assert saved == []
    others = torch.tensor([[0.0, 1.0]])
    monkeypatch.setattr(session.processes, "gather", lambda own: torch.cat([own, others]))
    assert session.save_if_due(learner, 2) is False
    assert (saved, session.stopping) == ([2], False)
    others = torch.tensor([[1.0, 0.0]])
    assert session.save_if_due(learner, 3) is True
    assert (saved, session.signals.stopping) == ([2, 3], "SIGTERM")
    session.signals.stopping = "SIGINT"
    assert session.save_if_due(learner, 5) is True
    assert session.signals.stopping == "SIGINT", "its own signal decides the exit status"


def test_a_process_uses_the_device_and_the_processes_that_it_was_given(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    chosen, made = list[Any](), list[Any]()
    fake = SimpleNamespace(set_device=chosen.append, device_count=lambda: 2)
    monkeypatch.setattr(sessions_module, "resolve_device", lambda name: "cuda:1")
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    signals = sessions_module.Signals
    monkeypatch.setattr(sessions_module, "Signals", lambda *a: made.append(a[1:]) or signals(*a))
    start(folder="gpu")
    assert chosen == [torch.device("cuda:1")]
    monkeypatch.setattr(sessions_module, "resolve_device", lambda name: "cuda")
    start(folder="gpu")
    assert len(chosen) == 1
    monkeypatch.setattr(sessions_module, "resolve_device", lambda name: "cpu")
    monkeypatch.setattr(sessions_module.Accelerator, "num_processes", 2)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    threads = torch.get_num_threads()
    try:
        session = start("model.dtype=float16", "run.threads=2", folder="gpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert session.accelerator.mixed_precision == "no", "half precision on a CPU needs no scaling"
    assert made == [(True, False), (True, False), (True, True)]
    assert json.loads((session.folder / "environment.json").read_text())["processes"] == 2
    assert Path(session.accelerator.project_dir) == session.folder


def test_the_end_of_a_session_gives_everything_back(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    usual, ended = signal.getsignal(signal.SIGTERM), list[Any]()

    class Tracker:
        def finish(self) -> None:
            ended.append("tracker")
            raise ConnectionError

    monkeypatch.setattr(sys, "argv", ["flowgrpo", "train", "--set", "rewards.0.options.token=abc"])
    with start() as session:
        assert signal.getsignal(signal.SIGTERM) != usual
        session.accelerator.trackers = [Tracker(), Tracker()]
        session.scorer = SimpleNamespace(close=lambda wait: ended.append(wait))  # type: ignore[assignment]
    assert ended == [False, "tracker", "tracker"]
    assert signal.getsignal(signal.SIGTERM) is usual
    Session(session.config).__exit__()  # The directory is free.
    environment = json.loads((session.folder / "environment.json").read_text())
    assert "abc" not in environment["command"]
    assert environment["command"].startswith("flowgrpo train --set")
    assert {"python", "platform", "threads", "flowgrpo", "peft"} <= environment.keys()
    assert environment["threads"] == torch.get_num_threads()


def test_closing_waits_for_the_others_and_ends_the_trackers_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session, seen = start(), list[str]()
    monkeypatch.setattr(session.accelerator, "wait_for_everyone", lambda: seen.append("waited"))
    tracker = SimpleNamespace(finish=lambda: seen.append("ended"))
    monkeypatch.setattr(session.accelerator, "end_training", tracker.finish)
    session.accelerator.trackers = [tracker]
    session.close()
    assert seen == ["waited", "ended"]
    session.__exit__()
    assert seen == ["waited", "ended"]


def test_changes_since_the_last_session_and_notes_on_prompts_are_said(start: Start, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    first = start()
    first.log(0, METRICS, 0.0)
    first.note_prompts([])
    notes = first.folder / "notes.json"
    assert not notes.exists()
    first.note_prompts(["3 prompts are cut", "one is empty"])
    assert json.loads(notes.read_text()) == {"notes": ["3 prompts are cut", "one is empty"]}
    said = capsys.readouterr().out
    assert "WARNING: 3 prompts are cut" in said
    assert "changed" not in said
    again = start("train.iterations=12")
    assert "changed since the last session: train.iterations 9 -> 12" in capsys.readouterr().out
    again.note_prompts([])
    assert json.loads(notes.read_text()) == {"notes": []}, "notes of earlier prompts do not stay"


def test_benchmarks_and_grids_go_to_the_trackers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session = start()
    tracked: list[Any] = []
    monkeypatch.setattr(session.accelerator, "log", lambda values, step: tracked.append((values, step)))  # fmt: skip
    monkeypatch.setattr(trackers, "log_picture", lambda *a: tracked.append(a[1:]))
    bench = {"geneval": {"results": {"overall": 0.5, "counting": None}}, "dpg": {"problem": "no"}}
    session.log_evaluation({**result(3), "bench": bench})
    session.log_grid(3)
    assert tracked == [
        ({"held_out/x": 0.5, "m": 1.0, "bench/geneval/overall": 0.5}, 3),
        ("grid", session.folder / "grids" / "000003.png", 3),
    ]
    assert lines(session, "evaluations")[0]["bench"] == bench


def test_objects_of_several_processes_are_gathered(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session = start()
    monkeypatch.setattr("flowgrpo.training.shares.gather_object", lambda own: [*own, "another's"])
    assert session.gather_objects(["own"]) == ["own"]
    monkeypatch.setattr(sessions_module.Accelerator, "num_processes", 2)
    assert session.gather_objects(["own"]) == ["own", "another's"]
    assert session.gather(torch.tensor([[1.0]])).tolist() == [[1.0]]


def test_a_session_says_only_what_matters(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    start()
    assert capsys.readouterr().out == ""
    claim = sessions_module.run_folder.claim

    def without_locks(*arguments: Any) -> Any:
        held, changed = claim(*arguments)
        held.warning = "WARNING: this file system has no locks"
        return held, changed

    monkeypatch.setattr(sessions_module.run_folder, "claim", without_locks)
    start()
    assert capsys.readouterr().out.split() == [
        "WARNING:",
        "this",
        "file",
        "system",
        "has",
        "no",
        "locks",
    ]


def test_other_ways_to_sample_and_artefacts_go_to_the_trackers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    session = start()
    tracked: list[Any] = []
    monkeypatch.setattr(session.accelerator, "log", lambda values, step: tracked.append((values, step)))  # fmt: skip
    slow = {"scores": {"x": 0.75}, "metrics": {"m": 2.0}, "seconds": 9.0}
    session.log_evaluation({**result(4), "artefacts": {"grid": 1.5}, "regimes": {"slow": slow}})
    values = {"held_out/x": 0.5, "m": 1.0, "artefacts/grid": 1.5, "held_out/slow/x": 0.75, "m/slow": 2.0}  # fmt: skip
    assert tracked == [(values, 4)]
    (line,) = lines(session, "evaluations")
    assert line["regimes"] == {"slow": {"scores": {"x": 0.75}, "metrics": {"m": 2.0}}}


def test_the_best_by_other_numbers_are_kept_apart(start: Start, policy: PipelinePolicy) -> None:
    session = start("evaluation.best=min:graded", "evaluation.keep_best=['strict', 'min:strict']")
    learner = learner_of(session, policy)
    high, low = Measured.parse("strict"), Measured.parse("min:strict")
    for iteration, value in enumerate((0.5, 0.25, 0.75, float("nan"), 0.75, 0.25)):
        session.save_best(learner, iteration, value)
        session.save_best(learner, iteration, value, high)
        session.save_best(learner, iteration, value, low)
    kept = {p.name: checkpoints.peek(p) for p in session.checkpoints.iterdir()}
    assert kept == {
        "best": {"iteration": 1, "score": 0.25},
        high.folder: {"iteration": 2, "score": 0.75},
        low.folder: {"iteration": 1, "score": 0.25},
    }
    session.save(learner, 6)
    again = start("evaluation.best=min:graded", "evaluation.keep_best=['strict', 'min:strict']")
    again.restore(learner)
    assert again.best == -0.25
    assert again.bests == {"strict": 0.75, "min:strict": -0.25}


def test_a_plan_and_its_waste_are_said(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    session = start("train.rollout_batch=288")
    session.announce()
    network = SimpleNamespace(dtype=torch.float32, attentions=(), denoisers={"transformer": torch.nn.Linear(2, 2)}, pipeline=policy.pipeline)  # fmt: skip
    weights = [torch.zeros(10), torch.zeros(2, 3)]
    learner = Mock(spec=Learner, parameters=weights, policy=network)
    session.announce_network(learner)
    said = capsys.readouterr().out
    assert "groups x samples  18 prompts" in " ".join(said.split(" "))
    assert "micro-batches  about" in said
    assert "WARNING" not in said
    assert "network" not in said
    monkeypatch.setattr(sessions_module.Accelerator, "num_processes", 2)
    monkeypatch.setattr(sessions_module.Accelerator, "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device_count=lambda: 3))  # fmt: skip
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    assert sessions_module._here(torch.device("cuda")) == (2, 3)
    session.announce()
    session.announce_network(learner)
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: train.rollout_batch = 288 is never filled" in said
    assert "WARNING: 1 of the 3 devices here" in said
    assert "the sum of 16 gradients" in said
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "3")
    session.announce()
    assert "devices here" not in capsys.readouterr().out


def test_a_divided_model_is_saved_by_all_processes_together(start: Start, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    session = start()
    learner = learner_of(session, policy)
    session.save(learner, 4)
    made, calls = list[Any](), list[Any]()
    signals = sessions_module.Signals
    monkeypatch.setattr(sessions_module, "Signals", lambda *a: made.append(a[1:]) or signals(*a))
    monkeypatch.setattr(Session, "is_sharded", True)
    session = start()
    assert made == [(False, False)], "it cannot stop alone"
    fake = SimpleNamespace(
        save=lambda folder, parts, state, **given: calls.append((folder.name, sorted(parts), state["iteration"], given["is_main"])),
        load=lambda folder, place: calls.append((folder.name, place)) or checkpoints.load(folder),
    )  # fmt: skip
    monkeypatch.setattr(checkpoint_files, "sharded_checkpoints", fake)
    session.restore(learner)
    assert session.iteration == 4
    assert calls.pop() == ("000004", learner.division)
    with pytest.raises(StopRequested), session.rescue(learner, 5):
        raise StopRequested("SIGTERM")
    assert calls == []
    monkeypatch.setattr(sessions_module.Accelerator, "is_main_process", False)
    session.save(learner, 6)
    session.save_best(learner, 6, 0.5)
    assert calls == [("000006", ["optimizer", "weights"], 6, False), ("best", ["weights"], 6, False)]  # fmt: skip
    # What is not finite in one process is refused in all.
    monkeypatch.setattr(
        session.processes, "gather_objects", lambda own: [*own, "weights contains NaN there"]
    )
    with pytest.raises(DivergenceError, match=r"^weights contains NaN there$"):
        session.save(learner, 7)


def test_changes_of_a_run_by_hand(tmp_path: Path) -> None:
    def changed(**values: tuple[Any, Any]) -> dict[str, Any]:
        return {k.replace("_", "."): {"from": a, "to": b} for k, (a, b) in values.items()}

    rows = [
        {"checkpoint": None},
        {"checkpoint": 3, "changed": changed(train_lr=(1.0, 2.0)), "kept": changed(train_lr=(1.0, 2.0))},
        {"checkpoint": 5, "changed": {}, "stopped": 5},
        {"checkpoint": 7, "changed": changed(train_lr=(2.0, 3.0), run_threads=(1, 2)), "stopped": 2},
    ]  # fmt: skip
    file = tmp_path / "sessions.jsonl"
    assert run_changes.history(tmp_path) == []
    assert run_changes.stopped_before(tmp_path) == 0
    file.write_text("\n".join(json.dumps(r) for r in rows) + '\n[1]\n{"checkpoint"')
    assert run_changes.history(tmp_path) == [
        (3, {"train.lr": (1.0, 2.0)}), (7, {"train.lr": (2.0, 3.0), "run.threads": (1, 2)}),
    ]  # fmt: skip
    assert run_changes.stopped_before(tmp_path) == 5
    assert run_changes._kept(file) == {"train.lr": [1.0, 2.0, 3.0]}
    for given, lr, notes in ((1.0, 3.0, 1), (2.0, 3.0, 1), (3.0, 3.0, 0), (4.0, 4.0, 0)):
        config = flowgrpo.load(
            "quickstart_flow_grpo", [f"run.folder={tmp_path}", f"train.lr={given}"]
        )
        found, said = run_changes.in_force(config)
        assert (found.train.lr, len(said)) == (lr, notes)
    one = flowgrpo.load(
        "quickstart_flow_grpo", ["rewards.0.options={a=1}", "evaluation.num_steps=3"]
    )
    other = flowgrpo.load("quickstart_flow_grpo", ["rewards=[{model='jpeg_size'}]"])
    kept = run_changes.kept_changes(one, other, ["rewards.0.weight", "rewards.1.name", "evaluation.num_steps"])  # fmt: skip
    assert list(kept) == ["rewards", "evaluation.num_steps"]
    assert kept["evaluation.num_steps"] == {"from": 3, "to": run_changes._at(run_changes.to_table(other), "evaluation.num_steps")}  # fmt: skip
    assert [r["model"] for r in kept["rewards"]["to"]] == ["jpeg_size"]
    table = {"a": {"b": 1}}
    run_changes._put(table, "a.b", None)
    run_changes._put(table, "c.d.e", 2)
    run_changes._put(table, "c.absent", None)
    assert table == {"a": {}, "c": {"d": {"e": 2}}}
    (tmp_path / "checkpoints" / "000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "000012").mkdir()
    for weights, words in (
        (
            "lora",
            f"--set model.weights.init={tmp_path}/checkpoints/000012 --set model.weights.reference=model, with",
        ),
        ("full", f"flowgrpo export {tmp_path} --out MODEL.*--set model.path=MODEL, with"),
        ("noise", r"^Start a new run with another --set run\.folder"),
    ):
        config = flowgrpo.load("quickstart_flow_grpo", [f"run.folder={tmp_path}", f"model.weights={{kind='{weights}'}}"])  # fmt: skip
        with pytest.raises(ConfigError, match=r"train\.groups may not change in a run: the iter"):
            run_changes.require_changeable("train.groups", config)
        assert re.search(words, run_changes.instead(config))
    run_changes.require_changeable("train.lr", config)
    with pytest.raises(ConfigError, match=f"{tmp_path} is none; to start one, use --set"):
        run_changes.extend(tmp_path, [])
    flowgrpo.config.save(config, tmp_path / "config.toml")
    longer, keys = run_changes.extend(tmp_path, ["train.iterations=500", "train.lr=0.5"])
    assert (longer.train.iterations, sorted(keys)) == (500, ["train.iterations", "train.lr"])
    assert run_changes.extend(tmp_path, [f"train.lr={config.train.lr}"])[1] == []
    with pytest.raises(ConfigError, match=r"run\.folder: a run stays in its directory"):
        run_changes.extend(tmp_path, ["run.folder=elsewhere"])
    with pytest.raises(ConfigError, match=r"train\.groups may not change"):
        run_changes.extend(tmp_path, ["train.groups=9"])


def test_a_function_of_the_user_gets_what_is_logged(tmp_path):
    heard: list[Any] = []
    config = flowgrpo.load("quickstart_flow_grpo", [*SMALL, f"run.folder={tmp_path / 'heard'}"])
    with Session(config, on_log=lambda name, record: heard.append((name, record))) as session:
        session.log(0, METRICS, 0.0)
        session.log_evaluation(result(1))
        assert heard == [
            ("metrics", lines(session, "metrics")[0]),
            ("evaluations", lines(session, "evaluations")[0]),
        ]
        assert Result(session.folder, [], True).metrics == [{"iteration": 0, **METRICS}]
