"""What the study runs, in which order, and where each result is kept.

Every job writes one file when it is done, and a job whose file exists is not repeated. The order makes
the results a valid table at any time: all methods with one seed come before the next seed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.study.entries import ALGORITHMS, FURTHER, GROUP_SIZE, GROUPS, RATES, Entry
from flowgrpo.data import files, strict_json

Kind = Literal["main", "flawed", "second", "guided", "long"]
KINDS: Mapping[Kind, str] = {
    "main": "training without guidance",
    "flawed": "training on the flawed reward",
    "second": "training in the second world",
    "guided": "training with guidance",
    "long": "training twice as long",
}


@dataclass(frozen=True)
class Plan:
    """The sizes of the study.

    Attributes:
        seconds: Budget of a run: processor seconds of rollouts and updates.
        tuning_seconds: Budget of a tuning run; as long as a run, because rates that are best after a third of
            it destroy the model later.
        images: Held-out images of an evaluation.
        few_images: Images of an evaluation with guidance and of one of prompts of new kinds.
        tuning_images: Images of training prompts that score a tuning run.
        drift_states: Paths on whose states the drift is measured, at most a batch of samples.
        reference_images: Images of the work that measures the machine's speed.
        points: Evaluations of a run; the last is at its end.
        kinds: What is trained.
        seeds: Seeds of the reported runs.
        tuning_seed: Seed of tuning runs, which is not reported.
    """

    seconds: float = 60.0
    tuning_seconds: float = 60.0
    images: int = 480
    few_images: int = 180
    tuning_images: int = 240
    drift_states: int = GROUPS * GROUP_SIZE
    reference_images: int = 24
    points: int = 2
    kinds: tuple[Kind, ...] = tuple(KINDS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100

    def budget(self, kind: Kind) -> float:
        """The processor seconds of a reported run."""
        return self.seconds * (2 if kind == "long" else 1)


SHORT = Plan(
    seconds=0.01, tuning_seconds=0.01, images=6, few_images=6, tuning_images=6, drift_states=2,
    reference_images=2, points=2, kinds=("main", "flawed"), seeds=(0,),
)  # fmt: skip
"""Sizes with which the code is tested; the results say nothing."""


@dataclass(frozen=True)
class Choice:
    """A learning rate and a value of the tuned constant."""

    rate: float
    value: str


@dataclass(frozen=True)
class Job:
    """One piece of work that writes one file.

    Attributes:
        work: ``cost``: time per iteration; ``tune``: a tuning run; ``base``: the evaluation of the model
            before training, in the second world if that is the kind; ``run``: a reported run.
        kind: What is trained; of cost, with or without guidance.
        entry: The method; None for ``base``.
        seed: The seed.
        choice: The tuned settings; the rate of ``cost`` has no meaning.
        iterations: Length of the run.
    """

    work: Literal["cost", "tune", "base", "run"]
    kind: Kind
    entry: Entry | None
    seed: int
    choice: Choice | None = None
    iterations: int = 0


class Store:
    """The folder with the results."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.second_model = folder / "second_world" / "pipeline"
        """The model of the second world, which its page tells how to train; nothing is run there without."""

    def file(self, job: Job) -> Path:
        """Where the result of a job is kept."""
        slug = job.entry.slug if job.entry else ""
        if job.work == "base":
            return self.folder / _bases(job.kind) / f"{job.seed}.json"
        if job.work == "run":
            return self.folder / job.kind / slug / f"{job.seed}.json"
        assert job.entry is not None
        assert job.choice is not None
        number = job.entry.values.index(job.choice.value)
        if job.work == "cost":
            return self.folder / "cost" / job.kind / f"{slug}-{number}.json"
        return self.folder / "tune" / slug / f"{job.choice.rate:g}-{number}.json"

    def read(self, job: Job) -> dict[str, Any] | None:
        """The result of a job; None if it is not done."""
        file = self.file(job)
        return _read(file) if file.exists() else None

    def write(self, job: Job, result: Mapping[str, Any]) -> None:
        """Keep the result of a job."""
        file = self.file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        described = {k: v for k, v in asdict(job).items() if k != "entry"}
        name = job.entry.name if job.entry else ""
        files.write_whole(file, strict_json.dumps({"entry": name, **described, **result}, indent=1))

    def pack(self, file: Path) -> None:
        """Write all results into one file, a line per job, which can be kept beside the page."""
        folders = ("base", "cost", *KINDS, "second_base", "tune")
        results = (f for name in folders for f in sorted((self.folder / name).rglob("*.json")))
        found = [self.folder / "unit.json", *results]
        lines = [
            strict_json.dumps(
                {"file": f.relative_to(self.folder).as_posix(), **json.loads(f.read_text("utf-8"))}
            )
            for f in found
        ]
        files.write_whole(file, "".join(f"{line}\n" for line in lines))

    def unpack(self, file: Path) -> None:
        """Write the results of a packed file that the folder does not have.

        Raises:
            ValueError: If a line is no result, or its name leads out of the folder; nothing is written then.
        """
        found: dict[Path, dict[str, Any]] = {}
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            try:
                result = json.loads(line)
                target = self.folder / result.pop("file")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {number}, is no packed result: {error!r}"
                ) from error
            if not target.resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(f"{file}, line {number}: {target} is outside of {self.folder}")
            found[target] = result
        for target, result in found.items():
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                files.write_whole(target, strict_json.dumps(result, indent=1))

    def unit(self) -> float | None:
        """Processor seconds of the reference work when the study began; None before that."""
        file = self.folder / "unit.json"
        return float(json.loads(file.read_text())["seconds"]) if file.exists() else None

    def save_unit(self, seconds: float) -> None:
        """Keep the processor seconds of the reference work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(self.folder / "unit.json", strict_json.dumps({"seconds": seconds}))

    def seconds_per_iteration(self, entry: Entry, value: str, kind: Kind = "main") -> float | None:
        """Processor seconds of an iteration, on the machine as it was when the study began.

        The mean over tuning runs where there are any, else the median of a few iterations. Other work on
        the machine slows a process down; each time is therefore divided by that of the reference work
        after it.
        """
        guided: Kind = "guided" if kind == "guided" else "main"
        tuned = [t for t in self.tuning_runs(entry) if t["choice"]["value"] == value]
        done = [t for t in tuned if not t["diverged"]]
        if done and guided == "main":
            return sum(self._normal(t) for t in done) / sum(len(t["seconds"]) for t in done)
        found = self.read(Job("cost", guided, entry, 0, Choice(0.0, value)))
        if found is None:
            return None
        return self._normal(found) / sum(found["seconds"]) * median(found["seconds"][1:])

    def _normal(self, result: Mapping[str, Any]) -> float:
        unit = self.unit()
        assert unit is not None
        return sum(result["seconds"]) * unit / reference_seconds(result)

    def tuning_runs(self, entry: Entry) -> list[dict[str, Any]]:
        """The finished tuning runs of a method."""
        found = sorted((self.folder / "tune" / entry.slug).glob("*.json"))
        return [_read(f) for f in found]

    def tuning(self, entry: Entry) -> dict[Choice, float]:
        """The score of each finished tuning run; minus infinity if training diverged."""
        return {
            Choice(**t["choice"]): float("-inf") if t["diverged"] else t["score"]
            for t in self.tuning_runs(entry)
        }

    def untried(self, entry: Entry) -> Choice | None:
        """What is tried next: all rates with the first value, then the second value with the best rate."""
        tried = self.tuning(entry)
        rates = [Choice(rate, entry.values[0]) for rate in RATES]
        left = [c for c in rates if c not in tried]
        if left:
            return left[0]
        last = Choice(max(rates, key=tried.__getitem__).rate, entry.values[1])
        return None if last in tried else last

    def chosen(self, entry: Entry) -> Choice | None:
        """The settings with the best score on training prompts; None until all are tried."""
        tried = self.tuning(entry)
        return None if self.untried(entry) else max(tried, key=tried.__getitem__)

    def runs(self, kind: Kind, entry: Entry) -> dict[int, dict[str, Any]]:
        """The finished runs of a method by seed."""
        found = {}
        for file in (self.folder / kind / entry.slug).glob("*.json"):
            found[int(file.stem)] = _read(file)
        return dict(sorted(found.items()))

    def bases(self, kind: Kind = "main") -> dict[int, dict[str, Any]]:
        """The evaluations of the model before training of a kind, by seed."""
        found = (self.folder / _bases(kind)).glob("*.json")
        return {int(f.stem): _read(f) for f in found}


def _bases(kind: Kind) -> str:
    """The folder with the evaluations of the model before training."""
    return "second_base" if kind == "second" else "base"


def _read(file: Path) -> dict[str, Any]:
    """A result; ValueError with its file if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}); delete it, and run does it again"
        ) from error
    return found


