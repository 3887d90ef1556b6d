"""Objects by import path, so that a configuration can name code outside of flowgrpo."""

import importlib
from typing import Any

from flowgrpo.names import suggest


def import_path(path: str) -> Any:
    """The object that ``"package.module:name"`` names.

    Raises:
        ValueError: If there is none.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ValueError(f"{path!r} is no import path; write 'package.module:name'")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path!r}: there is no module {error.name!r}") from error
    if not hasattr(imported, name):
        raise ValueError(f"{path!r}: module {module} has no {name!r}{suggest(name, dir(imported))}")
    return getattr(imported, name)
