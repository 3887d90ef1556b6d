"""What a person sees while a run goes on."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")


class Console:
    """Progress bars where there is a terminal, and lines that also read well in a log file."""

    def __init__(self, enabled: bool = True):
        self.rich = RichConsole(quiet=not enabled, highlight=False)
        self._seconds: list[float] = []

    def say(self, text: str) -> None:
        """One line."""
        self.rich.print(text, markup=False, soft_wrap=True)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """A small table; numbers are written by the caller."""
        table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE)
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i == 0
            )
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.rich.print(table)

    def track(self, values: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Iterate behind a progress bar with the time that is left; nothing without a terminal."""
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
        """The summary line of an iteration."""
        self._seconds = [*self._seconds, float(timings["total"])][-20:]
        left = (total - iteration - 1) * sum(self._seconds) / len(self._seconds)
        scores = " ".join(
            f"{k.removeprefix('score/')} {v:.3f}"
            for k, v in metrics.items()
            if k.startswith("score/")
        )
        self.say(
            f"[{iteration + 1:>4}/{total}] reward {metrics['reward']:.3f} ({scores}) | "
            f"flat groups {metrics['group/zero_variance']:.0%} | diversity {metrics['group/diversity']:.3f} | "
            f"grad {metrics['grad_norm']:.3f} | {timings['total']:.1f} s, {clock(left)} left"
        )


def clock(seconds: float) -> str:
    """``75`` as ``1:15``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
