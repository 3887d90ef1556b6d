"""What a run is configured by: the schema, its reader, and the files that hold configurations."""

from flowgrpo.config.reader import override
from flowgrpo.config.schema import (
    Config,
    Evaluation,
    Model,
    Prompts,
    Run,
    Train,
    dump,
    find,
    load,
    save,
)
from flowgrpo.core.errors import ConfigError

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
]
