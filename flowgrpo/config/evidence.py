"""The evidence that a recipe works: its levels, and the recorded results of ``flowgrpo verify``.

Each result is a file ``configs/evidence/RECIPE.LEVEL.json``. It counts for a recipe as long as the
recipe's file says what it said when it was verified.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgrpo.config.files import find

LEVELS = {
    "validated": "validated",
    "tiny": "runs whole on tiny parts",
    "device": "runs at real size on a device, with random weights",
    "rises": "its reward rises on real weights",
    "reproduces": "reproduces the published result",
}
"""Evidence that a recipe works, weakest first. A validated recipe loads, and its settings agree."""


def fingerprint(recipe: str) -> str:
    """A hash of the settings in a recipe's file, without its comments."""
    table = tomllib.loads(find(recipe).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def evidence(recipe: str, folder: Path | None = None) -> str:
    """The strongest recorded level of a recipe, a key of :data:`LEVELS`.

    Args:
        recipe: Name of a configuration that comes with flowgrpo.
        folder: Recorded results; by default those that come with flowgrpo.
    """
    folder = find("quickstart").parent / "evidence" if folder is None else folder
    found = ["validated"]
    for file in folder.glob(f"{recipe}.*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["recipe"] == recipe and counts(record):
            found.append(record["level"])
    return max(found, key=list(LEVELS).index)


def counts(record: Mapping[str, Any]) -> bool:
    """Whether a recorded result is a success with the recipe's present settings."""
    return bool(record["passed"]) and record["fingerprint"] == fingerprint(record["recipe"])


def next_level(level: str) -> str:
    """The level above one that a machine can verify.

    Raises:
        ValueError: If only a full run can show the level above.
    """
    above = list(LEVELS)[list(LEVELS).index(level) + 1 :]
    if not above or above[0] == "reproduces":
        raise ValueError(
            "the reward of this recipe has been seen to rise; whether it reproduces the published result "
            "only a full run shows: flowgrpo train RECIPE"
        )
    return above[0]
