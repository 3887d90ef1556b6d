"""Inline SVG charts for the report, and number formatting.

Charts use classes of the page's style sheet (``s{i}`` for series ``i``), so they follow its light and
dark colours, and ``<title>`` elements for values on hovering, so they need no JavaScript. All text is
escaped here.

Why not a plotting library: for the 19 charts of the quick start's report this module writes about 0.1 MB
in 0.3 s. Plotly 7 adds 4.8 MB of JavaScript, Bokeh 3.9 adds 3.9 MB, and Altair 6 adds 1.2 MB and 18 s; all three
set colours in the figure, so that each chart would need code to follow the page's colour scheme, and
need scripts, which the page's content security policy forbids. The SVG of Matplotlib 3.11 (0.25 MB, 6 s)
has fixed colours and no values on hovering; Pygal 3.1 shows values with a script from a server.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

NUM_COLORS = 6
MAX_POINTS = 300
"""Most points per curve. A chart is about 400 pixels wide, so more points only enlarge the file."""
HOVER_COLUMNS = 40
"""Most columns of a chart that show values on hovering, where points are not marked."""

Number = int | float
"""JSON does not distinguish the two types; type checks at run time do."""

Point = tuple[Number, Number]
LEFT, RIGHT, TOP, BOTTOM = 48.0, 10.0, 10.0, 22.0
"""Margins of a chart in pixels."""


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
        name: Name for the legend and for screen readers.
        points: ``(x, y)`` in order of x; a y that is not finite leaves a gap.
        color: Index of the series colour.
        errors: Half-length of each point's error bar; ``None`` for no bar.
        faint: Whether the curve is drawn faintly, behind its moving average.
        dots: Whether each point is marked, and shows its value on hovering.
        axis: Name of x in that value, such as ``iteration``.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    errors: Sequence[Number | None] | None = None
    faint: bool = False
    dots: bool = False
    axis: str = "iteration"


def number(value: Number) -> str:
    """Format with three significant digits and a minus sign (U+2212); ``–`` if not finite."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == int(value) and size < 1e15:
        text = f"{int(size):,}"
    elif size >= 999.5:
        text = f"{size:,.0f}"
    elif size >= 1e-3:
        text = f"{size:.3g}"
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e−{-int(exponent)}"
    return f"−{text}" if value < 0 else text


def points(value: Number) -> str:
    """Format a share as points out of 100, with one decimal; ``–`` if not finite."""
    return f"{100 * value:.1f}".replace("-", "−") if math.isfinite(value) else "–"


def duration(seconds: Number) -> str:
    """Format seconds in milliseconds, seconds, minutes or hours, by their size."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def smooth(line: Sequence[Point], window: int) -> list[Point]:
    """Centred moving average over ``window`` points; at both ends over the points that exist."""
    half, result = window // 2, []
    for i, (x, _) in enumerate(line):
        near = [y for _, y in line[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        result.append((x, sum(near) / len(near) if near else math.nan))
    return result


def thin(line: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Reduce a curve to at most ``limit`` points: the minimum and the maximum of each interval."""
    if len(line) <= limit:
        return list(line)
    size = -(-2 * len(line) // limit)
    result: list[Point] = []
    for start in range(0, len(line), size):
        interval = [p for p in line[start : start + size] if math.isfinite(p[1])]
        if not interval:
            result.append((line[start][0], math.nan))
            continue
        extremes = {min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])}
        result += sorted(extremes)
    return result


def ticks(low: Number, high: Number, least: int) -> list[float]:
    """The smallest set of at least ``least`` round, equally spaced values in ``[low, high]``."""
    power = 10.0 ** math.ceil(math.log10(high - low))
    while True:
        for step in (power, power / 2, power / 5):
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            if last - first + 1 >= least:
                return [i * step for i in range(first, last + 1)]
        power /= 10


