"""Reads nested tables into frozen dataclasses, and changes them by ``key=value`` settings.

pydantic-core, the validator of pydantic, checks keys and types. A dataclass's validator is built when
a table of that class is first read, straight from the dataclass: settings need not know pydantic, and
a command does not wait for pydantic's models (a tenth of a second). This file adds two things: a union
member may be named by an import path (``kind = "package.module:Name"``), and errors name the key as it
is written in the file, what is allowed, and the nearest known name.
"""

import copy
import dataclasses
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic_core import (
    ErrorDetails,
    PydanticCustomError,
    SchemaValidator,
    ValidationError,
    core_schema,
)

from flowgrpo.config.methods import advice
from flowgrpo.config.reference import documentation, is_required
from flowgrpo.config.renamed import RENAMED_KEYS, old_names
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import import_path, suggest

T = TypeVar("T")
Location = tuple[str | int, ...]
"""A key's place in nested tables, such as ``("rewards", 0, "weight")``."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a table.

    Attributes:
        location: The key.
        sentence: The error message; it names the key.
    """

    location: Location
    sentence: str


class TableError(ConfigError):
    """A table that cannot be read.

    Attributes:
        faults: All that is wrong in it: unknown keys first, missing keys last.
    """

    def __init__(self, faults: Sequence[Fault]):
        super().__init__("\n".join(f.sentence for f in faults))
        self.faults = faults


def read(cls: type[T], table: Any, path: str = "") -> T:
    """Build a dataclass from a table as TOML gives it.

    Args:
        cls: The dataclass. Its fields may be dataclasses, unions of them, and tuples of both.
        table: Keys and values.
        path: Where the table lies, for messages; empty at the top.

    Raises:
        TableError: If keys are unknown or missing, or values have the wrong type.
    """
    prefix = (path,) if path else ()
    old = [
        Fault(prefix + location, f"{dotted(prefix + location)}: {text}")
        for location, text in old_names(table)
    ]
    if old:
        raise TableError(old)
    if not isinstance(table, Mapping):
        sentence = f"{path or 'the configuration'} must be a table, got {table!r}"
        raise TableError([Fault(prefix, sentence)])
    try:
        result: T = _build(cls, dict(table))
    except ValidationError as error:
        raise TableError(_faults(cls, table, error, prefix)) from None
    return result


def _build(cls: Any, table: dict[str, Any]) -> Any:
    return cls(**_validator(cls).validate_python(table))


@cache
def _validator(cls: Any) -> SchemaValidator:
    """The validator of a dataclass's table; its nested tables are validated into dataclasses."""
    hints = get_type_hints(cls)
    keys = {
        f.name: core_schema.typed_dict_field(_schema(hints[f.name]), required=is_required(f))
        for f in dataclasses.fields(cls)
    }
    return SchemaValidator(core_schema.typed_dict_schema(keys, extra_behavior="forbid"))


def _schema(hint: Any) -> core_schema.CoreSchema:
    """The pydantic-core schema of a field's type."""
    members, origin, arguments = members_of(hint), get_origin(hint), get_args(hint)
    if members:
        return core_schema.no_info_plain_validator_function(partial(_read_member, members))
    if origin is Literal:
        return core_schema.no_info_plain_validator_function(partial(_one_of, arguments))
    if origin in (tuple, list, Sequence):
        # Not strict: TOML has lists where dataclasses have tuples. Entries stay strict.
        return core_schema.tuple_schema(
            [_schema(arguments[0])], variadic_item_index=0, strict=False
        )
    if origin in (dict, Mapping):
        return core_schema.dict_schema(
            values_schema=_schema(arguments[1]) if arguments else None, strict=True
        )
    if origin in (Union, types.UnionType):
        either = core_schema.union_schema(
            [_schema(a) for a in arguments if a is not types.NoneType]
        )
        return core_schema.nullable_schema(either) if types.NoneType in arguments else either
    # Another type, in a dataclass from outside: its own code has to check it.
    return _PLAIN.get(hint, core_schema.any_schema())


_PLAIN: Mapping[Any, core_schema.CoreSchema] = {
    # TOML's integers have 64 bits; Python's parser reads longer ones.
    int: core_schema.int_schema(strict=True, ge=-(2**63), le=2**63 - 1),
    float: core_schema.float_schema(strict=True, allow_inf_nan=False),
    str: core_schema.str_schema(strict=True),
    bool: core_schema.bool_schema(strict=True),
}


