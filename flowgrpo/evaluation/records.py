"""Reads the files of a run directory, and computes changes of scores with their standard errors."""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.core.secrets import redact
from flowgrpo.evaluation.charts import Number, Point, number, points

CREDIT_FILE = "credit.html"
"""The report's section on credit in a run directory: an HTML fragment that a run writes at its end."""
EARLIER_CREDIT_FILE = "inspection.html"
"""The name of :data:`CREDIT_FILE` in run directories of earlier versions."""
PROMPT_USE = "prompt_use.json"
"""Which trained rewards ignore their prompts, as measured at the start of a run."""
RECENT = 20
"""Number of last iterations that describe the current state of a run."""


@dataclass(frozen=True)
class Change:
    """One held-out score before and after training.

    Attributes:
        name: Name of the score or of the task.
        before: Mean in the first evaluation; NaN if there is none.
        after: Mean in the last evaluation; NaN if there is none.
        error: Standard error of ``after - before``; ``None`` if unknown.
        in_points: Whether the score lies in [0, 1] and is shown in points out of 100.
    """

    name: str
    before: Number
    after: Number
    error: Number | None
    in_points: bool

    @property
    def kind(self) -> str:
        """``rose`` or ``fell`` if the change exceeds two standard errors, else ``noise``; ``unknown``
        if the error is unknown, ``unmeasured`` if one of the two values is missing."""
        difference = self.after - self.before
        if not math.isfinite(difference):
            return "unmeasured"
        if self.error is None:
            return "unknown"
        if abs(difference) <= 2 * self.error:
            return "noise"
        return self._direction

    @property
    def words(self) -> str:
        """The change as a verb phrase, to follow the score's name."""
        if self.kind == "unknown":
            return "did not change" if self.after == self.before else self._direction
        special = {"noise": "stayed within noise", "unmeasured": "could not be measured"}
        return special.get(self.kind, self.kind)

    @property
    def _direction(self) -> str:
        return "rose" if self.after > self.before else "fell"

    def show(self, value: Number) -> str:
        """Format a value without its unit, with enough decimals to show the change."""
        if self.in_points:
            return points(value)
        change = abs(self.after - self.before)
        if not (math.isfinite(value) and math.isfinite(change) and change > 0):
            return number(value)
        decimals = min(6, max(0, 1 - math.floor(math.log10(change))))
        return f"{value:,.{decimals}f}".replace("-", "−")

    @property
    def difference(self) -> str:
        """``after - before`` with its error, such as ``+3.1 ± 1.2``, without a line break."""
        value = self.after - self.before
        text = f"{'+' if value > 0 else ''}{self.show(value)}"
        return (
            text
            if self.error is None
            else f"{text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{self.show(self.error)}"
        )


def standard_error(mean: Number, images: int) -> float:
    """Standard error of the mean of ``images`` scores in [0, 1], taken as a proportion.

    A proportion has the largest variance of all scores in [0, 1] with that mean, so this is an upper
    limit. One success and one failure are added (Agresti and Caffo, 2000), so that the error is above
    zero for 5 out of 5.
    """
    share = (mean * images + 1) / (images + 2)
    return math.sqrt(share * (1 - share) / (images + 2))