def tick_labels(values: Sequence[Number]) -> list[str]:
    """Format the ticks of an axis with the same number of decimals, enough to tell them apart."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    if max(abs(v) for v in values) < 1e-3:
        return [number(float(f"{v:.6g}")) for v in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v:,.{decimals}f}".replace("-", "−") for v in values]


def line_chart(
    lines: Sequence[Line], width: int = 420, height: int = 210, num_ticks: int = 4
) -> str:
    """Draw curves over a common x axis of whole numbers, as an ``<svg>`` that scales to its parent.

    The y range includes error bars. If no value is finite, the result is a paragraph that says so.
    """
    frame = _Frame.around(lines, width, height)
    if frame is not None:
        texts = tick_labels(ticks(frame.low, frame.high, num_ticks))
        # Long labels need a wider margin.
        frame = replace(frame, left=max(LEFT, 8 + max(map(_text_width, texts))))
    if frame is None:
        return '<p class="quiet">no finite values</p>'
    label = escape(", ".join(line.name for line in lines if not line.faint))
    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">']
    levels = ticks(frame.low, frame.high, num_ticks)
    for value, text in zip(levels, tick_labels(levels), strict=True):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left:g} {y:.1f}H{width - RIGHT:g}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 6:g}" y="{y + 3.5:.1f}">{text}</text>')
    for x, text in _x_labels(frame):
        at = f'x="{x:.1f}" y="{height - 6:g}"'
        parts.append(f'<text class="tick middle" {at}>{text}</text>')
    parts += [_curve(line, frame) for line in lines]
    if not any(line.dots for line in lines):
        parts += _hover_columns([line for line in lines if not line.faint], frame)
    return "".join([*parts, "</svg>"])


def _text_width(text: str) -> float:
    """The width of a tick's label in a wide font (DejaVu Sans) of 11 pixels; most fonts are narrower."""
    widths = {".": 3.6, ",": 3.6, "−": 9.3}
    return sum(widths.get(c, 7.1) for c in text)


def _x_labels(frame: "_Frame") -> list[tuple[float, str]]:
    """The middles and the texts of the labels of the x axis, whole numbers that do not overlap.

    Labels next to the edges move inwards, so that none is cut.
    """
    found: list[tuple[float, str]] = []
    free = 0.0
    for value in ticks(frame.first, frame.last, 4):
        if value != int(value):
            continue
        text = number(value)
        half = _text_width(text) / 2
        x = min(frame.x(value), frame.width - half - 1)
        if x - half >= free:
            found.append((x, text))
            free = x + half + 4
    return found


@dataclass(frozen=True)
class _Frame:
    """Ranges of both axes, and the conversion of values to pixels."""

    first: Number
    last: Number
    low: Number
    high: Number
    width: int
    height: int
    left: float = LEFT

    @staticmethod
    def around(lines: Sequence[Line], width: int, height: int) -> "_Frame | None":
        xs = [x for line in lines for x, _ in line.points]
        ys = []
        for line in lines:
            errors = line.errors or [None] * len(line.points)
            for (_, y), error in zip(line.points, errors, strict=True):
                if math.isfinite(y):
                    ys += [y - (error or 0), y + (error or 0)]
        if not ys:
            return None
        low, high = min(ys), max(ys)
        # A flat curve needs a range above zero; one that is flat up to rounding should look flat, with
        # ticks of few digits.
        spread, size = high - low, max(abs(low), abs(high))
        padding = 0.08 * spread if spread > 1e-6 * size else 0.1 * size or 1.0
        return _Frame(
            min(xs), max(max(xs), min(xs) + 1), low - padding, high + padding, width, height
        )

    def x(self, value: Number) -> float:
        share = (value - self.first) / (self.last - self.first)
        return self.left + share * (self.width - self.left - RIGHT)

    def y(self, value: Number) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def _curve(line: Line, frame: _Frame) -> str:
    color = f"s{line.color % NUM_COLORS}"
    path, pen_down, parts = "", False, []
    for index, (x, y) in enumerate(line.points):
        if not math.isfinite(y):
            pen_down = False
            continue
        px, py = frame.x(x), frame.y(y)
        path += f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}"
        pen_down = True
        error = line.errors[index] if line.errors else None
        if error is not None:
            ends = f"M{px:.1f} {frame.y(y - error):.1f}V{frame.y(y + error):.1f}"
            parts.append(f'<path class="whisker {color}" d="{ends}"/>')
        if line.dots:
            value = number(y) if error is None else f"{number(y)} ± {number(error)}"
            hint = f"<title>{escape(line.name)}, {line.axis} {number(x)}: {value}</title>"
            parts.append(
                f'<circle class="{color}" cx="{px:.1f}" cy="{py:.1f}" r="3.4">{hint}</circle>'
            )
    kind = "line faint" if line.faint else "line"
    return "".join([f'<path class="{kind} {color}" d="{path}"/>', *parts])


