"""``flowgrpo config``."""

import argparse
import json
from pathlib import Path

from flowgrpo.cli.common import UsageError, add_set_argument

SUMMARY = "explain, list or show configurations, or write their JSON schema"
EXAMPLE = "flowgrpo config explain algorithm.steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "action",
        choices=("explain", "list", "schema", "show"),
        help="explain a key; list the configurations that come with flowgrpo; write a JSON schema for "
        "editors; show a configuration with all defaults",
    )
    parser.add_argument("name", nargs="?", help="a key such as train.lr, or a configuration")
    add_set_argument(parser)
    parser.add_argument("--out", metavar="FILE", help="file for the JSON schema (default: print it)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Do one of the four actions."""
    if options.action in ("explain", "show") and options.name is None:
        what = "key" if options.action == "explain" else "configuration"
        raise UsageError(f"config {options.action} needs a {what}")
    actions = {"explain": _explain, "list": _list, "schema": _schema, "show": _show}
    actions[options.action](options)
    return 0


def _explain(options: argparse.Namespace) -> None:
    from flowgrpo.config import Config
    from flowgrpo.config.reference import explain

    print(explain(Config, options.name))


def _list(options: argparse.Namespace) -> None:
    from flowgrpo.config.evidence import LEVELS, evidence
    from flowgrpo.config.files import find

    for file in sorted(find("quickstart").parent.glob("*.toml")):
        first = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{file.stem:<24} {first} [evidence: {LEVELS[evidence(file.stem)]}]")


def _schema(options: argparse.Namespace) -> None:
    from flowgrpo.config import Config
    from flowgrpo.config.reference import json_schema

    text = json.dumps(json_schema(Config), indent=2)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
        print(options.out)
    else:
        print(text)


def _show(options: argparse.Namespace) -> None:
    from flowgrpo.config.files import dump, load

    print(dump(load(options.name, options.set)), end="")
