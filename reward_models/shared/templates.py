"""Questions to vision-language models, as text files that users can replace.

``$name`` is replaced by a text such as the prompt, or by pictures; ``$$`` is a dollar sign.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float

from flowgrpo.data.pictures import encode_png

FOLDER = Path(__file__).parents[1] / "templates"
PLACEHOLDER = re.compile(r"\$(\$|\w+)")

Content = list[str | bytes]
"""Text and PNG images, in the order in which the model reads them."""


@dataclass(frozen=True)
class Template:
    """A question with placeholders.

    Attributes:
        text: As in the file.
        pictures: Names of the placeholders for pictures; each occurs once.
    """

    text: str
    pictures: Sequence[str]

    @classmethod
    def load(cls, name: str, texts: Sequence[str], pictures: Sequence[str]) -> "Template":
        """Read a template that comes with flowgrpo by its name, or any file by its path.

        Args:
            name: Such as ``yes_no``, or ``my/question.txt``.
            texts: Names that it may use for texts.
            pictures: Names that it must use for pictures, once each.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it uses an unknown name or lacks pictures; says in which line.
        """
        path = Path(name)
        if path.suffix != ".txt":
            path = FOLDER / f"{name}.txt"
        if not path.is_file():
            # The texts of published models have no such placeholders.
            own = (p.stem for p in FOLDER.glob("*.txt") if PLACEHOLDER.search(p.read_text("utf-8")))
            known = ", ".join(sorted(own))
            raise FileNotFoundError(f"no template {name!r}: give a .txt file, or one of {known}")
        text = path.read_text(encoding="utf-8-sig").strip()
        allowed = ", ".join(f"${n}" for n in (*texts, *pictures))
        for number, line in enumerate(text.splitlines(), start=1):
            for match in PLACEHOLDER.finditer(line):
                if match[1] not in ("$", *texts, *pictures):
                    raise ValueError(
                        f"{path}, line {number}: unknown ${match[1]} (known: {allowed}; write $$ "
                        "for a dollar sign)"
                    )
        used = PLACEHOLDER.findall(text)
        for picture in pictures:
            if used.count(picture) != 1:
                raise ValueError(
                    f"{path}: needs ${picture} once, where the pictures go; found "
                    f"{used.count(picture)}"
                )
        return cls(text, pictures)

    def fill(self, texts: Mapping[str, str], pictures: Mapping[str, Sequence[bytes]]) -> Content:
        """Fill in texts and pictures. Placeholders within the filled-in text are not replaced."""
        content: Content = []
        line = ""
        for i, piece in enumerate(PLACEHOLDER.split(self.text)):
            if i % 2 == 0:
                line += piece
            elif piece in self.pictures:
                content += [line.strip()] if line.strip() else []
                content += pictures[piece]
                line = ""
            else:
                line += "$" if piece == "$" else texts[piece]
        return [*content, line.strip()] if line.strip() else content


def check_pictures(frames: int, longest_side: int, max_tokens: int) -> None:
    """Raise ValueError if one of these is out of range."""
    if frames < 1 or longest_side < 0 or max_tokens < 1:
        raise ValueError(
            "frames and max_tokens must be at least 1 and longest_side at least 0, got "
            f"{frames}, {max_tokens}, {longest_side}"
        )


def pictures_of(
    medium: Float[torch.Tensor, "*frames 3 height width"],
    frames: int,
    longest_side: int,
    floor: bool = False,
) -> list[bytes]:
    """An image, or ``frames`` evenly spaced frames of a video, as PNG.

    ``longest_side`` shrinks larger ones to that; 0 leaves them as they are. Places between two frames
    are rounded to the nearest one, or down with ``floor``.
    """
    images = medium if medium.ndim == 4 else medium[None]
    if len(images) > frames:
        places = torch.linspace(0, len(images) - 1, frames, dtype=torch.float64)
        chosen = (places.floor() if floor else places.float().round()).long()
        images = images[chosen]
    height, width = images.shape[-2:]
    if 0 < longest_side < max(height, width):
        ratio = longest_side / max(height, width)
        size = [max(1, round(height * ratio)), max(1, round(width * ratio))]
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    return [encode_png(i) for i in images]


def template(name: str) -> str:
    """A text that a model was trained to be asked with; ``{prompt}`` stands for the caption."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
