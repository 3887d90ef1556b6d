"""The configuration of a run: its schema, the files that hold it, its reader, and its reference.

Nothing here imports torch or diffusers, and names are imported when they are first used: commands
that only need the files do not wait for the schema.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowgrpo.core.errors import ConfigError

if TYPE_CHECKING:
    from flowgrpo.config.files import dump, find, load, save
    from flowgrpo.config.reader import override
    from flowgrpo.config.schema import Config, Evaluation, Model, Prompts, Run, Train

_HOMES = {
    "Config": "schema",
    "Evaluation": "schema",
    "Model": "schema",
    "Prompts": "schema",
    "Run": "schema",
    "Train": "schema",
    "dump": "files",
    "find": "files",
    "load": "files",
    "save": "files",
    "override": "reader",
}

__all__ = [
    "Config",
    "ConfigError",
    "Evaluation",
    "Model",
    "Prompts",
    "Run",
    "Train",
    "dump",
    "find",
    "load",
    "override",
    "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowgrpo.config' has no attribute {name!r}")
    return getattr(import_module(f"flowgrpo.config.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
