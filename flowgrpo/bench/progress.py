"""How far a long task is, and how long it will take: a line every few seconds."""

import sys
import time
from collections.abc import Callable

from flowgrpo.core.text import plain

EVERY = 10.0
"""Seconds between lines in a log file; a terminal gets one line that is renewed twice a second."""


class Progress:
    """Counts finished units and prints the share, the rate and the remaining time.

    Work that was done before this process began counts towards the share, not towards the rate.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, say: Callable[[str], None] | None = None
    ):
        """
        Args:
            title: The unit of work, such as ``images``.
            total: Of the whole task.
            done: Units that were finished before.
            say: Prints a line; by default standard error.
        """
        self.title, self.total, self.before, self.done = title, total, done, done
        self.terminal = say is None and sys.stderr.isatty()
        self.say = say or (lambda text: print(plain(text), file=sys.stderr, flush=True))
        self.began = self.printed = time.monotonic()

    def step(self, number: int = 1, note: str = "") -> None:
        """Count ``number`` more."""
        self.done += number
        now = time.monotonic()
        if now - self.printed >= (0.5 if self.terminal else EVERY):
            self.printed = now
            self._print(self.line(now) + (f", {note}" if note else ""))

    def close(self) -> float:
        """Print the last line; returns the seconds that it took."""
        seconds = time.monotonic() - self.began
        made = self.done - self.before
        if made:
            self._print(f"{self.title}: {made} in {clock(seconds)}, {self.done} of {self.total}")
            if self.terminal:
                print(file=sys.stderr)
        return seconds

    def line(self, now: float) -> str:
        """Such as ``images: 312 of 2212 (14%), 3.20/s, 9:53 left``."""
        made, seconds = self.done - self.before, max(now - self.began, 1e-9)
        rate = made / seconds
        left = clock((self.total - self.done) / rate) if rate else "unknown"
        share = self.done / max(1, self.total)
        speed = f"{rate:.2f}/s" if rate >= 0.1 else f"{60 * rate:.2f}/min"
        return f"{self.title}: {self.done} of {self.total} ({share:.0%}), {speed}, {left} left"

    def _print(self, text: str) -> None:
        if self.terminal:
            print(f"\r\x1b[K{plain(text)}", end="", file=sys.stderr, flush=True)
        else:
            self.say(text)


def clock(seconds: float) -> str:
    """``75`` as ``1:15``."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
