"""``flowgrpo completion``."""

import argparse

SUMMARY = "print a script that completes commands and options in a shell"
EXAMPLE = """\
flowgrpo completion bash
  flowgrpo completion bash > ~/.local/share/bash-completion/completions/flowgrpo
  eval "$(flowgrpo completion zsh)"                 in ~/.zshrc, after compinit"""
SHELLS = ("bash", "zsh", "tcsh")
FILES = ("config", "run", "model", "images", "prompts", "out", "html")
"""Arguments that complete to files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def run(options: argparse.Namespace) -> int:
    """Print the script, which shtab makes from the parser."""
    import shtab

    from flowgrpo.cli.main import commands, parser

    top = parser(commands())
    for one in (top, *subparsers(top).values()):
        for action in one._actions:
            if action.dest in FILES and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, options.shell))
    return 0


def subparsers(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands by name."""
    (action,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)
