"""Two ways to judge pictures: in batches by a model in this process, or many requests in flight."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue

from flowgrpo.bench.base import BenchError, Failure, Json, Judged, Picture
from flowgrpo.bench.pictures import read_image
from flowgrpo.core.tensors import Float, Tensor, torch

READERS = 2
"""Threads that decode images while a model judges."""

Batch = Callable[
    [Float[Tensor, "batch 3 height width"], Sequence[Picture]], Sequence[Json | Failure]
]


def in_batches(pictures: Iterable[Picture], size: int, judge: Batch) -> Iterator[Judged]:
    """Judge pictures in batches of one size in pixels; the next images are read meanwhile.

    Args:
        pictures: Read lazily, in order.
        size: Most images in one batch.
        judge: From images in [0, 1] and their pictures to judgements in the same order. What it
            raises ends the benchmark; a picture that cannot be read is a failure of its own.
    """
    batch: list[tuple[Picture, Tensor]] = []

    def judged() -> Iterator[Judged]:
        if batch:
            own = [p for p, _ in batch]
            yield from zip(own, judge(torch.stack([i for _, i in batch]), own), strict=True)
            batch.clear()

    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as readers:
        for picture, future in _ahead(readers, pictures, 2 * size):
            try:
                image = future.result()
            except BenchError as error:
                yield picture, Failure(str(error))
                continue
            if batch and (len(batch) == size or batch[0][1].shape != image.shape):
                yield from judged()
            batch.append((picture, image))
        yield from judged()


def _ahead(
    readers: ThreadPoolExecutor, pictures: Iterable[Picture], number: int
) -> Iterator[tuple[Picture, "Future[Tensor]"]]:
    """Every picture with its image, which is read up to ``number`` pictures ahead."""
    waiting: deque[tuple[Picture, Future[Tensor]]] = deque()
    for picture in pictures:
        waiting.append((picture, readers.submit(read_image, picture.path)))
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting


def in_flight(
    pictures: Iterable[Picture],
    concurrency: int,
    judge: Callable[[Picture], Json | Failure],
) -> Iterator[Judged]:
    """Judge pictures with ``concurrency`` calls at a time; each comes out as soon as it is done.

    A slow call holds back no other one. When the caller stops early, calls in flight are waited for
    and dropped.
    """
    done: SimpleQueue[tuple[Picture, Json | Failure | BaseException]] = SimpleQueue()

    def call(picture: Picture) -> None:
        try:
            done.put((picture, judge(picture)))
        except BaseException as error:
            done.put((picture, error))

    workers = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
    source, running = iter(pictures), 0
    try:
        while True:
            # A few more than there are threads, so that none waits for this one.
            for picture in islice(source, 2 * concurrency - running):
                workers.submit(call, picture)
                running += 1
            if not running:
                return
            picture, outcome = done.get()
            running -= 1
            if isinstance(outcome, BaseException):
                raise outcome
            yield picture, outcome
    finally:
        workers.shutdown(wait=True, cancel_futures=True)
