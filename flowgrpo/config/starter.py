"""A commented configuration for a model: the recipe for it, with the meaning of every key."""

import dataclasses
import difflib
import json
import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from flowgrpo.config.files import find
from flowgrpo.config.reader import assign, default_member, kind_of
from flowgrpo.config.recipes import head_of
from flowgrpo.config.reference import dataclasses_in, documentation
from flowgrpo.config.schema import Config
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest
from flowgrpo.policy.model_files import INDEX, published_folder

PREFERRED = (
    "quickstart", "sd15_dance", "sdxl_dance", "sd35_medium_24gb", "flux1_dev_24gb", "qwen_image",
    "wan21_t2v", "hunyuan_dance",
)  # fmt: skip
"""The first recipe for each model, where there are several: for a device of 24 GB if there is one."""
MARK = re.compile(r"^\[+([\w.]+)\]+$")
ASSIGNMENT = re.compile(r"^(\w+)\s*=")


def recipes_for(model: str) -> list[str]:
    """The shipped configurations for a model or for models of its kind, the preferred one first.

    Args:
        model: Hub id, or a folder, whose kind is the class of its pipeline.
    """
    paths = {f.stem: _model_of(f) for f in sorted(find("quickstart").parent.glob("*.toml"))}
    same = [name for name, path in paths.items() if path == model]
    if not same and (Path(model) / INDEX).is_file():
        kind = _class_of(Path(model))
        same = [name for name, path in paths.items() if _published_class(path) == kind]
    return sorted(same, key=lambda n: (n not in PREFERRED, n))


def similar_recipes(model: str) -> dict[str, str]:
    """The preferred recipe for each of the models whose names are most like a model's, at most two.

    Such models are often of one family, as FLUX.1-dev and FLUX.1-Kontext-dev, Wan2.1 and Wan2.2.
    """
    names: dict[str, str] = {}
    for file in sorted(find("quickstart").parent.glob("*.toml")):
        path = _model_of(file)
        if published_folder(path) is not None or path.count("/") == 1:
            names.setdefault(path.rsplit("/", 1)[-1].lower(), path)
    near = difflib.get_close_matches(model.rsplit("/", 1)[-1].lower(), list(names), n=2, cutoff=0.6)
    return {names[n]: recipes_for(names[n])[0] for n in near}


def starter(model: str, recipe: str, settings: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """The text of a configuration for a model.

    Args:
        model: Hub id or folder.
        recipe: The shipped configuration that it follows.
        settings: Keys to change, such as those that save memory.
        notes: Lines for its head.

    Raises:
        ConfigError: If the recipe does not exist.
    """
    from tomli_w import dumps

    try:
        source = find(recipe)
    except FileNotFoundError as error:
        known = [f.stem for f in find("quickstart").parent.glob("*.toml")]
        raise ConfigError(f"no recipe {recipe!r}{suggest(recipe, known)}; 'flowgrpo config list' lists them") from error  # fmt: skip
    table = tomllib.loads(source.read_text(encoding="utf-8"))
    name = Path(model).name.lower().replace(".", "_")
    for key, value in {"model.path": model, "run.folder": f"runs/{name}", **settings}.items():
        assign(table, key, value)
    first = f"A run on {model}, after the recipe {recipe} that comes with flowgrpo:"
    last = "'flowgrpo config explain KEY' explains any key, also those that are not here."
    head = [
        *_comment(first),
        *(f"#   {line}" for line in head_of(source)),
        *(line for text in (*notes, last) for line in _comment(text)),
    ]
    return "\n".join([*head, "", *_commented(dumps(table))]) + "\n"


def _commented(text: str) -> list[str]:
    """TOML as tomli-w writes it, with the meaning of each table and key above it."""
    table, lines, path = tomllib.loads(text), [], ()
    inside = False
    for line in text.splitlines():
        mark, assignment = MARK.match(line), ASSIGNMENT.match(line)
        if mark:
            path = tuple(mark[1].split("."))
            lines += [*_comment(_meaning(table, path)), line]
        elif assignment and not inside:
            lines += [*_comment(_meaning(table, (*path, assignment[1]))), line]
        else:
            lines.append(line)
        inside = (line.endswith("[") and bool(assignment)) or (inside and line != "]")
    return lines


def _comment(text: str) -> list[str]:
    plain = text.replace("``", "`")
    return textwrap.wrap(plain, 98, initial_indent="# ", subsequent_indent="# ")


def _meaning(table: Any, path: Sequence[str]) -> str:
    """The docstring of a key; empty for what no settings class describes, such as options of a reward."""
    cls: Any = Config
    for depth, part in enumerate(path):
        if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
            return ""
        if part not in get_type_hints(cls):
            return ""
        inner = table[part]
        # Of a list of tables, such as [[rewards]], all have one class.
        table = inner[0] if isinstance(inner, list) and inner and depth < len(path) - 1 else inner
        if depth == len(path) - 1:
            return documentation(cls)[part]
        members = dataclasses_in(get_type_hints(cls)[part])
        kind = table.get("kind") if isinstance(table, dict) else None
        named = [m for m in members if kind is not None and kind_of(m) == kind]
        alone = members[0] if len(members) == 1 else default_member(members)
        cls = named[0] if named else alone
    return ""


def _model_of(file: Path) -> str:
    return str(tomllib.loads(file.read_text(encoding="utf-8"))["model"]["path"])


def _class_of(folder: Path) -> str:
    return str(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("_class_name"))


def _published_class(model: str) -> str | None:
    """The pipeline class of a published model, from its config files in the package."""
    folder = published_folder(model)
    return None if folder is None else _class_of(folder)
