"""The report's film strip: the same prompts and the same noise after more and more iterations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from flowgrpo.core.text import counted
from flowgrpo.data import strict_json
from flowgrpo.evaluation.charts import number, points
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.records import Records
from flowgrpo.evaluation.tiles import data_uri, open_picture, read_tiles

MOST_FRAMES = 12
"""Most frames of a strip; of more evaluations these are spread evenly, the first and the last included."""
MARKS = {"✓": "good", "✗": "bad"}
"""Class of a note that is a mark. The mark is drawn on the image as well."""
CONTROLS = (
    '<div class="film-bar" hidden><button type="button" class="play" aria-label="Play"></button>'
    '<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="Iterations trained">'
    "<output>{name}</output></div>"
)


@dataclass(frozen=True)
class _Row:
    """One prompt of a grid: its tiles as ``(source, note)`` by column, and its own pictures."""

    label: str
    blocks: Sequence[Sequence[tuple[str, str]]]
    conditions: Sequence[str]


def film_strip(records: Records) -> str:
    """The images of each comparison grid, between which a slider switches.

    The base model's images come first. Without JavaScript the newest are shown.

    Returns:
        HTML; empty if the newest grid does not say where its images are, as those of earlier versions.
    """
    paths = dict(records.all_grids)
    # The grid of iteration 0 shows the base model twice; every grid shows it in its first column.
    chosen = spread([n for n in paths if n], MOST_FRAMES - 1) or list(paths)
    grids = {n: _read(str(paths[n]), paths[n].stat().st_mtime_ns) for n in chosen}
    newest = grids[chosen[-1]] if chosen else ()
    if not newest:
        return ""
    frames = [(0, [tile for row in newest for tile in row.blocks[0]])]
    for n, rows in grids.items():
        if n and [r.label for r in rows] == [r.label for r in newest]:
            frames.append((n, [tile for row in rows for tile in row.blocks[-1]]))
    scores = {e["iteration"]: _scores(records, e) for e in records.evaluations}
    described = [
        {
            "name": "base model" if n == 0 else f"after {counted(number(n), 'iteration')}",
            "scores": scores.get(n, ""),
            # The page shows the last frame, and the script reads its images there.
            "images": [] if index == len(frames) - 1 else [source for source, _ in tiles],
            "notes": [note for _, note in tiles],
        }
        for index, (n, tiles) in enumerate(frames)
    ]
    body = _rows(newest, iter(frames[-1][1]))
    controls = ""
    if len(frames) > 1:
        last = described[-1]
        controls = CONTROLS.format(last=len(frames) - 1, name=last["name"])
        controls += f'<p class="quiet film-scores">{escape(str(last["scores"]))}</p>'
    text = strict_json.dumps(described, ensure_ascii=False).replace("<", "\\u003c")
    data = f'<script type="application/json" class="film-data">{text}</script>'
    note = (
        "Held-out prompts, with the same noise at the same place. The slider goes from the base model to "
        f"the newest weights; press an image to see the base model's. The picture with all labels is "
        f"<code>grids/{records.all_grids[-1][1].name}</code>."
    )
    if len(frames) == 1:
        note = "Held-out prompts, drawn by the base model."
    style = f"--samples: {len(newest[0].blocks[-1])}"
    content = f'<div class="card film" style="{style}">{controls}{body}{data if len(frames) > 1 else ""}</div>'
    return section("Film strip", note, content)


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the values, evenly spaced, the first and the last included."""
    if len(values) <= most:
        return list(values)
    last = len(values) - 1
    return [values[round(i * last / (most - 1))] for i in range(most)]


def _rows(rows: Sequence[_Row], tiles: Any) -> str:
    parts = []
    for row in rows:
        images = []
        for _ in row.blocks[-1]:
            source, note = next(tiles)
            kind = MARKS.get(note[:1], "")
            images.append(
                f'<figure><img alt="{escape(row.label)}" src="{source}">'
                f'<figcaption class="{kind}">{escape(note)}</figcaption></figure>'
            )
        own = "".join(f'<img alt="condition" src="{c}">' for c in row.conditions)
        own = f'<div class="conditions">{own}</div>' if own else ""
        parts.append(
            f'<div class="film-row"><div class="prompt">{escape(row.label)}{own}</div>'
            f'<div class="film-tiles">{"".join(images)}</div></div>'
        )
    return "".join(parts)


def _scores(records: Records, evaluation: Mapping[str, Any]) -> str:
    """The held-out scores of an evaluation in one line."""
    parts = []
    for name in records.scores():
        value = evaluation["scores"].get(name)
        if value is not None:
            shown = points(value) if records.in_points(name) else number(value)
            parts.append(f"{name} {shown}")
    return f"Held-out scores: {', '.join(parts)}" if parts else ""


@lru_cache(maxsize=64)
def _read(path: str, stamp: int) -> tuple[_Row, ...]:
    """The images of a grid as ``data:`` addresses; empty if it does not say where they are.

    Args:
        path: The PNG file.
        stamp: Its time of modification, so that a changed file is read again.
    """
    picture = open_picture(Path(path))
    if picture is None:
        return ()
    try:
        rows = read_tiles(picture)
    except ValueError:
        return ()
    return tuple(
        _Row(
            row.label,
            [[(data_uri(picture.crop(t.box)), t.note) for t in block] for block in row.blocks],
            [data_uri(picture.crop(box)) for box in row.conditions],
        )
        for row in rows
    )
