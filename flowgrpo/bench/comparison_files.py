"""Writes a comparison as JSON, as Markdown and as an HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from flowgrpo.bench.comparison import Row, Setting, exploitation
from flowgrpo.bench.run_scores import AXES, CurvePoint
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.data.files import write_whole
from flowgrpo.evaluation.charts import Line, legend, line_chart
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.report import write_page

FORMAT = 1
ABOUT = (
    "Differences are second minus first on the same prompts. ± is half of the 95 % interval: a paired "
    "bootstrap over prompts, and a t interval over runs where both settings have several seeds. A "
    "difference whose interval contains 0 is within noise. Of twenty tasks without any difference, "
    "about one is marked by chance."
)
ONE_RUN = (
    "At least one setting is a single run, so the intervals cover prompts and noise, not the seed of "
    "training: the verdict is about these models, not about their settings."
)


@dataclass(frozen=True)
class Pair:
    """Two settings, or benchmark results, and their rows."""

    first: str
    second: str
    rows: Sequence[Row]
    images: int


@dataclass(frozen=True)
class Comparison:
    """Everything that is written.

    Attributes:
        settings: The settings with their scores; empty for results of benchmarks.
        pairs: The first setting with each other one.
        curves: For each setting the curve of each of its runs.
        differing: For each setting but the first, the configuration's keys in which it differs.
        notes: Sentences that a reader must know.
    """

    pairs: Sequence[Pair]
    settings: Sequence[Setting] = ()
    curves: Mapping[str, Sequence[Sequence[CurvePoint]]] = field(default_factory=dict)
    differing: Mapping[str, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``comparison.json``, ``comparison.md`` and ``comparison.html`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"comparison.{end}" for end in ("json", "md", "html")]
    write_whole(files[0], strict_json.dumps(as_json(comparison), indent=1, ensure_ascii=False))
    write_whole(files[1], markdown(comparison))
    write_page(files[2], "flowgrpo comparison", _page(comparison))
    return files


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence for each reward of each pair, and one for each setting about exploitation."""
    found = []
    for pair in comparison.pairs:
        several = f" ({pair.first} and {pair.second})" if len(comparison.pairs) > 1 else ""
        found += [
            f"{row.reward}{several}: {row.verdict(pair.first, pair.second)}"
            for row in pair.rows
            if not row.task
        ]
    for setting in comparison.settings:
        kind, words = exploitation(setting)
        if setting.weights:
            found.append(f"{setting.name}, reward hacking {kind}: {words}")
    return found


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON; numbers that are not finite are null."""
    pairs = [
        {
            "first": p.first,
            "second": p.second,
            "images": p.images,
            "rows": [
                {**asdict(r), "noise": r.is_noise, "verdict": r.verdict(p.first, p.second)}
                for r in p.rows
            ],
        }
        for p in comparison.pairs
    ]
    settings = []
    for one in comparison.settings:
        kind, words = exploitation(one)
        members = [
            {
                "run": m.name,
                "seed": m.seed,
                "iteration": m.iteration,
                "images": len(m.prompts),
                "scores": {k: _mean(v) for k, v in m.scores.items()},
                "metrics": dict(m.metrics),
            }
            for m in one.members
        ]
        hacking = {"kind": kind, "words": words} if one.weights else None
        settings.append({"name": one.name, "runs": members, "reward_hacking": hacking})
    curves = {
        name: [[{"cost": p.cost, "scores": p.scores} for p in curve] for curve in runs]
        for name, runs in comparison.curves.items()
    }
    body = {
        "format": FORMAT,
        "about": ABOUT,
        "notes": list(comparison.notes),
        "settings": settings,
        "pairs": pairs,
        "configuration": {
            n: {k: list(v) for k, v in d.items()} for n, d in comparison.differing.items()
        },
        "curves": curves,
    }
    found: dict[str, Any] = _finite(body)
    return found


def markdown(comparison: Comparison) -> str:
    """Tables for a paper or a pull request."""
    parts = []
    for pair in comparison.pairs:
        head = ("", pair.first, pair.second, "difference", "95 % interval", "wins", "")
        lines = [f"| {' | '.join(map(_cell, head))} |", "|---|" + "---:|" * 5 + "---|"]
        for cells in _cells(pair):
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        parts.append("\n".join(lines))
    parts += [f"- {_cell(v)}" for v in verdicts(comparison)]
    parts += [f"- {_cell(n)}" for n in comparison.notes]
    return "\n\n".join([*parts, ABOUT]) + "\n"


def _cells(pair: Pair) -> list[tuple[str, ...]]:
    """The rows of a table as text."""
    found: list[tuple[str, ...]] = []
    for row in pair.rows:
        name = f"{row.reward}: {row.task}" if row.task else row.reward
        wins = "–" if row.wins is None else f"{100 * row.wins:.0f} %"
        interval = "–"
        if math.isfinite(row.low):
            interval = f"{row.show(row.low, '+')} to {row.show(row.high, '+')}"
        found.append(
            (
                name,
                row.show(row.first),
                row.show(row.second),
                row.show(row.difference, "+"),
                interval,
                wins,
                row.verdict(pair.first, pair.second),
            )
        )
    return found


def _cell(text: str) -> str:
    """Text in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _page(comparison: Comparison) -> str:
    names = [s.name for s in comparison.settings]
    if not names:
        names = [comparison.pairs[0].first, *(p.second for p in comparison.pairs)]
    chips = "".join(f"<li>{escape(n)}</li>" for n in names)
    items = "".join(f"<p>{escape(v)}</p>" for v in verdicts(comparison))
    parts = [
        f'<header><p class="brand">flowgrpo compare</p><h1>{escape(" and ".join(names))}</h1>'
        f'<ul class="chips">{chips}</ul></header>',
        f'<section class="card verdict">{items}<p class="quiet">{escape(ABOUT)}</p></section>',
    ]
    if comparison.notes:
        listed = "".join(f"<li>{escape(n)}</li>" for n in comparison.notes)
        parts.append(
            f'<section class="card warnings"><h3>Before you conclude</h3><ul>{listed}</ul></section>'
        )
    parts += [_pair(pair) for pair in comparison.pairs]
    parts += [_settings(comparison), _curves(comparison), _configuration(comparison)]
    return "\n".join(filter(None, parts))


