"""Paired comparisons of models on the same held-out images.

Two intervals are combined. The first is a bootstrap over prompts, paired because both models are scored
on the same prompts (:mod:`flowgrpo.bench.statistics`). If both settings have several runs that differ in
the seed only, the second is a t interval for the difference of their means over runs, which covers the
randomness of training: paired if both have the same seeds, because a seed also decides the noise of the
evaluations and the order of the prompts, else Welch's. Independent errors add as squares.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowgrpo.bench.base import Entry, Metric
from flowgrpo.bench.statistics import CONFIDENCE, Table, compare
from flowgrpo.data.prompts import Prompt

SEPARATOR = "\n"
"""Between the reward and the task in the name of a dimension; neither contains a line break."""


@dataclass(frozen=True)
class Measured:
    """The scores of one model on the images of an evaluation.

    Attributes:
        name: The run directory or the model.
        prompts: For each image the number of its prompt.
        classes: For each image the class of its prompt; empty text for none.
        scores: For each reward the score of each image; NaN if the reward failed.
        metrics: Numbers about the whole evaluation, such as a diversity.
        iteration: Iterations trained; None for a model that is no run.
        seed: Seed of the run; None for a model that is no run.
    """

    name: str
    prompts: Sequence[int]
    classes: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    iteration: int | None = None
    seed: int | None = None

    @classmethod
    def of(cls, name: str, line: Mapping[str, Any], seed: int | None = None) -> "Measured":
        """The result of an evaluation, which must have ``per_image``."""
        each = line["per_image"]
        metrics = {
            k: v for k, v in line.get("metrics", {}).items() if v is not None and math.isfinite(v)
        }
        scores = {
            k: [math.nan if v is None else v for v in values]
            for k, values in each["scores"].items()
        }
        return cls(
            name,
            each["prompt"],
            each["class"],
            scores,
            metrics,
            line.get("iteration"),
            seed,
        )

    def first(self, images: int) -> "Measured":
        """The first images, which every evaluation with the same prompts has in the same order."""
        scores = {k: v[:images] for k, v in self.scores.items()}
        return Measured(
            self.name, self.prompts[:images], self.classes[:images], scores, self.metrics, self.iteration, self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One or several runs that differ in their seed only, or one model.

    Attributes:
        name: For tables.
        members: The runs, or the model.
        before: The same runs before training; empty if unknown.
        weights: The weight of each reward in training; empty for a model that is no run.
    """

    name: str
    members: Sequence[Measured]
    before: Sequence[Measured] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def first(self, images: int) -> "Setting":
        """The setting on the first images alone."""
        members, before = ([m.first(images) for m in part] for part in (self.members, self.before))
        return Setting(self.name, members, before, self.weights)

    @property
    def rewards(self) -> list[str]:
        """Names of the rewards that all members have."""
        return [k for k in self.members[0].scores if all(k in m.scores for m in self.members)]


