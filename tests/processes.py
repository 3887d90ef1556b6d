"""Processes of runs, forked from the tests so that they need not import torch and diffusers again."""

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from subprocess import TimeoutExpired

import torch
from accelerate.state import AcceleratorState

from flowgrpo import cli


class Forked:
    """Work in a process of its own, with the members of :class:`subprocess.Popen` that tests use.

    Attributes:
        returncode: The exit status, negative for a signal; None while the process runs.
    """

    def __init__(self, work: Callable[[], int], environment: Mapping[str, str] | None = None):
        """Start the work, which returns the exit status."""
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.environ |= {"OMP_NUM_THREADS": "1", **(environment or {})}
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(self._output.fileno(), number)
                setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
            logging.root.handlers.clear()  # Those of pytest keep warnings from the output.
            AcceleratorState._reset_state(reset_partial_state=True)
            # OpenMP's threads do not survive a fork: a process that uses several hangs or crashes if the
            # tests before it did. accelerate gives each process several unless the environment says otherwise.
            torch.set_num_threads(1)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status if the process has ended."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal if the process has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait for the end, and return the output; a process that does not end in time is killed.

        Raises:
            TimeoutExpired: If it was killed.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.returncode = -signal.SIGKILL
                raise TimeoutExpired("a forked process", timeout, self.output())
            time.sleep(0.01)
        return self.output(), None

    def output(self) -> str:
        """What the process has printed so far."""
        # The processes share the position in the file, which must stay at its end.
        length = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), length, 0).decode()


def command(*arguments: str) -> Forked:
    """``flowgrpo`` with these arguments."""
    return Forked(lambda: cli.main(arguments))


def ranks(work: Callable[[int], int], number: int = 2) -> Sequence[Forked]:
    """Work in several connected processes; it gets the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place["WORLD_SIZE"] = str(number)

    def start(rank: int) -> Forked:
        return Forked(lambda: work(rank), place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})

    return [start(rank) for rank in range(number)]
