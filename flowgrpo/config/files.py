"""Configuration files: where they lie, how they are loaded and saved, and which line is at fault."""

import re
import tomllib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest
from flowgrpo.core.secrets import redact_table
from flowgrpo.data.prompt_files import HUB

if TYPE_CHECKING:
    from flowgrpo.config.reader import Location
    from flowgrpo.config.schema import Config

CONFIG, INPUTS = "config.toml", "inputs.json"
"""Files of every run directory."""
CLOSE = 0.68
"""Likeness from which a file that ships with flowgrpo is suggested: ``sd35_ocr`` and ``sd35_medium_ocr`` have 0.70,
``edits_train.jsonl`` and ``prompts/shapes_train.jsonl``, which have nothing in common but their ending, 0.65."""
LISTED_FAULTS = 10
"""Mistakes of a file that an error lists."""


def find(name: str) -> Path:
    """A file by its path, or by the name of one that comes with flowgrpo.

    ``quickstart`` and ``configs/quickstart.toml`` name the same configuration. ``~`` is the home folder.

    Raises:
        FileNotFoundError: With the nearest name.
        IsADirectoryError: If it is a run directory.
    """
    if name.startswith(HUB):
        return Path(name)
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if Path(name).is_file():
        return Path(name)
    shipped = _shipped(name)
    if shipped is not None:
        return shipped
    if (Path(name) / "config.toml").is_file():
        raise IsADirectoryError(f"{name} is a folder; its configuration is {name}/config.toml")
    known = {
        f"{p.parent.name}/{p.name}"
        for r in _roots()
        for d in ("configs", "prompts")
        for p in (r / d).glob("*.*")
    }
    near = suggest(name, known | {Path(k).stem for k in known}, CLOSE)
    raise FileNotFoundError(f"no such file: {name}{near}")


def _roots() -> list[Path]:
    """The folders below which the files that come with flowgrpo lie, in a checkout and in a wheel."""
    package = Path(str(resources.files("flowgrpo")))
    return [package.parent, package / "data"]


def _shipped(name: str) -> Path | None:
    """A file that comes with flowgrpo; None if there is none of this name."""
    for root in _roots():
        for candidate in (root / name, root / "configs" / f"{name}.toml"):
            if candidate.is_file():
                return candidate
    return None


def absolute(config: "Config") -> "Config":
    """A configuration whose paths mean the same from any directory.

    Paths to existing files and folders become absolute, as does the run directory; ``~`` is replaced.
    Hub ids, and files that come with flowgrpo, keep their names.
    """
    from flowgrpo.policy.settings import LoRA

    model, weights = config.model, config.model.weights
    adapters = tuple(replace(a, path=_absolute(a.path)) for a in model.adapters)
    if isinstance(weights, LoRA):
        weights = replace(weights, init=_absolute(weights.init))
    model = replace(
        model,
        path=model.path if model.path == "shapes" else _absolute(model.path),
        base=_absolute(model.base),
        adapters=adapters,
        weights=weights,
    )
    prompts = replace(
        config.prompts,
        train=_absolute(config.prompts.train),
        held_out=_absolute(config.prompts.held_out),
    )
    run = replace(config.run, folder=str(Path(config.run.folder).expanduser().absolute()))
    return replace(config, model=model, prompts=prompts, run=run)


def _absolute(name: str) -> str:
    if not name or name.startswith(HUB):
        return name
    path = Path(name).expanduser()
    shipped = _shipped(name)
    if not path.exists() or (shipped is not None and shipped.resolve() == path.resolve()):
        return str(path) if name.startswith("~") else name
    return str(path.absolute())


@dataclass(frozen=True)
class Layer:
    """A configuration file, or one that it extends.

    Attributes:
        path: The file.
        text: Its text.
        table: Its own keys, without ``extends``.
    """

    path: Path
    text: str
    table: dict[str, Any]


def load(name: str | Path, settings: Sequence[str] | Mapping[str, Any] = ()) -> "Config":
    """Read a configuration file and apply settings to it.

    Args:
        name: The file, or the name of one that ships with flowgrpo.
        settings: ``key=value`` texts, as ``--set`` takes them, or a mapping from keys to values, such as
            ``{"train.lr": 1e-4}``.

    The configuration in a run directory is that of a run in this directory, also if it was moved.

    A file may begin with ``extends = "NAME"``: the keys that it does not have are those of the other
    file, which is named by its path from this file, or as :func:`find` takes it.

    Raises:
        ConfigError: On wrong keys, types or values. Each line of the message names the file and the
            line, or the setting.
        FileNotFoundError: If there is no such file.
    """
    from flowgrpo.config.reader import TableError, as_settings, override, read
    from flowgrpo.config.schema import Config

    settings = as_settings(settings)
    path = find(str(name))
    layers = _layers(path)
    table = _merged(layers)
    in_run = path.name == CONFIG and (path.parent / INPUTS).is_file()
    if in_run and "folder" in table.get("run", {}):
        table["run"]["folder"] = str(path.parent)
    try:
        config = read(Config, override(table, settings))
    except TableError as error:
        messages = []
        for fault in error.faults[:LISTED_FAULTS]:
            setting = _setting_of(fault.location, table, settings)
            place = f"--set {setting}" if setting else _place(layers, fault.location)
            messages.append(f"{place}: {fault.sentence}")
        if len(error.faults) > LISTED_FAULTS:
            messages.append(f"and {len(error.faults) - LISTED_FAULTS} more")
        raise ConfigError("\n".join(messages)) from None
    if config.run.folder.startswith("~"):
        folder = str(Path(config.run.folder).expanduser())
        return replace(config, run=replace(config.run, folder=folder))
    return config


