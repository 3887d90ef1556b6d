"""Keys that have no effect because another key switches off what they belong to.

A configuration may hold such keys, for example one that switches off what the configuration that it extends
has on. They are named before a run and in a dry run, so that nobody takes them for settings of the run.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from flowgrpo.config.reference import is_required


def equals(value: Any) -> Callable[[Any], bool]:
    """A test whether a switch has one value."""
    return lambda found: bool(found == value)


def differs(value: Any) -> Callable[[Any], bool]:
    """A test whether a switch has any other value."""
    return lambda found: bool(found != value)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Keys of a table, and the switch without which they have no effect.

    Attributes:
        table: Dotted path of the table, with ``*`` for each table of a list.
        keys: Keys of the table; empty for all but the switch.
        switch: A key of the same table or, with a dot, of the configuration.
        is_off: Whether a value of the switch leaves the keys without effect.
    """

    table: str
    keys: tuple[str, ...]
    switch: str
    is_off: Callable[[Any], bool]


RULES = (
    Rule("train.replay", (), "groups", equals(0)),
    Rule("train.early_stopping", (), "metric", equals("")),
    Rule("train", ("ema_every",), "ema_decay", equals(0)),
    Rule("train", ("split",), "updates", equals(1)),
    Rule("evaluation", ("images_during",), "every", equals(0)),
    Rule("guard", ("share", "adapt"), "kl", equals("all")),
    Rule("failures", ("wait",), "retries", equals(0)),
    Rule("memory", ("arithmetic",), "model.dtype", equals("float32")),
    Rule("rewards.*", ("schedule",), "weight", equals(0)),
    Rule("algorithm.previews", (), "number", equals(0)),
    Rule("algorithm.steps", ("decay_from",), "decay", equals(0)),
    Rule("algorithm.depths", ("decay_from",), "decay", equals(0)),
    Rule("algorithm", ("pruned_every", "pruned_until"), "pruned", equals(())),
    Rule("algorithm", ("pruned_until",), "pruned_every", equals(0)),
    Rule("algorithm", ("balance",), "turning_points", equals("none")),
    Rule("algorithm", ("anchor_steps",), "anchor", equals(0)),
    Rule("algorithm", ("invert_excess",), "branches", equals("denoise")),
    Rule("algorithm.advantage", ("ddof", "epsilon"), "std", equals("none")),
    Rule("algorithm.advantage", ("above",), "threshold", differs("fixed")),
    Rule("loss", ("power",), "weight", differs("ghuber")),
    Rule("loss", ("clip_range",), "surrogate", equals("pepg")),
    Rule("loss", ("proximal",), "proximal_coef", equals(0)),
    Rule("loss.teachers.*", ("share",), "tags", differs(())),
)  # fmt: skip
"""Keys of tables that a kind of algorithm or loss does not have are passed over. What contradicts its
switch, where a value makes no sense at all, is refused by the table's own check instead."""


def idle_notes(config: Any) -> list[str]:
    """A sentence for each key that differs from its default and has no effect; none if all have one."""
    found = {}
    for rule in RULES:
        for path, table in _tables(config, rule.table.split("."), ""):
            switch = f"{path}.{rule.switch}" if "." not in rule.switch else rule.switch
            value = _value(config, table, rule.switch)
            if value is _ABSENT or not rule.is_off(value):
                continue
            for name, own in _changed(table, rule):
                key = f"{path}.{name}"
                found[key] = (
                    f"{_shown(key, own)} has no effect while {_shown(switch, value)}: change {switch}, or remove "
                    f"{key}"
                )
    return list(found.values())


_ABSENT = object()


def _tables(here: Any, parts: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """The tables at a path, with their own paths."""
    if not parts:
        if dataclasses.is_dataclass(here):
            yield path, here
    elif parts[0] == "*":
        for index, one in enumerate(here):
            yield from _tables(one, parts[1:], f"{path}[{index}]")
    elif hasattr(here, parts[0]):
        yield from _tables(getattr(here, parts[0]), parts[1:], f"{path}.{parts[0]}".lstrip("."))


def _value(config: Any, table: Any, switch: str) -> Any:
    """The value of a switch; ``_ABSENT`` if there is no such key."""
    here = config if "." in switch else table
    for part in switch.split("."):
        here = getattr(here, part, _ABSENT)
    return here


def _changed(table: Any, rule: Rule) -> Iterator[tuple[str, Any]]:
    """The keys of a rule that a table has with another value than their default."""
    for field in dataclasses.fields(table):
        if field.name == rule.switch or is_required(field) or field.name == "kind":
            continue
        if rule.keys and field.name not in rule.keys:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(table, field.name)
        if value != default:
            yield field.name, value


def _shown(key: str, value: Any) -> str:
    """A key and its value, as in a configuration."""
    return f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}"
