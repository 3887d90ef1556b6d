"""The text of grids: a font that has the glyphs, and lines of limited width."""

import os
from collections.abc import Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

REGULAR = (
    "Inter-Regular.ttf",
    "Roboto-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.ttf",
    "SourceHanSansSC-Regular.otf",
    "DroidSansFallbackFull.ttf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "AppleSDGothicNeo.ttc",
    "msyh.ttc",
    "meiryo.ttc",
    "malgun.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "Arial Unicode.ttf",
    "unifont.ttf",
)
"""Fonts in the order in which they are tried for a text; the operating system's folders are searched."""
OWN_FONT = "FLOWGRPO_FONT"
"""Environment variable with a font file that is tried first."""
BOLD = ("Inter-SemiBold.ttf", "Roboto-Medium.ttf", "DejaVuSans-Bold.ttf", "Arial Bold.ttf")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Paragraph:
    """Text broken into lines of limited width, in pixels.

    Attributes:
        height: That of all lines together.
    """

    def __init__(self, text: str, size: int, width: int, max_lines: int, bold: bool = False):
        self.font = font_for(text, size, bold)
        self.lines = wrap(text, self.font, width, max_lines)
        self.line_height = round(size * 1.4)
        self.height = len(self.lines) * self.line_height

    def draw(self, canvas: Image.Image, left: int, top: int, color: str) -> None:
        """Draw the lines, the first one at this place."""
        pen = ImageDraw.Draw(canvas)
        for index, line in enumerate(self.lines):
            pen.text((left, top + index * self.line_height), line, fill=color, font=self.font)


@cache
def font_for(text: str, size: int, bold: bool) -> Font:
    """The first installed font with glyphs for the whole text; the first font if there is none."""
    fonts = _fonts(size, bold)
    return next((font for font in fonts if _covers(font, text)), fonts[0])


def missing_glyphs(texts: Sequence[str]) -> str:
    """Up to six characters of texts that no installed font can draw with the rest of their text."""
    found: dict[str, None] = {}
    for text in texts:
        if not _covers(font := font_for(text, 15, False), text):
            found |= dict.fromkeys(c for c in text if not _covers(font, c))
    return "".join([*found][:6])


@cache
def _fonts(size: int, bold: bool) -> list[Font]:
    """The installed fonts in the order in which they are tried, and Pillow's own at the end."""
    found: list[Font] = []
    own = os.environ.get(OWN_FONT)
    for name in (*((own,) if own else ()), *(BOLD if bold else ()), *REGULAR):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not installed
            continue
    return [*found, ImageFont.load_default(size)]


def _covers(font: Font, text: str) -> bool:
    """Whether the font has a glyph for every character of the text."""
    missing = bytes(font.getmask("\uffff"))
    return all(c.isspace() or bytes(font.getmask(c)) != missing for c in set(text))


def wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Break text into at most ``max_lines`` lines no wider than ``width``, between words if possible.

    Text that does not fit is replaced by an ellipsis.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()}…"]
    return lines