def _pair(pair: Pair) -> str:
    head = _row(("", pair.first, pair.second, "difference", "95 % interval", "wins", ""), "th")
    body = ""
    for row, cells in zip(pair.rows, _cells(pair), strict=True):
        kind = "noise" if row.is_noise else "rose" if row.difference > 0 else "fell"
        inner = "".join(
            f'<td class="{kind}">{escape(c)}</td>' if i == 3 else f"<td>{escape(c)}</td>"
            for i, c in enumerate(cells)
        )
        body += f'<tr class="all">{inner}</tr>' if not row.task else f"<tr>{inner}</tr>"
    note = f"{counted(pair.images, 'image', ',')}." if pair.images else ""
    table = f'<div class="card"><div class="scroll"><table>{head}{body}</table></div></div>'
    return section(f"{pair.first} → {pair.second}", note, table)


def _settings(comparison: Comparison) -> str:
    """Each run with its means, for settings of several seeds, and its other metrics."""
    members = [(s, m) for s in comparison.settings for m in s.members]
    if not members:
        return ""
    rewards = list(dict.fromkeys(k for _, m in members for k in m.scores))
    metrics = list(dict.fromkeys(k for _, m in members for k in m.metrics))
    head = _row(("", "seed", "iterations", "images", *rewards, *metrics), "th")
    body = ""
    for setting, m in members:
        name = setting.name if m.name == setting.name else f"{setting.name}: {m.name}"
        cells = [name, _text(m.seed), _text(m.iteration), str(len(m.prompts))]
        cells += [f"{_mean(m.scores[k]):.4g}" if k in m.scores else "–" for k in rewards]
        cells += [f"{m.metrics[k]:.4g}" if k in m.metrics else "–" for k in metrics]
        body += _row(cells)
    table = f'<div class="card"><div class="scroll"><table>{head}{body}</table></div></div>'
    note = "Means over all images of each model, and the metrics of its evaluation, such as a diversity."
    return section("Models", note, table)


def _curves(comparison: Comparison) -> str:
    """Held-out scores over each cost; runs of one setting are averaged."""
    curves = comparison.curves
    rewards = list(
        dict.fromkeys(k for runs in curves.values() for r in runs for p in r for k in p.scores)
    )
    parts = []
    for reward in rewards:
        figures = []
        for axis in AXES:
            lines = [
                Line(name, points, color, dots=True, axis=axis)
                for color, (name, runs) in enumerate(curves.items())
                if (points := mean_curve(runs, reward, axis))
            ]
            if any(len(line.points) > 1 for line in lines):
                names = legend([(line.name, line.color) for line in lines])
                chart = line_chart(lines)
                figures.append(
                    f'<figure class="card"><h3>{escape(reward)}</h3>{names}{chart}'
                    f'<p class="axis">{axis}</p></figure>'
                )
        if figures:
            parts.append(f'<div class="pair">{"".join(figures)}</div>')
    note = (
        "Held-out means over what was spent on training. Seconds exclude evaluations. Samples and "
        "denoiser evaluations exclude groups that train.refill replaced."
    )
    return section("Learning curves", note, "".join(parts))


def mean_curve(
    runs: Sequence[Sequence[CurvePoint]], reward: str, axis: str
) -> list[tuple[float, float]]:
    """The mean score of several runs at the evaluations that all of them have, over their mean cost."""
    by_iteration = [{p.cost["iterations"]: p for p in run if reward in p.scores} for run in runs]
    common = sorted(set.intersection(*(set(b) for b in by_iteration))) if by_iteration else []
    found = []
    for iteration in common:
        points = [b[iteration] for b in by_iteration]
        x = sum(p.cost[axis] for p in points) / len(points)
        y = sum(p.scores[reward] for p in points) / len(points)
        if math.isfinite(x):
            found.append((x, y))
    return found


def _configuration(comparison: Comparison) -> str:
    parts = []
    for name, keys in comparison.differing.items():
        body = "".join(_row((k, _text(a), _text(b))) for k, (a, b) in keys.items())
        if body:
            head = _row(("key", comparison.settings[0].name, name), "th")
            parts.append(
                f'<div class="card"><div class="scroll"><table>{head}{body}</table></div></div>'
            )
    return section("Configuration", "The keys in which the settings differ.", "".join(parts))


def _row(cells: Sequence[str], kind: str = "td") -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(c)}</{kind}>" for c in cells) + "</tr>"


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def _finite(value: Any) -> Any:
    """A copy for JSON in which numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
