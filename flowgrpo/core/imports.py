"""Objects by import path, and suggestions for misspelt names."""

import difflib
import importlib
import traceback
from collections.abc import Iterable
from typing import Any

OWN_PACKAGES = ("flowgrpo", "reward_models")
_code_is_refused = False


def refuse_code(refused: bool = True) -> None:
    """Let :func:`import_path` import modules of flowgrpo only, from now on."""
    global _code_is_refused
    _code_is_refused = refused


def code_is_refused() -> bool:
    """Whether :func:`refuse_code` was called."""
    return _code_is_refused


def check_code_allowed(path: str) -> None:
    """Raise ValueError if an import path names code from outside, and such code is refused."""
    if _code_is_refused and path.split(":")[0].split(".")[0] not in OWN_PACKAGES:
        raise ValueError(
            f"{path!r} is an import path, which would run code from outside of flowgrpo; --no-code (or "
            "FLOWGRPO_NO_CODE in the environment) refuses it"
        )


def import_path(path: str) -> Any:
    """The object at ``"package.module:name"``, so that a configuration can name a user's code.

    Raises:
        ValueError: If there is no such module or name, the module fails while it is imported, or it
            is not part of flowgrpo and code was refused (:func:`refuse_code`).
        ImportError: If the module itself raises one, such as a reward without its extra.
    """
    module, _, name = path.partition(":")
    if not module or not name or module.startswith("."):
        raise ValueError(f"{path!r} is no import path; write 'package.module:name'")
    check_code_allowed(path)
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = f"{path!r}: there is no module {error.name!r}"
        # A module on the way to ``module``, or one that it imports.
        if f"{module}.".startswith(f"{error.name}."):
            own = module.split(".")[0] in OWN_PACKAGES
            advice = "" if own else "; run the command in the folder that contains it, add this folder to PYTHONPATH, or install it"  # fmt: skip
            raise ValueError(f"{missing}{advice}") from error
        raise ValueError(f"{missing}, which {module} imports") from error
    except ImportError:
        # An optional package is missing; the message names the extra to install.
        raise
    except (Exception, SystemExit) as error:
        # The module is a user's file, and importing it runs it. The innermost line is in that file,
        # or in a library that it called.
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({last.filename}, line {last.lineno})"
        raise ValueError(
            f"{path!r}: module {module} cannot be imported: {type(error).__name__}: {error}"
            + ("" if isinstance(error, SyntaxError) else place)
        ) from error
    if not hasattr(imported, name):
        raise ValueError(f"{path!r}: module {module} has no {name!r}{suggest(name, dir(imported))}")
    return getattr(imported, name)


def suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or nothing; ``cutoff`` is the least likeness, up to 1."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
