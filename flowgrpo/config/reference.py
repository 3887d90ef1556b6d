"""What the keys of a configuration mean: explanations, the table form of settings, a JSON schema.

All of it comes from the dataclasses: their docstrings, the docstrings below their fields, types and
defaults. Nothing here needs pydantic, so ``flowgrpo config explain`` answers at once.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowgrpo.config.methods import method, similar
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest


def is_required(field: "dataclasses.Field[Any]") -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_table(value: Any) -> Any:
    """Settings as TOML can hold them: dataclasses as tables, tuples as lists.

    Optional keys that are unset are left out.
    """
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
    """The table of a field's value; a class that is not a member of the field's union is named by its path."""
    members = [m for m in get_args(hint) if dataclasses.is_dataclass(m)]
    if members and dataclasses.is_dataclass(value) and type(value) not in members:
        cls = type(value)
        return {**to_table(value), "kind": f"{cls.__module__}:{cls.__qualname__}"}
    return to_table(value)


@cache
def documentation(cls: Any) -> Mapping[str, str]:
    """The docstring below each field of a dataclass, on one line; also of inherited fields."""
    found = {f.name: "" for f in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            found.update(_documented(base))
    return found


def _documented(cls: Any) -> dict[str, str]:
    """The docstrings of the fields in a class's own body."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
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
    """What a dotted key means, its type and default; or how a published method is selected by its name.

    Raises:
        ConfigError: If there is no such key; with the known ones.
    """
    if (found := method(key)) is not None:
        return found.words(key)
    here: list[type] = [cls]
    parts = key.split(".")
    for depth, part in enumerate(parts):
        owners = [c for c in here if part in {f.name for f in dataclasses.fields(c)}]
        if not owners:
            known = sorted({f.name for c in here for f in dataclasses.fields(c)})
            methods = "" if "." in key else similar(key)
            raise ConfigError(
                f"unknown key {key!r}{suggest(part, known)}{methods} (known below {'.'.join(parts[:depth]) or 'the top'}: {', '.join(known)})"
            )
        if depth == len(parts) - 1:
            return "\n".join(_explanation(c, part, key) for c in owners)
        # Several kinds can share a table, as three algorithms share that of previews.
        here = list(
            dict.fromkeys(m for c in owners for m in dataclasses_in(get_type_hints(c)[part]))
        )
    return ""


def _explanation(cls: type, name: str, key: str) -> str:
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    hint = get_type_hints(cls)[name]
    default = "required" if is_required(field) else f"default {_default(field)!r}"
    inner = dataclasses_in(hint)
    meaning = documentation(cls)[name] or (_summary(cls) if name == "kind" else "")
    lines = [f"{key}  ({cls.__name__}; {default})", f"    {meaning}"]
    for member in inner:
        kind = next((repr(f.default) for f in dataclasses.fields(member) if f.name == "kind"), "")
        lines.append(f"    {'kind = ' + kind if kind else 'keys'}: {_summary(member)}")
        lines += [f"        {k}: {v}" for k, v in documentation(member).items() if k != "kind"]
    if not inner and get_origin(hint) is Literal:
        lines.append(f"    allowed: {', '.join(repr(a) for a in get_args(hint))}")
    return "\n".join(lines)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return to_table(field.default_factory())


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def dataclasses_in(hint: Any) -> list[type]:
    """All dataclasses that a type names, such as the members of a union."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [c for a in get_args(hint) for c in dataclasses_in(a)]


def json_schema(cls: type) -> dict[str, Any]:
    """A JSON schema of a dataclass's table, for editors: meanings, types, defaults, allowed values.

    It is as strict as the reader about keys and types, with two exceptions: the keys of a table whose
    ``kind`` is an import path are not checked; and in a file with ``extends``, tables that need keys of the
    other file are marked, because a schema sees one file.
    """
    definitions: dict[str, Any] = {}
    top = _definition(cls, definitions)
    needed = top.pop("required")
    top["properties"]["extends"] = {
        "type": "string",
        "description": "Another configuration, by its path from this file or by its name: keys that are not "
        "here are those of the other file.",
    }
    top["anyOf"] = [{"required": needed}, {"required": ["extends"]}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "flowgrpo configuration",
        **top,
        "$defs": definitions,
    }


def _definition(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one dataclass; those below it are added to the definitions."""
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)
    properties = {}
    for field in fields:
        schema = _schema(hints[field.name], definitions)
        text = documentation(cls)[field.name] or (_summary(cls) if field.name == "kind" else "")
        if text:
            schema["description"] = text
        default = None if is_required(field) else to_table(_default(field))
        if default is not None and field.name != "kind":
            schema["default"] = default
        properties[field.name] = schema
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split()),
        "properties": properties,
        "required": [f.name for f in fields if is_required(f)],
        "additionalProperties": False,
    }


_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean"}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _reference(hint, definitions)
    if origin in (Union, types.UnionType):
        members = [m for m in arguments if dataclasses.is_dataclass(m)]
        if members:
            return _union(members, definitions)
        choices = [_schema(a, definitions) for a in arguments if a is not types.NoneType]
        return choices[0] if len(choices) == 1 else {"anyOf": choices}
    if origin is Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object"}
    return {"type": _PLAIN[hint]}


def _union(members: list[Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One of several dataclasses by their ``kind``, or any table with an import path as its kind."""
    choices = []
    for member in members:
        choice = _reference(member, definitions)
        if not getattr(member, "is_default", False):
            choice["required"] = ["kind"]
        choices.append(choice)
    path = {"type": "string", "pattern": ":", "description": "An import path: package.module:Name."}
    outside = {"type": "object", "properties": {"kind": path}, "required": ["kind"]}
    return {"anyOf": [*choices, outside]}


def _reference(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}  # Holds the place while a class below refers to it.
        definitions[cls.__name__] = _definition(cls, definitions)
    # Within allOf, because editors that read schemas as draft 7 (Taplo) ignore keys beside a $ref.
    return {"allOf": [{"$ref": f"#/$defs/{cls.__name__}"}]}
