"""Starts the processes of a run on this machine (``flowgrpo train --nproc N``), passes signals to them,
and ends all of them when one fails.

The environment of a process is that of ``torchrun``: ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``,
``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``. torchrun itself is not used, because it kills its
processes 30 seconds after SIGTERM, keeps SIGUSR1 to itself, and replaces their exit status by its own, so
that a scheduler could not tell a run that has saved from one that has failed.
"""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.text import counted
from flowgrpo.training.signals import EXIT_STATUS, HANDLED

LAUNCHED = "FLOWGRPO_LAUNCHED"
"""Environment variable of a process that :func:`launch` has started: its standard input is a pipe that the
launcher holds open."""
PORT = 29500
"""Port of rank 0 in runs on several nodes, unless another is given; torchrun's default."""
GRACE_SECONDS = 60.0
"""After a process has failed, the time that the others have to save and end before they are killed."""
HELD_SECONDS = 1.0
"""How long a line of another process than rank 0 is held back, in case that rank 0 prints it too."""
POLL_SECONDS = 0.05
KEPT_LINES = 20_000
"""Different lines that are remembered, so that each is printed once."""
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables with the number of processes that MPI launchers started, as accelerate reads them."""
NODE_RANKS = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Variables with the number of this node: those of Slurm's tasks and of the pods of a Kubernetes Indexed
Job."""


