"""The command line: one file per command, with its arguments and the function that runs it.

A module here is a command if it has ``SUMMARY`` (a phrase for the help), ``EXAMPLE`` (a command line),
``add_arguments(parser)`` and ``run(options)``, which returns the exit status; ``main`` finds it by its
file name. ``--help`` imports all of them, so they import torch, diffusers and the packages that
need them inside functions. ``common`` has the arguments and helpers that several commands share, and
``local_pages`` those of commands that serve a page.
"""

from flowgrpo.cli.main import main

__all__ = ["main"]
