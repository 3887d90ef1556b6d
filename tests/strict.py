"""Reads what flowgrpo writes with a parser that accepts no NaN, as those of other programs."""

import json
from pathlib import Path
from typing import Any


def strictly(text: str) -> Any:
    """Parse JSON; ValueError for NaN and infinities, which Python's parser accepts by default."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON: {text[:200]}")

    return json.loads(text, parse_constant=refuse)


def read_strictly(folder: Path) -> int:
    """Parse all ``.json`` and ``.jsonl`` files below a folder; returns their number, at least one."""
    found = 0
    for path in folder.rglob("*.json*"):
        text = path.read_text("utf-8")
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            strictly(part)
        found += 1
    assert found
    return found