def num_ranks(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes of the run that this process belongs to, from the launcher's variables.

    Raises:
        ConfigError: If the variables contradict each other, or another launcher started several processes
            without connecting them, each of which would be a run of its own.
    """
    given = {k: environ.get(k, "") for k in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    for key in ("WORLD_SIZE", "RANK"):
        if given[key] and not given[key].isdecimal():
            raise ConfigError(
                f"the environment variable {key} must be a number, got {given[key]!r}"
            )
    size = int(given["WORLD_SIZE"] or 1)
    if size > 1:
        missing = [k for k, v in given.items() if not v]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {size}, but {' and '.join(missing)} is not set, so this process cannot find the "
                f"others and would train alone; {_right_command(size)}"
            )
        if int(given["RANK"]) >= size:
            raise ConfigError(f"RANK must be below WORLD_SIZE = {size}, got {given['RANK']}")
        return size
    if int(given["RANK"] or 0) > 0:
        raise ConfigError(
            f"RANK is {given['RANK']}, but WORLD_SIZE is {given['WORLD_SIZE'] or 'not set'}, so this process would "
            f"train alone; {_right_command(int(given['RANK']) + 1)}"
        )
    _refuse_strangers(environ)
    return size


def _refuse_strangers(environ: Mapping[str, str]) -> None:
    """Refuse processes of launchers that do not set torch's variables.

    Raises:
        ConfigError: With the command to use.
    """
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    if tasks > 1:
        raise ConfigError(
            f"srun started {counted(tasks, 'task')}, and each would be a run of its own; start one task per node, and let it "
            "start the processes: srun --ntasks-per-node=1 flowgrpo train ... --nproc GPUS_PER_NODE --nnodes "
            "$SLURM_NNODES --master $(hostname)"
        )
    for name in MPI_SIZES:
        if _number(environ, name) > 1:
            raise ConfigError(
                f"MPI started {counted(environ[name], 'process')} ({name}), and each would be a run of its own; "
                f"{_right_command(_number(environ, name))}"
            )
    if _number(environ, "JOB_COMPLETION_INDEX") > 0:
        raise ConfigError(
            f"this is pod {environ['JOB_COMPLETION_INDEX']} of an Indexed Job, and each pod would be a run of its "
            "own; add --nproc GPUS_PER_POD --nnodes COMPLETIONS --master NAME_OF_POD_0"
        )


def _right_command(size: int) -> str:
    return f"use flowgrpo train ... --nproc {size}, or torchrun --nproc-per-node {size} -m flowgrpo train ..."


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def check_devices(ranks: int, devices: int) -> None:
    """Raise ConfigError if there are more processes on this machine than devices that they can see."""
    if ranks > devices:
        raise ConfigError(
            f"{counted(ranks, 'process')} were started on this machine, and they can see {devices} "
            f"{'device' if devices == 1 else 'devices'}; use --nproc {max(1, devices)}, or run.device = 'cpu'"
        )


def idle_devices(ranks: int, devices: int) -> str:
    """A sentence about devices of this machine that no process uses; empty if all are used.

    Args:
        ranks: Processes of the run on this machine.
        devices: Devices that the processes can see.
    """
    if ranks >= devices:
        return ""
    return (
        f"{devices - ranks} of the {counted(devices, 'device')} here are not used; --nproc {devices} uses all, and "
        "CUDA_VISIBLE_DEVICES hides those that are meant for something else"
    )


@dataclass(frozen=True)
class Nodes:
    """The processes to start here, and their place among those of the other nodes.

    Attributes:
        nproc: Processes on this node.
        nnodes: Nodes, all with as many processes.
        node_rank: The number of this node.
        master: Host or address of node 0.
        port: Port on which rank 0 listens.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master: str = "127.0.0.1"
    port: int = 0

    @property
    def size(self) -> int:
        """Processes of the run."""
        return self.nproc * self.nnodes

    @classmethod
    def of(
        cls,
        nproc: int,
        nnodes: int = 1,
        node_rank: int | None = None,
        master: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> "Nodes":
        """From the options of the command.

        Args:
            nproc: Processes on this node.
            nnodes: Nodes.
            node_rank: The number of this node; None takes that of Slurm or Kubernetes.
            master: ``HOST`` or ``HOST:PORT`` of node 0, for several nodes.
            environ: Environment variables.

        Raises:
            ConfigError: If the options contradict each other or the environment.
        """
        if _number(environ, "WORLD_SIZE") > 1:
            raise ConfigError(
                f"this process is already one of {environ['WORLD_SIZE']} that a launcher started; leave out --nproc, "
                "or start the command without the launcher"
            )
        if nproc < 1 or nnodes < 1:
            raise ConfigError(f"--nproc and --nnodes must be at least 1, got {nproc} and {nnodes}")
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
        if tasks > nnodes:
            raise ConfigError(
                f"srun started {counted(tasks, 'task')} for --nnodes {nnodes}, and each would start a run of its own; use srun "
                f"--ntasks-per-node=1, and --nnodes {tasks} for {counted(tasks, 'node')}"
            )
        if nnodes == 1:
            if node_rank or master:
                raise ConfigError("--node-rank and --master are for several nodes; add --nnodes")
            return cls(nproc)
        if not master:
            raise ConfigError(f"--nnodes {nnodes} needs --master HOST:PORT, the address of node 0")
        found = next((environ[n] for n in NODE_RANKS if environ.get(n, "").isdecimal()), None)
        if node_rank is None and found is None:
            raise ConfigError(
                f"--nnodes {nnodes} needs --node-rank, from 0 to {nnodes - 1}, because neither "
                f"{' nor '.join(NODE_RANKS)} is set"
            )
        own = node_rank if node_rank is not None else int(found or 0)
        if not 0 <= own < nnodes:
            raise ConfigError(f"--node-rank must be from 0 to {nnodes - 1}, got {own}")
        address = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?", master)
        if address is None or not 0 < int(address[2] or PORT) < 65536:
            raise ConfigError(f"--master must be HOST or HOST:PORT, got {master!r}")
        return cls(nproc, nnodes, own, address[1].strip("[]"), int(address[2] or PORT))

    def environment(self, local_rank: int) -> dict[str, str]:
        """The variables of a process, as ``torchrun`` sets them."""
        return {
            "RANK": str(self.node_rank * self.nproc + local_rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(self.node_rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.nproc),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port or _free_port()),
            LAUNCHED: "1",
        }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(command: Sequence[str], nodes: Nodes) -> int:
    """Start the processes of this node, and wait for their end.

    When one fails, the others get SIGTERM, save what they can, and are killed after :data:`GRACE_SECONDS`.
    Signals are passed on to all, without a limit of time: the scheduler that sent them has its own.

    Args:
        command: The command of every process.
        nodes: How many to start, and their place in the run.

    Returns:
        The exit status: 0 if all have finished; otherwise that of the first process to fail, as a shell
        shows it (128 + the signal for one that was killed). Processes that a signal ended before they could
        receive it have the status of a run that the signal stopped.
    """
    if nodes.port == 0:
        nodes = Nodes(nodes.nproc, nodes.nnodes, nodes.node_rank, nodes.master, _free_port())
    environ = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // nodes.nproc)))
    output = _Output()
    ranks = [_Rank(command, environ | nodes.environment(i), output) for i in range(nodes.nproc)]
    stopping: list[str] = []

    def forward(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name in EXIT_STATUS:
            stopping.append(name)
        for rank in ranks:
            rank.send(number)

    previous = {}
    for name in HANDLED:
        if (one := getattr(signal, name, None)) and signal.getsignal(one) is not signal.SIG_IGN:
            previous[one] = signal.signal(one, forward)
    try:
        failed = _wait(ranks)
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
        for rank in ranks:
            rank.kill()
        output.close()
    if failed is None:
        return 0
    code = failed.code or 0
    status, name = _shell_status(code)
    if stopping and name == stopping[0]:
        return EXIT_STATUS[name]
    if not stopping:
        others = "" if nodes.nproc == 1 else "; the others were ended"
        print(f"flowgrpo: {failed.name} ended first, {_cause(code)}{others}", file=sys.stderr)
    return status


def _wait(ranks: Sequence["_Rank"]) -> "_Rank | None":
    """Wait until all have ended. Returns the first that failed, if one did."""
    failed, deadline = None, float("inf")
    while any(rank.code is None for rank in ranks):
        time.sleep(POLL_SECONDS)
        ended = [rank for rank in ranks if rank.poll()]
        # Of several, one that found another one missing (75) is not the cause.
        ended.sort(key=lambda rank: rank.code == EXIT_STATUS["SIGTERM"])
        if failed is None and ended:
            failed, deadline = ended[0], time.monotonic() + GRACE_SECONDS
            for rank in ranks:
                rank.send(signal.SIGTERM)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
    return failed


def _shell_status(code: int) -> tuple[int, str]:
    """The status that a shell shows, and the signal that ended the process, if one did."""
    return (code, "") if code >= 0 else (128 - code, signal.Signals(-code).name)


def _cause(code: int) -> str:
    if code >= 0:
        return f"with status {code}"
    why = ", often for lack of memory" if -code == signal.SIGKILL else ""
    return f"by {signal.Signals(-code).name}{why}"


class _Rank:
    """A process.

    Attributes:
        code: Its return code; None while it runs.
        name: For messages.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], output: "_Output"):
        self.code: int | None = None
        self.name = f"rank {environ['RANK']}"
        first = environ["RANK"] == "0"
        self._process = subprocess.Popen(
            command,
            env=environ,
            # Ends when the launcher ends, however it does (watch_launcher).
            stdin=subprocess.PIPE,
            # Rank 0 draws progress bars on the terminal, if this is one.
            stdout=None if first else subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C in a terminal goes to the launcher alone, which passes it on.
            start_new_session=True,
        )
        for source, target in (
            (self._process.stdout, sys.stdout),
            (self._process.stderr, sys.stderr),
        ):
            if source is not None:
                output.follow(source, target, self.name, at_once=first)

    def poll(self) -> bool:
        """Look whether it has ended; True if it has failed since the last call."""
        if self.code is None:
            self.code = self._process.poll()
            return bool(self.code)
        return False

    def send(self, number: int) -> None:
        if self.code is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        if self.code is None:
            self._process.kill()
            self._process.wait()


class _Output:
    """Prints what the processes print: all of rank 0 at once, and lines of the others with their names.

    A line that several processes print is printed as often as the one that prints it most often, so that an
    error or a warning of all ranks is one line.
    """

    def __init__(self) -> None:
        self._said: dict[str, Counter[str]] = {}
        self._printed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._held: queue.SimpleQueue[tuple[float, str, IO[str], str] | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._printer = threading.Thread(target=self._print, daemon=True)
        self._printer.start()

    def follow(self, source: IO[bytes], target: IO[str], name: str, at_once: bool) -> None:
        """Pass on a stream until it ends.

        Args:
            source: The stream of a process.
            target: Where it is printed.
            name: The process.
            at_once: Whether it is printed as it comes, and not by whole lines.
        """
        work = self._copy if at_once else self._hold
        thread = threading.Thread(target=work, args=(source, target, name), daemon=True)
        thread.start()
        self._readers.append(thread)

    def close(self) -> None:
        """Wait for the ends of the streams. A grandchild may hold one open, so not for long."""
        deadline = time.monotonic() + HELD_SECONDS
        for thread in self._readers:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._held.put(None)
        self._printer.join()

    def _copy(self, source: IO[bytes], target: IO[str], name: str) -> None:
        rest = b""
        while piece := os.read(source.fileno(), 65536):
            *lines, rest = (rest + piece).split(b"\n")
            with self._lock:
                for line in lines:
                    self._count(_text(line), name, printed=True)
                print(piece.decode(errors="replace"), end="", file=target, flush=True)

    def _hold(self, source: IO[bytes], target: IO[str], name: str) -> None:
        for line in source:
            if text := _text(line):
                self._held.put((time.monotonic() + HELD_SECONDS, text, target, name))

    def _print(self) -> None:
        while (one := self._held.get()) is not None:
            due, text, target, name = one
            time.sleep(max(0.0, due - time.monotonic()))
            with self._lock:
                if self._count(text, name, printed=False):
                    print(f"[{name}] {text}", file=target, flush=True)

    def _count(self, text: str, name: str, printed: bool) -> bool:
        """Count a line of a process; whether it says it more often than it was printed."""
        if len(self._said) > KEPT_LINES:
            self._said.clear()
            self._printed.clear()
        own = self._said.setdefault(text, Counter())
        own[name] += 1
        is_new = own[name] > self._printed[text]
        self._printed[text] += printed or is_new
        return is_new


def _text(line: bytes) -> str:
    """A line as a terminal would show it, after carriage returns."""
    return line.decode(errors="replace").rstrip().rpartition("\r")[2]


def watch_launcher() -> None:
    """In a process that :func:`launch` has started, send SIGTERM to itself if the launcher is gone."""
    if os.environ.get(LAUNCHED) != "1":
        return

    def wait() -> None:
        # Nothing is ever written to this pipe.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher-watch", daemon=True).start()
