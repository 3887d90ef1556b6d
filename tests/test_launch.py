"""``flowgrpo train --nproc N``: places of the processes, their output, signals, and exit statuses."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from flowgrpo.cli import main
from flowgrpo.cli.main import commands, parser
from flowgrpo.config import ConfigError
from flowgrpo.training.launch import Nodes, num_ranks
from flowgrpo.training.signals import AGAIN
from tests.processes import Forked

ROOT = Path(__file__).parents[1]
PLACE = {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"WORLD_SIZE": "4"}, "RANK and MASTER_ADDR and MASTER_PORT is not set.*--nproc 4"),
        (PLACE | {"RANK": "4"}, "RANK must be below WORLD_SIZE = 4"),
        (PLACE | {"WORLD_SIZE": "four"}, "WORLD_SIZE must be a number, got 'four'"),
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE is not set.*--nproc-per-node 4"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks.*srun --ntasks-per-node=1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPI started 2 processes.*--nproc 2"),
        ({"JOB_COMPLETION_INDEX": "1"}, "pod 1 of an Indexed Job.*--nnodes COMPLETIONS"),
    ],
)
def test_processes_that_would_be_several_runs_are_refused(environ, words):
    with pytest.raises(ConfigError, match=words):
        num_ranks(environ)


def test_connected_processes_and_single_ones_are_not_refused():
    assert num_ranks({}) == 1
    assert num_ranks(PLACE) == 4
    # srun of one task, a batch script of Slurm (it has no step), and torchrun inside of a step.
    assert num_ranks({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == 1
    assert num_ranks({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == 1
    assert num_ranks(PLACE | {"SLURM_STEP_NUM_TASKS": "2"}) == 4


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        ((0,), {}, "must be at least 1, got 0 and 1"),
        ((8,), PLACE, "already one of 4 that a launcher started"),
        ((8,), {"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks for --nnodes 1"),
        ((8, 1, None, "a"), {}, "are for several nodes"),
        ((8, 2), {}, "needs --master HOST:PORT"),
        ((8, 2, None, "a"), {}, "needs --node-rank, from 0 to 1"),
        ((8, 2, 2, "a"), {}, "--node-rank must be from 0 to 1, got 2"),
        ((8, 2, 1, "a:b:c"), {}, "must be HOST or HOST:PORT, got 'a:b:c'"),
        ((8, 2, 1, "a:70000"), {}, "must be HOST or HOST:PORT"),
    ],
)
def test_contradictory_options_are_refused(arguments, environ, words):
    with pytest.raises(ConfigError, match=words):
        Nodes.of(*arguments, environ=environ)


def test_every_process_has_its_place():
    nodes = Nodes.of(4, 2, None, "node0:1234", {"SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"})
    place = nodes.environment(3)
    assert place["RANK"] == "7"
    assert {k: place[k] for k in ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    }  # fmt: skip
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("node0", "1234")
    assert num_ranks(place) == 8
    assert Nodes.of(2, 2, 0, "[::1]", {}).environment(0)["MASTER_ADDR"] == "::1"


def test_the_plan_counts_the_processes_to_be_started(capsys):
    assert main(["train", "quickstart_flow_grpo", "--nproc", "5", "--set", "train.updates=1"]) == 1
    assert (
        "5 processes (1 x 5 = 5); the nearest that can is train.groups = 20"
        in capsys.readouterr().err
    )
    assert main(["train", "quickstart_flow_grpo", "--nnodes", "2"]) == 2
    assert "need --nproc N" in capsys.readouterr().err


LAUNCHER = """
import sys
from flowgrpo.training import launch
from flowgrpo.training.launch import Nodes
launch.GRACE_SECONDS = 2.0
launch.HELD_SECONDS = 0.3
sys.exit(launch.launch([sys.executable, "-c", sys.argv[1]], Nodes(3)))
"""
RANK = "import os, signal, sys, time; rank = int(os.environ['RANK']); "


def started(body):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )


def ended(process):
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def test_lines_of_all_processes_are_printed_once():
    body = """
print('from all', file=sys.stderr)
print('of', rank)
if rank: print('twice', flush=True); print('twice')
"""
    status, out, error = ended(started("\n" + body))
    assert status == 0
    assert error.splitlines() == ["from all"]
    lines = sorted(re.sub(r"rank \d", "rank N", line) for line in out.splitlines())
    assert lines == ["[rank N] of 1", "[rank N] of 2", "[rank N] twice", "[rank N] twice", "of 0"]


def test_the_status_of_the_first_failure_is_kept_and_the_others_end():
    # Rank 2 fails, rank 0 saves on SIGTERM, and rank 1 does not listen.
    body = """
