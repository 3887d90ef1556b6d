"""Names in configurations that changed. The error about an old name gives the new one."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flowgrpo.rewards.loading import REMOVED

RENAMED_KEYS = {"evaluation.measures": "evaluation.metrics"}
"""From old dotted keys to new ones."""

MOVED_MODULES = {
    "flowgrpo.core.several": "flowgrpo.core.multi_reward_advantages",
    "flowgrpo.frames": "flowgrpo.rewards.frames",
    "flowgrpo.pairwise": "flowgrpo.rewards.pairs",
}
"""From old modules to new ones, for modules that an import path in a configuration may name."""

_PATH = re.compile(r"(flowgrpo[\w.]*):\w+")


def old_names(value: Any, key: str = "") -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The location of every old name among the values of a table, and a message about it."""
    if isinstance(value, Mapping):
        for inner_key, inner in value.items():
            for location, text in old_names(inner, inner_key):
                yield (inner_key, *location), text
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            for location, text in old_names(inner, key):
                yield (index, *location), text
    elif isinstance(value, str) and (match := _PATH.fullmatch(value)):
        module = MOVED_MODULES.get(match[1])
        if module is not None:
            yield (), f"{value!r} has moved; write {value.replace(match[1], module, 1)!r}"
    elif key == "model" and value in REMOVED:
        yield (), f"{value!r} was removed: {REMOVED[value]}"
