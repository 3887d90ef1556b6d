"""Benchmarks of ``flowgrpo bench`` at the evaluations of a run (``[[evaluation.bench]]``).

Every process makes and judges its share of the images; the first one collects the judgements and
writes the results into ``bench/LABEL/ITERATION`` of the run directory, in the form of ``flowgrpo
bench``. A benchmark that was interrupted goes on where it stopped, if the weights are the same.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flowgrpo.bench.base import (
    BenchError,
    Benchmark,
    Entry,
    Failure,
    Picture,
    benchmark_class,
    select,
)
from flowgrpo.bench.files import read_json
from flowgrpo.bench.generation import (
    SETTINGS,
    Item,
    Plan,
    check_settings,
    make_missing,
    record_sampler,
    settings_of,
)
from flowgrpo.bench.models import Subject, identify, label_of
from flowgrpo.bench.progress import Progress
from flowgrpo.bench.report import FILE, compared, read_result
from flowgrpo.bench.run import finish
from flowgrpo.bench.scoring import Scores, score
from flowgrpo.config.benchmarks import Bench
from flowgrpo.config.reader import read
from flowgrpo.config.schema import Config, Evaluation
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest
from flowgrpo.core.measures import Measured
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.training.learner import Learner
from flowgrpo.training.session import Session

ADVICE = "To train without it, remove its table from the configuration"

PATIENCE = 10.0
"""Seconds to wait for a judge behind an endpoint before a run begins."""


@dataclass(frozen=True)
class RunBenchmark:
    """A benchmark of a configuration, with its prompts.

    Attributes:
        key: Its place in the configuration.
        settings: Its table.
        benchmark: The benchmark.
        entries: The prompts that are used.
    """

    key: str
    settings: Bench
    benchmark: Benchmark
    entries: Sequence[Entry]

    @property
    def images(self) -> int:
        """Images of one evaluation."""
        return len(self.entries) * self.benchmark.samples

    def is_due(self, iteration: int, full: bool) -> bool:
        """Whether it is run at an evaluation; ``full`` says that it is before or after training."""
        return {"every": True, "ends": full, "final": full and iteration > 0}[self.settings.when]


def load_benchmarks(evaluation: Evaluation) -> list[RunBenchmark]:
    """The benchmarks of a configuration; their data are read, their judges are not loaded.

    Raises:
        ConfigError: If a benchmark or a setting does not exist, its data are missing or are not the
            published ones, or ``evaluation.best`` or ``evaluation.keep_best`` name a result that it does not
            have.
    """
    found = [_load(f"evaluation.bench[{i}]", b) for i, b in enumerate(evaluation.bench)]
    for key, text in (
        ("evaluation.best", evaluation.best),
        *((f"evaluation.keep_best[{i}]", t) for i, t in enumerate(evaluation.keep_best)),
    ):
        tag, slash, name = Measured.parse(text).name.partition("/")
        for one in found:
            if slash and one.settings.tag == tag:
                _require_metric(key, one, name)
    return found


def _load(key: str, settings: Bench) -> RunBenchmark:
    try:
        kind = benchmark_class(settings.name)
        benchmark: Benchmark = read(kind, settings.settings, f"{key}.settings")
        if benchmark.samples < 1:
            raise ValueError(f"settings.samples must be at least 1, got {benchmark.samples}")
        entries = select(benchmark.entries(), settings.limit or None, settings.dimensions)
    except ConfigError:
        raise
    except (BenchError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{key}: {_in_a_file(str(error))}. {ADVICE}") from error
    return RunBenchmark(key, settings, benchmark, entries)


def _in_a_file(text: str) -> str:
    """A message of ``flowgrpo bench`` with its options as keys of a configuration."""
    options = {
        "--data PATH": "settings.data_file",
        "--set any_data=true": "settings.any_data = true",
        "--judge MODEL": "settings.judge_model",
        "--judge-url": "settings.judge_url",
    }
    for option, key in options.items():
        text = text.replace(option, key)
    return text.rstrip(". ")


def _require_metric(key: str, one: RunBenchmark, name: str) -> None:
    known = [m.name for m in one.benchmark.metrics()]
    if name not in known:
        raise ConfigError(
            f"{key}: {one.settings.tag} has no result {name!r}{suggest(name, known)} (known: "
            f"{', '.join(known)})"
        )


class Benchmarks:
    """Runs the benchmarks of a run's evaluations."""

    def __init__(
        self,
        config: Config,
        session: Session,
        policy: PipelinePolicy,
        learner: Learner,
        sampling: Sampling,
    ):
        """Read the benchmarks' data.

        Raises:
            ConfigError: See :func:`load_benchmarks`.
        """
        self.found = load_benchmarks(config.evaluation)
        self.model = config.model
        self.seed, self.session, self.policy = config.run.seed, session, policy
        self.learner, self.sampling = learner, sampling
        self._problem = ""

    def probe(self) -> None:
        """Make and judge one image of each benchmark, so that nothing is missing hours later.

        Judges that run here are loaded for this and released again.

        Raises:
            ConfigError: If a judge cannot be loaded or reached, or does not answer usefully.
        """
        for one in self.found:
            with TemporaryDirectory() as folder:
                plan = self._plan(one, Path(folder), {})
                item = plan.items()[0][0]
                try:
                    judge = _impatient(one.benchmark).judge()
                    make_missing(plan, self.policy, [[item]], Progress("", 1, 1))
                    ((_, outcome),) = judge.judge(iter([_picture(item)]))
                except (BenchError, ValueError, OSError, ImportError) as error:
                    raise ConfigError(f"{one.key}: {_in_a_file(str(error))}. {ADVICE}") from error
            if isinstance(outcome, Failure):
                raise ConfigError(
                    f"{one.key}: {judge.title} could not judge an image: {outcome.reason}. {ADVICE}"
                )

    def run(self, iteration: int, full: bool) -> dict[str, Any]:
        """Run the benchmarks that are due; all processes must call this.

        Args:
            iteration: Iterations trained so far.
            full: Whether the evaluation is one before or after training.

        Returns:
            For each label a table as in ``evaluations.jsonl``, on all processes. A benchmark whose
            judge fails has the key ``problem`` and no results.
        """
        due = [one for one in self.found if one.is_due(iteration, full)]
        weights = self._digest() if due else ""
        return {one.settings.tag: self._run(one, iteration, weights) for one in due}

    def _run(self, one: RunBenchmark, iteration: int, weights: str) -> dict[str, Any]:
        session = self.session
        place = self._folder(one, iteration)
        about = {"run": session.folder.name, "iteration": iteration, "weights_sha256": weights}
        plan = self._plan(one, place, about)
        # Also a barrier: no process writes images before the first one has prepared the folder.
        done = session.gather_objects([self._prepare(plan)] if session.is_main else [])
        if not done[0]:
            parts = session.gather_objects([self._share(one, plan)])
            if session.is_main:
                self._collect(one, plan, parts, iteration)
        (record,) = session.gather_objects([self._record(one, plan)] if session.is_main else [])
        if not one.settings.keep_images and "results" in record:
            self._delete_images(plan)
        return dict(record)

    def _folder(self, one: RunBenchmark, iteration: int) -> Path:
        return self.session.folder / "bench" / one.settings.tag / f"{iteration:06d}"

    def _plan(self, one: RunBenchmark, folder: Path, about: Mapping[str, Any]) -> Plan:
        part = {"limit": one.settings.limit, "dimensions": list(one.settings.dimensions)}
        shares = self.session.shares
        label = label_of(f"{self.session.folder.resolve().name}-{about.get('iteration', 0):06d}")
        subject = Subject(
            label,
            lambda: {**self._base, **about, "part": part},
            lambda: self.policy,
            self.sampling,
            self.model.dtype,
        )
        return Plan(
            folder,
            one.benchmark,
            one.entries,
            subject,
            seed=self.seed,
            batch=self.policy.batch_size,
            rank=shares.index,
            num_ranks=shares.number,
        )

    @cached_property
    def _base(self) -> dict[str, Any]:
        """Hash or revision of the model that training started from."""
        return identify(self.model.path)

    def _digest(self) -> str:
        """SHA-256 of the trained weights as they are now; of the first process alone."""
        if not self.session.is_main:
            return ""
        total = hashlib.sha256()
        for name, tensor in self.learner.named.items():
            total.update(name.encode())
            flat = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
            total.update(flat.numpy().data)
        return total.hexdigest()

    def _prepare(self, plan: Plan) -> bool:
        """Store the settings in a folder; whether it holds results made with the same ones.

        A folder that was made with others, such as the weights of a run that took another turn after
        it was interrupted, is emptied.
        """
        settings = json.loads(strict_json.dumps(settings_of(plan, plan.subject.identity())))
        try:
            same = read_json(plan.folder / SETTINGS).get("settings") == settings
        except BenchError:
            same = False
        if same:
            return (plan.folder / FILE).is_file()
        shutil.rmtree(plan.folder, ignore_errors=True)
        check_settings(replace(plan, rank=0), settings)
        record_sampler(plan, self.policy)
        return False

    def _share(self, one: RunBenchmark, plan: Plan) -> dict[str, Any]:
        """Make and judge the images of this process; a plain table, which processes can exchange."""
        session = self.session
        mine = plan.items()[plan.rank :: plan.num_ranks]
        items = [item for batch in mine for item in batch]
        try:
            there = session.once(lambda: sum(item.path.exists() for item in items))
            title = f"{one.settings.tag}, images"
            progress = Progress(title, len(items), there, session.console.say)
            self._make(plan, mine, progress)
            progress.close()
            if not session.shares.leads:
                return {}
            judge = one.benchmark.judge()
            out = plan.folder if plan.rank == 0 else plan.folder / "processes" / str(plan.rank)
            scores = score(
                out,
                one.benchmark,
                judge,
                one.entries,
                [_picture(item) for item in items],
                say=session.console.say,
                check=session.signals.check,
            )
        except BenchError as error:
            return {"problem": str(error)}
        return {
            "problem": "",
            "judgements": scores.judgements,
            "failed": scores.failed,
            "files": scores.files,
            "judge": (scores.title, scores.identity, scores.version, scores.notes),
        }

    def _make(self, plan: Plan, batches: Sequence[Sequence[Item]], progress: Progress) -> None:
        """Make the missing images of this process, and take part in the calls of others.

        Raises:
            BenchError: After all processes have made theirs.
        """
        problem = None
        with self.policy.together():
            try:
                session = self.session
                make_missing(
                    plan, self.policy, batches, progress, session.signals.check, session.once
                )
            except BenchError as error:
                problem = error
        if problem is not None:
            raise problem

    def _collect(
        self, one: RunBenchmark, plan: Plan, parts: Sequence[dict[str, Any]], iteration: int
    ) -> None:
        """Write the results of all processes, or say why there are none."""
        problem = next((p["problem"] for p in parts if p["problem"]), "")
        if not problem:
            title, identity, version, notes = parts[0]["judge"]
            scores = Scores(
                one.entries, title=title, identity=identity, version=version, notes=notes
            )
            for part in parts:
                for key, judged in part["judgements"].items():
                    scores.judgements.setdefault(key, {}).update(judged)
                scores.failed.update(part["failed"])
                scores.files.update(part["files"])
            try:
                finish(plan.folder, one.benchmark, scores, plan.subject.label)
            except BenchError as error:
                problem = str(error)
        if problem:
            self.session.console.say(
                f"WARNING: the benchmark {one.settings.tag} failed after {counted(iteration, 'iteration')}, and the run "
                f"goes on without its results: {problem}. The images stay in {plan.folder}"
            )
            self._problem = problem

    def _record(self, one: RunBenchmark, plan: Plan) -> dict[str, Any]:
        """A benchmark's table in ``evaluations.jsonl``."""
        if not (plan.folder / FILE).is_file():
            return {"problem": self._problem}
        result = read_result(plan.folder)
        metrics = result["metrics"]
        return {
            "title": result["title"],
            "folder": plan.folder.relative_to(self.session.folder).as_posix(),
            "images": result["counts"]["judged"],
            "failed": result["counts"]["failed"],
            "main": [m["name"] for m in metrics if m["headline"]] or [m["name"] for m in metrics],
            "results": {m["name"]: m["value"] for m in metrics},
            "intervals": {m["name"]: [m["low"], m["high"]] for m in metrics},
            "changes": _changes(plan.folder),
        }

    def _delete_images(self, plan: Plan) -> None:
        """Delete this process's images; the first process deletes their folders too."""
        for batch in plan.items()[plan.rank :: plan.num_ranks]:
            for item in batch:
                item.path.unlink(missing_ok=True)
        self.session.accelerator.wait_for_everyone()
        if self.session.is_main:
            shutil.rmtree(plan.folder / "images", ignore_errors=True)


def _impatient(benchmark: Benchmark) -> Benchmark:
    """The same benchmark, whose judge is not waited for long: it is asked before a run begins."""
    if not hasattr(benchmark, "patience"):
        return benchmark
    return replace(benchmark, patience=min(benchmark.patience, PATIENCE))  # type: ignore[type-var]


def headlines(benchmark: Benchmark) -> list[str]:
    """The names of the main results; all if none is marked."""
    metrics = benchmark.metrics()
    return [m.name for m in metrics if m.headline] or [m.name for m in metrics]


def _picture(item: Item) -> Picture:
    return Picture(item.entry, item.sample, item.path)


def _changes(folder: Path) -> dict[str, list[Any]]:
    """Difference from the run's first evaluation, with its interval; empty at the first itself.

    Also empty if the benchmark, its data or its judge changed in between.
    """
    first = min((p.parent for p in folder.parent.glob(f"*/{FILE}")), default=folder)
    if first.name >= folder.name:
        return {}
    try:
        return {r["name"]: [r["value"], r["low"], r["high"]] for r in compared(first, folder)}
    except BenchError:
        return {}