def reference_seconds(result: Mapping[str, Any]) -> float:
    """Processor seconds of the reference work in a job; the time after it, since the one before it
    is the first sampling of a policy and takes longer."""
    return float(result["reference"][-1])


def jobs(store: Store, plan: Plan, entries: Sequence[Entry] | None = None) -> Iterator[Job]:
    """The jobs that can be done now, in order. Others follow from their results; ask again after each job.

    Args:
        store: The results.
        plan: The sizes.
        entries: The methods that are compared first; all by default. The further ones follow.
    """
    first = ALGORITHMS if entries is None else entries
    further = FURTHER if entries is None else ()
    early, late = plan.seeds[:3], plan.seeds[3:]
    yield from _left(store, _tuning(store, plan, first))
    order: list[tuple[Kind, Sequence[int], Sequence[Entry]]] = [
        ("main", early, first), ("flawed", early[:1], first), ("main", late, first),
        ("flawed", early[1:], first), ("second", early[:2], first),
        ("main", early, further), ("second", early[2:], first), ("flawed", early, further),
        ("guided", early, first), ("long", early, first),
        ("second", early, further), ("main", late, further),
    ]  # fmt: skip
    for kind, seeds, some in order:
        if some is further:
            yield from _left(store, _tuning(store, plan, further))
        yield from _left(store, _reported(store, plan, kind, seeds, some))