@dataclass(frozen=True)
class Row:
    """One reward, on all images or those of a task, of two settings.

    Attributes:
        reward: Name of the reward or metric.
        task: Class of prompts; empty for all.
        first: Mean of the first setting.
        second: Mean of the second setting.
        difference: Second minus first on the prompts that both have.
        low: Lower end of its 95 % interval; NaN if unknown. Likewise ``high``.
        wins: Share of prompts on which the second has the higher mean, ties counted half; None if
            unknown.
        in_points: Whether values are shown in points out of 100.
    """

    reward: str
    task: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    wins: float | None
    in_points: bool

    @property
    def is_noise(self) -> bool:
        """Whether 0 lies within the interval, or there is none."""
        return not (self.low > 0 or self.high < 0)

    @property
    def half_width(self) -> float:
        """Half of the length of the 95 % interval."""
        return (self.high - self.low) / 2

    def show(self, value: float, sign: str = "") -> str:
        """A value in the row's unit, with enough decimals to show the difference."""
        if not math.isfinite(value):
            return "–"
        if self.in_points:
            return f"{100 * value:{sign}.1f}"
        size = max(abs(self.difference), self.half_width if math.isfinite(self.half_width) else 0)
        decimals = min(6, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 3
        return f"{value:{sign}.{decimals}f}"

    @property
    def amount(self) -> str:
        """The size of the difference with half of its interval, without a sign."""
        unit = " points" if self.in_points else ""
        return f"{self.show(abs(self.difference))} ± {self.show(self.half_width)}{unit}"

    def verdict(self, first: str, second: str) -> str:
        """The difference in words."""
        if not math.isfinite(self.difference):
            return "not measured"
        if not math.isfinite(self.low):
            return "unknown: too few prompts for an interval"
        if self.is_noise:
            unit = " points" if self.in_points else ""
            return f"within noise ({self.show(self.difference, '+')} ± {self.show(self.half_width)}{unit})"
        return f"{second if self.difference > 0 else first} better by {self.amount}"


def rows(first: Setting, second: Setting) -> list[Row]:
    """Compare two settings on each reward that both have, on all images and on each task.

    The evaluations must be of the same prompts. Where one has more images, the common ones are used,
    so that the images compared also have the same noise if the seeds are equal.
    """
    images = min(len(m.prompts) for m in [*first.members, *second.members])
    first, second = first.first(images), second.first(images)
    shared = [r for r in first.rewards if r in second.rewards]
    return [row for reward in shared for row in _rows_of(reward, first.members, second.members)]


def changes(setting: Setting) -> list[Row]:
    """The change of each reward from before training to after; empty if unknown."""
    if not setting.before:
        return []
    return [r for r in rows(Setting("before", setting.before), setting) if not r.task]


def exploitation(setting: Setting) -> tuple[str, str]:
    """Whether rewards that were only measured rose with those that were trained on.

    Returns:
        A kind (``suspected``, ``none``, ``unclear`` or ``unknown``), and a sentence.
    """
    found = changes(setting)
    if not found:
        return "unknown", "no scores of the same images before training are recorded"
    weight = setting.weights
    trained = [r for r in found if weight.get(r.reward, 1) != 0]
    measured = [r for r in found if weight.get(r.reward, 1) == 0]
    rose = [r for r in trained if not r.is_noise and r.difference > 0]
    fell = [r for r in measured if not r.is_noise and r.difference < 0]
    words = ", ".join(f"{r.reward} by {r.amount}" for r in rose)
    if not rose:
        return "none", "no reward that was trained on rose beyond noise"
    if not measured:
        advice = "add a reward with weight 0 to measure whether others follow"
        return "unknown", f"rose: {words}; every reward was trained on: {advice}"
    if fell:
        others = ", ".join(f"{r.reward} by {r.amount}" for r in fell)
        return "suspected", (
            f"the model may be exploiting its reward: trained on and rose: {words}; only measured "
            f"and fell: {others}; look at the images"
        )
    also = [r for r in measured if not r.is_noise]
    others = ", ".join(f"{r.reward} by {r.amount}" for r in also)
    if also:
        return "none", f"trained on and rose: {words}; only measured and rose too: {others}"
    same = ", ".join(r.reward for r in measured)
    return "unclear", f"trained on and rose: {words}; only measured and within noise: {same}"


def _rows_of(reward: str, first: Sequence[Measured], second: Sequence[Measured]) -> list[Row]:
    """One reward of two groups of runs, on all images and on each task."""
    tables = [_table(reward, group) for group in (first, second)]
    seeds = [m.seed for m in first], [m.seed for m in second]
    tasks = sorted({c for m in [*first, *second] for c in m.classes if c})
    known = {d for t in tables for d in t.dimensions}
    metrics = [Metric(reward, (tuple(sorted(known)),))]
    metrics += [Metric(t, ((f"{reward}{SEPARATOR}{t}",),)) for t in tasks if len(tasks) > 1]
    values = [v for m in [*first, *second] for v in m.scores[reward] if math.isfinite(v)]
    in_points = all(0 <= v <= 1 for v in values)
    found = []
    for index, (metric, estimated) in enumerate(
        zip(metrics, compare(tables[0], tables[1], metrics), strict=True)
    ):
        each = [_means(reward, group, metric) for group in (first, second)]
        spread = _seed_interval(each[0], each[1], seeds)
        low = estimated.value - math.hypot(estimated.value - estimated.low, spread)
        high = estimated.value + math.hypot(estimated.high - estimated.value, spread)
        one, other = (float(t.values([metric], np.ones((1, len(t.keys))))[0, 0]) for t in tables)
        wins = _wins(tables[0], tables[1], metric)
        task = metric.name if index else ""
        found.append(Row(reward, task, one, other, estimated.value, low, high, wins, in_points))
    return found


def _table(reward: str, group: Sequence[Measured]) -> Table:
    """The scores of all runs of a group, by prompt and task."""
    points: dict[int, list[tuple[str, float]]] = {}
    strata: dict[int, str] = {}
    for one in group:
        for prompt, task, value in zip(one.prompts, one.classes, one.scores[reward], strict=True):
            strata[prompt] = task
            found = points.setdefault(prompt, [])
            if math.isfinite(value):
                found.append((f"{reward}{SEPARATOR}{task}", float(value)))
    entries = [Entry(str(p), Prompt(str(p)), stratum=strata[p]) for p in points]
    return Table.of(entries, list(points.values()))


def _means(reward: str, group: Sequence[Measured], metric: Metric) -> list[float]:
    """The mean of each run."""
    tables = [_table(reward, [m]) for m in group]
    return [float(t.values([metric], np.ones((1, len(t.keys))))[0, 0]) for t in tables]


def _seed_interval(
    first: Sequence[float],
    second: Sequence[float],
    seeds: tuple[Sequence[int | None], Sequence[int | None]],
) -> float:
    """Half of the 95 % t interval of the difference of two means over runs.

    Args:
        first: The mean of each run of the first setting.
        second: The mean of each run of the second setting.
        seeds: The seeds of the runs of both; if they are the same, the differences of runs with equal
            seeds are taken.

    Returns:
        0 if a group has one run only, from which the spread of training is not known.
    """
    if len(first) < 2 or len(second) < 2:
        return 0.0
    from scipy.stats import t

    one, other = (dict(zip(s, g, strict=True)) for s, g in zip(seeds, (first, second), strict=True))
    if set(one) == set(other) and len(one) == len(first) == len(second):
        each = [other[s] - one[s] for s in one]
        total, freedom = float(np.var(each, ddof=1)) / len(each), float(len(each) - 1)
    else:
        sizes = (len(first), len(second))
        parts = [float(np.var(g, ddof=1)) / len(g) for g in (first, second)]
        total = sum(parts)
        weighed = sum(p**2 / (n - 1) for p, n in zip(parts, sizes, strict=True))
        freedom = total**2 / weighed if weighed > 0 else 1.0
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total)


def _wins(first: Table, second: Table, metric: Metric) -> float | None:
    """Share of the common prompts on which the second mean is higher; ties count half."""
    shared = [k for k in first.keys if k in set(second.keys)]
    identity = np.eye(len(shared))
    one, other = (t.only(shared).values([metric], identity)[:, 0] for t in (first, second))
    known = np.isfinite(one) & np.isfinite(other)
    if not known.any():
        return None
    sign = np.sign(other[known] - one[known])
    return float(((sign + 1) / 2).mean())