def _one_of(allowed: Sequence[Any], value: Any) -> Any:
    # True equals 1, but is not a number in a configuration.
    if value in allowed and not isinstance(value, bool):
        return value
    names = ", ".join(repr(a) for a in allowed)
    raise _wrong(f"must be one of {names}, got {value!r}{suggest(str(value), map(str, allowed))}")


def members_of(hint: Any) -> list[type]:
    """The dataclasses of a type: itself, or the members of a union."""
    if get_origin(hint) in (Union, types.UnionType):
        return [m for m in get_args(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)]
    return [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []


def kind_of(cls: type) -> str:
    """The ``kind`` that names a member of a union."""
    return str(get_args(get_type_hints(cls)["kind"])[0])


def default_member(members: Sequence[type]) -> type | None:
    """The member of a union that a table without a ``kind`` means, if there is one."""
    return next((m for m in members if getattr(m, "is_default", False)), None)


def _read_member(members: Sequence[type], value: Any) -> Any:
    """A nested dataclass from its table."""
    cls = _member(members, value)
    return _build(cls, {k: v for k, v in value.items() if k != "kind" or cls in members})


def _member(members: Sequence[type], value: Any) -> type[Any]:
    """The class of a nested table: the union member that its ``kind`` names, or an imported one.

    Raises:
        PydanticCustomError: If there is no such class, or ``value`` is not a table.
    """
    if len(members) == 1:
        if not isinstance(value, Mapping):
            raise _wrong(f"must be a table, got {value!r}")
        return members[0]
    by_kind = {kind_of(m): m for m in members}
    allowed = ", ".join(repr(k) for k in by_kind)
    if not isinstance(value, Mapping):
        raise _wrong(f"must be a table with a kind ({allowed}), got {value!r}")
    if "kind" not in value:
        default = default_member(members)
        if default is None:
            raise _wrong(f"needs a kind: one of {allowed}, or an import path 'package.module:name'")
        return default
    kind = value["kind"]
    if isinstance(kind, str) and ":" in kind:
        return _imported(kind)
    if not isinstance(kind, str) or kind not in by_kind:
        raise _wrong(
            f"must be one of {allowed}, or an import path 'package.module:name', "
            f"got {kind!r}{suggest(str(kind), by_kind)}{advice(str(kind))}",
            key=".kind",
        )
    return by_kind[kind]


def _imported(kind: str) -> type[Any]:
    """A dataclass by its import path."""
    try:
        cls = import_path(kind)
    except (ValueError, ImportError) as error:
        raise _wrong(f": {error}", key=".kind") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        message = f": {kind!r} is not a dataclass, so no table can describe it"
        raise _wrong(message, key=".kind")
    return cls


def _wrong(predicate: str, key: str = "") -> PydanticCustomError:
    """An error whose sentence begins with the key; ``key`` is appended to it."""
    space = "" if predicate.startswith(":") else " "
    context = {"predicate": f"{key}{space}{predicate}"}
    return PydanticCustomError("flowgrpo", "{predicate}", context)


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
}
_CONTAINERS = {"tuple_type": "a list", "dict_type": "a table"}


def _faults(
    cls: type, table: Mapping[str, Any], error: ValidationError, prefix: Location
) -> list[Fault]:
    """pydantic's errors in our words."""
    order = {"extra_forbidden": 0, "missing": 2}
    details = sorted(error.errors(include_url=False), key=lambda d: order.get(d["type"], 1))
    found: list[Fault] = []
    for detail in details:
        location = detail["loc"]
        if detail["type"] == "missing":
            # An unknown key in the same table is this one, misspelt: one error is enough.
            near = f"did you mean {location[-1]!r}?"
            if any(f.location[:-1] == prefix + location[:-1] and near in f.sentence for f in found):
                continue
        sentence = _sentence(cls, table, detail, dotted(prefix + location))
        found.append(Fault(prefix + location, sentence))
    return found


