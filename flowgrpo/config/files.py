"""Configuration files: where they lie, how they are loaded and saved, and which line is at fault."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest
from flowgrpo.data.prompt_files import HUB

if TYPE_CHECKING:
    from flowgrpo.config.reader import Location
    from flowgrpo.config.schema import Config

CONFIG, INPUTS = "config.toml", "inputs.json"
"""Files of every run directory."""


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
    raise FileNotFoundError(
        f"no such file: {name}{suggest(name, known | {Path(k).stem for k in known})}"
    )


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


def load(name: str, settings: Sequence[str] = ()) -> "Config":
    """Read a configuration file and apply ``key=value`` settings to it.

    The configuration in a run directory is that of a run in this directory, also if it was moved.

    Raises:
        ConfigError: On wrong keys, types or values. Each line of the message names the file and the
            line, or the setting.
        FileNotFoundError: If there is no such file.
    """
    from flowgrpo.config.reader import TableError, override, read
    from flowgrpo.config.schema import Config

    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
        if (
            path.name == CONFIG
            and (path.parent / INPUTS).is_file()
            and "folder" in table.get("run", {})
        ):
            table["run"]["folder"] = str(path.parent)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file in this encoding") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        config = read(Config, override(table, settings))
    except TableError as error:
        messages = []
        for fault in error.faults:
            setting = _setting_of(fault.location, table, settings)
            place = f"--set {setting}" if setting else f"{path}:{line_of(text, fault.location)}"
            messages.append(f"{place}: {fault.sentence}")
        raise ConfigError("\n".join(messages)) from None
    if config.run.folder.startswith("~"):
        folder = str(Path(config.run.folder).expanduser())
        return replace(config, run=replace(config.run, folder=folder))
    return config


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

    TOML parsers do not report lines, so ever longer parts of the text are parsed: the statement after
    which a key is there for the first time is the one that gives it. A part that cannot be parsed
    ends within a value of several lines.
    """
    lines = text.splitlines()
    found, depth, start = 1, 0, 0
    for end in range(1, len(lines) + 1):
        try:
            table = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        reached = _depth(table, location)
        if reached > depth:
            names = [str(p) for p in location[:reached] if isinstance(p, str)]
            found = start + 1 + _row(lines[start:end], names[-1])
            depth = reached
        start = end
    return found


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
    """A configuration as TOML; :func:`load` gives an equal one."""
    import tomli_w

    from flowgrpo.config.reference import to_table

    return tomli_w.dumps(to_table(config))


def save(config: "Config", path: Path) -> None:
    """Write a configuration so that :func:`load` gives an equal one."""
    path.write_text(dump(config), encoding="utf-8")
