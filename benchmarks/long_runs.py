"""Watches the processes of a run from outside: leaks over many iterations, and scaling on pinned cores.

    python -m benchmarks.long_runs leaks --iterations 500 --results leaks.jsonl
    python -m benchmarks.long_runs leaks --iterations 500 --ranks 2 --set parallel.shard=all \
        --results leaks_sharded.jsonl
    python -m benchmarks.long_runs scaling --iterations 20 --results scaling.jsonl

``leaks`` trains the embedded model with small batches, and reads resident memory, threads and open files
of every process from ``/proc`` while it runs. Each line of the results is the state of a process after
an iteration. The table has the values after every tenth of the run, and the growth of memory per
iteration in its second half (least squares). The prompt cache is limited to 10 MB, because it is meant to
grow up to its limit.

``scaling`` runs one process on one core, then two processes on a core each, with the same iterations. It
prints the seconds of an iteration and the processor time of a process per iteration. On a machine that is
busy with other work only the second is meaningful: with ideal scaling it is half of one process's.

Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kill_and_resume import SMALL, free_port
from benchmarks.training_runs import ROOT, seconds_per_iteration
from flowgrpo.data import strict_json

Row = dict[str, float]
TICK = os.sysconf("SC_CLK_TCK")


def launch(settings: Sequence[str], ranks: int, pinned: bool, output: Path) -> list[subprocess.Popen[bytes]]:  # fmt: skip
    """Start the processes of a run, each on a core of its own if they are pinned."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "flowgrpo", "train", "quickstart_flow_grpo"]
        command += [f"--set={s}" for s in settings]
        core = ["taskset", "-c", str(rank)] if pinned else []
        more = place | own if ranks > 1 else {}
        with output.open("ab") as stream:
            started.append(
                subprocess.Popen(
                    [*core, *command],
                    env={**os.environ, "PYTHONPATH": str(ROOT), **more},
                    stdout=stream,
                    stderr=stream,
                )
            )
    return started


def state(pid: int) -> Row:
    """Resident memory in MB, threads, open files, and processor time in seconds of a process."""
    place = Path(f"/proc/{pid}")
    lines = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    # After the command's name, which may contain spaces: state, parent, ... user and system time.
    fields = (place / "stat").read_text().rpartition(")")[2].split()
    return {
        "memory": int(lines["VmRSS"].split()[0]) / 1024,
        "threads": int(lines["Threads"]),
        "files": len(list((place / "fd").iterdir())),
        "seconds": (int(fields[11]) + int(fields[12])) / TICK,
    }


def watch(processes: Sequence[subprocess.Popen[bytes]], folder: Path, results: Path) -> list[Row]:
    """The state of each process when an iteration has been logged, until all have ended.

    Raises:
        RuntimeError: If a process fails.
    """
    rows: list[Row] = []
    done = 0
    while any(p.poll() is None for p in processes):
        with suppress(FileNotFoundError):
            now = len((folder / "metrics.jsonl").read_bytes().splitlines())
            if now > done:
                done = now
                for rank, process in enumerate(processes):
                    with suppress(FileNotFoundError, ProcessLookupError, KeyError):
                        rows.append({"iteration": done, "rank": rank, **state(process.pid)})
                        with results.open("a") as stream:
                            stream.write(strict_json.dumps(rows[-1]) + "\n")
        time.sleep(0.05)
    if any(p.returncode for p in processes):
        raise RuntimeError(f"exit statuses {[p.returncode for p in processes]}")
    return rows


def growth(rows: Sequence[Row]) -> float:
    """Growth of memory per iteration in the second half of a run, in kB: the slope of a line."""
    last = max(r["iteration"] for r in rows)
    half = [r for r in rows if r["iteration"] > last / 2]
    slope, _ = np.polyfit([r["iteration"] for r in half], [r["memory"] for r in half], 1)
    return float(1024 * slope)


