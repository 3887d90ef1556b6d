"""Markdown tables, and placing them between the markers of a documentation page.

A page marks the place of a generated text by ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
"""

from collections.abc import Sequence
from pathlib import Path


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a newline at the end."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def marked_text(page: str, name: str) -> str:
    """The text between a page's markers. Raises ValueError as :func:`with_marked_text`."""
    return _split(page, name)[1]


def with_marked_text(page: str, name: str, text: str) -> str:
    """A page with ``text`` on its own lines between the markers.

    Raises:
        ValueError: If the page does not have exactly one pair of markers, in order.
    """
    before, _, after = _split(page, name)
    return f"{before}\n{text}\n{after}"


def write_marked_text(file: Path, name: str, text: str) -> None:
    """Replace the text between the markers of a file. Raises ValueError if it has none."""
    try:
        page = with_marked_text(file.read_text(), name, text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    file.write_text(page)


def _split(page: str, name: str) -> tuple[str, str, str]:
    """The page up to and with the first marker, the text between, and the rest."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one line {begin!r} and below it one line {end!r}")
    before, rest = page.split(begin)
    between, after = rest.split(end)
    return before + begin, between.strip("\n"), end + after
