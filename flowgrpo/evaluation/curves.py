"""Sections of the report with charts: held-out scores, rewards, training metrics and times."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

from flowgrpo.core.text import counted
from flowgrpo.evaluation import charts
from flowgrpo.evaluation.charts import Line, Number, Point, duration, line_chart, number
from flowgrpo.evaluation.records import RECENT, Records, finite

METRICS = {
    "score": (
        "Score",
        "Raw mean on training samples. Rises if trained on; should not fall if its weight is 0.",
    ),
    "part": (
        "Part of the reward",
        "Contribution of one reward, after scale, clip and weight. None should dominate by accident.",
    ),
    "learning": (
        "Learning reward",
        "Reported by a reward model that is trained during the run.",
    ),
    "reward_std": (
        "Reward spread",
        "Standard deviation over samples. Above zero; shrinks as prompts are mastered.",
    ),
    "group/zero_variance": (
        "Groups without variance",
        "Prompts whose samples all have the same reward, so nothing is learnt. Below 0.5.",
    ),
    "group/refilled": (
        "Replaced groups",
        "Groups of equal rewards that further prompts replaced; 0 without train.refill.",
    ),
    "group/diversity": (
        "Diversity within groups",
        "How much the samples of a prompt differ. Constant; a steady fall is collapse.",
    ),
    "group/duplicates": (
        "Duplicates",
        "Samples identical to another sample of their group. Zero.",
    ),
    "log_prob/noise": (
        "Noise of log-probs",
        "Difference between rollout and replay before any update. Far below the clip range.",
    ),
    "ratio/deviation": (
        "Ratio deviation",
        "Mean distance of the ratio from 1. About the clip range or less.",
    ),
    "ratio/clip_fraction": (
        "Clip fraction",
        "Share of actions beyond the clip range. Below about 0.3; zero while on-policy.",
    ),
    "ratio_deviation": (
        "Ratio deviation by step",
        "Mean distance of the ratio from 1. Similar at all steps.",
    ),
    "clip_fraction": (
        "Clip fraction by step",
        "Share of actions beyond the clip range. Similar at all steps.",
    ),
    "teacher/distance": (
        "Distance to the teachers",
        "Squared difference of the outputs. Falls, and levels off where the student cannot follow.",
    ),
    "teacher_distance": (
        "Distance to the teachers by step",
        "Squared difference of the outputs. Falls at all steps.",
    ),
    "dpo/accuracy": (
        "Pairs preferred rightly",
        "Share of pairs whose chosen picture the policy prefers more than the reference. Rises above 0.5.",
    ),
    "dpo/margin": (
        "Margin of chosen pictures",
        "Mean argument of the loss's sigmoid. Rises slowly.",
    ),
    "dpo/chosen_error": (
        "Error on chosen pictures",
        "Above that of the reference. About 0 or below; if it grows, the model leaves them.",
    ),
    "grad_norm": (
        "Gradient norm",
        "Before clipping. Within one order of magnitude, without spikes.",
    ),
    "loss/policy": (
        "Policy loss",
        "With advantages around zero, and no sign of progress. Without them it falls.",
    ),
    "loss/kl": (
        "KL to the reference",
        "Grows slowly and levels off; a steep rise is drift.",
    ),
    "kl/velocity": (
        "Distance to the reference",
        "Squared difference of the outputs. Grows slowly and levels off.",
    ),
    "diversity": (
        "Diversity",
        "On held-out prompts. Constant; if it falls, the images of a prompt become more similar.",
    ),
    "lr": (
        "Learning rate",
        "Follows the schedule in the configuration.",
    ),
    "failures": (
        "Failed scores",
        "Samples for which a reward model returned no score. Zero.",
    ),
    "skipped_updates": (
        "Skipped updates",
        "Skipped because of a spike in the gradient norm. Zero.",
    ),
    "nfe_per_prompt": (
        "Denoiser evaluations per prompt",
        "Cost of a rollout. Constant, unless the trained steps are chosen at random.",
    ),
    "decodes_per_prompt": (
        "Decodes per prompt",
        "Images decoded and scored. Constant.",
    ),
}
"""Title and healthy behaviour of metrics, by key or by the part of a key before a slash."""

STEADY = 0.03
"""A curve whose mean distance from its moving average is below this share of its range is drawn
without the average."""


def section(title: str, note: str, content: str) -> str:
    """A section of the page, empty if ``content`` is. ``note`` and ``content`` are HTML."""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>" if content else ""


def main_curves(records: Records) -> str:
    """The held-out scores and the training reward, next to each other."""
    main = _main_scores(records)
    figures = [_held_out_figure(records, main)] if main else []
    reward = records.series("reward")
    if reward:
        lines = _smoothed("reward", reward, color=2)
        figures.append(_figure("Reward on training samples", [lines[-1]], line_chart(lines)))
    note = (
        "Held-out scores show whether the model is better; the reward only shows whether it learns."
    )
    return section("Curves", note, _grid("pair", figures))


def held_out_metrics(records: Records) -> str:
    """The other scores and the metrics of held-out evaluations, one small chart for each."""
    others = [s for s in records.scores() if s not in _main_scores(records)]
    lines = [_held_out_line(records, name) for name in others]
    lines += [Line(key, curve, dots=True) for key, curve in records.held_out_metrics().items()]
    figures = [_mini(line.name, [line], line.points[-1][1]) for line in lines]
    note = "From the same evaluations. The number is the latest value."
    return section("Held-out metrics", note, _grid("minis", figures))


def training_metrics(records: Records) -> str:
    """A small chart for every metric that changes, and one line for those that are constant."""
    known = {k: i for i, k in enumerate(METRICS)}
    keys = {k for m in records.metrics for k in m} - {"iteration", "reward"}
    figures, constants = [], []
    by_step: dict[str, list[Point]] = {}
    for key in sorted(keys, key=lambda k: (known.get(_known(k), len(known)), k)):
        curve = records.series(key)
        per_step = re.fullmatch(r"step/(\d+)/(.+)", key)
        if per_step:
            by_step.setdefault(per_step[2], []).append((int(per_step[1]), records.recent(key)))
        elif len({y for _, y in curve}) == 1:
            title, _ = _explanation(key)
            constants.append(f"{escape(title.lower())} <b>{number(curve[0][1])}</b>")
        else:
            figures.append(_mini(key, _smoothed(key, curve), records.recent(key)))
    for name, steps in by_step.items():
        line = Line(name, sorted(steps), 2, dots=True, axis="step")
        figures.append(_mini(name, [line], None, f"By denoising step, last {RECENT} iterations. "))
    rest = f"Constant throughout: {', '.join(constants)}." if constants else ""
    rest = f'<p class="card constants">{rest}</p>' if rest else ""
    note = (
        "Over training iterations, each with its healthy behaviour. Numbers are means of the last "
        f"{RECENT} iterations."
    )
    return section("Training metrics", note, _grid("minis", figures) + rest)


def phases(timing: Mapping[str, Number | None]) -> dict[str, Number]:
    """Seconds of each phase of an iteration, without evaluations.

    Reward models run in parallel with the rollout, so their time (``scoring``) is not a phase; the
    time spent waiting for them is part of the rollout.
    """
    others = ("iteration", "total", "scoring", "evaluation")
    return {k: v or 0.0 for k, v in timing.items() if k not in others}


def total(timing: Mapping[str, Number | None]) -> Number:
    """Seconds of an iteration, without evaluations."""
    return timing.get("total") or sum(phases(timing).values())


def evaluation_seconds(records: Records) -> list[Number]:
    """Seconds of each held-out evaluation whose time is recorded; that after training is not.

    Earlier versions recorded them with the scores.
    """
    found = [t["evaluation"] for t in records.timings if t.get("evaluation") is not None]
    return found or [e["seconds"] for e in records.evaluations if "seconds" in e]


def times(records: Records) -> str:
    """Time by phase, as a bar and a table."""
    columns: dict[str, list[Number]] = {}
    for timing in records.timings:
        parts = phases(timing)
        for name, seconds in parts.items():
            columns.setdefault(name, []).append(seconds)
        columns.setdefault("other", []).append(max(0.0, total(timing) - sum(parts.values())))
    evaluations = evaluation_seconds(records)
    if evaluations:
        columns["evaluation"] = evaluations
    whole = sum(sum(v) for v in columns.values())
    if not records.timings or not whole:
        return ""
    columns = {n: v for n, v in columns.items() if n != "other" or sum(v) > 0.01 * whole}
    rows = []
    for index, (name, values) in enumerate(columns.items()):
        swatch = f'<i class="s{index % charts.NUM_COLORS}"></i>{escape(name.replace("_", " "))}'
        rows.append(_time_row(swatch, values, f"{100 * sum(values) / whole:.0f} %"))
    scoring = [t["scoring"] for t in records.timings if t.get("scoring") is not None]
    if any(scoring):
        rows.append(_time_row("reward models, in parallel with the rollout", scoring))
    rows.append(_time_row("<b>iteration</b>", [total(t) for t in records.timings]))
    head = "<tr><th></th><th>median</th><th>longest</th><th>share of all</th></tr>"
    bar = charts.stacked_bar([(n, sum(v)) for n, v in columns.items()])
    table = f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    note = f"Median and longest time of each phase, and its share of {duration(whole)}."
    return section("Time", note, f'<div class="card">{bar}{table}</div>')


def _time_row(name: str, values: Sequence[Number], share: str = "") -> str:
    median, longest = duration(statistics.median(values)), duration(max(values))
    return f"<tr><td>{name}</td><td>{median}</td><td>{longest}</td><td>{share}</td></tr>"


def _grid(kind: str, figures: Sequence[str]) -> str:
    return f'<div class="{kind}">{"".join(figures)}</div>' if figures else ""


def _main_scores(records: Records) -> list[str]:
    """The held-out scores of the large chart: all scores in points, or else the first score."""
    scores = records.scores()
    return [s for s in scores if records.in_points(s)] or scores[:1]


def _held_out_figure(records: Records, names: Sequence[str]) -> str:
    in_points = records.in_points(names[0])
    factor = 100.0 if in_points else 1.0
    lines = []
    for color, name in enumerate(names):
        line = _held_out_line(records, name, color)
        errors = [None if e is None else factor * e for e in line.errors or ()]
        lines.append(replace(line, points=[(x, factor * y) for x, y in line.points], errors=errors))
    title = "Held-out scores in points" if in_points else "Held-out score"
    known = any(e is not None for line in lines for e in line.errors or ())
    return _figure(f"{title}, ± standard error" if known else title, lines, line_chart(lines))


def _held_out_line(records: Records, name: str, color: int = 0) -> Line:
    values = [records.held_out(name, index) for index in range(len(records.evaluations))]
    iterations = [float(e["iteration"]) for e in records.evaluations]
    curve = [(x, mean) for x, (mean, _) in zip(iterations, values, strict=True)]
    return Line(name, curve, color, [error for _, error in values], dots=True)


def _smoothed(name: str, curve: Sequence[Point], color: int = 0) -> list[Line]:
    """A curve; if it is long and noisy, drawn faintly behind its moving average."""
    plain, window, values = Line(name, charts.thin(curve), color), len(curve) // 15, finite(curve)
    if window < 3 or not values:
        return [plain]
    average = charts.smooth(curve, window)
    off = finite([(x, abs(y - a)) for (x, y), (_, a) in zip(curve, average, strict=True)])
    if statistics.fmean(off) < STEADY * (max(values) - min(values)):
        return [plain]
    smooth = Line(f"{name}, mean over {counted(window, 'iteration')}", charts.thin(average), color)
    return [replace(plain, faint=True), smooth]


def _figure(title: str, lines: Sequence[Line], chart: str) -> str:
    legend = charts.legend([(line.name, line.color) for line in lines])
    body = f'<h3>{escape(title)}</h3>{legend}{chart}<p class="axis">iteration</p>'
    return f'<figure class="card">{body}</figure>'


def _mini(key: str, lines: Sequence[Line], value: Number | None, about: str = "") -> str:
    """A small chart with the metric's title, a number and its healthy behaviour."""
    title, healthy = _explanation(key)
    shown = "" if value is None else f" <b>{number(value)}</b>"
    text = f"<p>{escape(about + healthy)}</p>" if about + healthy else ""
    chart = line_chart(lines, width=340, height=130, num_ticks=2)
    return f'<figure class="card mini"><h3>{escape(title)}{shown}</h3>{chart}{text}</figure>'


def _known(key: str) -> str:
    """The longest prefix of a key in :data:`METRICS`; empty if there is none."""
    return max((k for k in METRICS if f"{key}/".startswith(f"{k}/")), key=len, default="")


def _explanation(key: str) -> tuple[str, str]:
    """Title and healthy behaviour of a metric."""
    known = _known(key)
    if not known:
        return key, ""
    title, healthy = METRICS[known]
    rest = key[len(known) + 1 :]
    return f"{title}: {rest}" if rest else title, healthy
