"""Console output of a run: progress bars, lines and tables."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flowgrpo.core.secrets import redact
from flowgrpo.core.text import plain

T = TypeVar("T")
WIDTH = 120
"""Columns of tables in files and pipes."""


class Console:
    """Prints lines that also suit a log file, and progress bars if the output is a terminal."""

    def __init__(self, enabled: bool = True):
        self.rich = RichConsole(quiet=not enabled, highlight=False)
        if not self.rich.is_terminal:  # A file or a pipe has no width; tables need not be folded.
            self.rich.width = max(self.rich.width, WIDTH)
        self._seconds: list[float] = []

    def say(self, text: str) -> None:
        """Print one line."""
        self.rich.print(self._plain(text), markup=False, soft_wrap=True)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """Print a small table; the caller formats the numbers."""
        table = Table(
            title=self._text(title), title_justify="left", header_style="bold", box=box.SIMPLE
        )
        for i, column in enumerate(columns):
            table.add_column(
                self._text(column),
                justify="left" if i == 0 else "right",
                overflow="fold",
                no_wrap=i == 0,
            )
        for row in rows:
            table.add_row(*(self._text(str(cell)) for cell in row))
        self.rich.print(table)

    def _plain(self, text: str) -> str:
        return plain(redact(text), self.rich.encoding)

    def _text(self, text: str) -> Text:
        """A cell; as a string it would be read as markup."""
        return Text(self._plain(text))

    def track(self, values: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Iterate with a progress bar that shows the remaining time, if the output is a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=self.rich, transient=True, disable=not self.rich.is_terminal
        ) as bar:
            yield from bar.track(values, total=total, description=description)

    def iteration(
        self, iteration: int, total: int, metrics: Mapping[str, float], timings: Mapping[str, Any]
    ) -> None:
        """Print the summary line of an iteration.

        The remaining time is estimated from the mean of the last 20 iterations.
        """
        self._seconds = [*self._seconds, float(timings["total"])][-20:]
        left = (total - iteration - 1) * sum(self._seconds) / len(self._seconds)
        scores = " ".join(
            f"{k.removeprefix('score/')} {v:.3f}"
            for k, v in metrics.items()
            if k.startswith("score/")
        )
        # A reward that takes turns with the policy learns alone in some iterations.
        update = (
            f"grad {metrics['grad_norm']:.3g}" if "grad_norm" in metrics else "policy not trained"
        )
        judged = f"loss {metrics.get('loss/policy', math.nan):.4g}"  # if nothing is judged
        if "reward" in metrics:
            judged = f"reward {metrics['reward']:.3f} ({scores})"
            # A differentiated reward compares no samples, and its groups may be single samples.
            if "reward/differentiated" not in metrics:
                judged += (
                    f" | flat groups {metrics['group/zero_variance']:.0%}"
                    f" | diversity {metrics['group/diversity']:.3f}"
                )
        self.say(
            f"[{iteration + 1:>4}/{total}] {judged} | {update} | {timings['total']:.1f} s, {clock(left)} left"
        )


def clock(seconds: float) -> str:
    """Format seconds as ``m:ss`` or ``h:mm:ss``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
