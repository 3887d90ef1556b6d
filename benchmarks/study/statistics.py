"""Intervals of mean gains, and which methods can be told apart."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean

import numpy as np
from scipy import stats

Gains = Mapping[str, Mapping[int, float]]
"""Gains of each method by seed."""


def pooled(gains: Gains) -> tuple[float, int]:
    """Standard deviation between the seeds of a method, pooled over methods, and its degrees of freedom.

    Pooling assumes that the seeds of all methods vary alike, and makes intervals of few seeds usable.
    NaN and 0 if no method has two seeds.
    """
    groups = [list(g.values()) for g in gains.values()]
    freedom = sum(max(0, len(g) - 1) for g in groups)
    if freedom == 0:
        return math.nan, 0
    squares = sum((v - mean(g)) ** 2 for g in groups for v in g)
    return math.sqrt(squares / freedom), freedom


def half_width(gains: Gains, seeds: int) -> float:
    """Half of the 95 % interval of the mean of ``seeds`` gains (Student's t, pooled deviation)."""
    deviation, freedom = pooled(gains)
    if freedom == 0 or seeds == 0:
        return math.nan
    return float(stats.t.ppf(0.975, freedom)) * deviation / math.sqrt(seeds)


def comparable(gains: Gains) -> tuple[list[str], list[int]]:
    """The methods that are compared, and their common seeds.

    While runs are missing, methods differ in their seeds. Of all sets of seeds ``0, ..., k`` the one with
    the most results is taken, with the methods that have all of them; with equal numbers, the one with
    more methods. At least two seeds are needed, and otherwise all methods are returned with one seed or none.
    """
    seeds = sorted({s for each in gains.values() for s in each})
    options = []
    for number in range(2, len(seeds) + 1):
        common = seeds[:number]
        methods = [m for m, each in gains.items() if set(common) <= each.keys()]
        options.append((number * len(methods), len(methods), methods, common))
    if options and max(options)[1] > 1:
        _, _, methods, common = max(options)
        return methods, common
    each_seeds = [set(each) for each in gains.values()]
    return list(gains), sorted(set.intersection(*each_seeds)) if each_seeds else []


def compared_means(gains: Gains) -> dict[str, float]:
    """The mean gain of each method that is compared, over the common seeds; the largest first."""
    methods, common = comparable(gains)
    found = {m: mean(gains[m][s] for s in common) for m in methods} if common else {}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def smallest_difference(gains: Gains) -> float:
    """The smallest difference of two means that is not chance, for all pairs at once, at 95 %.

    Tukey's range with the residuals of a two-way analysis of variance (method and seed), over the seeds
    and methods of :func:`comparable`. All methods of a seed are evaluated with the same noise, so what a
    seed adds to all of them cancels.

    Returns:
        NaN unless there are two methods and two common seeds.
    """
    error, freedom, methods, seeds = residual(gains)
    if freedom == 0:
        return math.nan
    quantile = float(stats.studentized_range.ppf(0.95, methods, freedom))
    return quantile * error / math.sqrt(seeds)


def residual(gains: Gains) -> tuple[float, int, int, int]:
    """What is left of gains after the means of methods and of seeds are taken out.

    Returns:
        Its standard deviation, its degrees of freedom, and the numbers of methods and of seeds of
        :func:`comparable`; NaN and 0 degrees without two of each.
    """
    methods, common = comparable(gains)
    if len(methods) < 2 or len(common) < 2:
        return math.nan, 0, len(methods), len(common)
    table = np.asarray([[gains[m][s] for s in common] for m in methods])
    rows, columns = table.shape
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (rows - 1) * (columns - 1)
    return math.sqrt(float((left**2).sum()) / freedom), freedom, rows, columns


def contrast(gains: Gains, better: str, than: str) -> tuple[float, float, int]:
    """The mean difference of two methods over their common seeds.

    Returns:
        The difference, half of its 95 % interval (Student's t, the deviation of :func:`residual`; NaN
        without one or with a gain that was not reached), and the number of seeds.
    """
    seeds = sorted(gains[better].keys() & gains[than].keys())
    error, freedom, _, _ = residual(gains)
    if len(seeds) < 2 or freedom == 0:
        return math.nan, math.nan, len(seeds)
    difference = mean(gains[better][s] - gains[than][s] for s in seeds)
    half = float(stats.t.ppf(0.975, freedom)) * error * math.sqrt(2 / len(seeds))
    return difference, half, len(seeds)


def leaders(gains: Gains) -> list[str]:
    """The methods that cannot be told from the best, the best one first; none without an interval."""
    least, means = smallest_difference(gains), compared_means(gains)
    if math.isnan(least):
        return []
    best = next(iter(means.values()))
    return [name for name, value in means.items() if best - value <= least]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN for fewer than three pairs."""
    return float(stats.spearmanr(a, b).statistic) if len(a) > 2 else math.nan
