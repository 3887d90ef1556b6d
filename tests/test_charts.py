"""Charts and numbers of the report."""

import math
import re

import pytest

from flowgrpo.evaluation.charts import (
    Line,
    dumbbell,
    duration,
    legend,
    line_chart,
    number,
    points,
    smooth,
    stacked_bar,
    thin,
    tick_labels,
    ticks,
)


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
    assert thin(curve[:300]) == curve[:300]
    assert thin([(i, float(i)) for i in range(6)], 4) == [(0, 0.0), (2, 2.0), (3, 3.0), (5, 5.0)]
    assert thin([(i, float(-i)) for i in range(6)], 4) == [(0, 0), (2, -2.0), (3, -3.0), (5, -5.0)]
    # An interval of equal values needs one point, and one without values is a gap.
    gaps = thin([(0, 1.0), (1, 1.0), (2, math.nan), (3, math.nan), (4, 2.0), (5, math.nan)], 6)
    assert len(gaps) == 6
    gaps = thin([(0, 1.0), (0, 1.0), (2, math.nan), (3, math.nan), (4, 2.0), (5, math.nan)], 5)
    assert [(x, None if math.isnan(y) else y) for x, y in gaps] == [(0, 1.0), (4, 2.0)]
    gaps = thin([(i, math.nan if 3 <= i < 6 else 1.0) for i in range(9)], 6)
    assert [(x, None if math.isnan(y) else y) for x, y in gaps] == [(0, 1.0), (3, None), (6, 1.0)]


def test_smoothing_keeps_a_straight_line_and_ignores_gaps():
    line = [(float(i), 2.0 * i) for i in range(20)]
    assert smooth(line, 4)[2:-2] == line[2:-2]
    assert smooth([(0, 1.0), (1, math.nan), (2, 3.0)], 3) == [(0, 1.0), (1, 2.0), (2, 3.0)]
    # Five points of a window of 4 or 5; at the ends those that exist.
    found = smooth([(i, float(i * i)) for i in range(6)], 4)
    assert found == [(0, 5 / 3), (1, 14 / 4), (2, 30 / 5), (3, 55 / 5), (4, 54 / 4), (5, 50 / 3)]
    ((_, gap),) = smooth([(0, math.nan)], 3)
    assert math.isnan(gap)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (90.0, "90"), (1234.5, "1,234"), (0.12345, "0.123"), (-2.5, "−2.5"), (2e-7, "2e−7"),
     (1.23e-5, "1.2e−5"), (999.7, "1,000"), (999.4, "999"), (9.996, "10"), (-0.00012, "−1.2e−4"),
     (0.001, "0.001"), (1e15, "1,000,000,000,000,000"), (1e-10, "1e−10"), (-math.inf, "–"), (math.nan, "–")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (1.25, "1.2 s"), (59.94, "59.9 s"), (59.99, "1 min 0 s"),
     (605, "10 min 5 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (7300, "2 h 1 min"), (math.nan, "–")],
)  # fmt: skip
def test_durations_have_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_ticks_are_round_and_enough():
    assert ticks(0.0, 1.0, 4) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(28.0, 71.0, 4) == [30, 40, 50, 60, 70]
    assert ticks(-1.0, 1.0, 3) == [-1.0, 0.0, 1.0]
    assert ticks(0.0, 10.0, 2) == [0.0, 10.0]
    assert ticks(0.3, 0.7, 4) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert tick_labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert tick_labels([-2000.0, 0.0, 2000.0]) == ["−2,000", "0", "2,000"]
    assert tick_labels([0.02, 0.04]) == ["0.02", "0.04"]
    assert tick_labels([0.0, 2e-4, 4e-4]) == ["0", "2e−4", "4e−4"]
    assert tick_labels([7.0]) == ["7"]
    assert points(0.1234) == "12.3"
    assert points(-0.5) == "−50.0"
    assert points(math.inf) == "–"


