"""Text from users, such as names and prompts, as a terminal can show it."""

import re
import unicodedata

UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that are escaped: control and format characters (which move the cursor or reverse
the direction of text), lone surrogates, unassigned code points, line and paragraph separators."""
KEPT = "\n\t\u200d\u200c"
"""Characters of these categories that are shown: line breaks, tabs, and the joiners of emoji and scripts."""


def plain(text: str, encoding: str = "utf-8") -> str:
    """The text with backslash escapes in place of what could disturb a terminal or cannot be encoded.

    Args:
        text: Any text.
        encoding: The terminal's.
    """
    safe = "".join(
        c
        if c in KEPT or unicodedata.category(c) not in UNSAFE
        else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def shorten(text: str, limit: int = 1000) -> str:
    """The text without the middle of lines that are longer than ``limit`` characters.

    Errors quote values, and a value can have any length.
    """
    half = limit // 2
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= limit else f"{line[:half]} ... {line[-half:]}" for line in lines
    )


def tag_words(tag: str) -> str:
    """The name of a further way to sample, as words: ``guidance 1.5`` for ``guidance_1p5``."""
    return re.sub(r"(?<=\d)p(?=\d)", ".", tag).replace("_", " ")


def counted(number: int | float | str, noun: str, spec: str = "") -> str:
    """A number with its noun, in the plural unless it is shown as 1: ``1 step``, ``12 optimizer steps``.

    Args:
        number: The number, or its text.
        noun: The noun in the singular, also with words before it.
        spec: How the number is formatted, such as ``,``.
    """
    shown = format(number, spec)
    return f"{shown} {noun if shown == '1' else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a regular English noun."""
    if noun.endswith(("s", "x", "sh", "tch", "nch")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"