def _hover_columns(lines: Sequence[Line], frame: _Frame) -> list[str]:
    """Invisible columns over the whole height that show the values of all curves on hovering."""
    xs = sorted({x for line in lines for x, y in line.points if math.isfinite(y)})
    xs = xs[:: -(-len(xs) // HOVER_COLUMNS)] if xs else xs
    values = [dict(line.points) for line in lines]
    # Each column reaches half of the way to its neighbours.
    centres = [frame.x(x) for x in xs]
    edges = [frame.left, *((a + b) / 2 for a, b in pairwise(centres)), frame.width - RIGHT]
    parts = []
    for x, (left, right) in zip(xs, pairwise(edges), strict=True):
        texts = [f"{lines[0].axis} {number(x)}"]
        texts += [f"{v.name}: {number(y[x])}" for v, y in zip(lines, values, strict=True) if x in y]
        box = f'x="{left:.1f}" y="{TOP:g}" width="{right - left:.1f}"'
        height = f'height="{frame.height - TOP - BOTTOM:g}"'
        hint = f"<title>{escape(chr(10).join(texts))}</title>"
        parts.append(f'<rect class="hover" {box} {height}>{hint}</rect>')
    return parts


def dumbbell(before: Number, after: Number, low: Number, high: Number, kind: str) -> str:
    """Draw a hollow dot for ``before``, joined to a filled one for ``after``, on ``[low, high]``."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return ""
    width, middle, edge = 150.0, 9.0, 7.0
    scale = (width - 2 * edge) / ((high - low) or 1.0)
    a, b = (edge + (v - low) * scale for v in (before, after))
    return (
        f'<svg class="dumbbell {kind}" viewBox="0 0 {width:g} {2 * middle:g}" aria-hidden="true">'
        f'<path class="track" d="M{edge:g} {middle:g}H{width - edge:g}"/>'
        f'<path class="link" d="M{a:.1f} {middle:g}H{b:.1f}"/>'
        f'<circle class="before" cx="{a:.1f}" cy="{middle:g}" r="4"/>'
        f'<circle class="after" cx="{b:.1f}" cy="{middle:g}" r="5"/></svg>'
    )


def stacked_bar(parts: Sequence[tuple[str, Number]]) -> str:
    """Draw shares of a whole as one bar; part ``i`` has series colour ``i``."""
    total = sum(value for _, value in parts) or 1.0
    x, pieces = 0.0, []
    for index, (name, value) in enumerate(parts):
        width = 1000 * value / total
        hint = f"<title>{escape(name)}: {100 * value / total:.0f} %</title>"
        box = f'x="{x:.1f}" width="{max(0.0, width - 2):.1f}" height="20"'
        pieces.append(f'<rect class="s{index % NUM_COLORS}" {box}>{hint}</rect>')
        x += width
    label = escape(", ".join(f"{name} {100 * value / total:.0f} %" for name, value in parts))
    return (
        '<svg class="stack" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(pieces)}</svg>'
    )


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """A list of names with their series colours."""
    items = (
        f'<li><i class="s{color % NUM_COLORS}"></i>{escape(name)}</li>' for name, color in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'
