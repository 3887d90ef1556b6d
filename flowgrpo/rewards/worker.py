"""The thread on which reward models are called."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any


class Worker:
    """One thread that does work in the order of submission, and tells how long a call lasts.

    One, because reward models need not be thread-safe, and results must not depend on timing. Unlike
    that of a ``ThreadPoolExecutor``, the thread does not keep the process alive: a reward that never
    returns cannot be ended from outside, and would hold the process for ever.
    """

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._call: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> "Future[Any]":
        """Do work after all that was submitted before; the future holds its result or its error."""
        done: Future[Any] = Future()
        self._jobs.put((done, work))
        return done

    @contextmanager
    def call(self, label: str) -> Iterator[None]:
        """Measure the time inside, which is a call of the model ``label``; on the worker's thread."""
        self._call = label, time.monotonic()
        try:
            yield
        finally:
            self._call = None

    def current_call(self) -> tuple[str, float]:
        """The model that is being called, and for how many seconds; ``("", 0)`` between two calls."""
        label, began = self._call or ("", time.monotonic())
        return label, time.monotonic() - began

    def close(self, wait: bool) -> None:
        """Cancel the work that has not begun, and stop; ``wait`` for the work that is being done."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job[0].cancel()
        self._jobs.put(None)
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done, work = job
            if not done.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)
            del job, done, work
