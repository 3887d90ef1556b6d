"""The HTML page of one or several benchmark folders; it needs no network."""

import base64
import contextlib
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrpo.bench.base import BenchError
from flowgrpo.bench.report import compared, interval, read_result, settings_line, show
from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.evaluation.report import write_page

THUMBNAIL, NUM_THUMBNAILS = 128, 16
RADIUS, MARGIN = 150.0, 110.0


def write_html(folders: Sequence[Path], out: Path) -> Path:
    """Write a page about results, the first of them compared with each other one.

    Raises:
        BenchError: If a folder has no results.
    """
    results = [read_result(f) for f in folders]
    title = " and ".join(dict.fromkeys(r["title"] for r in results))
    parts = [f'<header><p class="brand">flowgrpo bench</p><h1>{html.escape(title)}</h1></header>']
    for folder, result in zip(folders, results, strict=True):
        parts += [
            _chips(result),
            _warnings(result),
            _table(result),
            radar([result]),
            _images(folder, result),
        ]
    for other in folders[1:]:
        with contextlib.suppress(BenchError):  # of another benchmark, other data or another judge
            parts.append(_comparison(folders[0], other))
    parts += [_settings(r) for r in results]
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_page(out, f"{title} · flowgrpo bench", "\n".join(filter(None, parts)))


def _chips(result: Mapping[str, Any]) -> str:
    counts = result["counts"]
    chips = [
        result["label"],
        f"{counted(counts['judged'], 'image')} of {counted(counts['prompts'], 'prompt')}",
        settings_line(result),
        f"judge: {result['judge']['title']} {result['judge']['version']}".strip(),
    ]
    items = "".join(f"<li>{html.escape(c)}</li>" for c in chips)
    return f'<h2>{html.escape(result["label"])}</h2><ul class="chips">{items}</ul>'


def _warnings(result: Mapping[str, Any]) -> str:
    if not result["warnings"]:
        return ""
    items = "".join(f"<li>{html.escape(w)}</li>" for w in result["warnings"])
    return f'<section class="card warnings"><h3>Before you compare</h3><ul>{items}</ul></section>'


def _table(result: Mapping[str, Any]) -> str:
    references = result["references"]
    wanted = {m["name"] for m in result["metrics"]}
    references = [r for r in references if wanted & set(r["values"])]
    head = ["metric", result["label"], "95 % interval", "points"]
    names = [f"{r['model']}{' *' if r['differs'] else ''}" for r in references]
    rows = []
    for m in result["metrics"]:
        value = show(m["value"], m["percent"])
        if m.get("strict") is not None and m["strict"] != m["value"]:
            value += f" (strict {show(m['strict'], m['percent'])})"
        cells = [m["name"], value, interval(m), f"{m['points']:,}"]
        cells += [show(r["values"].get(m["name"]), m["percent"]) for r in references]
        rows.append(_row(cells, "all" if m["headline"] else ""))
    sources = sorted({f"{r['source']} ({r['judge']})" for r in references})
    note = f"Published scores: {'; '.join(sources)}. * other sampler settings." if sources else ""
    return (
        f'<section class="card"><div class="scroll"><table>{_head([*head, *names])}{"".join(rows)}'
        f'</table></div><p class="quiet">{html.escape(note)}</p></section>'
    )


def _head(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in cells) + "</tr>"


def _row(cells: Sequence[str], kind: str = "") -> str:
    inner = "".join(f"<td>{html.escape(c)}</td>" for c in cells)
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"


def _comparison(first: Path, second: Path) -> str:
    rows = []
    labels = [read_result(f)["label"] for f in (first, second)]
    for row in compared(first, second):
        percent = row["percent"]
        cells = [row["name"], show(row["first"], percent), show(row["second"], percent)]
        cells += [show(row["value"], percent), interval(row), row["verdict"]]
        rows.append(_row(cells, "all" if row["headline"] else ""))
    head = _head(["metric", *labels, "difference", "95 % interval", ""])
    note = (
        "Same prompts, paired resamples of prompts. A difference whose interval holds 0 is noise."
    )
    return (
        f'<h2>{html.escape(" → ".join(labels))}</h2><section class="card"><div class="scroll"><table>'
        f'{head}{"".join(rows)}</table></div><p class="quiet">{note}</p></section>'
    )


def radar(results: Sequence[Mapping[str, Any]]) -> str:
    """The spokes of one or several results as an ``<svg>``; empty with fewer than three."""
    spokes = [m["name"] for m in results[0]["metrics"] if m["radar"]]
    if len(spokes) < 3:
        return ""
    size = 2 * (RADIUS + MARGIN)
    parts = [f'<svg viewBox="0 0 {size:g} {size:g}" role="img" aria-label="scores by dimension">']
    for level in (25.0, 50.0, 75.0, 100.0):
        points = " ".join(_place(i, len(spokes), level) for i in range(len(spokes)))
        parts.append(f'<polygon class="grid" fill="none" points="{points}"/>')
    for i, name in enumerate(spokes):
        x, y = _place(i, len(spokes), 112.0).split(",")
        side = math.sin(2 * math.pi * i / len(spokes))
        anchor = "middle" if abs(side) < 0.2 else "start" if side > 0 else "end"
        parts.append(
            f'<text class="tick" style="text-anchor:{anchor}" x="{x}" y="{y}">{html.escape(name)}</text>'
        )
    for number, result in enumerate(results):
        values = {m["name"]: m["value"] or 0.0 for m in result["metrics"]}
        places = [_place(i, len(spokes), values.get(s, 0.0)) for i, s in enumerate(spokes)]
        hint = html.escape(", ".join(f"{s} {values.get(s, 0.0):.1f}" for s in spokes))
        path = "M" + "L".join(p.replace(",", " ") for p in places) + "Z"
        parts.append(f'<path class="line s{number % 6}" d="{path}"><title>{hint}</title></path>')
    return f'<section class="card chart">{"".join([*parts, "</svg>"])}</section>'


def _place(spoke: int, number: int, value: float) -> str:
    angle = 2 * math.pi * spoke / number
    radius = RADIUS * value / 100
    x, y = math.sin(angle) * radius, -math.cos(angle) * radius
    return f"{RADIUS + MARGIN + x:.1f},{RADIUS + MARGIN + y:.1f}"


def _images(folder: Path, result: Mapping[str, Any]) -> str:
    """Some of the images, spread over the benchmark, with their prompts."""
    shown = []
    for example in result.get("examples", ()):
        try:
            with Image.open(folder / example["file"]) as image:
                small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        except OSError:
            continue
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        prompt = html.escape(example["prompt"], quote=True)
        shown.append(
            f'<img src="data:image/jpeg;base64,{data}" alt="{prompt}" title="{prompt}" style="margin:2px;border-radius:4px">'
        )
    return f'<section class="card">{"".join(shown)}</section>' if shown else ""


def _settings(result: Mapping[str, Any]) -> str:
    keys = ("generation", "judge", "data", "counts", "interval", "versions", "command")
    text = strict_json.dumps({k: result[k] for k in keys}, indent=1, ensure_ascii=False)
    return (
        f'<details class="card"><summary>{html.escape(result["label"])}: everything needed to repeat it'
        f"</summary><pre>{html.escape(text)}</pre></details>"
    )
