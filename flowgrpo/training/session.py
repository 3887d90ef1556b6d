"""A session of a run: its processes, the run directory, logs, checkpoints and resuming."""

import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowgrpo.config import Config
from flowgrpo.config.geometry import geometry
from flowgrpo.config.method_rows import method_rows
from flowgrpo.config.plan import plan
from flowgrpo.core.errors import DivergenceError, LostRankError
from flowgrpo.core.measures import Measured
from flowgrpo.core.secrets import redact_command
from flowgrpo.core.text import counted
from flowgrpo.data import files, strict_json
from flowgrpo.data.prompts import Group
from flowgrpo.policy.encoder_lockstep import text_encoders
from flowgrpo.policy.placement import resolve_device
from flowgrpo.policy.sharding import gathered_bytes, gathered_dtype
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import RewardError
from flowgrpo.training import checkpoints, run_folder, trackers
from flowgrpo.training.checkpoint_files import CheckpointFiles
from flowgrpo.training.console import Console
from flowgrpo.training.cpu import prepare_cpu
from flowgrpo.training.launch import check_devices, idle_devices
from flowgrpo.training.learner import Learner
from flowgrpo.training.lock import RunLock
from flowgrpo.training.logs import Logs, OnLog
from flowgrpo.training.ranks import bounded_wait, process_group
from flowgrpo.training.shares import Once, Shares
from flowgrpo.training.signals import Signals, StopRequested