def table(rows: Sequence[Row], ranks: int) -> str:
    """The state of each process after every tenth of the run."""
    last = int(max(r["iteration"] for r in rows))
    lines = [
        "| process | iterations | memory, MB | threads | open files |",
        "|--:|--:|--:|--:|--:|",
    ]
    for rank in range(ranks):
        own = [r for r in rows if r["rank"] == rank]
        for share in range(1, 11):
            row = min(own, key=lambda r: abs(r["iteration"] - share * last / 10))
            lines.append(
                f"| {rank} | {row['iteration']:.0f} | {row['memory']:.0f} | {row['threads']:.0f} | {row['files']:.0f} |"
            )
        lines.append(f"\nprocess {rank}: {growth(own):+.1f} kB per iteration in the second half\n")
    return "\n".join(lines)


def leaks(options: argparse.Namespace, folder: Path) -> None:
    """Run many iterations, and print what the processes hold."""
    settings = [
        *SMALL, f"train.iterations={options.iterations}", "train.updates=2",
        "algorithm={kind='flow_grpo', group_size=4, transition={kind='cps', noise_level=0.7}, "
        "steps={kind='window', start=0, size=2}}",
        "loss.kl_coef=0.01", "evaluation.every=100", "run.checkpoint_every=10",
        "memory.prompt_cache_gb=0.01", "memory.prompt_disk_gb=0.01", *options.set,
        f"run.folder={folder / 'run'}",
    ]  # fmt: skip
    output = folder / "output"
    processes = launch(settings, options.ranks, False, output)
    try:
        rows = watch(processes, folder / "run", options.results)
    except RuntimeError as error:
        raise SystemExit(f"{error}:\n{output.read_text()[-3000:]}") from error
    print(table(rows, options.ranks))


def scaling(options: argparse.Namespace, folder: Path) -> None:
    """Run the same iterations on one core and on two, and print their times."""
    results: dict[int, dict[str, Any]] = {}
    for ranks in (1, 2):
        run, output = folder / f"run{ranks}", folder / f"output{ranks}"
        settings = [
            f"train.iterations={options.iterations}", "evaluation.images=2", "evaluation.every=0",
            "evaluation.grid_prompts=1", "evaluation.grid_samples=1", "evaluation.inspected_prompts=0",
            "prompts.balance=''", "run.checkpoint_every=1000", "run.trackers=[]", "run.threads=1",
            "run.device=cpu", *options.set, f"run.folder={run}",
        ]  # fmt: skip
        processes = launch(settings, ranks, True, output)
        try:
            rows = watch(processes, run, options.results)
        except RuntimeError as error:
            raise SystemExit(f"{error}:\n{output.read_text()[-3000:]}") from error
        used = []
        for rank in range(ranks):
            own = [r for r in rows if r["rank"] == rank]
            # From the first to the last iteration that was seen; the start of the process is left out.
            iterations = own[-1]["iteration"] - own[0]["iteration"]
            used.append((own[-1]["seconds"] - own[0]["seconds"]) / iterations)
        results[ranks] = {"elapsed": seconds_per_iteration(run), "used": used}
    one, two = results[1], results[2]
    print(
        "| processes | s per iteration | processor time of a process per iteration |\n|--:|--:|--:|"
    )
    for ranks, row in results.items():
        print(f"| {ranks} | {row['elapsed']:.1f} | {', '.join(f'{s:.1f}' for s in row['used'])} |")
    print(
        f"\nspeed-up {one['elapsed'] / two['elapsed']:.2f}; by processor time {one['used'][0] / max(two['used']):.2f}"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("mode", choices=("leaks", "scaling"))
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=1, help="with leaks: number of processes")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, for all runs")
    parser.add_argument("--results", type=Path, default=Path("long_runs.jsonl"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        (leaks if options.mode == "leaks" else scaling)(options, Path(temporary))


if __name__ == "__main__":
    main()
