"""Does the jobs of the plan, one after the other; several processes share the jobs of a folder."""

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.study import new_kinds, second_world
from benchmarks.study.entries import COMMON, FLAWED, Entry
from benchmarks.study.plan import Job, Kind, Plan, Store, jobs
from benchmarks.study.trial import Spent, Trial, load_prompts, no_threads
from flowgrpo.core.errors import DivergenceError
from flowgrpo.shapes.world import WORLD, World

COST_ITERATIONS = 2
UNTRAINED = ("algorithm={kind='matching'}", "loss={kind='matching'}")
"""Settings for what is done with the model before training; they have no influence on it."""
GUIDANCE = 3.0


def work(
    store: Store,
    plan: Plan,
    entries: Sequence[Entry] | None = None,
    settings: Sequence[str] = (),
    hours: float = float("inf"),
    say: Callable[[str], None] = print,
) -> None:
    """Do all jobs that are left, together with other processes that work on the same folder.

    Args:
        store: Where results are kept.
        plan: The sizes.
        entries: The methods; all by default.
        settings: Further ``--set`` arguments for every run.
        hours: No job begins after this time.
        say: Prints a line per job.

    """
    no_threads()
    worker, until = Worker(store, plan, settings), time.time() + 3600 * hours
    with _claim(store.folder / "locks" / "unit.lock", wait=True):
        if store.unit() is None:
            with worker.trial(UNTRAINED, plan.tuning_seed) as trial:
                store.save_unit(median(worker.speed(trial) for _ in range(5)))
    if "second" in plan.kinds and not store.second_model.exists():
        say(
            f"without {store.second_model} no method is trained in the second world; "
            "benchmarks/study/second_world.py tells how to make it"
        )
    # After each job the order is read anew, since costs and choices depend on results.
    while left := list(jobs(store, plan, entries)):
        if time.time() >= until:
            return
        if not any(_done(worker, job, say) for job in left):
            time.sleep(1)  # Others do all of them; their results may ask for more.


def _done(worker: "Worker", job: Job, say: Callable[[str], None]) -> bool:
    """Do a job and keep its result, unless another process does it or has done it."""
    file, began = worker.store.file(job), time.time()
    name = file.relative_to(worker.store.folder)
    with _claim(
        worker.store.folder / "locks" / "-".join(name.with_suffix(".lock").parts)
    ) as claimed:
        if not claimed or file.exists():
            return False
        worker.store.write(job, worker.do(job))
    say(f"{time.strftime('%H:%M')} {name}: {time.time() - began:.0f} s")
    return True


class Worker:
    """Does one job."""

    def __init__(self, store: Store, plan: Plan, settings: Sequence[str] = ()):
        self.store, self.plan, self.settings = store, plan, settings
        self.new_kinds = load_prompts(new_kinds.write(store.folder / "prompts"))
        self.second_prompts = second_world.write_prompts(store.folder / "prompts")

    def do(self, job: Job) -> dict[str, Any]:
        """The result of a job."""
        if job.work == "base":
            settings = [*UNTRAINED, *self.settings_of(job.kind)]
            with self.trial(settings, job.seed, _world(job.kind)) as trial:
                trial.keep_states(self.plan.drift_states)
                return {"end": self.whole(trial, job.kind)}
        assert job.entry is not None
        assert job.choice is not None
        settings = [
            *job.entry.with_value(job.choice.value),
            *self.settings_of(job.kind),
            f"train.iterations={job.iterations or 10}",
            f"train.lr={job.choice.rate or 1e-4}",
        ]
        with self.trial(settings, job.seed, _world(job.kind)) as trial:
            if job.work == "cost":
                return self.cost(trial)
            return self.tuning(trial, job) if job.work == "tune" else self.run(trial, job)

    def trial(self, settings: Sequence[str], seed: int, world: World = WORLD) -> Trial:
        """A run with the common settings."""
        return Trial([*COMMON, *settings, *self.settings], seed, world)

    def speed(self, trial: Trial) -> float:
        """Processor seconds of the reference work."""
        return trial.reference_work(self.plan.reference_images)

    def settings_of(self, kind: Kind) -> Sequence[str]:
        """What a kind of run differs in."""
        if kind == "flawed":
            return [FLAWED]
        if kind == "second":
            train, held_out = self.second_prompts
            return [
                second_world.REWARDS,
                f"model.path='{self.store.second_model}'",
                f"prompts.train='{train}'",
                f"prompts.held_out='{held_out}'",
            ]
        return [f"sampling.guidance_scale={GUIDANCE}"] if kind == "guided" else []

    def cost(self, trial: Trial) -> dict[str, Any]:
        """Processor seconds of a few iterations and of the reference work."""
        reference = [self.speed(trial)]
        spent = [trial.train_once() for _ in range(COST_ITERATIONS)]
        reference.append(self.speed(trial))
        return {"seconds": [s.seconds for s in spent], "reference": reference}

    def tuning(self, trial: Trial, job: Job) -> dict[str, Any]:
        """Train, and score images of training prompts, so that nothing is tuned to the held-out ones."""
        done = self.trained(trial, job, points=0)
        if not done["diverged"]:
            found = trial.evaluate(self.plan.tuning_images, trial.prompts)
            done |= {"score": found["reward"], "strict": found["strict"]}
        return done

    def run(self, trial: Trial, job: Job) -> dict[str, Any]:
        """Train with evaluations on the way, and evaluate the end."""
        trial.keep_states(self.plan.drift_states)
        done = self.trained(trial, job, self.plan.points if job.kind in ("main", "long") else 0)
        if not done["diverged"]:
            done["end"] = self.whole(trial, job.kind)
        return done

    def trained(self, trial: Trial, job: Job, points: int) -> dict[str, Any]:
        """Train for the job's iterations, with ``points - 1`` evaluations on the way."""
        at = {round(job.iterations * p / points) for p in range(1, points)} if points else set()
        spent, seconds, curve = Spent(), [], []
        reference, diverged = [self.speed(trial)], False
        try:
            for iteration in range(1, job.iterations + 1):
                one = trial.train_once()
                spent += one
                seconds.append(one.seconds)
                if iteration in at and iteration < job.iterations:
                    found = {"iteration": iteration, **vars(spent), "drift": trial.drift()}
                    curve.append({**found, **trial.evaluate(self.plan.images)})
        except DivergenceError:
            diverged = True
        reference.append(self.speed(trial))
        return {
            "diverged": diverged,
            "seconds": seconds,
            "reference": reference,
            "spent": vars(spent),
            "training_rewards": trial.rewards,
            "curve": curve,
        }

    def whole(self, trial: Trial, kind: Kind) -> dict[str, Any]:
        """The evaluation before and after training: both regimes, prompts of new kinds, the drift."""
        few = self.plan.few_images
        found = {
            "plain": trial.evaluate(self.plan.images, guidance=1.0),
            "guided": trial.evaluate(few, guidance=GUIDANCE),
        }
        if kind != "second":
            found["new_kinds"] = trial.evaluate(few, self.new_kinds, guidance=1.0)
        return {**found, "drift": trial.drift()}


def _world(kind: Kind) -> World:
    """What the pictures of a kind of run show."""
    return second_world.WORLD if kind == "second" else WORLD


@contextmanager
def _claim(file: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock, which the system releases however the process ends; False if another process has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
