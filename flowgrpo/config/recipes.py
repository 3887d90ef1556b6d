"""The comments at the beginning of the shipped configurations."""

from itertools import takewhile
from pathlib import Path

from flowgrpo.config.files import find


def summaries() -> dict[str, str]:
    """The first sentence about each shipped configuration, by name."""
    found = {}
    for file in sorted(find("quickstart").parent.glob("*.toml")):
        text = ""
        for line in head_of(file):
            text = f"{text} {line}".lstrip()
            if text.endswith((".", ":")):
                break
        # A colon leads to a command on the next lines, which are not part of the sentence.
        found[file.stem] = text.removesuffix(":").removesuffix(".") + "."
    return found


def head_of(file: Path) -> list[str]:
    """The comment at the beginning of a file, without its marks."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines)]
