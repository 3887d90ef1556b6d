"""Writes the report of a run: one HTML file without external resources, which needs no network.

The report states how the held-out scores changed and whether the change exceeds noise, lists warnings,
and contains a film strip of the comparison grids, the best and the worst samples, all curves, costs and
times, the configuration and the command that resumes the run. A script of a few lines moves the film
strip; without it the page shows the newest images.
"""

import base64
import math
import shlex
import statistics
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from flowgrpo.core.text import counted, tag_words
from flowgrpo.data.files import write_whole
from flowgrpo.evaluation.bench_section import benchmarks
from flowgrpo.evaluation.charts import Number, dumbbell, duration, number
from flowgrpo.evaluation.costs import costs
from flowgrpo.evaluation.curves import (
    evaluation_seconds,
    held_out_metrics,
    main_curves,
    section,
    times,
    total,
    training_metrics,
)
from flowgrpo.evaluation.film_strip import film_strip
from flowgrpo.evaluation.hacking import hacking_section
from flowgrpo.evaluation.local_server import script_source
from flowgrpo.evaluation.records import (
    CREDIT_FILE,
    EARLIER_CREDIT_FILE,
    Change,
    Records,
    finite,
)
from flowgrpo.evaluation.run_history import run_history
from flowgrpo.evaluation.sample_section import best_and_worst
from flowgrpo.evaluation.warnings import warnings

CHIPS = {
    "algorithm": "algorithm.kind",
    "model": "model.path",
    "groups of": "algorithm.group_size",
}
"""Settings shown in the header, by their label."""