def save(*_): print('saved', flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, save if rank == 0 else signal.SIG_IGN)
print('ready', rank, flush=True)
time.sleep(1 if rank == 2 else 60)
sys.exit(3)
"""
    began = time.monotonic()
    status, out, error = ended(started("\n" + body))
    assert status == 3
    assert "saved" in out
    assert error == "flowgrpo: rank 2 ended first, with status 3; the others were ended\n"
    assert time.monotonic() - began < 20


def test_a_killed_process_has_the_status_that_a_shell_shows():
    status, _, error = ended(started("rank == 1 and os.kill(os.getpid(), 9); time.sleep(60)"))
    assert status == 137
    assert "rank 1 ended first, by SIGKILL, often for lack of memory" in error


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        # The processes save and say themselves how they ended, or did not listen yet.
        ("SIGTERM", "signal.signal(15, lambda *_: sys.exit(75)); print('ready', flush=True)", 75),
        ("SIGTERM", "print('ready', flush=True)", 75),
        ("SIGINT", "signal.signal(2, lambda *_: sys.exit(130)); print('ready', flush=True)", 130),
    ],
)
def test_signals_are_passed_on(name, body, status):
    process = started(f"{body}; time.sleep(60)")
    seen = [process.stdout.readline() for _ in range(1)]
    assert seen == ["ready\n"]
    time.sleep(0.5)
    process.send_signal(getattr(signal, name))
    assert ended(process)[0] == status


def test_a_request_to_save_reaches_all_and_ends_nothing():
    body = """
signal.signal(signal.SIGUSR1, lambda *_: print('saving', rank, flush=True))
print('ready', rank, flush=True)
time.sleep(3)
"""
    process = started("\n" + body)
    assert sorted(process.stdout.readline()[-8:] for _ in range(3)) == [
        f"ready {i}\n" for i in range(3)
    ]
    process.send_signal(signal.SIGUSR1)
    status, out, _ = ended(process)
    assert status == 0
    assert sorted(re.findall(r"saving \d", out)) == ["saving 0", "saving 1", "saving 2"]


def test_no_process_is_left_if_the_launcher_is_killed(tmp_path):
    body = f"""
from flowgrpo.training.launch import watch_launcher
watch_launcher()
open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w').close()
time.sleep(60)
"""
    process = started("\n" + body)
    deadline = time.monotonic() + 30
    while len(left := [int(p.name) for p in tmp_path.iterdir()]) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
        time.sleep(0.05)
    assert left == []


# The files for schedulers.
EXAMPLES = ROOT / "docs" / "examples"


def parsed(words):
    """What the command's own parser makes of a command."""
    assert words[0] == "flowgrpo"
    return parser(commands()).parse_args(words[1:])


def test_the_slurm_script_is_a_script_and_its_command_is_one():
    file = EXAMPLES / "slurm.sbatch"
    text = file.read_text()
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", file], check=True)
    command = re.search(r"flowgrpo train .*", text)[0]
    for name, value in {"config": "quickstart", "SLURM_NNODES": "2", "master": "node0"}.items():
        command = command.replace(f'"${name}"', value)
    options = parsed(shlex.split(command))
    # Without --node-rank, as srun runs it on the second node.
    environ = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    nodes = Nodes.of(options.nproc, options.nnodes, options.node_rank, options.master, environ)
    assert nodes == Nodes(8, 2, 1, "node0", 29500)
    settings = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert settings["ntasks-per-node"] == "1"
    assert settings["gpus-per-node"] == str(nodes.nproc)
    # To the steps, and not with "B:" to the script alone (sbatch(1), --signal).
    assert re.fullmatch(r"TERM@\d+", settings["signal"])
    assert f'"$status" -eq {AGAIN}' in text


def test_the_job_restarts_what_asks_for_it():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = parsed([*container["command"], *container["args"]])
    environ = {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    nodes = Nodes.of(options.nproc, options.nnodes, options.node_rank, options.master, environ)
    assert nodes.nnodes == spec["completions"] == spec["parallelism"]
    assert nodes.nproc == int(container["resources"]["limits"]["nvidia.com/gpu"])
    # Pods of an Indexed Job have the host name JOB-INDEX, and with a headless service of the same name as
    # their subdomain the DNS name JOB-INDEX.SERVICE (kubernetes.io, Job with Pod-to-Pod Communication).
    assert nodes.master == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    # The controller labels its pods with this (batch.kubernetes.io/job-name, and the older job-name).
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert rules == {AGAIN: "Ignore", 1: "FailJob", 2: "FailJob"}
    # podFailurePolicy is refused with any other restart policy.
    assert pod["restartPolicy"] == "Never"
    assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/dev/shm"}


@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_the_manifest_fits_the_schemas_of_kubernetes(version):
    validate = pytest.importorskip("kubernetes_validate")
    for one in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()):
        validate.validate(one, version, strict=True)


def test_forked_test_processes_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads() -> int:
        return 10 * int(os.environ["OMP_NUM_THREADS"]) + torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        process = Forked(threads)
        process.communicate()
    finally:
        torch.set_num_threads(before)
    assert process.returncode == 11
