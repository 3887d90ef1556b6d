"""Objects by import path, and suggestions for misspelt names."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def import_path(path: str) -> Any:
    """The object at ``"package.module:name"``, so that a configuration can name a user's code.

    Raises:
        ValueError: If there is no such module or name, or importing the module fails.
        ImportError: If the module needs a package that is not installed.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or module.startswith("."):
        raise ValueError(f"{path!r} is no import path; write 'package.module:name'")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path!r}: there is no module {error.name!r}") from error
    except ImportError:
        # An optional package is missing; the message names the extra to install.
        raise
    except (Exception, SystemExit) as error:
        # The module is a user's file, and importing it runs it.
        raise ValueError(
            f"{path!r}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(imported, name):
        raise ValueError(f"{path!r}: module {module} has no {name!r}{suggest(name, dir(imported))}")
    return getattr(imported, name)


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
