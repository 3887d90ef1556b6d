"""Compares the verifier of the embedded world with labels of generated pictures.

python -m benchmarks.verifier_agreement
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo.shapes import verifier
from flowgrpo.shapes.captions import TASKS, Record, all_records
from flowgrpo.shapes.verifier import detect, strict
from scripts.page_tables import markdown_table

FOLDER = Path(__file__).parent / "verifier_labels"
COLUMNS = 20
SIDE = 64


@dataclass(frozen=True)
class Labelled:
    """A picture and its label.

    Attributes:
        picture: Components ``(64, 64, 3)`` in [0, 1].
        record: The prompt as GenEval's record.
        about: Its line in ``labels.json``: ``prompt``, ``model``, ``guidance``, ``right`` and others.
    """

    picture: np.ndarray
    record: Record
    about: dict[str, Any]

    @property
    def verdict(self) -> bool:
        """Whether the verifier calls the picture right."""
        return strict(detect(self.picture), self.record) == 1


def labelled() -> list[Labelled]:
    """All labelled pictures."""
    records = {r["prompt"]: r for task in TASKS for r in all_records(task)}
    with Image.open(FOLDER / "pictures.webp") as file:
        atlas = np.asarray(file.convert("RGB"))
    found = []
    for index, about in enumerate(json.loads((FOLDER / "labels.json").read_text())):
        y, x = SIDE * (index // COLUMNS), SIDE * (index % COLUMNS)
        picture = atlas[y : y + SIDE, x : x + SIDE] / np.float32(255)
        found.append(Labelled(picture, records[about["prompt"]], about))
    return found


def main() -> None:
    """Print the agreement for several bounds of the overlap, and the pictures without agreement."""
    pictures, rows = labelled(), []
    eye = np.array([p.about["right"] for p in pictures])
    base = np.array([p.about["model"] == "base" for p in pictures])
    used = verifier.GOOD_MATCH
    for bound in (0.86, 0.82, 0.78, used, 0.74):
        verifier.GOOD_MATCH = bound
        said = np.array([p.verdict for p in pictures])
        row = [f"{bound:.2f}", _percent(said == eye), str((said & ~eye).sum())]
        row += [str((~said & eye).sum())]
        row += [f"{_percent(eye[part])} / {_percent(said[part])}" for part in (base, ~base)]
        rows.append(row)
    verifier.GOOD_MATCH = used
    heads = ["overlap", "agreement, %", "wrongly right", "wrongly wrong"]
    print(markdown_table([*heads, "base, eye / verifier", "trained, eye / verifier"], rows))
    for index, picture in enumerate(pictures):
        if picture.verdict != picture.about["right"]:
            doubt = picture.about.get("doubt", "")
            print(
                f"{index}: {picture.about['prompt']}; verifier: {picture.verdict}{doubt and f'; {doubt}'}"
            )


def _percent(values: np.ndarray) -> str:
    return f"{100 * values.mean():.1f}"


if __name__ == "__main__":
    main()
