"""Kills runs, resumes them, and compares them with an uninterrupted run.

    python -m benchmarks.kill_and_resume points --results kills.jsonl
    python -m benchmarks.kill_and_resume points --ranks 2 --results kills.jsonl
    python -m benchmarks.kill_and_resume random --kills 100 --results kills.jsonl
    python -m benchmarks.kill_and_resume writes --ranks 2 --kills 40 --set parallel.shard=denoiser \
        --results kills.jsonl
    python -m benchmarks.kill_and_resume bench --results kills.jsonl

``points`` kills with ``SIGKILL`` before every operation on a file that a run announces
(:data:`flowgrpo.data.files.failpoint`), one after the other: the process that resumes is killed as well,
somewhere. ``random`` kills at random moments, in
the algorithms of ``ALGORITHMS``. With ``--ranks 2`` runs have two
processes, of which one is killed; the other has to end by itself. ``writes`` kills up to 0.1 s after a
process has begun to write its part of a checkpoint, each process in turn. ``bench`` kills ``flowgrpo
bench`` at every operation. ``--set`` adds settings to the runs.

A kill is survived if the same command then finishes. A run is identical if its checkpoints, logs, grids
and export equal those of an uninterrupted run byte for byte and nothing is left over. Each run is a line
of a JSON-lines file, so that a later call continues where this one ended.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from math import ceil
from pathlib import Path
from typing import Any

from flowgrpo.data import strict_json

SMALL = [
    "sampling.num_steps=4",
    "train.iterations=2",
    "train.groups=2",
    "train.rollout_batch=8",
    "train.updates=1",
    "train.ema_decay=0.9",
    "train.lr=1e-4",
    "evaluation.images=2",
    "evaluation.every=1",
    "evaluation.images_during=2",
    "evaluation.regimes=[{guidance_scale=3.0, images=2}]",
    "evaluation.grid_prompts=1",
    "evaluation.grid_samples=1",
    "evaluation.inspected_prompts=1",
    "prompts.balance=''",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=1",
    "run.rank_timeout_minutes=2",
    "run.trackers=[]",
    "run.threads=1",
    "run.device=cpu",
    "failures.probe=off",
]
CPS = "transition={kind='cps', noise_level=0.7}"
WINDOW = "steps={kind='window', start=0, size=2}"
ALGORITHMS = {
    "flow_grpo": (CPS, WINDOW),
    "dance_grpo": (CPS, WINDOW),
    "mix_grpo": (CPS, "steps={kind='sliding_window', size=1, every=1, skip_last=2}"),
    "pref_grpo": (
        CPS, WINDOW, "shared_noise=true", "preference={kind='compared', reward='graded', weight=1.0}",
    ),
    "diffusion_nft": (),
    "tempflow_grpo": ("seeds=2", CPS, WINDOW),
    "g2rpo": ("granularities=[1, 2]", CPS, WINDOW),
    "tp_grpo": (CPS, WINDOW),
    "vgpo": (CPS,),
    "branch_grpo": ("splits=[0, 1]", "children=2", CPS),
    "find": (),
    "neighbor_grpo": ("anchors=2", WINDOW),
    "self_opd": ("seeds=2", CPS, WINDOW),
    "matching": ("num_times=2",),
    "distillation": (),
    "dmd": (),
    "rtdmd": (CPS, "steps={kind='random_steps', count=2, first=0, last=2}"),
    "draft": (),
    "refl": ("stop_range=[0.5, 1.0]",),
    "srpo": ("step_range=[0.0, 0.5]",),
}  # fmt: skip
"""Settings of each algorithm besides its kind and the group size."""
DIFFERENTIABLE = "rewards=[{model='flowgrpo.shapes.denoiser_reward:DenoiserReward'}]"
MORE = {
    "vgpo": ["loss={ratio='guard', clip_range=1e-3}"],
    "branch_grpo": ["loss={ratio='guard', clip_range=1e-3}"],
    "diffusion_nft": ["loss={kind='nft'}"],
    "find": [
        "model.weights={kind='noise'}",
        "loss={clip_range=0.2}",
        "train.lr=1e-2",
        "train.monitor_states=0",
    ],
    "neighbor_grpo": ["loss={kind='neighbor', clip_range=1e-3}"],
    "self_opd": ["loss={kind='self_opd'}"],
    "matching": ["loss={kind='matching', kl_coef=0.05}"],
    "distillation": [
        "loss={kind='distillation', teachers=[{guidance_scale=3.0}, {guidance_scale=1.5}]}"
    ],
    "dmd": ["loss={kind='dmd', fake={updates=2, num_times=2}}"],
    "rtdmd": ["loss={kind='dmd', weight=0.1, fake={num_times=2}, teachers=[{guidance_scale=3.0}]}"],
    "draft": ["loss={kind='reward_gradient'}", DIFFERENTIABLE],
    "refl": ["loss={kind='reward_gradient', form='hinge', target=2.0}", DIFFERENTIABLE],
    "srpo": ["loss={kind='reward_gradient'}", DIFFERENTIABLE],
}
NOT_COMPARED = re.compile(
    r"timings|sessions|environment|finished|run\.lock|report\.html|config\.toml|\.lock$|bench\.json|"
    r"generation\.json"
)
"""Files with times or the folder's name in them."""
Act = Callable[[str, Path], None]