def _left(store: Store, some: Iterator[Job]) -> Iterator[Job]:
    return (job for job in some if not store.file(job).exists())


def _tuning(store: Store, plan: Plan, entries: Sequence[Entry]) -> Iterator[Job]:
    for entry in entries:
        if choice := store.untried(entry):
            cost = Job("cost", "main", entry, plan.tuning_seed, Choice(0.0, choice.value))
            if store.read(cost) is None:
                yield cost
            else:
                job = Job("tune", "main", entry, plan.tuning_seed, choice)
                yield _with_length(store, job, plan.tuning_seconds)


def _reported(
    store: Store, plan: Plan, kind: Kind, seeds: Sequence[int], entries: Sequence[Entry]
) -> Iterator[Job]:
    if kind not in plan.kinds or (kind == "second" and not store.second_model.exists()):
        return
    for seed in seeds:
        yield Job("base", "second" if kind == "second" else "main", None, seed)
        for entry in entries:
            choice = store.chosen(entry)
            if choice is None:
                continue
            if kind == "guided":
                cost = Job("cost", "guided", entry, plan.tuning_seed, Choice(0.0, choice.value))
                if store.read(cost) is None:
                    yield cost
                    continue
            yield _with_length(store, Job("run", kind, entry, seed, choice), plan.budget(kind))


def _with_length(store: Store, job: Job, seconds: float) -> Job:
    """The job with as many iterations as the budget allows, at least two."""
    assert job.entry is not None
    assert job.choice is not None
    cost = store.seconds_per_iteration(job.entry, job.choice.value, job.kind)
    assert cost is not None, "the cost comes first"
    iterations = max(2, round(seconds / cost))
    return Job(job.work, job.kind, job.entry, job.seed, job.choice, iterations)
