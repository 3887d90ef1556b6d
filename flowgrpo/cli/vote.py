"""``flowgrpo vote``."""

import argparse
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from flowgrpo.cli.common import UsageError, is_run
from flowgrpo.cli.local_pages import check_port, port_errors, serve
from flowgrpo.core.text import counted

if TYPE_CHECKING:
    from flowgrpo.data.votes import Ballot
    from flowgrpo.evaluation.vote_pairs import Source

SUMMARY = "let people vote on pairs of pictures in the browser"
EXAMPLE = """\
flowgrpo vote runs/quickstart --out votes
  flowgrpo vote images_a images_b --out votes             two folders of 'flowgrpo sample'
  flowgrpo vote images --out votes                        samples of the same prompt
  flowgrpo vote --out votes                               go on with these votes
  flowgrpo compare votes                                  the result
  flowgrpo learn-reward votes --out head.safetensors      a reward from the votes"""
PORT = 8643
IMAGES = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="RUN|FOLDER",
        help="run directories, or folders of 'flowgrpo sample'; not needed to go on with votes",
    )
    parser.add_argument("--out", default="votes", help="folder of the votes (default: %(default)s)")
    parser.add_argument("--pairs", type=int, help="most pairs (default: all)")
    parser.add_argument("--seed", type=int, help="for the order of the pairs and the sides (default: 0)")  # fmt: skip
    parser.add_argument(
        "--images",
        type=int,
        help="draw this many held-out pictures of each run, in place of those of its newest comparison grid "
        f"(default: {IMAGES} if the grid has marks on its pictures, which would give the sides away)",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="0 for any free one (default: %(default)s)"
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address only")


def run(options: argparse.Namespace) -> int:
    """Make the pairs, and serve the page until Ctrl-C."""
    for name in ("pairs", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if options.seed is not None and options.seed < 0:
        raise UsageError(f"--seed must be at least 0, got {options.seed}")
    check_port(options.port)
    return _serve(_ballot(options), options.port, not options.no_browser)


def _ballot(options: argparse.Namespace) -> "Ballot":
    from flowgrpo.data.votes import is_ballot, read_ballot
    from flowgrpo.evaluation.vote_pairs import check_free, make_ballot

    out = Path(options.out)
    if not options.sources:
        given = [n for n in ("pairs", "seed", "images") if getattr(options, n) is not None]
        if given:
            raise UsageError(f"--{given[0]} is for new votes: name a run or folders")
        if not is_ballot(out):
            raise UsageError(
                f"{out} has no votes to go on with: name a run, or folders of 'flowgrpo sample'"
            )
        return read_ballot(out)
    check_free(out)  # before pictures are drawn
    paths = [Path(s) for s in options.sources]
    runs = [is_run(str(p)) for p in paths]
    if options.images is not None and not any(runs):
        raise UsageError("--images is for run directories; a folder has its own pictures")
    if any(runs) and not all(runs):
        raise UsageError(
            "a run has other prompts than a folder: sample it with 'flowgrpo sample', and name folders only"
        )
    sources = _of_runs(paths, options.images) if any(runs) else _of_folders(paths)
    return make_ballot(out, sources, options.seed or 0, options.pairs or 0)


def _names(paths: list[Path]) -> list[str]:
    """A name of each path: its last part, or the whole path where two have the same."""
    last = [p.resolve().name for p in paths]
    if len({p.resolve() for p in paths}) < len(paths):
        raise UsageError("the same run or folder is named twice")
    return last if len(set(last)) == len(last) else [str(p) for p in paths]


def _of_folders(paths: list[Path]) -> "list[Source]":
    from flowgrpo.evaluation.vote_pairs import from_folder

    return [from_folder(p, n) for p, n in zip(paths, _names(paths), strict=True)]


def _of_runs(paths: list[Path], images: int | None) -> "list[Source]":
    """The pictures of runs: of their grids, or drawn now. Of one run also those before training."""
    from flowgrpo.evaluation.vote_pairs import from_grid, newest_grid

    names = _names(paths)
    if images is None:
        found: list[Source] = []
        for path, name in zip(paths, names, strict=True):
            grid = newest_grid(path)
            columns = from_grid(grid, f"{name}: base", name) if grid else None
            if columns is None:
                break
            found += columns if len(paths) == 1 else columns[1:]
        else:
            return found
        print(f"the grids have no pictures without marks, so {IMAGES} pictures are drawn of each model")  # fmt: skip
    return _drawn(paths, names, images or IMAGES)


def _drawn(paths: list[Path], names: list[str], images: int) -> "list[Source]":
    """Pictures of the first run's held-out prompts, with the same noise for all models."""
    from flowgrpo.cli.common import checkpoint_of, load_run, quiet, run_config
    from flowgrpo.config import find
    from flowgrpo.data.pictures import picture_of
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.evaluation.comparison_grid import ComparisonGrid
    from flowgrpo.evaluation.vote_pairs import Picture, Source
    from flowgrpo.training.cpu import prepare_cpu

    for path in paths:
        checkpoint_of(path, "last")  # before pictures of the others are drawn
    config = run_config(paths[0])
    prompts = PromptSet.load(find(config.prompts.held_out), config.prompts.balance)
    grid = ComparisonGrid.of(prompts, images, 1, 0)
    samples = -(-images // len(grid.prompts))
    grid = ComparisonGrid(grid.prompts, samples, 0)
    # The first sample of every prompt, then the second one, so that a limit leaves no prompt out.
    order = [p * samples + s for s in range(samples) for p in range(len(grid.prompts))][:images]
    quiet()
    prepare_cpu(0)
    models = [(paths[0], "base", f"{names[0]}: base")] if len(paths) == 1 else []
    models += [(p, "last", n) for p, n in zip(paths, names, strict=True)]
    sources = []
    for path, weights, name in models:
        policy, _ = load_run(path, weights)
        if policy.makes_videos:
            raise UsageError(f"{path} makes videos, and people vote on pictures here")
        media = grid.generate(policy, policy.sampling)
        pictures = [Picture(grid.expanded[i].text, picture_of(media[i])) for i in order]
        sources.append(Source(name, pictures))
        del policy
    return sources


def _serve(ballot: "Ballot", port: int, browser: bool) -> int:
    from flowgrpo.evaluation.vote_server import VoteServer

    with port_errors(port):
        server = VoteServer(ballot, port)
    print(f"{counted(len(ballot.pairs), 'pair')}: {server.address}", flush=True)
    print(f"votes are stored in {ballot.folder}; Ctrl-C ends", flush=True)
    serve(server, started=lambda: browser and webbrowser.open(server.address))
    return 0
