"""Builds the parser from the command files, and runs a command."""

import argparse
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from flowgrpo import __version__
from flowgrpo.cli.common import UsageError
from flowgrpo.core.imports import code_is_refused, refuse_code, suggest
from flowgrpo.core.secrets import clean_logs, redact
from flowgrpo.core.text import plain, shorten

EPILOG = """\
first steps:
  flowgrpo train quickstart --nproc 2    train the model in the package; five minutes on two CPU cores
  flowgrpo train quickstart --dry-run    print the plan without loading a model
  flowgrpo doctor shapes                 check that a model can be trained
  flowgrpo config explain train.lr       explain a key of a configuration
  flowgrpo serve-reward pick_score       serve a reward from an environment of its own
"""

NO_CODE = "FLOWGRPO_NO_CODE"
"""Environment variable with the effect of ``--no-code``."""
EXPECTED = (ValueError, OSError, RuntimeError, ImportError, OverflowError)
"""Errors that users can correct; the message says how. Any other error is a defect and shows its
traceback."""

SHARED = ("common", "local_pages", "main")
"""Modules of this package that are no commands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    refuse_code("--no-code" in arguments or os.environ.get(NO_CODE, "") not in ("", "0"))
    if "--no-code" in arguments:  # before or after the command
        arguments.remove("--no-code")
        os.environ[NO_CODE] = "1"  # for processes that this one starts
    clean_logs()
    known = commands()
    top = parser(known)
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is not None and command not in known:
        top.error(f"unknown command {command!r}{suggest(command, known)} (known: {', '.join(known)})")  # fmt: skip
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        misspelt(top if command is None else options.parser, unknown)
    if command is None:
        top.print_help()
        return 2
    # Threads that spin while they wait take time from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # So that import paths in a configuration find modules in the working directory, as with
    # python -m flowgrpo.
    if not code_is_refused():
        sys.path.insert(0, os.getcwd())
    try:
        status = int(known[command].run(options))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        # Code of the user's ended the process; 0 would say that the command's work is done.
        print(f"flowgrpo: {command} was ended by sys.exit({error.code!r})", file=sys.stderr)
        return error.code if isinstance(error.code, int) and error.code else 1
    except BrokenPipeError:  # the reader of the output has what it wants, as ``| head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except EXPECTED as error:
        print(shorten(plain(redact(f"flowgrpo: {error}"))), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def misspelt(one: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """End with the arguments that a command does not take, and the nearest option that it has."""
    known = [o for a in one._actions for o in a.option_strings]
    first = next((u for u in unknown if u.startswith("-")), None)
    near = suggest(first.partition("=")[0], known) if first else ""
    one.error(f"unrecognized arguments: {' '.join(unknown)}{near}")


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest value where one of several is expected."""

    def error(self, message: str) -> NoReturn:
        """End with the usage and a message; the status is 2."""
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        argument = re.match(r"argument ([^:]+):", message)
        if wrong and argument:
            names = argument[1].split("/")
            allowed = [
                str(c)
                for a in self._actions
                if a.choices and ({a.dest, *a.option_strings} & {*names})
                for c in a.choices
            ]
            message += suggest(wrong[1], allowed)
        super().error(message)


def commands() -> Mapping[str, Any]:
    """The module of each command, by the command's name: ``serve_reward.py`` is ``serve-reward``."""
    folder = str(Path(__file__).parent)
    names = sorted(m.name for m in pkgutil.iter_modules([folder]) if m.name not in SHARED)
    return {n.replace("_", "-"): import_module(f"flowgrpo.cli.{n}") for n in names}


def parser(known: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="flowgrpo",
        description="Reinforcement learning for image and video generators: any diffusers pipeline is a policy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--no-code",
        action="store_true",
        help="refuse import paths of modules that are not part of flowgrpo; may follow the command",
    )
    top.add_argument("--version", action="version", version=f"flowgrpo {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND")
    for name, command in known.items():
        sub = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY[0].upper() + command.SUMMARY[1:] + ".",
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(parser=sub)
        command.add_arguments(sub)
    return top


if __name__ == "__main__":
    sys.exit(main())