class Session:
    """One process of a run, from its start to its end or interruption.

    The main process writes the run directory; the others take part in collective operations only.

    Attributes:
        folder: The run directory.
        scorer: The rewards, whose state (of rewards that learn) checkpoints contain; set by the setup.
        iteration: The first iteration of this session; above 0 if it resumes a run.
        best: The best value so far of the number that ``evaluation.best`` names; of one whose lowest value
            is the best, its negative.
        bests: The same for the other numbers whose best weights are kept, by name.
        processes: The processes, each by itself.
        checkpoint_files: The checkpoints on disk.
        shares: The share of this process in the work.
        once: Does work in the first process of a share, and tells the others its result.
        score_once: The same for rewards, which are computed on another thread.
        signals: The signals that this process has received.
        is_finished: Whether the run had finished before this session; there is nothing to do then.
    """

    def __init__(
        self, config: Config, kept: Sequence[str] = (), on_log: OnLog = lambda name, record: None
    ):
        """Start the process group and claim the run directory.

        Args:
            config: The configuration.
            kept: Keys of it whose change stays in force when the run is resumed without it.
            on_log: Gets each record of the logs ``metrics`` and ``evaluations`` once it is written, in
                the main process.

        Raises:
            ConfigError: If the directory belongs to another configuration or is in use.
            LostRankError: If another process ends or does not answer.
            RuntimeError: If a launcher started processes that are not connected to each other.
        """
        prepare_cpu(config.run.threads)
        self.config, self.folder, self.on_log = config, Path(config.run.folder), on_log
        device = torch.device(resolve_device(config.run.device))
        cpu = device.type == "cpu"
        if not cpu:
            check_devices(*_here(device))
        if device.index is not None:
            torch.get_device_module(device).set_device(device)
        patience = config.run.rank_timeout_minutes
        with bounded_wait(patience):
            self.accelerator = Accelerator(
                cpu=cpu,
                mixed_precision="fp16" if config.model.dtype == "float16" and not cpu else "no",
                project_dir=str(self.folder),
                kwargs_handlers=[process_group(patience)],
            )
        self._check_world()
        wait = timedelta(minutes=patience)
        self.shares = Shares(self.accelerator, config.parallel.context)
        self.processes = Shares(self.accelerator)
        self.checkpoint_files = CheckpointFiles(
            self.checkpoints, self.processes, self.is_sharded, config.run.keep_checkpoints
        )
        with bounded_wait(patience):
            # Scores are told on the scorer's thread.
            self.once, self.score_once = Once(self.shares, wait), Once(self.shares, wait)
        self.console = Console(enabled=self.is_main)
        self.iteration, self.best = 0, -math.inf
        self.bests: dict[str, float] = {}
        self.scorer: RewardScorer | None = None
        self.logs = Logs(self.folder)
        self._phases: dict[str, float] = {}
        self._warned, self._saved_at = False, time.monotonic()
        self._lines: Mapping[str, int] = {}
        self._lock: RunLock | None = None
        if self.is_main:
            self._claim(kept)
        with bounded_wait(patience):
            self.accelerator.wait_for_everyone()
        self.is_finished = run_folder.is_finished(config)
        launched = self.accelerator.num_processes > 1
        # With a sharded model one process cannot stop or save alone, so an iteration is finished.
        stops_alone = self.is_main and not self.is_sharded
        self.signals = Signals(self.console.say, stops_alone, launched)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the scorer without waiting, end the trackers, release the signals and the lock."""
        self.signals.restore()
        if self.scorer is not None:
            self.scorer.close(wait=False)
        for tracker in self.accelerator.trackers:
            # After close() they have ended already; an error here must not hide another one.
            with suppress(Exception):
                tracker.finish()
        if self._lock is not None:
            self._lock.release()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run directory."""
        return bool(self.accelerator.is_main_process)

    @property
    def shares_main(self) -> bool:
        """Whether this process does what the main process does: it is that, or computes its samples with it."""
        return self.shares.index == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the denoiser is divided, so that all processes save and load their parts."""
        return self.config.parallel.is_sharded

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def grid(self, iteration: int) -> Path:
        """The file of the comparison grid after this many iterations."""
        return self.folder / "grids" / f"{iteration:06d}.png"

    def share(self, groups: list[Group]) -> list[Group]:
        """The part of the groups that this process handles; groups are never split."""
        size = len(groups) // self.shares.number
        return groups[self.shares.index * size :][:size]

    def gather(self, tensor: Tensor) -> Tensor:
        """The concatenation of a tensor of each process, or of each share of several, on the CPU."""
        return self.shares.gather(tensor)

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The concatenation of a list of each process, or of each share of several."""
        return self.shares.gather_objects(values)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the time of a part of the iteration."""
        began = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def rescue(self, learner: Learner, iteration: int) -> Iterator[None]:
        """Save the state of the last iteration if the rollout inside ends early, and raise again.

        That happens if a reward fails permanently, a signal asks to stop, another process is lost, or
        any other error occurs, such as a lack of memory.
        """
        self._lines = self.logs.counts() if self.is_main else {}
        self.signals.loading = False
        try:
            self.signals.check()
            with bounded_wait(self.config.run.rank_timeout_minutes):
                yield
        except DivergenceError:
            raise  # The weights may be destroyed; the last checkpoint is better.
        except (Exception, StopRequested) as error:
            alone = self.accelerator.num_processes == 1
            if self.is_sharded:
                raise  # The other processes hold the other parts.
            expected = isinstance(error, RewardError | StopRequested | LostRankError)
            if iteration > 0 and (alone or isinstance(error, StopRequested | LostRankError)):
                # Another error, such as a lack of memory, must not be hidden by one in saving.
                with nullcontext() if expected else suppress(Exception):
                    self._write(learner, iteration, self._lines)
                    self.console.say(
                        f"saved after {counted(iteration, 'iteration')}; the same command resumes from there"
                    )
            raise

    @property
    def stopping(self) -> bool:
        """Whether the run ends before its last iteration."""
        return bool(self.signals.stopping)

    def save_if_due(self, learner: Learner, iterations: int) -> bool:
        """Save after this many iterations if it is time or a signal asks for it.

        All processes must call this. Returns whether the run stops.
        """
        run = self.config.run
        minutes = (time.monotonic() - self._saved_at) / 60
        due = (
            iterations == self.config.train.iterations
            or iterations % run.checkpoint_every == 0
            or self.signals.saving
            or (run.checkpoint_minutes > 0 and minutes >= run.checkpoint_minutes)
        )
        flags = torch.tensor([[float(self.stopping), float(due and self.is_main)]])
        flags = self.processes.gather(flags)
        stopping, save = flags.bool().any(0).tolist()
        if stopping and not self.stopping:
            self.signals.stopping = "SIGTERM"  # Another process received it.
        if stopping or save:
            self.signals.saving = False
            self.save(learner, iterations)
        return bool(stopping)

    def log(self, iteration: int, metrics: Mapping[str, float], scoring_seconds: float) -> None:
        """Write an iteration's metrics and, to another file, its times.

        Times are kept apart because metrics are equal in every repetition of a run.
        """
        timings = {
            **self._phases,
            "scoring": scoring_seconds,
            "total": sum(v for k, v in self._phases.items() if k != "evaluation"),
        }
        self._phases = {}
        if self.is_main:
            record = {"iteration": iteration, **metrics}
            self.logs.append("metrics", record)
            self.logs.append("timings", {"iteration": iteration, **timings})
            self.console.iteration(iteration, self.config.train.iterations, metrics, timings)
            self._warn(metrics)
            self.on_log("metrics", record)
        self.accelerator.log(dict(metrics), step=iteration)

    def _warn(self, metrics: Mapping[str, float]) -> None:
        """Print the loss's warning about an iteration, once per session."""
        text = "" if self._warned else self.config.loss.warning(metrics)
        if text:
            self._warned = True
            self.console.say(
                f"WARNING: {text}. To check the model's replay, run: flowgrpo doctor "
                f"{self.config.model.path}"
            )

    def log_evaluation(self, result: Mapping[str, Any]) -> None:
        """Write the result of an evaluation, without its time."""
        if self.is_main:
            # Two runs of one configuration write the same lines.
            self.logs.append("evaluations", _timeless(result))
            self.on_log("evaluations", _timeless(result))
        flat = {f"held_out/{k}": v for k, v in result["scores"].items()} | result["metrics"]
        flat |= {f"artefacts/{k}": v for k, v in result.get("artefacts", {}).items()}
        for tag, table in result.get("regimes", {}).items():
            flat |= {f"held_out/{tag}/{k}": v for k, v in table["scores"].items()}
            flat |= {f"{k}/{tag}": v for k, v in table["metrics"].items()}
        for label, table in result.get("bench", {}).items():
            values = table.get("results", {}).items()
            flat |= {f"bench/{label}/{k}": v for k, v in values if v is not None}
        self.accelerator.log(flat, step=result["iteration"])

    def log_grid(self, iteration: int) -> None:
        """Show the comparison grid after this many iterations in the trackers."""
        trackers.log_picture(self.accelerator, "grid", self.grid(iteration), iteration)

    def drop_phases(self) -> None:
        """Discard times that belong to no iteration."""
        self._phases = {}

    def past_evaluations(self) -> list[Mapping[str, Any]]:
        """The evaluations of earlier sessions of this run."""
        return self.logs.read("evaluations")

    def restore(self, learner: Learner) -> None:
        """Load the newest checkpoint that is not damaged, if there is one.

        A damaged one is set aside with a warning, because the previous one gives the same run: the
        iterations in between are repeated with the same numbers.

        Raises:
            CheckpointError: If all checkpoints are damaged.
            LogError: If log lines that the checkpoint counts are lost or broken.
        """
        if self.is_main:
            self.checkpoint_files.mend(self.console.say)
        self.accelerator.wait_for_everyone()
        found = checkpoints.newest(self.checkpoints)
        lines: Mapping[str, int] = {}
        if found is not None:
            parts, state = self.load(found, learner)
            lines = state["lines"]
            if self.is_main:
                self.logs.check(lines, state.get("lines_sha256", {}), str(found))
            learner.restore(parts, state["learner"])
            if self.scorer is not None:
                self.scorer.restore(parts)
            # Without an evaluation that has the number, the best value is -inf, which JSON lacks.
            best = state["best"]
            self.iteration, self.best = state["iteration"], -math.inf if best is None else best
            self.bests = dict(state.get("bests", {}))
            self.console.say(f"resuming at iteration {self.iteration} from {found}")
        if self.is_main:
            # The iterations after the checkpoint are repeated and log the same numbers again.
            self.logs.cut(lines)
        # The other processes read the evaluations next, which decide whether all of them stop early.
        self.accelerator.wait_for_everyone()

    def load(
        self, folder: Path, learner: Learner
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Read a checkpoint; of a divided model only this process's parts. All processes must call this.

        Returns:
            Tensors by part and name, divided as the learner's parameters are, and the state.
        """
        return self.checkpoint_files.read(folder, learner.division)

    def save(self, learner: Learner, iteration: int) -> None:
        """Write a checkpoint after ``iteration`` iterations, and delete old ones.

        All processes must call this.
        """
        self._write(learner, iteration, self.logs.counts() if self.is_main else {})
        self.accelerator.wait_for_everyone()

    def _write(self, learner: Learner, iteration: int, lines: Mapping[str, int]) -> None:
        """Write a checkpoint that counts these log lines."""
        if not self.checkpoint_files.is_written_here:
            return
        parts, state = learner.state()
        self.checkpoint_files.require_finite(parts)
        parts |= self.scorer.state() if self.scorer is not None else {}
        self.checkpoint_files.write(
            f"{iteration:06d}",
            parts,
            {
                "iteration": iteration,
                "best": self.best,
                "bests": self.bests,
                "lines": dict(lines),
                "lines_sha256": self.logs.digests(lines),
                "learner": state,
            },
        )
        if self.is_main:
            self.checkpoint_files.prune()
        self._saved_at = time.monotonic()

    def save_best(
        self, learner: Learner, iteration: int, score: float, measured: Measured | None = None
    ) -> None:
        """Save the evaluated weights if they are the best so far.

        Args:
            learner: The learner.
            iteration: Iterations trained.
            score: The value of the number in this evaluation.
            measured: The number, whose best weights are kept in a folder of their own; None for
                ``evaluation.best``, whose weights are kept in ``best``.
        """
        own = measured or Measured.parse(self.config.evaluation.best)
        gain = -score if own.lower else score
        key = "" if measured is None else str(measured)
        # NaN is not the best either.
        if not gain > (self.best if measured is None else self.bests.get(key, -math.inf)):
            return
        if self.checkpoint_files.is_written_here:
            parts, _ = learner.state()
            self.checkpoint_files.require_finite(parts)
            weights = parts.get("ema", parts["weights"])
            name = "best" if measured is None else own.folder
            state = {"iteration": iteration, "score": score}
            self.checkpoint_files.write(name, {"weights": weights}, state)
        # Afterwards: if this could not be written, a resumed run writes it.
        if measured is None:
            self.best = gain
        else:
            self.bests[key] = gain

    def save_now(self, learner: Learner, iteration: int) -> None:
        """Save the state before this iteration, without the evaluation that preceded it.

        If the run is resumed, the evaluation is made and logged again. All processes must call this.
        """
        self._write(learner, iteration, self._lines)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Wait for the other processes, end the trackers and the process group."""
        # The other processes wait here until the main process has written the export and the report.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        self.accelerator.trackers = []

    def announce(self) -> None:
        """Print the plan of the run, and what is wasteful about it."""
        work = plan(self.config, self.accelerator.num_processes)
        words = method_rows(self.config) | geometry(self.config, work.num_ranks) | work.rows()
        for name, value in words.items():
            self.console.say(f"{name:>16}  {value}")
        notes = work.notes()
        device = self.accelerator.device
        if device.type != "cpu" and (note := idle_devices(*_here(device))):
            notes.append(note)
        for note in notes:
            self.console.say(f"WARNING: {note}")

    def announce_network(self, learner: Learner) -> None:
        """Print what an iteration sends over the network, which depends on the trained parameters."""
        work = plan(self.config, self.accelerator.num_processes)
        dtype = gathered_dtype(self.config.model.weights, learner.policy.dtype)
        gathered = max(gathered_bytes(m, dtype) for m in learner.policy.denoisers.values())
        encoders = text_encoders(learner.policy.pipeline).values()
        divided = sum(
            gathered_bytes(m, None) for m in encoders if self.config.parallel.divides_encoders
        )
        trained = sum(p.numel() for p in learner.parameters)
        policy = learner.policy
        attention = policy.dtype.itemsize * max((c.most for c in policy.attentions), default=0)
        if network := work.network(trained, gathered, divided, attention):
            self.console.say(f"network: {network}")

    def note_prompts(self, notes: Sequence[str]) -> None:
        """Print warnings about the model and the prompts, and keep them for the report."""
        if not self.is_main:
            return
        for note in notes:
            self.console.say(f"WARNING: {note}")
        file = self.folder / run_folder.NOTES
        if notes or file.exists():
            files.write_whole(file, strict_json.dumps({"notes": list(notes)}, indent=1))

    def start_trackers(self) -> None:
        """Open the experiment trackers, such as TensorBoard.

        Raises:
            ConfigError: If one cannot be started.
        """
        trackers.start_trackers(self.accelerator, self.config)

    def _check_world(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise RuntimeError(
                f"the launcher started {counted(launched, 'process')}, but torch.distributed sees "
                f"{self.accelerator.num_processes}: every process would train alone. Start with "
                "'flowgrpo train ... --nproc N'; on CPUs add --set run.device=cpu"
            )

    def _claim(self, kept: Sequence[str]) -> None:
        """Lock the run directory and write the configuration and the environment into it."""
        packages = ("flowgrpo", "torch", "diffusers", "transformers", "accelerate", "peft")
        environment = {name: version(name) for name in packages} | {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "command": redact_command(sys.argv),
        }
        processes = self.accelerator.num_processes
        self._lock, changed = run_folder.claim(self.config, processes, environment, kept)
        if self._lock.warning:
            self.console.say(self._lock.warning)
        if changed:
            self.console.say(f"changed since the last session: {changed}")


def _here(device: torch.device) -> tuple[int, int]:
    """Processes of the run on this machine, and devices of this type that they can see."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ranks, torch.get_device_module(device).device_count()


def _timeless(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an evaluation without its times."""
    record = {k: v for k, v in result.items() if k != "seconds"}
    if "regimes" in record:
        record["regimes"] = {tag: _timeless(table) for tag, table in record["regimes"].items()}
    return record
