"""The report's section on benchmarks (``[[evaluation.bench]]``)."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flowgrpo.core.text import counted
from flowgrpo.evaluation.charts import Line, legend, line_chart, number
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.records import Records

WORDS = {1: ("rose", "▲"), -1: ("fell", "▼"), 0: ("noise", "≈")}
"""Class of a change, by its direction, and the mark of the table."""


def benchmarks(records: Records) -> str:
    """A table for each benchmark, and a chart of its main results; empty without benchmarks."""
    labels = dict.fromkeys(k for e in records.evaluations for k in e.get("bench", {}))
    cards = [card for label in labels if (card := _card(records, label))]
    note = (
        "Before and after training, on the same prompts with the same noise. Intervals are 95 % "
        "bootstrap intervals over prompts, paired for the change; ≈ marks a change whose interval "
        "holds 0, which may be noise."
    )
    return section("Benchmarks", note, "".join(cards))


def problems(records: Records) -> list[str]:
    """A sentence for each evaluation at which a benchmark has no results."""
    return [
        f"The benchmark {label} has no results after {counted(evaluation['iteration'], 'iteration')}: "
        f"{table['problem']}"
        for evaluation in records.evaluations
        for label, table in evaluation.get("bench", {}).items()
        if table.get("problem")
    ]


def direction(change: Sequence[float | None]) -> int:
    """1 or -1 if the interval of a change ``[value, low, high]`` excludes 0, else 0."""
    low, high = change[1:]
    if low is None or high is None:
        return 0
    return int(low > 0) - int(high < 0)


def _card(records: Records, label: str) -> str:
    series = [
        (e["iteration"], e["bench"][label])
        for e in records.evaluations
        if "results" in e.get("bench", {}).get(label, {})
    ]
    if not series:
        return ""
    first, last = series[0][1], series[-1][1]
    failed = f", {number(last['failed'])} failed" if last["failed"] else ""
    images = (
        f"{counted(number(last['images']), 'image')}{failed}; <code>{escape(last['folder'])}</code>"
    )
    rows = "".join(_row(name, first, last, len(series) > 1) for name in last["results"])
    head = "<tr><th></th><th>before</th><th>after</th><th>change</th><th>95 % interval</th></tr>"
    if len(series) == 1:
        head = "<tr><th></th><th>result</th><th>95 % interval</th></tr>"
    return (
        f'<div class="card"><h3>{escape(last["title"])}</h3><p class="quiet">{images}</p>'
        f'<div class="scroll"><table>{head}{rows}</table></div>{_chart(series)}</div>'
    )


def _row(name: str, first: Mapping[str, Any], last: Mapping[str, Any], several: bool) -> str:
    kind = ' class="all"' if name in last["main"] else ""
    cells = [escape(name)]
    if several:
        change = last["changes"].get(name, [None, None, None])
        word, mark = WORDS[direction(change)]
        cells += [_show(first["results"].get(name)), _show(last["results"][name])]
        text = f'<span class="{word}">{mark} {_show(change[0])}</span>'
        cells += [text if change[0] is not None else "–", _interval(change[1:])]
    else:
        cells += [_show(last["results"][name]), _interval(last["intervals"][name])]
    return f"<tr{kind}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _chart(series: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """The main results over iterations, if there are more than two evaluations."""
    if len(series) < 3:
        return ""
    names = [n for n in series[-1][1]["main"] if n in series[-1][1]["results"]]
    lines = [
        Line(name, [(i, _float(t["results"].get(name))) for i, t in series], color, dots=True)
        for color, name in enumerate(names)
    ]
    key = legend([(line.name, line.color) for line in lines])
    return f'{key}{line_chart(lines)}<p class="axis">iteration</p>'


def _show(value: float | None) -> str:
    return "–" if value is None else number(value)


def _interval(ends: Sequence[float | None]) -> str:
    return "–" if None in ends else f"{_show(ends[0])} to {_show(ends[1])}"


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
