"""Numbers of an evaluation by name: which is the best, and whether they still improve."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest

MIN, MAX = "min:", "max:"
ARTEFACTS = "artefacts/"
MEASURES = (
    "high_frequency", "grid", "saturation", "contrast", "clipped", "variety", "duplicates",
)  # fmt: skip
"""The measures of images in every evaluation (:mod:`flowgrpo.evaluation.artefacts`)."""


@dataclass(frozen=True)
class Measured:
    """A number of every evaluation, and whether a higher or a lower value is better.

    Attributes:
        name: ``reward`` (the weighted sum), a reward's name, a metric's name, ``artefacts/MEASURE``, a
            benchmark's label (its first main result), or ``LABEL/RESULT``.
        lower: Whether a lower value is better.
    """

    name: str
    lower: bool = False

    @classmethod
    def parse(cls, text: str) -> "Measured":
        """Read ``NAME``, ``max:NAME`` or ``min:NAME``."""
        return cls(text.removeprefix(MIN).removeprefix(MAX), text.startswith(MIN))

    def __str__(self) -> str:
        return f"{MIN if self.lower else ''}{self.name}"

    @property
    def folder(self) -> str:
        """The folder of the best weights among the checkpoints, if they are not in ``best``."""
        return f"best-{quote(str(self), safe='')}"

    def of(self, evaluation: Mapping[str, Any]) -> float:
        """The value in an evaluation; NaN if it is missing."""
        return named(evaluation).get(self.name, math.nan)

    def gain(self, evaluation: Mapping[str, Any]) -> float:
        """The value with the sign with which higher is better; NaN if it is missing."""
        return -self.of(evaluation) if self.lower else self.of(evaluation)

    def require(self, evaluation: Mapping[str, Any], key: str) -> None:
        """Raise ConfigError if an evaluation has no such number; the message lists those that it has."""
        known = named(evaluation)
        if self.name not in known:
            raise ConfigError(
                f"{key} = {str(self)!r}: evaluations have no number {self.name!r}"
                f"{suggest(self.name, known)} (known: {', '.join(known)})"
            )


def named(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a line of ``evaluations.jsonl`` that can be the best, by name."""
    found: dict[str, Any] = {"reward": evaluation.get("reward")}
    found |= evaluation.get("scores", {})
    found |= evaluation.get("metrics", {})
    found |= {f"{ARTEFACTS}{k}": v for k, v in evaluation.get("artefacts", {}).items()}
    for label, table in evaluation.get("bench", {}).items():
        results = table.get("results", {})
        found |= {f"{label}/{k}": v for k, v in results.items()}
        main = list(table.get("main", ()))[:1]
        found |= {label: results.get(main[0]) if main else None}
    return {k: math.nan if v is None else float(v) for k, v in found.items()}


def best_of(
    evaluations: Sequence[Mapping[str, Any]], measured: Measured
) -> Mapping[str, Any] | None:
    """The evaluation with the best value, of equal ones the first; None if none has one."""
    having = [e for e in evaluations if not math.isnan(measured.gain(e))]
    return max(having, key=measured.gain, default=None)


def waited(
    evaluations: Sequence[Mapping[str, Any]],
    measured: Measured,
    min_gain: float,
    since: int = 0,
) -> int:
    """The number of evaluations since the last one that improved.

    An evaluation improves if its value exceeds the best of those before it by more than ``min_gain``. A
    missing value does not improve.

    Args:
        evaluations: In order; one per number of iterations.
        measured: The number.
        min_gain: Smallest improvement that counts.
        since: Evaluations after at most this many iterations do not count as waiting.
    """
    best, count = -math.inf, 0
    for evaluation in evaluations:
        value = measured.gain(evaluation)
        improves = value > best + min_gain
        best = value if improves else best
        count = 0 if improves or evaluation["iteration"] <= since else count + 1
    return count
