"""Contact sheets: a comparison grid as one HTML file, for more images than a picture can hold.

Images are embedded and decoded when they come into view. Videos are embedded as animated WebP.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data.files import write_whole
from flowgrpo.evaluation.report import page
from flowgrpo.evaluation.samples import still
from flowgrpo.evaluation.tiles import QUALITY, data_uri

MARKS = {"✓": "good", "✗": "bad"}
"""Class of a note that is a mark."""


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Attributes:
        label: The value of the second axis; empty without one.
        cells: For each column and sample the image as a ``data:`` address, and its note.
    """

    label: str
    cells: Sequence[Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class SheetPrompt:
    """The rows of one prompt.

    Attributes:
        text: The prompt.
        conditions: Its own pictures (editing, image-to-video).
        rows: One for each value of the second axis.
    """

    text: str
    conditions: Sequence[Image.Image]
    rows: Sequence[SheetRow]


def media_uri(media: Float[Tensor, "*frames channels height width"], fps: float) -> str:
    """An image, or a video as it plays, as a ``data:`` address of a WebP file of at most 256 pixels.

    Args:
        media: The image or video in [0, 1].
        fps: Frames per second of a video.
    """
    if media.ndim == 3:
        return data_uri(still(media))
    first, *others = [still(frame) for frame in media]
    stream = io.BytesIO()
    first.save(
        stream,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=round(1000 / fps),
        loop=0,
        quality=QUALITY,
    )
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def write_sheet(
    path: Path,
    prompts: Sequence[SheetPrompt],
    columns: Sequence[str],
    title: str,
    subtitle: str,
    settings: str,
    aspect: float,
) -> None:
    """Write a contact sheet. The file is replaced atomically.

    Args:
        path: HTML file; its folder is created.
        prompts: The rows.
        columns: Name of each column.
        title: Headline.
        subtitle: How the images were generated.
        settings: JSON that ``flowgrpo grid --from`` reads.
        aspect: Width of an image divided by its height, so that the page does not move while images load.
    """
    cards = "".join(_card(prompt, columns) for prompt in prompts)
    # The text of a script element ends at the first "</script", whatever it means in JSON.
    data = settings.replace("<", "\\u003c")
    content = (
        f'<header><p class="brand">flowgrpo grid</p><h1>{escape(title)}</h1>'
        f'<p class="note">{escape(subtitle)}</p></header><section class="sheet" style="--aspect: {aspect:.4f}">{cards}</section>'
        f'<script type="application/json" id="flowgrpo-grid">{data}</script>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(f"{title} · flowgrpo grid", content))


def _card(prompt: SheetPrompt, columns: Sequence[str]) -> str:
    own = "".join(f'<img alt="condition" src="{data_uri(c)}">' for c in prompt.conditions)
    own = f'<div class="conditions">{own}</div>' if own else ""
    labelled = any(row.label for row in prompt.rows)
    head = "<th></th>" if labelled else ""
    head += "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    rows = []
    for row in prompt.rows:
        cells = "".join(f"<td><div>{''.join(_image(*i, prompt.text) for i in c)}</div></td>" for c in row.cells)  # fmt: skip
        label = f'<th scope="row">{escape(row.label)}</th>' if labelled else ""
        rows.append(f"<tr>{label}{cells}</tr>")
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return f'<div class="card"><h3>{escape(prompt.text)}</h3>{own}{table}</div>'


def _image(source: str, note: str, text: str) -> str:
    kind = MARKS.get(note[:1], "")
    caption = f'<figcaption class="{kind}">{escape(note)}</figcaption>' if note else ""
    return f'<figure><img loading="lazy" decoding="async" alt="{escape(text)}" src="{source}">{caption}</figure>'
