"""Checks the model of :mod:`benchmarks.scaling` against the real scheduling, on a cluster that sleeps.

Each process of the run is a thread, and sampling, training and scoring are pauses. What is real is what
decides who waits for whom: the reward scorer's worker (:class:`flowgrpo.rewards.worker.Worker`), the client
of the reward servers with its balancing, retries and pauses
(:class:`flowgrpo.rewards.serving.client.Endpoints`), and the order of
:class:`flowgrpo.training.ahead.Rollouts`. ``python -m benchmarks.simulated_cluster`` prints a table.
"""

import argparse
import itertools
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from statistics import mean

from benchmarks.scaling import Cluster, Work, iteration
from flowgrpo.rewards.serving.client import Endpoints, Unavailable
from flowgrpo.rewards.worker import Worker

SECOND = 1e12
"""Operations that a GPU does in a second here."""


@dataclass
class Server:
    """A reward server that scores one sample at a time.

    Attributes:
        score: Seconds for a sample.
        away: Times, in seconds from the start, from and to which it does not answer.
        scored: Samples so far.
    """

    score: float
    away: tuple[float, float] = (0.0, 0.0)
    scored: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, began: float, samples: int) -> None:
        """Score, or fail as a client sees it."""
        with self.lock:
            if self.away[0] <= time.monotonic() - began < self.away[1]:
                raise Unavailable("connection refused")
            time.sleep(self.score * samples)
            self.scored += samples


@dataclass(frozen=True)
class Case:
    """A cluster to simulate.

    Attributes:
        name: What is special about it.
        ranks: Processes.
        servers: Reward servers.
        samples: Samples of a process in an iteration.
        batch: Samples of one call of the pipeline.
        sample: Seconds of sampling one sample.
        train: Seconds of training of a process in an iteration.
        score: Seconds of scoring one sample.
        staleness: ``train.staleness``.
        spread: Standard deviation of a pause, relative to its mean, drawn for each process and iteration.
        away: When the first server is away, as parts of the run.
    """

    name: str
    ranks: int = 8
    servers: int = 4
    samples: int = 16
    batch: int = 4
    sample: float = 0.04
    train: float = 0.4
    score: float = 0.01
    staleness: int = 0
    spread: float = 0.0
    away: tuple[float, float] = (0.0, 0.0)

    def expected(self) -> float:
        """Seconds of an iteration by the model."""
        work = Work(
            step=self.sample * SECOND,
            decode=0,
            groups=self.ranks,
            group_size=self.samples,
            nfe=self.samples,
            decodes=self.samples,
            trained_steps=1,
            passes=self.train / (self.sample * self.samples),
            updates=0,
            parameters=0,
            trained=0,
            calls=0,
            rollout_batch=self.batch,
            staleness=self.staleness,
        )
        # A server that is away for a part of the run is missing for that part.
        present = self.servers - (self.away[1] - self.away[0])
        cluster = Cluster(
            tflops=SECOND / 1e12,
            sampling=1,
            training=1,
            spread=self.spread,
            score=self.score * self.servers / present,
            servers=self.servers,
        )
        return iteration(work, cluster, self.ranks).total

    def measured(self, iterations: int) -> tuple[float, Sequence[int]]:
        """Mean seconds of an iteration of the simulation, and the samples that each server scored."""
        length = self.expected() * iterations
        servers = {f"http://server-{i}": Server(self.score) for i in range(self.servers)}
        next(iter(servers.values())).away = (self.away[0] * length, self.away[1] * length)
        began = time.monotonic()
        meeting = threading.Barrier(self.ranks)
        ends: list[float] = []

        def process(rank: int, pool: Endpoints) -> None:
            worker, noise = Worker(f"scorer-{rank}"), random.Random(rank)

            def send(url: str) -> None:
                servers[url].answer(began, 1)

            def rollout(slow: float) -> list[Future[object]]:
                futures = []
                for _ in range(self.samples // self.batch):
                    time.sleep(max(0.0, self.sample * self.batch * slow))
                    futures.append(
                        worker.submit(lambda: pool.ask_all(self.batch, lambda _: pool.call(send)))
                    )
                return futures

            ahead: list[Future[object]] | None = None
            for i in range(iterations):
                slow = noise.gauss(1, self.spread)
                now = ahead if ahead is not None else rollout(slow)
                if self.staleness:
                    ahead = rollout(slow) if i + 1 < iterations else None
                for future in now:
                    answers = future.result()
                    assert isinstance(answers, list)
                    assert not any(isinstance(a, Exception) for a in answers), answers
                time.sleep(max(0.0, self.train * slow))
                meeting.wait()  # the sum of gradients
                if rank == 0:
                    ends.append(time.monotonic())
            worker.close(wait=True)

        threads = []
        for rank in range(self.ranks):
            os.environ["RANK"] = str(rank)  # which server a process begins with
            pool = Endpoints(list(servers), concurrency=1, patience=60.0)
            threads.append(threading.Thread(target=process, args=(rank, pool)))
        del os.environ["RANK"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Nothing overlaps in the first iteration, and nothing is sampled ahead in the last.
        kept = ends[1:-1] if self.staleness else ends
        seconds = mean(b - a for a, b in itertools.pairwise(kept))
        return seconds, [s.scored for s in servers.values()]


CASES = (
    Case("fast rewards", score=0.005),
    Case("rewards as slow as sampling", score=0.02),
    Case("slow rewards", score=0.04),
    Case("slow rewards, staleness 1", score=0.04, staleness=1),
    Case("rewards slower than all else, staleness 1", score=0.06, staleness=1),
    Case("processes that differ by 10 %", score=0.005, spread=0.1),
    Case("32 processes, 8 servers", ranks=32, servers=8, score=0.01),
    Case("one of four servers away for half of the run", score=0.04, away=(0.25, 0.75)),
)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=12)
    options = parser.parse_args()
    print("| cluster | model, s | simulated, s | difference | samples by server |")
    print("|---|--:|--:|--:|---|")
    for case in CASES:
        expected, (seconds, scored) = case.expected(), case.measured(options.iterations)
        print(
            f"| {case.name} | {expected:.2f} | {seconds:.2f} | {seconds / expected - 1:+.0%} | "
            f"{', '.join(map(str, scored))} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
