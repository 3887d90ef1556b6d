"""A session of a run: its processes, the run directory, logs, checkpoints and resuming."""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flowgrpo import config as configuration
from flowgrpo.config import Config, ConfigError
from flowgrpo.config.reference import to_table
from flowgrpo.data.prompts import Group
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import RewardError
from flowgrpo.training import checkpoints
from flowgrpo.training.console import Console
from flowgrpo.training.cpu import prepare_cpu
from flowgrpo.training.learner import Learner

LOGS = ("metrics", "timings", "evaluations")
"""Files of one JSON object per line; a checkpoint records how many lines each had."""


class Session:
    """One process of a run, from its start to its end or interruption.

    The main process writes the run directory; the others take part in collective operations only.

    Attributes:
        folder: The run directory.
        scorer: The rewards, whose state (of rewards that learn) checkpoints contain; set by the setup.
        iteration: The first iteration of this session; above 0 if it resumes a run.
        best: The best held-out reward so far.
        stopping: Whether Ctrl-C was pressed; the current iteration is finished and saved.
    """

    def __init__(self, config: Config):
        """Start the process group and claim the run directory.

        Raises:
            ConfigError: If the directory belongs to another configuration, or ``run.device`` is a GPU
                and there is none.
            RuntimeError: If a launcher started processes that are not connected to each other.
        """
        prepare_cpu(config.run.threads)
        self.config, self.folder = config, Path(config.run.folder)
        cpu = config.run.device == "cpu" or not torch.cuda.is_available()
        if cpu and config.run.device not in ("auto", "cpu"):
            raise ConfigError(
                f"run.device = {config.run.device!r}, but torch finds no GPU here; set it to 'auto' or 'cpu'"
            )
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="fp16" if config.model.dtype == "float16" and not cpu else "no",
            log_with=list(config.run.trackers) or None,
            project_dir=str(self.folder),
        )
        self._check_world()
        self.console = Console(enabled=self.is_main)
        self.iteration, self.best, self.stopping = 0, float("-inf"), False
        self.scorer: RewardScorer | None = None
        self._phases: dict[str, float] = {}
        self._warned = False
        if self.is_main:
            self._claim()
        self.accelerator.wait_for_everyone()
        signal.signal(signal.SIGINT, self._interrupt)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run directory."""
        return bool(self.accelerator.is_main_process)

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    def grid(self, iteration: int) -> Path:
        """The file of the comparison grid after this many iterations."""
        return self.folder / "grids" / f"{iteration:06d}.png"

    def share(self, groups: list[Group]) -> list[Group]:
        """The part of the groups that this process handles; groups are never split."""
        size = len(groups) // self.accelerator.num_processes
        return groups[self.accelerator.process_index * size :][:size]

    def gather(self, tensor: Tensor) -> Tensor:
        """The concatenation of a tensor of each process, on the CPU."""
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The concatenation of a list of each process."""
        return gather_object(values) if self.accelerator.num_processes > 1 else values

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the time of a part of the iteration."""
        began = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def rescue(self, learner: Learner, iteration: int) -> Iterator[None]:
        """Save a checkpoint if a reward fails permanently inside, and raise the error again."""
        try:
            yield
        except RewardError:
            if self.accelerator.num_processes == 1:
                self.save(learner, iteration)
                self.console.say(
                    f"saved after {iteration} iterations; the same command resumes from there"
                )
            raise

    def should_stop(self) -> bool:
        """Whether Ctrl-C was pressed in any process."""
        flag = torch.tensor([float(self.stopping)])
        self.stopping = bool(self.gather(flag).any())
        return self.stopping

    def checkpoint_due(self, iterations: int) -> bool:
        """Whether a checkpoint is due after this many iterations; after the last one always."""
        return (
            iterations == self.config.train.iterations
            or iterations % self.config.run.checkpoint_every == 0
        )

    def log(self, iteration: int, metrics: Mapping[str, float], judge_seconds: float) -> None:
        """Write an iteration's metrics and, to another file, its times.

        Times are kept apart because metrics are equal in every repetition of a run.
        """
        timings = {
            **self._phases,
            "judge": judge_seconds,
            "total": sum(v for k, v in self._phases.items() if k != "evaluation"),
        }
        self._phases = {}
        if self.is_main:
            _append(self.folder / "metrics.jsonl", {"iteration": iteration, **metrics})
            _append(self.folder / "timings.jsonl", {"iteration": iteration, **timings})
            self.console.iteration(iteration, self.config.train.iterations, metrics, timings)
            self._warn(metrics)
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
            record = {k: v for k, v in result.items() if k != "seconds"}
            _append(self.folder / "evaluations.jsonl", record)
        flat = {f"held_out/{k}": v for k, v in result["scores"].items()} | result["metrics"]
        self.accelerator.log(flat, step=result["iteration"])

    def drop_phases(self) -> None:
        """Discard times that belong to no iteration."""
        self._phases = {}

    def past_evaluations(self) -> list[Mapping[str, Any]]:
        """The evaluations of earlier sessions of this run."""
        file = self.folder / "evaluations.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def restore(self, learner: Learner) -> None:
        """Load the newest checkpoint, if there is one."""
        if self.is_main:
            checkpoints.tidy(self.checkpoints)
        self.accelerator.wait_for_everyone()
        found = checkpoints.newest(self.checkpoints)
        lines: Mapping[str, int] = {}
        if found is not None:
            parts, state = checkpoints.load(found)
            learner.restore(parts, state["learner"])
            if self.scorer is not None:
                self.scorer.restore(parts)
            self.iteration, self.best, lines = state["iteration"], state["best"], state["lines"]
            self.console.say(f"resuming at iteration {self.iteration} from {found}")
        if self.is_main:
            # The iterations after the checkpoint are repeated and log the same numbers again.
            for name in LOGS:
                _truncate(self.folder / f"{name}.jsonl", lines.get(name, 0))

    def save(self, learner: Learner, iteration: int) -> None:
        """Write a checkpoint after ``iteration`` iterations, and delete old ones."""
        if self.is_main:
            parts, state = learner.state()
            parts |= self.scorer.state() if self.scorer is not None else {}
            lines = {n: _lines(self.folder / f"{n}.jsonl") for n in LOGS}
            checkpoints.save(
                self.checkpoints / f"{iteration:06d}",
                parts,
                {"iteration": iteration, "best": self.best, "lines": lines, "learner": state},
            )
            checkpoints.prune(self.checkpoints, self.config.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def save_best(self, learner: Learner, iteration: int, score: float) -> None:
        """Save the evaluated weights as ``best`` if their held-out reward is the best so far."""
        if score <= self.best:
            return
        self.best = score
        if self.is_main:
            parts, _ = learner.state()
            weights = parts.get("ema", parts["weights"])
            checkpoints.save(
                self.checkpoints / "best",
                {"weights": weights},
                {"iteration": iteration, "score": score},
            )

    def close(self) -> None:
        """End the trackers and the process group."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The other processes wait here until the main process has written the export and the report.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def start_trackers(self) -> None:
        """Open the experiment trackers, such as TensorBoard."""
        if self.config.run.trackers:
            self.accelerator.init_trackers("tracking")

    def _check_world(self) -> None:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise RuntimeError(
                f"the launcher started {launched} processes, but torch.distributed sees "
                f"{self.accelerator.num_processes}: every process would train alone. Start with 'torchrun "
                "--nproc-per-node N -m flowgrpo train ...'; on CPUs add --set run.device=cpu"
            )

    def _claim(self) -> None:
        """Write the configuration into the run directory, unless it belongs to another configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.toml"
        if file.exists():
            there = configuration.load(str(file))
            difference = _difference(to_table(_essence(there)), to_table(_essence(self.config)))
            # A run that stopped before its first iteration has no results that could be mixed up.
            if difference and (self.folder / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{self.folder} belongs to another configuration: {difference}. Choose another "
                    "--set run.folder=..., or delete that one"
                )
        elif any(self.folder.iterdir()):
            raise ConfigError(
                f"{self.folder} is not empty and not a run directory; choose another --set run.folder=..."
            )
        write_whole(file, configuration.dump(self.config))
        packages = ("flowgrpo", "torch", "diffusers", "transformers", "accelerate", "peft")
        environment = {name: version(name) for name in packages} | {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "command": " ".join(sys.argv),
        }
        write_whole(self.folder / "environment.json", json.dumps(environment, indent=1))

    def _interrupt(self, *_: object) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.console.say("stopping after this iteration (Ctrl-C again stops at once)")


def _essence(config: Config) -> Config:
    """The part of a configuration that determines the numbers: all but how results are written."""
    run = configuration.Run(folder="", seed=config.run.seed)
    return replace(config, run=run)


def _difference(there: Any, here: Any, path: str = "") -> str:
    """The first key in which two tables differ, in words; empty if none."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(k for k in here if k not in there)]:
            found = _difference(there.get(key), here.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if there == here else f"{path} is {there!r} there and {here!r} now"


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _truncate(path: Path, lines: int) -> None:
    if path.exists():
        write_whole(path, "".join(path.read_text().splitlines(keepends=True)[:lines]))
