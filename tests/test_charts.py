"""Charts and numbers of the report."""

import math
import re

import pytest

from flowgrpo.evaluation.charts import Line, duration, line_chart, number, smooth, thin, ticks


def test_chart_breaks_its_path_at_a_gap():
    chart = line_chart([Line("a", [(0, 1.0), (1, math.nan), (2, 2.0), (3, 3.0)])])
    (path,) = re.findall(r'class="line s0" d="([^"]*)"', chart)
    assert (path.count("M"), path.count("L")) == (2, 1)


def test_values_of_unmarked_curves_are_shown_on_hovering():
    lines = [
        Line("a & b", [(float(i), i / 10) for i in range(100)]),
        Line("raw", [(float(i), 1.0) for i in range(100)], faint=True),
    ]
    chart = line_chart(lines)
    titles = re.findall(r'class="hover"[^>]*><title>([^<]*)</title>', chart)
    assert titles[:2] == ["iteration 0\na &amp; b: 0", "iteration 3\na &amp; b: 0.3"]
    assert len(titles) == 34
    boxes = re.findall(r'class="hover" x="([^"]*)" y="[^"]*" width="([^"]*)"', chart)
    starts, widths = ([float(v) for v in column] for column in zip(*boxes, strict=True))
    ends = [x + w for x, w in zip(starts, widths, strict=True)]
    # The columns cover the whole width without gaps.
    assert (starts[0], ends[-1]) == (48, 410)
    assert ends[:-1] == pytest.approx(starts[1:], abs=0.2)
    assert "hover" not in line_chart([Line("a", [(0, 1.0), (1, 2.0)], dots=True)])
    assert "no finite values" in line_chart([Line("a", [(0, math.nan)])])


@pytest.mark.parametrize(
    "values", [[0.0], [5.0] * 3, [1e-9, 2e-9], [-3e6, 4e6], [0.1, 0.1 + 1e-12]]
)
def test_charts_support_any_range(values):
    chart = line_chart([Line("a", list(enumerate(values)), errors=[None] * len(values), dots=True)])
    numbers = [float(v) for v in re.findall(r'c[xy]="([^"]*)"', chart)]
    assert all(0 <= v <= 420 for v in numbers)
    assert chart.count('class="grid"') >= 2


def test_thinned_curves_keep_their_peaks():
    curve = [(float(i), 0.0) for i in range(10_000)]
    curve[4321], curve[6789] = (4321.0, 9.0), (6789.0, -9.0)
    thinned = thin(curve)
    assert len(thinned) <= 300
    assert {(4321.0, 9.0), (6789.0, -9.0)} <= set(thinned)
    assert thinned == sorted(thinned)


def test_smoothing_keeps_a_straight_line_and_ignores_gaps():
    line = [(float(i), 2.0 * i) for i in range(20)]
    assert smooth(line, 4)[2:-2] == line[2:-2]
    assert smooth([(0, 1.0), (1, math.nan), (2, 3.0)], 3) == [(0, 1.0), (1, 2.0), (2, 3.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (90.0, "90"), (1234.5, "1,234"), (0.12345, "0.123"), (-2.5, "−2.5"), (2e-7, "2e−7"),
     (1.23e-5, "1.2e−5"), (999.7, "1,000"), (math.nan, "–")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (1.25, "1.2 s"), (59.99, "1 min 0 s"), (605, "10 min 5 s"), (7300, "2 h 1 min")],
)  # fmt: skip
def test_durations_have_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_ticks_are_round_and_enough():
    assert ticks(0.0, 1.0, 4) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(28.0, 71.0, 4) == [30, 40, 50, 60, 70]
