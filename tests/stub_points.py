"""A judge of test points for a real server: reads a picture's grey, and can be slow or wrong.

The scores of a picture are :func:`scores_for` its shade, whatever the mode:

- ``good`` answers everything;
- ``moody`` is slow for some pictures, says 503 or nonsense to the first question about others, and
  nonsense to every question about pictures of shade 3.
"""

import re
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer

from tests.stub_vlm import Question, Reply, said

# By default 5 connections may wait to be accepted; more are reset, and a client rests after that.
ThreadingHTTPServer.request_queue_size = 128

STEP = 8
"""Grey levels per shade, so that JPEG does not change it."""


def shade_of(index: int, sample: int) -> int:
    """The shade, of 32, in which tests draw an image."""
    return (5 * index + 11 * sample) % 32


def scores_for(shade: int, number: int) -> list[int]:
    """The scores of ``number`` test points for a picture of a shade."""
    return [int((shade + i) % 3 != 0) for i in range(number)]


def number_of(text: str) -> int:
    """How many test points are asked about, in our wording or in the tests' official one."""
    match = re.search(r"each of these (\d+) points", text) or re.search(r"N=(\d+)", text)
    assert match
    return int(match[1])


class Judge:
    """Answers by mode; remembers which pictures it has seen."""

    def __init__(self, mode: str):
        self.mode, self.seen, self._lock = mode, Counter[int](), threading.Lock()

    def __call__(self, question: Question) -> Reply:
        shade = round(question.light * 255 / STEP)
        with self._lock:
            self.seen[shade] += 1
            first = self.seen[shade] == 1
        if self.mode == "moody":
            if shade == 3:
                return said("I like it. <score>[1, 'maybe']</score>")
            if shade % 8 == 1:
                time.sleep(0.3)
            if shade % 8 == 2 and first:
                return 503, {}, b"loading"
            if shade % 8 == 4 and first:
                return said("<score>[1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]</score>")
        scores = scores_for(shade, number_of(question.text))
        return said(f'<analysis>["it\'s \\"fine\\""]</analysis> <score>{scores}</score>')
