"""Dynamic batching: requests that arrive at about the same time share a call of the reward model."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrpo.rewards.protocols import RewardModel, checked_scores
from flowgrpo.rewards.serving.protocol import Sample

log = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """Too many samples are waiting, or the server is stopping; the client should try again."""


@dataclass
class _Job:
    """One request."""

    samples: Sequence[Sample]
    done: "Future[list[float]]" = field(default_factory=Future)


class Batcher:
    """Calls a reward model from one thread, with the samples of all requests that are waiting.

    Samples of equal shape share a call, whichever request they belong to. If a call that serves
    several requests fails, each request is scored alone, so that only the requests at fault fail.

    Attributes:
        num_calls: Calls of the model so far.
        num_scored: Samples scored so far.
        num_failed: Samples among these whose score is not finite.
        num_waiting: Samples that are waiting or being scored.
    """

    def __init__(
        self, reward: RewardModel, *, max_batch: int = 64, wait: float = 0.01, max_waiting: int = 4096
    ):  # fmt: skip
        """
        Args:
            reward: The model; it need not be thread-safe.
            max_batch: Most samples in one call.
            wait: Seconds to wait for more requests after the first one.
            max_waiting: Samples that may wait before further requests are refused.

        Raises:
            ValueError: If a number is out of range.
        """
        if max_batch < 1 or wait < 0 or max_waiting < 1:
            raise ValueError(
                "max_batch and max_waiting must be at least 1 and wait at least 0, got "
                f"{max_batch}, {max_waiting}, {wait}"
            )
        self.reward = reward
        self.max_batch, self.wait, self.max_waiting = max_batch, wait, max_waiting
        self.num_calls, self.num_scored, self.num_failed, self.num_waiting = 0, 0, 0, 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, samples: Sequence[Sample]) -> "Future[list[float]]":
        """Queue a request. The future holds its scores, NaN where scoring failed, or the model's error.

        Raises:
            Overloaded: If too many samples wait already, or the batcher is closed.
        """
        with self._lock:
            if self._closed:
                raise Overloaded("the server is stopping")
            # A single request may exceed the limit: otherwise it could never be answered.
            if self.num_waiting and self.num_waiting + len(samples) > self.max_waiting:
                raise Overloaded(f"{self.num_waiting} samples are waiting")
            self.num_waiting += len(samples)
            job = _Job(samples)
            self._jobs.put(job)
        return job.done

    def close(self, timeout: float | None = None) -> bool:
        """Score the requests that are waiting, then stop.

        Args:
            timeout: Seconds to wait for that; None waits for ever.

        Returns:
            Whether all were scored in time.
        """
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        closing = False
        while not closing:
            first = self._jobs.get()
            if first is None:
                return
            jobs = [first]
            deadline = time.monotonic() + self.wait
            while sum(len(j.samples) for j in jobs) < self.max_batch:
                try:
                    job = self._jobs.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if job is None:
                    closing = True
                    break
                jobs.append(job)
            self._answer(jobs)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        try:
            scores = self._score([s for j in jobs for s in j.samples])
        except BaseException as error:  # otherwise the requests would wait for ever
            if len(jobs) == 1:
                log.warning("the reward failed: %s: %s", type(error).__name__, error)
                self._leave(jobs[0])
                jobs[0].done.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
            return
        for job in jobs:
            self._leave(job)
            job.done.set_result(scores[: len(job.samples)])
            scores = scores[len(job.samples) :]

    def _leave(self, job: _Job) -> None:
        """Count the samples of a request as no longer waiting, before its answer arrives."""
        with self._lock:
            self.num_waiting -= len(job.samples)

    def _score(self, samples: Sequence[Sample]) -> list[float]:
        """Score samples, grouped by shape into calls of at most ``max_batch``; scores keep their order."""
        scores = torch.full((len(samples),), torch.nan)
        shapes: dict[torch.Size, list[int]] = {}
        for row, sample in enumerate(samples):
            shapes.setdefault(sample.media.shape, []).append(row)
        for members in shapes.values():
            for start in range(0, len(members), self.max_batch):
                rows = members[start : start + self.max_batch]
                scores[torch.tensor(rows)] = self._call([samples[r] for r in rows])
        self.num_scored += len(samples)
        self.num_failed += int(scores.isnan().sum())
        return scores.tolist()

    def _call(self, samples: Sequence[Sample]) -> Tensor:
        self.num_calls += 1
        alone = len(samples) == 1  # a video can be large: no copy of it
        media = samples[0].media[None] if alone else torch.stack([s.media for s in samples])
        values = self.reward(media, [s.prompt for s in samples])
        return checked_scores(type(self.reward).__name__, values, len(samples))
