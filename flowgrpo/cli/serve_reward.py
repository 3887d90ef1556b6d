"""``flowgrpo serve-reward``."""

import argparse
import logging
import os
import signal
import threading

from flowgrpo.cli.common import parse_setting

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
        help="secret that requests must carry; FLOWGRPO_TOKEN is safer, since command lines can be "
        "seen",
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
    parser.add_argument(
        "--max-megabytes", type=float, default=256, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-images", type=int, default=1024, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=4096 * 4096, help="of an image (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Load the reward and serve it until SIGTERM or SIGINT."""
    from flowgrpo.rewards.loading import load_reward
    from flowgrpo.rewards.protocols import LearningReward
    from flowgrpo.rewards.serving.protocol import Limits
    from flowgrpo.rewards.serving.server import RewardServer
    from flowgrpo.rewards.settings import Reward

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = dict(parse_setting(s, "--option") for s in options.option)
    settings = Reward(model=options.reward, options=given)
    reward = load_reward(settings)
    if isinstance(reward, LearningReward):
        raise ValueError(
            f"reward {settings.label!r} learns during a run, and its state belongs to the run: behind "
            "a server it would never be updated; use it in the run's own process"
        )
    server = RewardServer(
        reward,
        name=settings.label,
        host=options.host,
        port=options.port,
        token=options.token or os.environ.get("FLOWGRPO_TOKEN", ""),
        limits=Limits(
            num_bytes=int(options.max_megabytes * 2**20),
            num_images=options.max_images,
            num_pixels=options.max_pixels,
        ),
        max_batch=options.max_batch,
        wait=options.wait,
    )
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    guard = "a token" if server.token else "no token"
    print(f"serving {settings.label} at {server.url} ({guard}); Ctrl-C stops", flush=True)
    stopped.wait()
    # A request or a reward may take for ever: a second signal ends the process at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    print("stopping after the requests in progress (again to stop at once)", flush=True)
    server.close()
    return 0
