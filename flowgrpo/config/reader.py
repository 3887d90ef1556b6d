"""Strict reading of nested tables into frozen dataclasses, and writing them back.

Every error names the key, the value and what is allowed. A union of dataclasses is chosen by the
table's ``kind``, which may also be the import path of a dataclass from outside: ``package.module:Name``.
"""

import ast
import dataclasses
import inspect
import math
import textwrap
import tomllib
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import import_path, suggest

T = TypeVar("T")


def read(cls: type[T], table: Any, path: str = "") -> T:
    """A dataclass from a table as TOML gives it. Raises ConfigError at the first wrong key."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a table, got {table!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in table:
        if key not in fields:
            known = ", ".join(fields)
            raise ConfigError(
                f"unknown key {_join(path, key)!r}{suggest(key, fields)} (known here: {known})"
            )
    values = {k: _value(hints[k], v, _join(path, k)) for k, v in table.items()}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"key {_join(path, name)!r} is missing: {documentation(cls)[name]}")  # type: ignore[arg-type]
    return cls(**values)


def _value(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        members = [a for a in arguments if a is not type(None)]
        return (
            _value(members[0], value, path) if len(members) == 1 else _tagged(members, value, path)
        )
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            allowed = ", ".join(repr(a) for a in arguments)
            raise ConfigError(
                f"{path} must be one of {allowed}, got {value!r}{suggest(str(value), map(str, arguments))}"
            )
        return value
    if dataclasses.is_dataclass(kind):
        return read(kind, value, path)  # type: ignore[arg-type]
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        return tuple(_value(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a table, got {value!r}")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path} must be {_NAMES[kind]}, got {value!r} ({type(value).__name__})")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be finite, got {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _tagged(members: list[Any], value: Any, path: str) -> Any:
    """The member of a union of dataclasses that the table's ``kind`` names, or a class from outside.

    Without a kind it is the member with ``is_default``, where the union has one.
    """
    by_kind: dict[str, Any] = {_kind(m): m for m in members if dataclasses.is_dataclass(m)}
    allowed = ", ".join(repr(k) for k in by_kind)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must be a table with a kind ({allowed}), got {value!r}")
    defaults = [m for m in by_kind.values() if getattr(m, "is_default", False)]
    if "kind" not in value and defaults:
        return read(defaults[0], value, path)
    if "kind" not in value:
        raise ConfigError(f"{path} needs a kind: one of {allowed}, or an import path")
    kind = value["kind"]
    if isinstance(kind, str) and ":" in kind:
        return _from_outside(kind, value, path)
    if not isinstance(kind, str) or kind not in by_kind:
        raise ConfigError(
            f"{path}.kind must be one of {allowed}, or an import path 'package.module:name', "
            f"got {kind!r}{suggest(str(kind), by_kind)}"
        )
    return read(by_kind[kind], value, path)


def _kind(cls: Any) -> str:
    return str(get_args(get_type_hints(cls)["kind"])[0])


def _from_outside(kind: str, value: Mapping[str, Any], path: str) -> Any:
    """A dataclass by its import path; its own ``kind``, if it has one, keeps its default."""
    try:
        cls = import_path(kind)
    except ValueError as error:
        raise ConfigError(f"{path}.kind: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(
            f"{path}.kind: {kind!r} is no dataclass, so that no table can describe it"
        )
    outside: Any = cls
    return read(outside, {k: v for k, v in value.items() if k != "kind"}, path)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def override(table: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of a table with ``a.b=value`` settings; values are TOML, or else strings.

    A setting of a ``kind`` drops the other keys of its table, which belong to the old kind.
    """
    result = _copy(table)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set needs key=value, got {setting!r}")
        *parents, last = key.strip().split(".")
        here: Any = result
        for part in parents:
            here = _inner(here, part, key)
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if not isinstance(here, dict):
            raise ConfigError(f"--set {key}: {last!r} is an entry of a list; set one of its keys")
        if last == "kind" and here.get("kind") != value:
            here.clear()
        here[last] = value
    return result


def _inner(here: Any, part: str, key: str) -> Any:
    """The table or list below a part of a dotted key."""
    if isinstance(here, list):
        if not part.isdigit() or int(part) >= len(here):
            raise ConfigError(
                f"--set {key}: {part!r} is no entry of a list of {len(here)}, counted from 0"
            )
        inner = here[int(part)]
    else:
        inner = here.setdefault(part, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"--set {key}: {part} is not a table")
    return inner


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def to_table(value: Any) -> Any:
    """Back to what TOML can hold: unset optional keys are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value))
        pairs = (
            (f.name, _to_table(hints[f.name], getattr(value, f.name)))
            for f in dataclasses.fields(value)
        )
        return {k: v for k, v in pairs if v is not None}
    if isinstance(value, list | tuple):
        return [to_table(v) for v in value]
    if isinstance(value, Mapping):
        return {k: to_table(v) for k, v in value.items() if v is not None}
    return value


def _to_table(hint: Any, value: Any) -> Any:
    """The table of a field's value; a class from outside of the field's union is named by its path."""
    members = [m for m in get_args(hint) if dataclasses.is_dataclass(m)]
    if members and dataclasses.is_dataclass(value) and type(value) not in members:
        cls = type(value)
        return {**to_table(value), "kind": f"{cls.__module__}:{cls.__qualname__}"}
    return to_table(value)


@cache
def documentation(cls: Any) -> Mapping[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {f.name: "" for f in dataclasses.fields(cls)}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def explain(cls: type, key: str) -> str:
    """What a dotted key means, its type and default. Raises ConfigError if there is none."""
    here: list[type] = [cls]
    parts = key.split(".")
    for depth, part in enumerate(parts):
        owners = [c for c in here if part in get_type_hints(c) and part in documentation(c)]
        if not owners:
            known = sorted({f.name for c in here for f in dataclasses.fields(c)})
            raise ConfigError(
                f"unknown key {key!r}{suggest(part, known)} (known below {'.'.join(parts[:depth]) or 'the top'}: {', '.join(known)})"
            )
        if depth == len(parts) - 1:
            return "\n".join(_explanation(c, part, key) for c in owners)
        here = [m for c in owners for m in _dataclasses_in(get_type_hints(c)[part])]
    return ""


def _explanation(cls: type, name: str, key: str) -> str:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    hint = get_type_hints(cls)[name]
    default = "required"
    if field.default is not dataclasses.MISSING:
        default = f"default {field.default!r}"
    elif field.default_factory is not dataclasses.MISSING:
        default = f"default {to_table(field.default_factory())!r}"
    inner = _dataclasses_in(hint)
    lines = [f"{key}  ({cls.__name__}; {default})", f"    {documentation(cls)[name]}"]
    for member in inner:
        kind = next((repr(f.default) for f in dataclasses.fields(member) if f.name == "kind"), "")
        lines.append(
            f"    {'kind = ' + kind if kind else 'keys'}: {(member.__doc__ or '').strip().splitlines()[0]}"
        )
        lines += [f"        {k}: {v}" for k, v in documentation(member).items() if k != "kind"]
    if not inner and get_origin(hint) is Literal:
        lines.append(f"    allowed: {', '.join(repr(a) for a in get_args(hint))}")
    return "\n".join(lines)


def _dataclasses_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [c for a in get_args(hint) for c in _dataclasses_in(a)]
