"""Configuration files: where they lie, how they are loaded and saved, and which line is at fault."""

import re
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
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


LISTED_FAULTS = 10
"""Mistakes of a file that an error lists."""


def find(name: str) -> Path:
    """A file by its path, or by the name of one that comes with flowgrpo.

    ``quickstart`` and ``configs/quickstart.toml`` name the same configuration.

    Raises:
        FileNotFoundError: With the nearest name.
        IsADirectoryError: If it is a run directory.
    """
    if Path(name).is_file() or name.startswith(HUB):
        return Path(name)
    package = Path(str(resources.files("flowgrpo")))
    roots = [package.parent, package / "data"]
    for root in roots:
        for candidate in (root / name, root / "configs" / f"{name}.toml"):
            if candidate.is_file():
                return candidate
    if (Path(name) / "config.toml").is_file():
        raise IsADirectoryError(f"{name} is a folder; its configuration is {name}/config.toml")
    known = {
        f"{p.parent.name}/{p.name}"
        for r in roots
        for d in ("configs", "prompts")
        for p in (r / d).glob("*.*")
    }
    raise FileNotFoundError(
        f"no such file: {name}{suggest(name, known | {Path(k).stem for k in known})}"
    )


def load(name: str, settings: Sequence[str] = ()) -> "Config":
    """Read a configuration file and apply ``key=value`` settings to it.

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
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file in this encoding") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return read(Config, override(table, settings))
    except TableError as error:
        messages = []
        for fault in error.faults[:LISTED_FAULTS]:
            setting = _setting_of(fault.location, table, settings)
            place = f"--set {setting}" if setting else f"{path}:{line_of(text, fault.location)}"
            messages.append(f"{place}: {fault.sentence}")
        if len(error.faults) > LISTED_FAULTS:
            messages.append(f"and {len(error.faults) - LISTED_FAULTS} more")
        raise ConfigError("\n".join(messages)) from None


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