def test_every_stroke_of_a_chart_is_in_its_place():
    """The pixels by the description: margins of 48, 10, 10 and 22, and 8 % above and below."""
    first = Line("a", [(2, 1.0), (4, 3.0), (5, math.nan), (6, 2.0)], 1, [0.5, None, None, 1.0], dots=True)  # fmt: skip
    second = Line("b <c>", [(2, 2.0), (8, 4.0)], 7, faint=True)
    chart = line_chart([first, second], width=200, height=100)

    def x(value):
        return f"{48 + (value - 2) / 6 * (200 - 58):.1f}"

    def y(value):  # from 0.5, the end of the first bar, to 4: 3.5, and 0.28 on both sides
        return f"{78 - (value - 0.22) / 4.06 * 68:.1f}"

    assert chart.startswith('<svg viewBox="0 0 200 100" role="img" aria-label="a">')
    assert re.findall(r'class="grid" d="([^"]*)"', chart) == [f"M48 {y(v)}H190" for v in (1, 2, 3, 4)]  # fmt: skip
    # Rounded once: the label is 3.5 pixels below its line.
    labels = re.findall(r'class="tick" x="42" y="([^"]*)">([^<]*)<', chart)
    assert [t for _, t in labels] == ["1", "2", "3", "4"]
    assert [float(v) for v, _ in labels] == pytest.approx([float(y(v)) + 3.5 for v in (1, 2, 3, 4)], abs=0.1)  # fmt: skip
    below = re.findall(r'class="tick middle" x="([^"]*)" y="94">([^<]*)<', chart)
    assert below == [(x(v), str(v)) for v in (2, 4, 6, 8)]
    assert re.findall(r'class="line s1" d="([^"]*)"', chart) == [
        f"M{x(2)} {y(1)}L{x(4)} {y(3)}M{x(6)} {y(2)}"
    ]
    assert re.findall(r'class="line faint s1" d="([^"]*)"', chart) == [f"M{x(2)} {y(2)}L{x(8)} {y(4)}"]  # fmt: skip
    assert re.findall(r'class="whisker s1" d="([^"]*)"', chart) == [
        f"M{x(2)} {y(0.5)}V{y(1.5)}",
        f"M{x(6)} {y(1)}V{y(3)}",
    ]
    dots = re.findall(r'cx="([^"]*)" cy="([^"]*)" r="3.4"><title>([^<]*)<', chart)
    assert dots == [
        (x(2), y(1), "a, iteration 2: 1 ± 0.5"),
        (x(4), y(3), "a, iteration 4: 3"),
        (x(6), y(2), "a, iteration 6: 2 ± 1"),
    ]
    # One point: a range of 1 on both axes, so that the value is in the middle.
    alone = line_chart([Line("a", [(3, 5.0)], dots=True)], width=158, height=132)
    assert 'cx="48.0" cy="60.0"' in alone
    # Marks of x are whole numbers.
    assert re.findall(r'middle" x="[^"]*" y="[^"]*">([^<]*)<', alone) == ["3", "4"]
    # A curve that is flat up to rounding looks flat, in the middle.
    flat = line_chart([Line("a", [(0, 1.0), (1, 1 + 1e-9)])], height=132)
    assert re.findall(r' d="M48.0 ([0-9.]*)L410.0 ([0-9.]*)"', flat) == [("60.0", "60.0")]


def test_hover_columns_name_the_curves_that_have_a_value_there():
    lines = [Line("a", [(0, 1.0), (1, math.nan), (2, 3.0)], axis="step"), Line("b", [(2, 4.0)])]
    chart = line_chart(lines, width=158, height=132)
    found = re.findall(r'<rect class="hover" x="([^"]*)" y="10" width="([^"]*)" height="100"><title>([^<]*)<', chart)  # fmt: skip
    assert found == [("48.0", "50.0", "step 0\na: 1"), ("98.0", "50.0", "step 2\na: 3\nb: 4")]


def test_bars_and_pairs_of_dots_are_in_their_places():
    found = dumbbell(0.25, 0.75, 0.0, 1.0, "rose")
    assert 'class="dumbbell rose" viewBox="0 0 150 18"' in found
    assert 'class="track" d="M7 9H143"' in found
    assert 'class="link" d="M41.0 9H109.0"' in found
    assert 'class="before" cx="41.0" cy="9" r="4"' in found
    assert 'class="after" cx="109.0" cy="9" r="5"' in found
    assert 'cx="7.0"' in dumbbell(2.0, 2.0, 2.0, 2.0, "noise")
    assert 'M143.0 9H7.0"' in dumbbell(6.0, 2.0, 2.0, 6.0, "fell")
    assert dumbbell(0.5, math.nan, 0.0, 1.0, "") == dumbbell(math.nan, 0.5, 0.0, 1.0, "") == ""
    bar = stacked_bar([("a<", 3.0), ("b", 1.0), ("c", 0.0)])
    assert 'aria-label="a&lt; 75 %, b 25 %, c 0 %"' in bar
    assert re.findall(r'class="s(\d)" x="([^"]*)" width="([^"]*)"', bar) == [
        ("0", "0.0", "748.0"), ("1", "750.0", "248.0"), ("2", "1000.0", "0.0"),
    ]  # fmt: skip
    assert re.findall("<title>([^<]*)<", bar) == ["a&lt;: 75 %", "b: 25 %", "c: 0 %"]
    assert "nan" not in stacked_bar([("a", 0.0)])
    assert re.findall(r'<i class="s(\d)"></i>([^<]*)<', legend([("a&", 2), ("b", 8)])) == [
        ("2", "a&amp;"), ("2", "b"),
    ]  # fmt: skip