class Records:
    """The contents of a run directory.

    Every file may be missing, but not both ``metrics.jsonl`` and ``evaluations.jsonl``.

    Attributes:
        folder: The run directory.
        metrics: Lines of ``metrics.jsonl`` in order of iteration. If an iteration has several lines,
            the last is used.
        timings: Lines of ``timings.jsonl``, likewise.
        evaluations: Lines of ``evaluations.jsonl``, likewise.
        config: The resolved configuration as nested tables.
        config_text: Text of ``config.toml``.
        environment: Versions of libraries, and the machine.
        prompt_notes: Warnings about the prompts, found when the run started.
        all_grids: Comparison grids by the number of iterations trained, in order.
        grids: Comparison grids of the newest iteration that has any.
    """

    def __init__(self, folder: Path):
        """Read all files.

        Raises:
            ValueError: If there is neither a metric nor an evaluation, or a file is invalid; the
                message names the file and the line.
        """
        self.folder = folder
        self.metrics = read_lines(folder / "metrics.jsonl")
        self.timings = read_lines(folder / "timings.jsonl")
        for line in self.timings:
            # Earlier versions wrote the time of reward models under the key "judge".
            if "judge" in line:
                line["scoring"] = line.pop("judge")
        self.evaluations = read_lines(folder / "evaluations.jsonl", required="scores")
        if not self.metrics and not self.evaluations:
            raise ValueError(f"{folder}: neither metrics.jsonl nor evaluations.jsonl has a line")
        self.config_text = redact(_text(folder / "config.toml"))
        try:
            self.config = tomllib.loads(self.config_text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{folder / 'config.toml'}: not valid TOML: {error}") from error
        environment = folder / "environment.json"
        self.environment = parse_object(_text(environment) or "{}", str(environment))
        notes = folder / "notes.json"
        self.prompt_notes = list(parse_object(_text(notes) or "{}", str(notes)).get("notes", []))
        use = folder / PROMPT_USE
        self.prompt_notes += parse_object(_text(use) or "{}", str(use)).get("notes", [])
        grids = sorted((folder / "grids").glob("*.png"))
        newest = max((_iteration(g) for g in grids), default=0)
        self.all_grids = sorted((n, g) for g in grids if (n := _iteration(g)) >= 0)
        self.grids = [g for g in grids if _iteration(g) == newest]

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the configuration; ``None`` if it is not set."""
        here: Any = self.config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def weights(self) -> dict[str, float]:
        """The weight of each reward, by its name in metrics; 0 means that it is not trained on."""
        rewards = self.config.get("rewards", [])
        labels = [r.get("name") or re.split(r"[.:]", str(r.get("model")))[-1] for r in rewards]
        return {k: float(r.get("weight", 1)) for k, r in zip(labels, rewards, strict=True)}

    def series(self, key: str) -> list[Point]:
        """The values of a metric over iterations; ``null`` becomes NaN."""
        return [(m["iteration"], _float(m[key])) for m in self.metrics if key in m]

    def recent(self, key: str) -> float:
        """The mean of the last finite values of a metric; NaN if there is none."""
        values = [y for _, y in self.series(key)[-RECENT:] if math.isfinite(y)]
        return statistics.fmean(values) if values else math.nan

    def total(self, key: str) -> Number:
        """The sum of a metric's finite values."""
        return sum(y for _, y in self.series(key) if math.isfinite(y))

    def held_out_metrics(self) -> dict[str, list[Point]]:
        """The metrics and measures of evaluations over iterations, by name; scores are not among them."""
        found: dict[str, list[Point]] = {}
        for line in self.evaluations:
            # Earlier versions wrote this table under the key "measures".
            table = dict(line.get("metrics", line.get("measures", {})))
            table |= {f"artefacts/{k}": v for k, v in line.get("artefacts", {}).items()}
            for key, value in table.items():
                found.setdefault(key, []).append((line["iteration"], _float(value)))
        return found

    def regimes(self) -> list[str]:
        """The further ways to sample of the first evaluation that were evaluated again since.

        One that was added when a run was resumed has no base model to compare with.
        """
        first, *later = self.evaluations or [{}]
        return [
            k for k in first.get("regimes", {}) if any(k in e.get("regimes", {}) for e in later)
        ]

    def regime(self, tag: str) -> "Records":
        """The same run, with the evaluations of one of the further ways to sample as its evaluations."""
        found = copy(self)
        found.evaluations = [
            {"iteration": e["iteration"], **e["regimes"][tag]}
            for e in self.evaluations
            if tag in e.get("regimes", {})
        ]
        return found

    def scores(self) -> list[str]:
        """Names of the held-out scores, those that are trained on first."""
        names = dict.fromkeys(k for e in self.evaluations for k in e["scores"])
        return sorted(names, key=lambda name: self.weights().get(name, 1) == 0)

    def tasks(self) -> list[str]:
        """The classes of held-out prompts in the first and the last evaluation."""
        ends = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else ()
        return list(dict.fromkeys(k for e in ends for k in e.get("by_class", {})))

    def in_points(self, score: str) -> bool:
        """Whether a held-out score lies in [0, 1] in all evaluations and tasks."""
        tables = [
            t for e in self.evaluations for t in (e["scores"], *e.get("by_class", {}).values())
        ]
        values = [_float(t.get(score)) for t in tables]
        return all(0 <= v <= 1 for v in values if math.isfinite(v))

    def held_out(
        self, score: str, index: int, task: str | None = None
    ) -> tuple[float, float | None]:
        """Mean and standard error of a score in one evaluation.

        Args:
            score: Name of the score.
            index: Position of the evaluation.
            task: Class of prompts; ``None`` for all images.

        Returns:
            The mean, and the recorded error; if none is recorded, that of a proportion for scores in
            [0, 1], else ``None``.
        """
        line = self.evaluations[index]
        table = line if task is None else line.get("by_class", {}).get(task, {})
        mean = _float((line["scores"] if task is None else table).get(score))
        images, errors = table.get("images", 0), table.get("errors", {})
        if score in errors:
            return mean, _float(errors[score])
        known = images > 0 and math.isfinite(mean) and self.in_points(score)
        return mean, standard_error(mean, images) if known else None

    def change(self, score: str, task: str | None = None) -> Change:
        """Change of a score from the first evaluation to the last, on all images or on one task."""
        (before, e0), (after, e1) = (self.held_out(score, index, task) for index in (0, -1))
        error = None if e0 is None or e1 is None else math.hypot(e0, e1)
        return Change(task or score, before, after, error, self.in_points(score))

    def diversities(self) -> list[Change]:
        """Change of each diversity: the held-out metrics, or the rollouts' if there are none."""
        curves = self.held_out_metrics().items()
        ends = {k: (v[0][1], v[-1][1]) for k, v in curves if "diversity" in k}
        rollouts = [y for _, y in self.series("group/diversity") if math.isfinite(y)]
        if not ends and len(rollouts) >= 2 * RECENT:
            mean = statistics.fmean
            ends = {"group/diversity": (mean(rollouts[:RECENT]), mean(rollouts[-RECENT:]))}
        return [Change(k, a, b, None, False) for k, (a, b) in ends.items()]


def read_lines(path: Path, required: str = "") -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file in order of their ``iteration``.

    Args:
        path: The file; if it does not exist, the result is empty.
        required: Key that every object must have, with a table of numbers. Empty if every value of
            the object itself must be a number or null.

    Raises:
        ValueError: If a line is invalid; the message names the file and the line.
    """
    found: dict[int, dict[str, Any]] = {}
    for index, text in enumerate(_text(path).splitlines(), start=1):
        if not text.strip():
            continue
        where = f"{path}, line {index}"
        line = parse_object(text, where)
        if not isinstance(line.get("iteration"), int):
            raise ValueError(f"{where}: needs a whole number 'iteration'")
        if required and not isinstance(line.get(required), dict):
            raise ValueError(f"{where}: needs a table {required!r}")
        numbers: Mapping[str, Any] = line[required] if required else line
        for key, value in numbers.items():
            if not isinstance(value, int | float | None):
                raise ValueError(f"{where}: {key!r} must be a number, got {value!r}")
        # A resumed run may log an iteration again; the last line is used.
        found[line["iteration"]] = line
    return [found[iteration] for iteration in sorted(found)]


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError with a message that begins with ``where``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {text[:80]!r}")
    return value


def finite(line: Sequence[Point]) -> list[Number]:
    """The finite values of a curve."""
    return [y for _, y in line if math.isfinite(y)]


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _iteration(path: Path) -> int:
    """The number at the start of a grid's file name; -1 if there is none."""
    found = re.match(r"\d+", path.stem)
    return int(found[0]) if found else -1


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""
