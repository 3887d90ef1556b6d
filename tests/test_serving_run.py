"""Whole runs whose reward is served by a process of its own, which is killed in the middle."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flowgrpo
from flowgrpo.rewards.settings import RewardError
from tests.test_serving import start
from tests.test_train import SMALL

LENGTH = ["train.iterations=3", "train.groups=4", "evaluation.every=0", "evaluation.images=4"]
WRITTEN = ("metrics.jsonl", "evaluations.jsonl")


class Server:
    """``flowgrpo serve-reward jpeg_size`` at one port, which can be killed and started again."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = start(self.port)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    running.start()
    yield running
    running.kill()


def train(server: Server, folder: Path, retries: int) -> None:
    options = f"{{url='http://127.0.0.1:{server.port}', patience=0.2, part=4}}"
    reward = f"rewards=[{{model='remote', name='size', options={options}}}]"
    failures = [f"failures.retries={retries}", "failures.wait=0.2"]
    settings = [*SMALL, *LENGTH, *failures, reward, f"run.folder={folder}"]
    flowgrpo.train(flowgrpo.load("quickstart_flow_grpo", settings))


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose server was left alone."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(server, folder, retries=0)
    return folder


def when(moment: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act in the background as soon as the moment has come."""

    def work() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not moment():
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def an_iteration_is_done(folder: Path) -> Callable[[], bool]:
    file = folder / "metrics.jsonl"
    return lambda: file.exists() and bool(file.read_text())


def same(a: Path, b: Path) -> None:
    for name in WRITTEN:
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_a_run_outlives_a_restart_of_its_server(
    server: Server, straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    killing = when(an_iteration_is_done(folder), server.kill)
    # Restarted only when the judge has tried in vain.
    restarting = when(lambda: "failed (attempt 2)" in caplog.text, server.start)
    train(server, folder, retries=12)
    killing.join()
    restarting.join()
    assert "reward 'size' failed (attempt 2): the reward server failed: no answer" in caplog.text
    same(folder, straight)


def test_without_its_server_a_run_stops_and_can_go_on(
    server: Server, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    killing = when(an_iteration_is_done(folder), server.kill)
    with pytest.raises(RewardError, match=r"scores failed, more than failures\.max_rate"):
        train(server, folder, retries=0)
    killing.join()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) < 3
    server.start()
    train(server, folder, retries=0)
    same(folder, straight)
