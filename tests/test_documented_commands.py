"""The commands in the pages are commands of this version: their options exist, and go together."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowgrpo.cli.common import UsageError, sampling_of
from flowgrpo.cli.main import commands, parser

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
SHELL = {">", ">>", "|", "&", "&&", ";"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def documented(page: Path) -> Iterator[list[str]]:
    """The arguments of each ``flowgrpo`` command in the blocks of a page."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "bash", "console", "sh", "shell"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            # Three blanks separate a command from a remark about it.
            command = line.removeprefix("$ ").strip().partition("   ")[0]
            # A schematic line has capitals in brackets, or an ellipsis.
            if not command.startswith("flowgrpo ") or re.search(r"\[[A-Z-]|\.\.\.", command):
                continue
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            # What the shell does with the output is not the command's.
            yield words[1 : next((i for i, w in enumerate(words) if w in SHELL), len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_documented_commands_parse(page: Path) -> None:
    for words in documented(page):
        try:
            options = parser(commands()).parse_args(words)
            if hasattr(options, "call"):
                sampling_of(options, 28)
        except (SystemExit, UsageError) as error:
            if words[-1] in ("--help", "--version"):
                continue
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")


def test_there_are_documented_commands() -> None:
    assert sum(len(list(documented(page))) for page in PAGES) > 50
