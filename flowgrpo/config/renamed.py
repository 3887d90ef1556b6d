"""Names in configurations that changed. A configuration that uses an old name gets the new one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

RENAMED_KEYS = {"evaluation.measures": "evaluation.metrics"}
"""From old dotted keys to new ones."""

MOVED_MODULES = {
    "flowgrpo.core.several": "flowgrpo.core.advantages",
    "flowgrpo.frames": "flowgrpo.rewards.frames",
    "flowgrpo.pairwise": "flowgrpo.rewards.pairs",
}
"""From old modules to new ones, of what an import path in a configuration may name."""

_PATH = re.compile(r"(flowgrpo[\w.]*):\w+")


def moved_paths(value: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The location of every import path in a table that names a moved module, and a message."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (((key, *location), text) for location, text in moved_paths(inner))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from (((index, *location), text) for location, text in moved_paths(inner))
    elif isinstance(value, str) and (match := _PATH.fullmatch(value)):
        module = MOVED_MODULES.get(match[1])
        if module is not None:
            yield (), f"{value!r} has moved; write {value.replace(match[1], module, 1)!r}"