MARKS = {"rose": "▲", "fell": "▼", "noise": "≈", "unknown": "", "unmeasured": ""}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run directory.

    Args:
        folder: The run directory, with ``metrics.jsonl`` or ``evaluations.jsonl``. The files
            ``timings.jsonl``, ``config.toml``, ``environment.json`` and ``grids/*.png`` are optional.

    Returns:
        Path of the report.

    Raises:
        ValueError: If there is nothing to report on, or a file is invalid; the message names the file
            and the line.
    """
    title, content = report_content(Path(folder))
    return write_page(Path(folder) / "report.html", title, content)


def report_content(folder: Path) -> tuple[str, str]:
    """The title of a run's report, and its sections as HTML.

    Raises:
        ValueError: As :func:`write_report`.
    """
    records = Records(folder)
    sections = [
        _header(records),
        _verdict(records),
        _warnings(records),
        film_strip(records) or _grids(records),
        _videos(records),
        best_and_worst(records),
        _tasks(records),
        _regimes(records),
        hacking_section(records),
        benchmarks(records),
        main_curves(records),
        held_out_metrics(records),
        _inspection(records),
        training_metrics(records),
        costs(records),
        times(records),
        run_history(records),
        _appendix(records),
    ]
    return f"{_name(records)} · flowgrpo report", "\n".join(filter(None, sections))


def write_page(path: Path, title: str, content: str) -> Path:
    """Write HTML sections as a page with the report's style. The file is replaced atomically."""
    write_whole(path, page(title, content))
    return path


def page(title: str, content: str, version: str | None = None, interval: float = 2.0) -> str:
    """A page with the report's style and script.

    The content security policy lets nothing run but the script, whose digest it names.

    Args:
        title: Title of the window, as text.
        content: The sections, as HTML.
        version: Of a page that a server keeps up to date, the version of the content; None for a file.
        interval: Seconds after which such a page asks the server again.
    """
    files = resources.files("flowgrpo.evaluation")
    script = files.joinpath("report_script.js").read_text("utf-8")
    live = (
        ""
        if version is None
        else f' data-version="{escape(version)}" data-interval="{1000 * interval:g}"'
    )
    status = "" if version is None else '<p class="live" role="status">connecting</p>'
    return Template(files.joinpath("report_template.html").read_text("utf-8")).substitute(
        title=escape(title),
        content=content,
        script=script,
        policy=f"script-src {script_source(script)}"
        + ("" if version is None else "; connect-src 'self'"),
        live=live,
        status=status,
    )


def _inspection(records: Records) -> str:
    """The credit of some trajectories, if the run was inspected."""
    paths = [records.folder / name for name in (CREDIT_FILE, EARLIER_CREDIT_FILE)]
    return next((p.read_text("utf-8") for p in paths if p.exists()), "")


def _name(records: Records) -> str:
    return records.folder.resolve().name


def _header(records: Records) -> str:
    planned = records.setting("train.iterations")
    of = f" of {number(planned)}" if planned else ""
    chips = [f"{number(len(records.metrics))}{counted(of, 'iteration')}"]
    chips += [
        f"{words} {records.setting(key)}"
        for words, key in CHIPS.items()
        if records.setting(key) is not None
    ]
    if "device" in records.environment:
        chips.append(f"on {records.environment['device']}")
    # The times of iterations do not include evaluations.
    spent = sum(total(t) for t in records.timings)
    spent += sum(evaluation_seconds(records))
    chips += [duration(spent)] if spent else []
    items = "".join(f"<li>{escape(chip)}</li>" for chip in chips)
    name = f'<p class="brand">flowgrpo run</p><h1>{escape(_name(records))}</h1>'
    return f'<header>{name}<ul class="chips">{items}</ul></header>'


def _verdict(records: Records) -> str:
    changes = [records.change(score) for score in records.scores()]
    if not changes:
        return _card(*_training_only(records))
    if len(records.evaluations) == 1:
        return _card(*_evaluated_once(records))
    tiles = "".join(_tile(change, records) for change in changes)
    text = [_scores_paragraph(records, changes), _diversity_paragraph(records)]
    text += [_regime_paragraph(records, tag) for tag in records.regimes()]
    about = f'<p class="quiet">{_about_numbers(records, changes)}</p>'
    return _card(_headline(changes), text, f'<div class="tiles">{tiles}</div>', about)


def _card(headline: str, text: Sequence[str], *more: str) -> str:
    """The first card of the report; all arguments are HTML."""
    paragraphs = "".join(f"<p>{part}</p>" for part in text if part)
    body = f'<p class="headline">{headline}</p>{paragraphs}{"".join(more)}'
    return f'<section class="card verdict">{body}</section>'


def _training_only(records: Records) -> tuple[str, list[str]]:
    if records.evaluations:
        text = (
            "Held-out images were generated without a reward, so this report cannot say whether the model "
            "is better; compare the images. A table <code>[[rewards]]</code> measures them."
        )
        return "No reward was measured on held-out prompts.", [text]
    values = finite(records.series("reward"))
    few = max(1, len(values) // 10)
    text = "Without held-out evaluations this report cannot say whether the model is better."
    if values:
        first, last = statistics.fmean(values[:few]), statistics.fmean(values[-few:])
        text += f" The reward on training samples changed from {number(first)} to {number(last)}."
    return "The model was not evaluated on held-out prompts.", [text]


def _evaluated_once(records: Records) -> tuple[str, list[str]]:
    parts = []
    for score in records.scores():
        change = records.change(score)
        _, error = records.held_out(score, 0)
        spread = "" if error is None else f" ± {change.show(error)}"
        unit = " points" if change.in_points else ""
        parts.append(f"<b>{escape(score)}</b> {change.show(change.after)}{spread}{unit}")
    iteration = records.evaluations[0]["iteration"]
    return (
        "The model was evaluated once, so there is nothing to compare with yet.",
        [f"After {counted(number(iteration), 'iteration')}: {', '.join(parts)}."],
    )


def _headline(changes: Sequence[Change]) -> str:
    """The verdict in one sentence, as HTML; on scores with a known error, if there are any."""
    stated = [c for c in changes if c.kind != "unknown"] or changes
    words = {c.words for c in stated}
    if words == {"stayed within noise"}:
        return "No change beyond noise on held-out prompts."
    if len(words) > 1:
        parts = ", ".join(f"{escape(c.name)} {c.words}" for c in stated)
        return f"Held-out scores are mixed: {parts}."
    several = len(stated) > 1
    subject = "Held-out scores" if several else f"On held-out prompts {escape(stated[0].name)}"
    doubt = "; whether by more than noise is unknown" if stated[0].kind == "unknown" else ""
    return f"{subject} {stated[0].words}{doubt}."


def _scores_paragraph(records: Records, changes: Sequence[Change]) -> str:
    clauses = []
    for change in changes:
        joint = " from " if change.words in ("rose", "fell") else ": "
        span = f"{joint}{_span(change)}{_unit(change)} ({change.difference})"
        if change.kind == "unmeasured":
            span = ""
        clauses.append(f"<b>{escape(change.name)}</b> {change.words}{span}")
    first = changes[0].name
    kinds = [records.change(first, task).kind for task in records.tasks()]
    tasks = ""
    if {"rose", "fell", "noise"} & set(kinds):
        tasks = (
            f" Of {counted(len(kinds), 'task')}, {escape(first)} rose in {kinds.count('rose')}, fell in "
            f"{kinds.count('fell')} and stayed within noise in {kinds.count('noise')}."
        )
    iteration = number(records.evaluations[-1]["iteration"])
    return f"After {counted(iteration, 'iteration')}, {'; '.join(clauses)}.{tasks}"


def _diversity_paragraph(records: Records) -> str:
    clauses = []
    for change in records.diversities():
        share = 100 * (change.after / change.before - 1) if change.before else math.nan
        percent = f" by {abs(share):.1f} %" if math.isfinite(share) else ""
        moved = "fell" if change.after < change.before else "rose"
        clauses.append(f"{escape(change.name)} {moved}{percent} from {_span(change)}")
    return f"Diversity: {'; '.join(clauses)}." if clauses else ""


def _regime_paragraph(records: Records, tag: str) -> str:
    """How the scores changed with another way to sample."""
    view, clauses = records.regime(tag), []
    for score in view.scores():
        change = view.change(score)
        span = "" if change.kind == "unmeasured" else f", {_span(change)}{_unit(change)}"
        clauses.append(
            f"<b>{escape(score)}</b> {change.words}{span}{span and f' ({change.difference})'}"
        )
    return f"Sampled with <b>{escape(tag_words(tag))}</b>: {'; '.join(clauses)}."


def _about_numbers(records: Records, changes: Sequence[Change]) -> str:
    """The number of images, and the meaning and the source of the errors."""
    ends = (records.evaluations[0], records.evaluations[-1])
    first, last = (number(e.get("images", math.nan)) for e in ends)
    text = [f"{counted(last, 'held-out image')}."]
    if first != last:
        text = [
            f"The first evaluation has {counted(first, 'image')} and the last {last}, so their prompts differ "
            "and the change is only approximate."
        ]
    if any(c.error is not None for c in changes):
        text.append(
            "± is one standard error of the difference; a change below two of them counts as noise."
        )
    if not all("errors" in e for e in ends) and any(c.in_points for c in changes):
        text.append(
            "It is the error of a proportion of independent images, which is an upper limit for "
            "scores between 0 and 1."
        )
    if any(c.kind == "unknown" for c in changes):
        text.append("The error of scores without ± is unknown; they may have changed by chance.")
    return " ".join(text)


def _span(change: Change) -> str:
    return f"{change.show(change.before)} to {change.show(change.after)}"


def _unit(change: Change) -> str:
    return " points" if change.in_points else ""


def _tile(change: Change, records: Records) -> str:
    weight = records.weights().get(change.name)
    role = "" if weight is None else "trained on" if weight else "not trained on"
    short = {"noise": "within noise", "unmeasured": "not measured", "unknown": "error unknown"}
    moved = f"{MARKS[change.kind]} {change.difference}{_unit(change)}"
    return (
        f'<div class="tile {change.kind}">'
        f'<div class="name"><b>{escape(change.name)}</b><span>{role}</span></div>'
        f'<div class="values">{_span(change).replace(" to ", " <i>→</i> ")}</div>'
        f'<div class="move">{moved}, {short.get(change.kind, change.words)}</div></div>'
    )


def _warnings(records: Records) -> str:
    found = warnings(records)
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    title = counted(len(found), "warning")
    return f'<section class="card warnings"><h3>{title}</h3><ul>{items}</ul></section>'


def _grids(records: Records) -> str:
    """The newest comparison grid as it is, for those that do not say where their images are."""
    figures = []
    for path in records.grids:
        if path.with_suffix(".mp4").exists():
            continue
        with Image.open(path) as picture:
            size = f'width="{picture.width}" height="{picture.height}"'
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        image = f'<img {size} alt="{escape(f"Comparison grid {path.stem}")}" src="{source}">'
        figures.append(f'<figure class="card picture">{image}</figure>')
    note = "The newest comparison grid; earlier ones are in the folder <code>grids</code>."
    return section("Comparison grid", note, "".join(figures))


def _videos(records: Records) -> str:
    """The newest comparison grid as it plays, if the model makes videos."""
    figures = []
    for path in records.grids:
        video = path.with_suffix(".mp4")
        if video.exists():
            with Image.open(path) as picture:
                size = f'width="{picture.width}" height="{picture.height}"'
            source = f"data:video/mp4;base64,{base64.b64encode(video.read_bytes()).decode()}"
            player = f'<video controls loop muted playsinline {size} src="{source}"></video>'
            figures.append(f'<figure class="card picture">{player}</figure>')
    note = "The newest comparison grid; earlier ones are in the folder <code>grids</code>."
    return section("Comparison grid", note, "".join(figures))


def _tasks(records: Records) -> str:
    cards = _task_cards(records)
    note = (
        "Hollow dots show the score before training, filled dots after. ▲ and ▼ mark changes of more "
        "than two standard errors, ≈ changes that may be noise. Of twenty tasks without any change, "
        "about one is marked by chance."
    )
    return section("By task", note, f'<div class="pair">{cards}</div>' if cards else "")


def _regimes(records: Records) -> str:
    """The same tables for each further way to sample."""
    parts = []
    for tag in records.regimes():
        view = records.regime(tag)
        if cards := _task_cards(view):
            images = number(view.evaluations[-1].get("images", math.nan))
            title = f"{escape(tag_words(tag))}, {counted(images, 'image')}"
            parts.append(f'<h3>{title}</h3><div class="pair">{cards}</div>')
    note = "The same weights and prompts, sampled in the ways that <code>evaluation.regimes</code> names."
    return section("Other ways to sample", note, "".join(parts))


def _task_cards(records: Records) -> str:
    """A table for each score: all images and each task, before and after."""
    if len(records.evaluations) < 2:
        return ""
    cards = []
    for score in records.scores():
        all_changes = [records.change(score)]
        all_changes += [records.change(score, task) for task in records.tasks()]
        values = [v for c in all_changes for v in (c.before, c.after) if math.isfinite(v)]
        ends = (0.0, 1.0) if records.in_points(score) else (min(values), max(values))
        rows = "".join(_task_row(c, ends, whole=i == 0) for i, c in enumerate(all_changes))
        head = "<tr><th></th><th>before</th><th>after</th><th>change</th><th></th></tr>"
        table = f'<div class="scroll"><table>{head}{rows}</table></div>'
        cards.append(f'<div class="card"><h3>{escape(score)}</h3>{table}</div>')
    return "".join(cards)


def _task_row(change: Change, ends: tuple[Number, Number], whole: bool) -> str:
    name = "all" if whole else change.name.replace("_", " ")
    row = '<tr class="all">' if whole else "<tr>"
    picture = dumbbell(change.before, change.after, *ends, change.kind)
    return (
        f"{row}<td>{escape(name)}</td>"
        f"<td>{change.show(change.before)}</td><td>{change.show(change.after)}</td>"
        f'<td class="{change.kind}">{MARKS[change.kind]} {change.difference}</td>'
        f"<td>{picture}</td></tr>"
    )


def _appendix(records: Records) -> str:
    parts = []
    if records.config_text:
        text = escape(records.config_text.strip())
        parts.append(
            f'<details class="card"><summary>Configuration</summary><pre>{text}</pre></details>'
        )
    if records.environment:
        rows = "".join(
            f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>"
            for k, v in records.environment.items()
        )
        table = f'<div class="scroll"><table>{rows}</table></div>'
        parts.append(f'<details class="card"><summary>Environment</summary>{table}</details>')
    command = f"flowgrpo train {shlex.quote(str(records.folder / 'config.toml'))}"
    parts.append(
        '<div class="card command"><h3>Resume or repeat</h3>'
        f'<pre>{escape(command)}</pre><p class="quiet">This command resumes the run; with '
        "<code>--set run.folder=another/folder</code> it repeats it from the start.</p></div>"
    )
    return section("Reproduction", "", "".join(parts))
