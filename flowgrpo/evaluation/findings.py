"""What the records of a run say: its files read strictly, changes with their errors, warnings."""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.evaluation.charts import Number, Point, number, points

RECENT = 20
"""Iterations that count as the present state of a run."""

MAX_ZERO_VARIANCE = 0.5
MAX_NOISE = 0.5
"""Share of the clip range that numerical noise may take up."""
MAX_DIVERSITY_LOSS = 0.1


@dataclass(frozen=True)
class Change:
    """One held-out score before and after.

    Attributes:
        name: The score or the task.
        before: Mean of the first evaluation; NaN if it was not measured.
        after: Mean of the last.
        error: Standard error of ``after - before``; ``None`` where it cannot be known.
        in_points: Whether the score lies in [0, 1] and is told in points out of 100.
    """

    name: str
    before: Number
    after: Number
    error: Number | None
    in_points: bool

    @property
    def kind(self) -> str:
        """``rose`` or ``fell`` by more than two standard errors, or ``noise``; ``unknown`` without
        an error to compare with, ``unmeasured`` without two values."""
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
        """What the score did."""
        if self.kind == "unknown":
            return "did not change" if self.after == self.before else self._direction
        special = {"noise": "stayed within noise", "unmeasured": "could not be measured"}
        return special.get(self.kind, self.kind)

    @property
    def _direction(self) -> str:
        return "rose" if self.after > self.before else "fell"

    def show(self, value: Number) -> str:
        """A value in the score's unit, which is left out, as finely as the change asks for."""
        if self.in_points:
            return points(value)
        change = abs(self.after - self.before)
        if not (math.isfinite(value) and math.isfinite(change) and change > 0):
            return number(value)
        decimals = min(6, max(0, 1 - math.floor(math.log10(change))))
        return f"{value:,.{decimals}f}".replace("-", "−")

    @property
    def difference(self) -> str:
        """Such as ``+3.1 ± 1.2``, on one line."""
        value = self.after - self.before
        text = f"{'+' if value > 0 else ''}{self.show(value)}"
        return (
            text
            if self.error is None
            else f"{text}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{self.show(self.error)}"
        )


def standard_error(mean: Number, images: int) -> float:
    """Of the mean of ``images`` scores in [0, 1]: a proportion's, the largest such a mean can have.

    One success and one failure are added (Agresti and Caffo, 2000): 5 out of 5 is not certain.
    """
    share = (mean * images + 1) / (images + 2)
    return math.sqrt(share * (1 - share) / (images + 2))