def settings(algorithm: str, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The overrides of a run on top of the quick start."""
    table = ", ".join([f"kind='{algorithm}'", "group_size=4", *ALGORITHMS[algorithm]])
    own = [f"algorithm={{{table}}}", *MORE.get(algorithm, []), *more]
    return [*SMALL, *own, f"run.folder={folder}"]


def train(algorithm: str, folder: Path, more: Sequence[str] = ()) -> int:
    """A run, in this process. Returns its exit status."""
    import flowgrpo
    from flowgrpo.core.errors import LostRankError
    from flowgrpo.training.loop import train as run

    try:
        config = flowgrpo.load("quickstart_flow_grpo", settings(algorithm, folder, more))
        return 0 if run(config).finished else 75
    except LostRankError:
        return 75


def bench(folder: Path) -> int:
    """Images and a report of a benchmark, in this process. Returns its exit status."""
    from flowgrpo.cli.main import main as command

    small = ["--limit", "6", "--samples", "1", "--steps", "2", "--batch", "2", "--out", str(folder)]
    return command(["bench", "shapes", "--model", "shapes", "--device", "cpu", *small])


def start(work: Callable[[], int], act: Act | None, output: Path, place: dict[str, str]) -> int:
    """Do work in a forked process, which has imported what this one has. Returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        os.environ |= place
        from flowgrpo.data import files

        files.failpoint = act
        with output.open("a") as stream, redirect_stdout(stream):
            os.dup2(stream.fileno(), 2)
            try:
                status = work()
            except BaseException:
                traceback.print_exc()
                status = 1
    finally:
        os._exit(status)


def wait(process: int, limit: float = 900) -> int:
    """The exit status of a process, negative for a signal; one that hangs is killed and is 124."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 124


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Runs:
    """Runs of one kind: ``ranks`` processes that do the same work in a folder.

    Attributes:
        work: Does the work in a folder, and returns the exit status.
        output: What the processes print.
        outlived: Most seconds for which a process went on after another one was killed.
    """

    def __init__(self, work: Callable[[Path], int], ranks: int, output: Path):
        self.work, self.ranks, self.output = work, ranks, output
        self.outlived = 0.0

    def attempt(self, folder: Path, victim: int = 0, act: Act | None = None, after: float = 0.0) -> int:  # fmt: skip
        """Start all processes and wait for them.

        Args:
            folder: Where to work.
            victim: The process that is to be killed.
            act: Called by the victim before each operation on a file.
            after: Seconds after which the victim is killed; 0 for never.

        Returns:
            The exit status of the victim. A process that outlives the victim by other means than ending
            with status 75 is an error.
        """
        place = {}
        if self.ranks > 1:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(self.ranks):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks} if place else {}
            more = place | {k: str(v) for k, v in own.items()}
            acts = act if rank == victim else None
            processes.append(start(lambda: self.work(folder), acts, self.output, more))
        if after:
            time.sleep(after)
            done, status = os.waitpid(processes[victim], os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            else:
                os.kill(processes[victim], signal.SIGKILL)
                code = wait(processes[victim])
        else:
            code = wait(processes[victim])
        ended = time.monotonic()
        others = [wait(p) for r, p in enumerate(processes) if r != victim]
        if code < 0:
            self.outlived = max(self.outlived, time.monotonic() - ended)
        allowed = {0} if code == 0 else {0, 75}
        if not set(others) <= allowed:
            raise RuntimeError(f"the victim ended with {code}, the others with {others}")
        return code


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a finished folder that do not depend on time and place."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {n: _without(p, folder) for n, p in files.items() if not NOT_COMPARED.search(n)}


def _without(file: Path, folder: Path) -> bytes:
    """A file's contents without the folder's name, and without the order of names in a header."""
    content = file.read_bytes()
    if file.name.startswith("shard-"):
        return _in_order(content)
    if file.name == "state.json" and b'"shard-' in content:
        # The digests of such files depend on the order.
        state = {k: v for k, v in json.loads(content).items() if "sha256" not in k}
        content = strict_json.dumps(state).encode()
    return content.replace(str(folder).encode(), b"")


def _in_order(content: bytes) -> bytes:
    """A safetensors file of ``torch.distributed.checkpoint`` with its metadata sorted.

    The order of entries there is arbitrary, also in uninterrupted runs.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    texts = header.pop("__metadata__")
    parsed = {k: json.loads(v) if v.startswith("{") else v for k, v in texts.items()}
    return json.dumps([parsed, header], sort_keys=True).encode() + content[8 + length :]


def differences(straight: Path, folder: Path) -> list[str]:
    """The files that differ, are missing, or are left over."""
    a, b = contents(straight), contents(folder)
    return sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))


