"""A run: its processes, its directory, its metrics, its way back after a stop."""

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
from flowgrpo.config.reader import to_table
from flowgrpo.data.prompts import Group
from flowgrpo.losses.losses import ClippedLoss
from flowgrpo.rewards.scorer import RewardError, RewardScorer
from flowgrpo.training import checkpoints
from flowgrpo.training.console import Console
from flowgrpo.training.cpu import prepare_cpu
from flowgrpo.training.learner import Learner

LOGS = ("metrics", "timings", "evaluations")


class Session:
    """One process of a run.

    Attributes:
        folder: The run directory.
        iteration: The iteration to begin with; above 0 after a restart.
        best: The best held-out reward so far.
        stopping: Whether Ctrl-C was pressed; the iteration under way is finished and saved.
    """

    def __init__(self, config: Config):
        """Claim the run directory and start the process group.

        Raises:
            ConfigError: If the directory belongs to another configuration.
            RuntimeError: If a launcher started processes that do not know of each other.
        """
        prepare_cpu(config.run.threads)
        self.config, self.folder = config, Path(config.run.folder)
        cpu = config.run.device == "cpu" or not torch.cuda.is_available()
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

    def share(self, groups: list[Group]) -> list[Group]:
        """The groups of this process; groups are never split."""
        size = len(groups) // self.accelerator.num_processes
        return groups[self.accelerator.process_index * size :][:size]

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, joined, on the CPU."""
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, joined."""
        return gather_object(values) if self.accelerator.num_processes > 1 else values

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the iteration."""
        began = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def rescue(self, learner: Learner, iteration: int) -> Iterator[None]:
        """If a reward fails for good inside, save what was learned so far before the run ends."""
        try:
            yield
        except RewardError:
            if self.accelerator.num_processes == 1:
                self.save(learner, iteration)
                self.console.say(
                    f"saved after {iteration} iterations; the same command goes on from there"
                )
            raise

    def should_stop(self) -> bool:
        """Whether Ctrl-C reached any process."""
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
        """Write an iteration's metrics and, apart from them, its times."""
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
            self._warn_of_noise(metrics.get("log_prob/noise", 0.0))
        self.accelerator.log(dict(metrics), step=iteration)

    def _warn_of_noise(self, noise: float) -> None:
        """Say at once, and once, that a replay is not what was rolled out."""
        loss = self.config.loss
        if self._warned or not isinstance(loss, ClippedLoss):
            return
        if loss.clip != "ratio" or noise <= loss.clip_range:
            return
        self._warned = True
        self.console.say(
            f"WARNING: before any update, log-probabilities are {noise:.1e} off in the replay, more than "
            f"loss.clip_range = {loss.clip_range:g}: clipping acts on that. Where it is rounding, set "
            "train.train_batch as train.rollout_batch, or take more precision or a wider clip range; "
            f"where it is more, flowgrpo doctor {self.config.model.path} says why"
        )

    def log_evaluation(self, result: Mapping[str, Any]) -> None:
        """Write the result of an evaluation."""
        if self.is_main:
            # Times are no results: two runs of one configuration write the same lines.
            record = {k: v for k, v in result.items() if k != "seconds"}
            _append(self.folder / "evaluations.jsonl", record)
        flat = {f"held_out/{k}": v for k, v in result["scores"].items()} | result["metrics"]
        self.accelerator.log(flat, step=result["iteration"])

    def drop_phases(self) -> None:
        """Forget times that belong to no iteration."""
        self._phases = {}

    def past_evaluations(self) -> list[Mapping[str, Any]]:
        """The evaluations of earlier sessions of this run."""
        file = self.folder / "evaluations.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def restore(self, learner: Learner) -> None:
        """Go on from the newest checkpoint, if there is one."""
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
            self.console.say(f"going on at iteration {self.iteration} from {found}")
        if self.is_main:
            # What was logged after the checkpoint will be logged again, with the same numbers.
            for name in LOGS:
                _truncate(self.folder / f"{name}.jsonl", lines.get(name, 0))

    def save(self, learner: Learner, iteration: int) -> None:
        """Write a checkpoint after ``iteration`` iterations."""
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
        """Keep the evaluated weights apart if their held-out reward is the best so far."""
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
        # The main process is still writing the export and the report when the others arrive here.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def start_trackers(self) -> None:
        """Open TensorBoard and the like."""
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
        """Write the configuration into a new directory; refuse one that belongs to another."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.toml"
        if file.exists():
            there = configuration.load(str(file))
            difference = _difference(to_table(_essence(there)), to_table(_essence(self.config)))
            # A run that stopped before its first iteration left nothing that could be spoilt.
            if difference and (self.folder / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{self.folder} belongs to another configuration: {difference}. Choose another "
                    "--set run.folder=..., or delete that one"
                )
        elif any(self.folder.iterdir()):
            raise ConfigError(
                f"{self.folder} is not empty and no run directory; choose another --set run.folder=..."
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
    """What decides the numbers: everything but where and how often things are written."""
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
    """Write a file so that it is never seen half written."""
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