def _sentence(cls: type, table: Mapping[str, Any], detail: ErrorDetails, key: str) -> str:
    """The message of one of pydantic's errors; ``key`` is the dotted key from the top."""
    kind, location, value = detail["type"], detail["loc"], detail["input"]
    if kind == "flowgrpo":
        return key + str(detail["ctx"]["predicate"])
    if kind in _EXPECTED:
        return f"{key} must be {_EXPECTED[kind]}, got {value!r} ({type(value).__name__})"
    if kind in _CONTAINERS:
        return f"{key} must be {_CONTAINERS[kind]}, got {value!r}"
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"{key} must be a whole number of at most 64 bits"
    if kind == "finite_number":
        return f"{key} must be finite, got {value!r}"
    name = str(location[-1])
    if kind == "missing":
        meaning = documentation(_class_at(cls, table, location[:-1]))[name]
        return f"key {key!r} is missing: {meaning}"
    if kind == "extra_forbidden":
        if key in RENAMED_KEYS:
            return f"unknown key {key!r}: it is called {RENAMED_KEYS[key]!r} now"
        known = [f.name for f in dataclasses.fields(_class_at(cls, table, location[:-1]))]
        return f"unknown key {key!r}{suggest(name, known)} (known here: {', '.join(known)})"
    return f"{key}: {detail['msg']}"


def _class_at(cls: Any, table: Any, location: Location) -> Any:
    """The dataclass of the nested table at a location."""
    hint: Any = cls
    for part in location:
        hint = get_args(hint)[0] if isinstance(part, int) else get_type_hints(cls)[part]
        table = table[part]
        members = members_of(hint)
        if members:
            cls = _member(members, table)
    return cls


def dotted(location: Location) -> str:
    """``rewards[0].weight`` for ``("rewards", 0, "weight")``."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location)
    return text.removeprefix(".")


def as_settings(settings: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Settings as ``key=value`` texts, from a list of these or from a mapping of keys to values.

    Raises:
        ConfigError: If the settings are one text, or a value has no form in TOML.
    """
    if isinstance(settings, str):
        raise ConfigError(
            f"settings are a list or a dictionary, got one text; write [{settings!r}]"
        )
    if not isinstance(settings, Mapping):
        return list(settings)
    return [f"{key}={_written(key, value)}" for key, value in settings.items()]


def _written(key: str, value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, str | PurePath):
        return json.dumps(str(value))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(str(k))} = {_written(key, v)}' for k, v in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(_written(key, v) for v in value)}]"
    raise ConfigError(
        f"the setting {key!r} must be a number, a text, a list or a dictionary, got {value!r}"
    )


def override(table: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of a table with ``a.b=value`` settings; values are TOML, or else strings.

    A setting of a ``kind`` drops the other keys of its table, which belong to the old kind.

    Raises:
        ConfigError: If a setting has no ``=``, or its key leads through something that is not a table.
    """
    result = copy.deepcopy(table)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set needs key=value, got {setting!r}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        assign(result, key, value)
    return result


def assign(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a table in place. A ``kind`` drops the other keys of its table.

    Raises:
        ConfigError: If the key leads through something that is not a table.
    """
    *parents, last = key.strip().split(".")
    here: Any = table
    for part in parents:
        here = _inner(here, part, key)
    if not isinstance(here, dict):
        raise ConfigError(f"--set {key}: {last!r} is an entry of a list; set one of its keys")
    if last == "kind" and here.get("kind") != value:
        here.clear()
    here[last] = value


def dropped(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, list[str]]:
    """The keys of a table that settings of a ``kind`` drop and nothing sets again, by setting."""
    found = {}
    for index, setting in enumerate(settings):
        key = setting.partition("=")[0].strip()
        if key.rpartition(".")[2] != "kind":
            continue
        here = _table_at(override(dict(table), settings[:index]), key)
        after = _table_at(override(dict(table), settings), key)
        if gone := [k for k in here if k != "kind" and k not in after]:
            found[setting] = gone
    return found


def _table_at(table: Any, key: str) -> Mapping[str, Any]:
    """The table that holds a dotted key; empty if there is none."""
    for part in key.split(".")[:-1]:
        inner = table[int(part)] if isinstance(table, list) else table.get(part)
        table = inner if isinstance(inner, dict | list) else {}
    return table if isinstance(table, dict) else {}


def _inner(here: Any, part: str, key: str) -> Any:
    """The table or list below a part of a dotted key."""
    if isinstance(here, list):
        if not part.isdecimal() or int(part) >= len(here):
            raise ConfigError(
                f"--set {key}: {part!r} is not an entry of a list of {len(here)}, counted from 0"
            )
        inner = here[int(part)]
    else:
        inner = here.setdefault(part, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"--set {key}: {part} is not a table")
    return inner
