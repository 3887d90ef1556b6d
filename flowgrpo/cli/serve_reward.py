"""``flowgrpo serve-reward``."""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from flowgrpo.cli.common import UsageError, parse_setting
from flowgrpo.core.text import counted, plain

SUMMARY = "serve a reward over HTTP, from an environment or a machine of its own"
EXAMPLE = (
    "flowgrpo serve-reward pick_score --option dtype=bfloat16 --port 8500\n"
    "  curl -F prompt='a red circle' -F image=@circle.png http://127.0.0.1:8500/score\n"
    '  in the configuration of a run:\n    [[rewards]]\n    model = "remote"\n    name = "pick_score"\n'
    '    options = { url = "http://127.0.0.1:8500" }'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("reward", help="name in reward_models or import path")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the reward; can be given again",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; beyond this machine a token is required (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8500, help="0 for any (default: %(default)s)")
    parser.add_argument(
        "--token",
        default="",
        help="secret that requests must carry; other users of the machine can see command lines, so "
        "--token-file or the environment variable FLOWGRPO_TOKEN is safer",
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file that contains the token"
    )
    parser.add_argument(
        "--max-batch", type=int, default=64, help="samples in one call (default: %(default)s)"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=0.01,
        help="seconds to wait for more requests after the first one (default: %(default)s)",
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-megabytes", type=float, default=256, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-images", type=int, default=1024, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=4096 * 4096, help="of an image (default: %(default)s)"
    )
    parser.add_argument(
        "--max-decoded-megabytes",
        type=float,
        default=4096,
        help="of the decoded images of a request, 12 bytes per pixel (default: %(default)s)",
    )
    parser.add_argument(
        "--max-memory-megabytes",
        type=float,
        default=8192,
        help="of all requests in progress, decoded images included (default: %(default)s)",
    )
    parser.add_argument(
        "--max-connections", type=int, default=64, help="at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        help="after SIGTERM or Ctrl-C, time to answer the requests in progress (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Load the reward and serve it until SIGTERM or SIGINT."""
    from flowgrpo.rewards.loading import load_reward
    from flowgrpo.rewards.protocols import LearningReward, takes_audio
    from flowgrpo.rewards.serving.protocol import Limits
    from flowgrpo.rewards.serving.server import RewardServer
    from flowgrpo.rewards.settings import Reward

    token = _token(options)  # before a model is loaded
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = dict(parse_setting(s, "--option") for s in options.option)
    settings = Reward(model=options.reward, options=given)
    reward = load_reward(settings)
    if isinstance(reward, LearningReward):
        raise ValueError(
            f"reward {settings.label!r} learns during a run, and its state belongs to the run: behind "
            "a server it would never be updated; use it in the run's own process"
        )
    if takes_audio(reward):
        raise ValueError(
            f"reward {settings.label!r} needs sound, which requests to a reward server do not carry; use it "
            "in the run's own process"
        )
    server = RewardServer(
        reward,
        name=settings.label,
        host=options.host,
        port=options.port,
        token=token,
        limits=Limits(
            num_bytes=int(options.max_megabytes * 2**20),
            num_images=options.max_images,
            num_pixels=options.max_pixels,
            num_decoded=int(options.max_decoded_megabytes * 2**20),
            num_reserved=int(options.max_memory_megabytes * 2**20),
            num_connections=options.max_connections,
        ),
        max_batch=options.max_batch,
        wait=options.wait,
        drain=options.drain_seconds,
    )
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    guard = "a token" if server.token else "no token"
    print(f"serving {plain(settings.label)} at {server.url} ({guard}); Ctrl-C stops", flush=True)
    stopped.wait()
    # A request or a reward may take for ever: a second signal ends the process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    print("stopping after the requests in progress (again to stop at once)", flush=True)
    if not server.close():
        print(
            f"flowgrpo: not scored within {server.drain:g} s: {counted(server.batcher.num_waiting, 'sample')}",
            file=sys.stderr,
        )
        return 1
    return 0


def _token(options: argparse.Namespace) -> str:
    """The token, from the command line, its file or the environment.

    Raises:
        UsageError: If it is given twice, or its file cannot be read or is empty.
    """
    if options.token and options.token_file:
        raise UsageError("give --token or --token-file, not both")
    if not options.token_file:
        return str(options.token or os.environ.get("FLOWGRPO_TOKEN", ""))
    try:
        return read_token(options.token_file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--token-file: {error}") from error


def read_token(file: Path) -> str:
    """The token in a file, without spaces around it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not one line of text.
    """
    try:
        token = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file") from error
    if not token or len(token.split()) != 1:
        raise ValueError(f"{file} must contain the token and nothing else")
    return token
