"""Metrics and intervals of benchmarks, against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from flowgrpo.bench.base import Entry, Metric
from flowgrpo.bench.statistics import Table, compare, draws, estimate
from flowgrpo.data.prompts import Prompt


def entry(key: str, stratum: str = "") -> Entry:
    return Entry(key, Prompt(key), stratum=stratum)


def test_means_by_hand() -> None:
    entries = [entry("a"), entry("b")]
    points = [[("x", 1.0), ("x", 0.0), ("y", 1.0)], [("x", 1.0), ("z", 0.0)]]
    table = Table.of(entries, points)
    metrics = [
        Metric("x", (("x",),)),
        Metric("all", (("x", "y", "z"),)),
        Metric("of means", (("x",), ("y", "z"))),
        Metric("absent", (("w",),)),
    ]
    found = estimate(table, metrics)
    assert [e.value for e in found[:3]] == pytest.approx([2 / 3, 3 / 5, (2 / 3 + 1 / 2) / 2])
    assert np.isnan(found[3].value)
    assert [e.points for e in found] == [3, 5, 5, 0]


def scores(seed: int, prompts: int = 60) -> list[list[float]]:
    """Unequal numbers of points per prompt, which share a difficulty."""
    random = np.random.default_rng(seed)
    chances = np.random.default_rng(0).beta(1, 1, prompts)
    return [list((random.random(random.integers(1, 6)) < c).astype(float)) for c in chances]


def table_of(values: list[list[float]]) -> Table:
    entries = [entry(str(i)) for i in range(len(values))]
    return Table.of(entries, [[("x", v) for v in row] for row in values])


METRIC = [Metric("x", (("x",),))]


def test_the_interval_of_a_ratio_is_scipys() -> None:
    values = scores(1)
    sums, counts = np.array([sum(v) for v in values]), np.array([len(v) for v in values])
    theirs = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    (ours,) = estimate(table_of(values), METRIC)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_a_paired_difference_is_scipys_and_narrower_than_an_unpaired_one() -> None:
    first, second = scores(1), scores(2)
    arrays = [np.array([f(v) for v in values]) for values in (first, second) for f in (sum, len)]
    theirs = stats.bootstrap(
        arrays,
        lambda a, n, b, m, axis: b.sum(axis) / m.sum(axis) - a.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    tables = table_of(first), table_of(second)
    (ours,) = compare(*tables, METRIC)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)
    alone = [estimate(t, METRIC)[0] for t in tables]
    assert ours.high - ours.low < 0.8 * np.hypot(*(e.high - e.low for e in alone))


def test_only_shared_prompts_are_compared() -> None:
    first = table_of([[0.0], [0.0], [1.0]])
    second = table_of([[0.0], [1.0], [1.0]]).only(["1", "2"])
    (found,) = compare(first, second, METRIC)
    assert found.value == pytest.approx(1.0 - 0.5)


def test_prompts_are_drawn_within_their_strata() -> None:
    strata = ["a"] * 3 + ["b"] * 5
    drawn = draws(strata, 200, np.random.default_rng(0))
    assert (drawn[:, :3].sum(1) == 3).all()
    assert (drawn[:, 3:].sum(1) == 5).all()
    assert (drawn.max(0) > 1).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_wrong_or_all_right_has_the_exact_interval(value: float) -> None:
    (found,) = estimate(table_of([[value] * 3] * 20), METRIC)
    exact = stats.binomtest(int(20 * value), 20).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_parts_without_points_are_left_out() -> None:
    (found,) = estimate(table_of([[1.0], [0.0]]), [Metric("m", (("x",), ("absent",)))])
    assert found.value == pytest.approx(0.5)
    assert found.low < found.high


def test_one_prompt_has_no_interval() -> None:
    (found,) = estimate(table_of([[1.0, 0.0, 1.0]]), METRIC)
    assert found.value == pytest.approx(2 / 3)
    assert np.isnan(found.low)
    assert found.is_noise
