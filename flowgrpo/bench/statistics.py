"""Metrics from points, with bootstrap intervals over prompts.

Images of one prompt, and several points of one image, are correlated, so whole prompts are
resampled, within the benchmark's strata. All resamples are matrix products: with weights ``W`` (how
often each prompt was drawn), sums ``S`` and counts ``N`` of points per prompt and dimension, the
means are ``(W @ S) / (W @ N)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flowgrpo.bench.base import Entry, Metric, Points

RESAMPLES = 2000
CONFIDENCE = 0.95
CHUNK = 256
"""Resamples at a time, which bounds memory."""

Matrix = Float[np.ndarray, "prompts dimensions"]


@dataclass(frozen=True)
class Table:
    """The points of a benchmark, per prompt and dimension.

    Attributes:
        keys: The prompts' ids, in the rows' order.
        strata: Their strata.
        dimensions: In the columns' order.
        sums: Sum of the points.
        counts: Number of points.
    """

    keys: tuple[str, ...]
    strata: tuple[str, ...]
    dimensions: tuple[str, ...]
    sums: Matrix
    counts: Matrix

    @classmethod
    def of(cls, entries: Sequence[Entry], points: Sequence[Points]) -> "Table":
        """Collect the points of each entry."""
        rows = [list(p) for p in points]
        dimensions = tuple(dict.fromkeys(d for row in rows for d, _ in row))
        column = {d: i for i, d in enumerate(dimensions)}
        sums = np.zeros((len(entries), len(dimensions)))
        counts = np.zeros_like(sums)
        for i, row in enumerate(rows):
            for dimension, value in row:
                sums[i, column[dimension]] += value
                counts[i, column[dimension]] += 1
        keys, strata = tuple(e.key for e in entries), tuple(e.stratum for e in entries)
        return cls(keys, strata, dimensions, sums, counts)

    def only(self, keys: Sequence[str]) -> "Table":
        """The rows of some prompts, in the order of ``keys``."""
        place = {k: i for i, k in enumerate(self.keys)}
        rows = [place[k] for k in keys]
        strata = tuple(self.strata[i] for i in rows)
        return Table(tuple(keys), strata, self.dimensions, self.sums[rows], self.counts[rows])

    def values(
        self, metrics: Sequence[Metric], weights: Float[np.ndarray, "resamples prompts"]
    ) -> Float[np.ndarray, "resamples metrics"]:
        """Each metric, for prompts that count ``weights`` times.

        Parts of a metric that no prompt of the table has points in are left out, as in the official
        scripts. NaN if none is left, if a metric with weights lacks one, or if none of a part's
        prompts was drawn.
        """
        column = {d: i for i, d in enumerate(self.dimensions)}
        parts = [
            [own for part in metric.parts if (own := [column[d] for d in part if d in column])]
            for metric in metrics
        ]
        sums, counts = weights @ self.sums, weights @ self.counts
        result = np.full((len(weights), len(metrics)), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            for i, (metric, present) in enumerate(zip(metrics, parts, strict=True)):
                means = [sums[:, part].sum(1) / counts[:, part].sum(1) for part in present]
                if metric.weights and len(means) < len(metric.parts):
                    continue
                if means:
                    result[:, i] = np.average(means, axis=0, weights=metric.weights or None)
        return result


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval.

    Attributes:
        metric: The metric.
        value: From all prompts; NaN if there are no points.
        low: Lower end of the interval; NaN if it rests on fewer than two prompts. Likewise ``high``.
        points: Number of points that it rests on.
    """

    metric: Metric
    value: float
    low: float
    high: float
    points: int

    @property
    def is_noise(self) -> bool:
        """For a difference: whether 0 lies within the interval, or there is none."""
        return not (self.low > 0 or self.high < 0)


def draws(
    strata: Sequence[str], resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, "resamples prompts"]:
    """How often each prompt is drawn: with replacement, as many per stratum as it has."""
    weights = np.zeros((resamples, len(strata)))
    labels = np.asarray(strata)
    for stratum in dict.fromkeys(strata):
        rows = np.flatnonzero(labels == stratum)
        share = np.full(len(rows), 1 / len(rows))
        weights[:, rows] = generator.multinomial(len(rows), share, size=resamples)
    return weights


def estimate(table: Table, metrics: Sequence[Metric], seed: int = 0) -> list[Estimate]:
    """Every metric with its percentile interval."""
    return _estimates([table], metrics, seed)


def compare(
    first: Table, second: Table, metrics: Sequence[Metric], seed: int = 0
) -> list[Estimate]:
    """Second minus first, with intervals from paired resamples of the prompts that both have."""
    shared = [k for k in first.keys if k in set(second.keys)]
    return _estimates([first.only(shared), second.only(shared)], metrics, seed)


def _estimates(tables: Sequence[Table], metrics: Sequence[Metric], seed: int) -> list[Estimate]:
    """One table, or the difference of two with the same prompts."""
    number, strata = len(tables[0].keys), tables[0].strata
    generator = np.random.default_rng(seed)

    def measured(weights: Float[np.ndarray, "resamples prompts"]) -> np.ndarray:
        values = [t.values(metrics, weights) for t in tables]
        return values[0] if len(values) == 1 else values[1] - values[0]

    whole = measured(np.ones((1, number)))[0]
    sampled = np.concatenate(
        [
            measured(draws(strata, min(CHUNK, RESAMPLES - start), generator))
            for start in range(0, RESAMPLES, CHUNK)
        ]
    )
    tail = 50 * (1 - CONFIDENCE)
    found = []
    for i, metric in enumerate(metrics):
        finite = sampled[np.isfinite(sampled[:, i]), i]
        enough = _prompts(tables[0], metric) > 1 and len(finite) > 0 and np.isfinite(whole[i])
        low, high = np.percentile(finite, [tail, 100 - tail]) if enough else (np.nan, np.nan)
        if len(tables) == 1 and enough and low == high and metric.percent:
            low, high = _exact(float(whole[i]), _prompts(tables[0], metric))
        points = sum(_points(t, metric) for t in tables)
        found.append(Estimate(metric, float(whole[i]), float(low), float(high), points))
    return found


def _exact(share: float, number: int) -> tuple[float, float]:
    """The interval where all points are 0 or all are 1, of which resampling knows nothing.

    The exact (Clopper-Pearson) interval of a proportion, with every prompt counted once.
    """
    bound = ((1 - CONFIDENCE) / 2) ** (1 / number)
    if share == 0:
        return 0.0, 1 - bound
    return (bound, 1.0) if share == 1 else (share, share)


def _prompts(table: Table, metric: Metric) -> int:
    """Number of prompts that a metric rests on."""
    return int((table.counts[:, _columns(table, metric)].sum(1) > 0).sum())


def _columns(table: Table, metric: Metric) -> list[int]:
    wanted = {d for part in metric.parts for d in part}
    return [i for i, d in enumerate(table.dimensions) if d in wanted]


def _points(table: Table, metric: Metric) -> int:
    return int(table.counts[:, _columns(table, metric)].sum())
