"""The command line: one file per command."""

from flowgrpo.cli.parser import main

__all__ = ["main"]