def dropped_keys(name: str, settings: Sequence[str]) -> list[str]:
    """Sentences about keys of a configuration file that settings of a ``kind`` drop.

    A table of another kind has keys of its own, so that, for instance, the ``group_size`` of the file
    does not apply to another algorithm.
    """
    from flowgrpo.config.reader import dropped

    found = dropped(_merged(_layers(find(name))), settings)
    return [
        f"--set {setting} leaves out {', '.join(keys)} of the file, which belong to the other kind; set "
        "again what is to hold"
        for setting, keys in found.items()
    ]


def _merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The table of a file with those that it extends."""
    table: dict[str, Any] = {}
    for layer in reversed(layers):
        table = _extended(table, layer.table)
    return table


def _layers(path: Path) -> list[Layer]:
    """A file, the file that it extends, and so on.

    Raises:
        ConfigError: If a file cannot be read, or extends itself.
    """
    layers: list[Layer] = []
    while True:
        table = _table_of(path)
        other = table.pop("extends", None)
        layers.append(Layer(path, path.read_text(encoding="utf-8"), table))
        if other is None:
            return layers
        place = f"{path}:{line_of(layers[-1].text, ('extends',))}"
        if not isinstance(other, str):
            raise ConfigError(f"{place}: extends must be the name of a file, got {other!r}")
        beside = path.parent / other
        try:
            path = beside if beside.is_file() else find(other)
        except OSError as error:
            raise ConfigError(f"{place}: extends: {error}") from error
        if any(path.resolve() == layer.path.resolve() for layer in layers):
            raise ConfigError(f"{place}: extends = {other!r} comes back to a file that extends it")


def _table_of(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file in this encoding") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _extended(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The keys of both; those of ``own`` win. Lists are replaced as a whole, and so is a table of another kind."""
    result = dict(base)
    for key, value in own.items():
        there = result.get(key)
        if not isinstance(there, dict) or not isinstance(value, dict):
            result[key] = value
        elif value.get("kind", there.get("kind")) == there.get("kind"):
            result[key] = _extended(there, value)
        else:
            result[key] = value
    return result


def _place(layers: Sequence[Layer], location: "Location") -> str:
    """The file and the line that give a key: of the first file that has it, or the nearest table around it."""
    depths = [_depth(layer.table, location) for layer in layers]
    layer = layers[depths.index(max(depths))]
    return f"{layer.path}:{line_of(layer.text, location)}"


def _setting_of(location: "Location", table: Any, settings: Sequence[str]) -> str | None:
    """The last setting that decides a key.

    It sets the key itself, a table around it, or its kind; or a key below it, if the file does not
    have the key, so that the setting has created it.
    """
    parts = [str(p) for p in location]
    is_new = _depth(table, location) < len(location)
    for setting in reversed(settings):
        key = setting.partition("=")[0].strip().removesuffix(".kind").split(".")
        if parts[: len(key)] == key or (is_new and key[: len(parts)] == parts):
            return setting
    return None


def line_of(text: str, location: "Location") -> int:
    """The line of a TOML text, counted from 1, that gives a key, or else the nearest table around it.

    TOML parsers do not report lines, so the text is parsed up to the ends of statements: the statement
    after which a key is there for the first time is the one that gives it.
    """
    lines, ends = text.split("\n"), _statement_ends(text)

    def depth_at(end: int) -> int:
        return _depth(tomllib.loads("\n".join(lines[:end])), location)

    reached = depth_at(len(lines))
    names = [str(p) for p in location[:reached] if isinstance(p, str)]
    if not names:
        return 1
    # What is there after a statement is there after all later ones.
    index = bisect_left(ends, reached, key=depth_at)
    start = ends[index - 1] if index else 0
    return start + 1 + _row(lines[start : ends[index]], names[-1])


@lru_cache(maxsize=1)
def _statement_ends(text: str) -> list[int]:
    """The numbers of lines after which a statement of a valid TOML text ends, and that of all lines.

    Lines that cannot be parsed end within a value of several lines.
    """
    lines, ends, start = text.split("\n"), list[int](), 0
    for end in range(1, len(lines) + 1):
        # Every line of a long list would be parsed with all lines before it.
        if lines[end - 1].rstrip().endswith(","):
            continue
        with suppress(tomllib.TOMLDecodeError):
            tomllib.loads("\n".join(lines[start:end]))
            ends.append(end)
            start = end
    return ends if ends and ends[-1] == len(lines) else [*ends, len(lines)]


def _depth(table: Any, location: "Location") -> int:
    """How many parts of a location exist."""
    for depth, part in enumerate(location):
        try:
            table = table[part]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(location)


def _row(statement: Sequence[str], name: str) -> int:
    """The row of a statement that assigns to a name; the first that is not a comment, if that is unclear."""
    assigning = [i for i, line in enumerate(statement) if re.search(rf"\b{name}\b.*=", line)]
    if len(assigning) == 1:
        return assigning[0]
    rows = [i for i, line in enumerate(statement) if line.strip() and not line.lstrip().startswith("#")]  # fmt: skip
    return rows[0] if rows else 0


def dump(config: "Config") -> str:
    """A configuration as TOML; :func:`load` gives an equal one, except for secrets, which are redacted."""
    import tomli_w

    from flowgrpo.config.reference import to_table

    return tomli_w.dumps(redact_table(to_table(config)))


def save(config: "Config", path: Path) -> None:
    """Write a configuration so that :func:`load` gives an equal one, except for secrets."""
    path.write_text(dump(config), encoding="utf-8")