class Records:
    """What a run directory holds. Files may be missing, but not both metrics and evaluations.

    Attributes:
        folder: The run directory.
        metrics: Lines of ``metrics.jsonl`` in order of iteration; likewise ``timings`` and
            ``evaluations``. Of lines for one iteration the last counts.
        config: The resolved configuration, and ``config_text`` as it is written.
        environment: Versions and machine.
        grids: The pictures of the newest iteration that has any.
    """

    def __init__(self, folder: Path):
        """Read it all.

        Raises:
            ValueError: If there is neither a metric nor an evaluation, or a file is broken; names
                the file and the line.
        """
        self.folder = folder
        self.metrics = read_lines(folder / "metrics.jsonl")
        self.timings = read_lines(folder / "timings.jsonl")
        self.evaluations = read_lines(folder / "evaluations.jsonl", required="scores")
        if not self.metrics and not self.evaluations:
            raise ValueError(f"{folder}: neither metrics.jsonl nor evaluations.jsonl has a line")
        self.config_text = _text(folder / "config.toml")
        try:
            self.config = tomllib.loads(self.config_text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{folder / 'config.toml'}: not valid TOML: {error}") from error
        environment = folder / "environment.json"
        self.environment = parse_object(_text(environment) or "{}", str(environment))
        grids = sorted((folder / "grids").glob("*.png"))
        newest = max((_iteration(g) for g in grids), default=0)
        self.grids = [g for g in grids if _iteration(g) == newest]

    def setting(self, key: str) -> Any:
        """A dotted key of the configuration; ``None`` if it is not set."""
        here: Any = self.config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def weights(self) -> dict[str, float]:
        """The weight of each reward by its name in metrics; zero is watched, not trained on."""
        rewards = self.config.get("rewards", [])
        labels = [r.get("name") or re.split(r"[.:]", str(r.get("model")))[-1] for r in rewards]
        return {k: float(r.get("weight", 1)) for k, r in zip(labels, rewards, strict=True)}

    def series(self, key: str) -> list[Point]:
        """A metric over iterations; ``null`` is NaN."""
        return [(m["iteration"], _float(m[key])) for m in self.metrics if key in m]

    def recent(self, key: str) -> float:
        """The mean of the last finite values of a metric; NaN if there is none."""
        values = [y for _, y in self.series(key)[-RECENT:] if math.isfinite(y)]
        return statistics.fmean(values) if values else math.nan

    def total(self, key: str) -> Number:
        """The sum of a metric's finite values."""
        return sum(y for _, y in self.series(key) if math.isfinite(y))

    def measures(self) -> dict[str, list[Point]]:
        """What evaluations measured besides scores, over iterations."""
        found: dict[str, list[Point]] = {}
        for line in self.evaluations:
            auxiliary = {k: v for k, v in line.items() if "/" in k}
            for key, value in (auxiliary | line.get("measures", {})).items():
                found.setdefault(key, []).append((line["iteration"], _float(value)))
        return found

    def scores(self) -> list[str]:
        """The held-out scores, those that are trained on first."""
        names = dict.fromkeys(k for e in self.evaluations for k in e["scores"])
        return sorted(names, key=lambda name: self.weights().get(name, 1) == 0)

    def tasks(self) -> list[str]:
        """The classes of held-out prompts."""
        ends = (self.evaluations[0], self.evaluations[-1]) if self.evaluations else ()
        return list(dict.fromkeys(k for e in ends for k in e.get("by_class", {})))

    def in_points(self, score: str) -> bool:
        """Whether a held-out score is within [0, 1] in all evaluations and tasks."""
        tables = [
            t for e in self.evaluations for t in (e["scores"], *e.get("by_class", {}).values())
        ]
        values = [_float(t.get(score)) for t in tables]
        return all(0 <= v <= 1 for v in values if math.isfinite(v))

    def held_out(
        self, score: str, index: int, task: str | None = None
    ) -> tuple[float, float | None]:
        """Mean and standard error of a score in one evaluation, of all its images or of a task's.

        The error is the one recorded under ``errors``, else a proportion's, else ``None``.
        """
        line = self.evaluations[index]
        table = line if task is None else line.get("by_class", {}).get(task, {})
        mean = _float((line["scores"] if task is None else table).get(score))
        images, errors = table.get("images", 0), table.get("errors", {})
        if score in errors:
            return mean, float(errors[score])
        known = images > 0 and math.isfinite(mean) and self.in_points(score)
        return mean, standard_error(mean, images) if known else None

    def change(self, score: str, task: str | None = None) -> Change:
        """From the first evaluation to the last, of all images or of one task."""
        (before, e0), (after, e1) = (self.held_out(score, index, task) for index in (0, -1))
        error = None if e0 is None or e1 is None else math.hypot(e0, e1)
        return Change(task or score, before, after, error, self.in_points(score))

    def diversities(self) -> list[Change]:
        """Each diversity measure at first and at last: of held-out images, else of rollouts."""
        ends = {k: (v[0][1], v[-1][1]) for k, v in self.measures().items() if "diversity" in k}
        rollouts = [y for _, y in self.series("group/diversity") if math.isfinite(y)]
        if not ends and len(rollouts) >= 2 * RECENT:
            mean = statistics.fmean
            ends = {"group/diversity": (mean(rollouts[:RECENT]), mean(rollouts[-RECENT:]))}
        return [Change(k, a, b, None, False) for k, (a, b) in ends.items()]


def warnings(records: Records) -> list[str]:
    """What the numbers show to be wrong, in words; plain text, the gravest first."""
    return [
        *_reward_warnings(records),
        *_update_warnings(records),
        *_diversity_warnings(records),
    ]


def _reward_warnings(records: Records) -> list[str]:
    found = []
    changes = [records.change(s) for s in records.scores()] if len(records.evaluations) > 1 else []
    weights = records.weights()
    trained_rose = any(c.kind == "rose" and weights.get(c.name, 1) > 0 for c in changes)
    for change in changes:
        if trained_rose and change.kind == "fell" and weights.get(change.name, 1) == 0:
            found.append(
                f"{change.name} is only watched, and fell ({change.difference}) while what is "
                "trained on rose. The model may be exploiting the reward; look at the images."
            )
    failures = records.total("failures")
    if failures > 0:
        found.append(
            f"Failed scores: {number(failures)}. Their samples took no part in training, and a "
            "reward that fails on some kinds of images teaches nothing about them."
        )
    flat = records.recent("group/zero_variance")
    if flat > MAX_ZERO_VARIANCE:
        found.append(
            f"{100 * flat:.0f} % of the groups in the last {RECENT} iterations had no variance: "
            "their samples all scored alike and taught nothing. Prompts may be too easy or too "
            "hard, groups too small, or the reward too coarse."
        )
    return found


def _update_warnings(records: Records) -> list[str]:
    found = []
    skipped = records.total("skipped_updates")
    if skipped > 0:
        found.append(
            f"Skipped updates: {number(skipped)}, because the gradient norm spiked. A few are "
            "harmless; many mean that the learning rate is too high."
        )
    noise, clip = records.series("log_prob/noise"), records.setting("loss.clip_range")
    above = [y for _, y in noise if clip is not None and y > MAX_NOISE * clip]
    if above:
        found.append(
            f"The log-probabilities' numerical noise reached {number(max(above))}, more than half "
            f"the clip range of {number(clip)}, in {len(above)} of {len(noise)} iterations. "
            "Clipping then acts on rounding errors; use a higher precision or a wider clip range."
        )
    return found


def _diversity_warnings(records: Records) -> list[str]:
    found = []
    duplicates = records.total("group/duplicates")
    if duplicates > 0:
        found.append(
            f"Duplicates: {number(duplicates)} samples are exactly like another of their group. "
            "Samples of one prompt should differ in their noise."
        )
    for change in records.diversities():
        if change.before > 0 and change.after < (1 - MAX_DIVERSITY_LOSS) * change.before:
            fall = 100 * (1 - change.after / change.before)
            found.append(
                f"{change.name} fell by {fall:.0f} %, from {change.show(change.before)} to "
                f"{change.show(change.after)}: the images grow alike."
            )
    return found


def read_lines(path: Path, required: str = "") -> list[dict[str, Any]]:
    """The objects of a JSON-lines file in order of their ``iteration``; none if there is no file.

    With ``required`` each must hold that key, a table of numbers; without, every value must be a
    number or null.

    Raises:
        ValueError: Naming the file and the line.
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
        # A resumed run may log an iteration again.
        found[line["iteration"]] = line
    return [found[iteration] for iteration in sorted(found)]


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError beginning with ``where``."""
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
    """The number that a grid's name begins with."""
    found = re.match(r"\d+", path.stem)
    return int(found[0]) if found else -1


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""