def at(operation: str, folder: Path) -> Act:
    """Kills the process where it first comes to an operation, as :func:`listed` writes it."""

    def act(kind: str, path: Path) -> None:
        if operation == f"{kind} {path}".replace(str(folder), ""):
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def late(number: int, seconds: float) -> Act:
    """Kills the process a time after it has begun to write its part of a checkpoint for the n-th time."""
    left = [number]

    def act(kind: str, path: Path) -> None:
        if kind == "write" and path.parent.name == "checkpoints":
            left[0] -= 1
            if left[0] == 0:
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return act


def listed(file: Path, folder: Path) -> Act:
    """Writes every operation into a file, with its path in the folder."""

    def act(operation: str, path: Path) -> None:
        with file.open("a") as stream:
            stream.write(f"{operation} {path}\n".replace(str(folder), ""))

    return act


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(t) for t in results.read_text().splitlines()] if results.exists() else []


def main() -> None:
    """Kill and resume until all is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("points", "random", "writes", "bench"))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, metavar="NAME")
    parser.add_argument(
        "--kills", type=int, default=100, help="with random and writes: stop after this many"
    )
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, for all runs")
    parser.add_argument("--every", type=int, default=1, help="with points: only each N-th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("kills.jsonl"))
    options = parser.parse_args()
    every = tuple(ALGORITHMS) if options.mode == "random" else ("flow_grpo",)
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        for name in ["bench"] if options.mode == "bench" else options.algorithms or every:
            share = options.kills / len(options.algorithms or every)
            examine(name, options, Path(temporary) / name, share)
    print(report(read(options.results)))


def examine(name: str, options: argparse.Namespace, temporary: Path, share: float) -> None:
    """Kill runs of one algorithm, or of the benchmark, and note the results."""
    temporary.mkdir()
    output = temporary / "output"
    work = bench if options.mode == "bench" else lambda folder: train(name, folder, options.set)
    runs = Runs(work, options.ranks, output)
    # Grids show the name of the run directory, which therefore is always the same.
    straight, again = temporary / "straight" / "run", temporary / "again" / "run"
    operations = temporary / "operations"
    began = time.monotonic()
    if runs.attempt(straight) or runs.attempt(again, act=listed(operations, again)):
        raise SystemExit(f"{name} does not run:\n{output.read_text()[-2000:]}")
    whole = (time.monotonic() - began) / 2
    wrong = differences(straight, again)
    if wrong:
        raise SystemExit(f"{name}: two uninterrupted runs differ in {wrong}")
    points = list(dict.fromkeys(operations.read_text().splitlines()))
    print(
        f"{name}, {options.ranks} ranks: {len(points)} different operations, {whole:.0f} s",
        flush=True,
    )
    group = "/".join([options.mode, name, str(options.ranks), *options.set])
    known = [row for row in read(options.results) if row["group"] == group]
    is_random = options.mode in ("random", "writes")
    left = share - sum(row["kills"] for row in known)
    if options.mode == "writes":
        chains = _delays(options.seed, left)
    elif is_random:
        chains = _moments(options.seed, whole, left)
    else:
        hit = {operation for row in known for operation in row["at"]}
        chains = _chains([p for p in points[:: options.every] if p not in hit])
    folder = temporary / "killed" / "run"
    for chain in chains:
        if is_random and left <= 0:
            break
        row = {"group": group, "points": len(points)} | one(
            runs, folder, straight, chain, is_random
        )
        left -= row["kills"]
        with options.results.open("a") as stream:
            stream.write(strict_json.dumps(row) + "\n")
        if row["problem"] or row["wrong"]:
            print(f"  {group}: {row}", flush=True)


CHAIN = 5
"""Kills of one run before it may finish."""


def _moments(seed: int, whole: float, kills: float) -> Iterator[list[float]]:
    """Random moments at which a run is killed, in seconds, for at least this many kills."""
    chance = random.Random(f"{seed}/{kills}")
    # A run may finish before all of its kills.
    for _ in range(ceil(kills)):
        yield [chance.uniform(0.1, 0.9) * whole for _ in range(CHAIN)]


def _delays(seed: int, kills: float) -> Iterator[list[tuple[int, float]]]:
    """Which write of a checkpoint is interrupted, and after how many seconds."""
    chance = random.Random(f"{seed}/{kills}")
    # A run may finish before all of its kills.
    for _ in range(ceil(kills)):
        yield [(chance.randint(1, 3), chance.uniform(0.0, 0.1)) for _ in range(CHAIN)]


def _chains(points: list[str]) -> Iterator[list[str]]:
    """Operations, a few for each run. Those that a run did not come to are at the head of the next."""
    while points:
        chain = points[:CHAIN]
        yield chain
        # ``one`` removes the operations at which it killed the process.
        first, *rest = chain or [""]
        points[:CHAIN] = rest if first == points[0] else chain


def one(runs: Runs, folder: Path, straight: Path, moments: list[Any], timed: bool) -> dict[str, Any]:  # fmt: skip
    """Kill a run at each of some moments, then let it finish, and compare it.

    Operations at which the process was killed are removed from ``moments``.
    """
    folder.parent.mkdir(exist_ok=True)
    killed: list[Any] = []
    problem, wrong = "", []
    try:
        for number, moment in enumerate(list(moments)):
            victim = number % runs.ranks if timed else 0
            killer: dict[str, Any] = {"act": at(moment, folder)} if not timed else {"after": moment}
            if isinstance(moment, tuple):
                killer = {"act": late(*moment)}
            code = runs.attempt(folder, victim, **killer)
            if code not in (0, -9):
                raise RuntimeError(f"exit status {code}")
            if code == 0:
                break  # The run has finished: it did not come to this operation again.
            killed.append(moment)
        if code := runs.attempt(folder):
            raise RuntimeError(f"exit status {code} after {len(killed)} kills")
        wrong = differences(straight, folder)
    except RuntimeError as error:
        problem = f"{error}: {runs.output.read_text()[-1000:]}"
    if problem or wrong:
        problem = problem or f"kept as {_keep(folder)}"
    else:
        shutil.rmtree(folder)
    moments[:] = [m for m in moments if m not in killed]
    survived = 0 if problem else len(killed)
    where = [] if timed else killed
    return {
        "kills": len(killed),
        "survived": survived,
        "at": where,
        "wrong": wrong,
        "problem": problem,
        "outlived": round(runs.outlived, 1),
    }


def _keep(folder: Path) -> Path:
    """Move a folder out of the temporary one, so that it can be looked at."""
    kept = Path(tempfile.mkdtemp(prefix="killed-")) / folder.name
    shutil.move(folder, kept)
    return kept


def preload() -> None:
    """Import what runs import, once; processes are forked from this one."""
    import torch

    torch.set_num_threads(1)
    import diffusers  # noqa: F401
    from diffusers import StableDiffusion3Pipeline  # noqa: F401

    import flowgrpo.bench.run
    import flowgrpo.doctor
    import flowgrpo.shapes.model
    import flowgrpo.training.loop

    assert flowgrpo.training.loop
    sys.stdout.flush()


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the results by group."""
    lines = ["| runs | operations | kills | survived | runs | identical |", "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    groups = dict.fromkeys(row["group"] for row in rows)
    for name, some in [(g, [r for r in rows if r["group"] == g]) for g in groups] + [("all", list(rows))]:  # fmt: skip
        same = sum(not r["wrong"] and not r["problem"] for r in some)
        points = max((r["points"] for r in some), default=0)
        kills, survived = (sum(r[k] for r in some) for k in ("kills", "survived"))
        lines.append(f"| {name} | {points} | {kills} | {survived} | {len(some)} | {same} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
