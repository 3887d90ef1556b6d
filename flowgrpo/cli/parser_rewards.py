"""The part of the command line that is about rewards: ``score``, ``serve-reward``, ``learn-rubrics``."""

import argparse
from collections.abc import Callable

from flowgrpo.cli import rewards

Add = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]


def add_score(add: Add) -> None:
    score = add(
        "score",
        rewards.score,
        "score images or videos with reward models",
        "flowgrpo score images --reward jpeg_size --reward-option jpeg_size.quality=80 --out scores.csv",
    )
    score.add_argument(
        "images",
        help="folder of images, or of videos as folders of frames (or NAME_frame000.png, ...); with "
        "index.jsonl as 'sample' writes it, prompts are known",
    )
    score.add_argument(
        "--reward",
        required=True,
        action="append",
        metavar="[NAME=]MODEL",
        help="name in reward_models or import path; can be given again, the same one too under "
        "another NAME",
    )
    score.add_argument(
        "--reward-option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="an option of one of the rewards, by the name in its column; can be given again",
    )
    score.add_argument(
        "--prompts", help="file of prompts, one for each image in the order of file names"
    )
    score.add_argument("--out", help="file for a table (.jsonl or .csv)")
    score.add_argument(
        "--batch", type=int, default=32, help="images scored at a time (default: %(default)s)"
    )


def add_serve_reward(add: Add) -> None:
    serve = add(
        "serve-reward",
        rewards.serve_reward,
        "serve a reward over HTTP, from an environment or a machine of its own",
        "flowgrpo serve-reward pick_score --option dtype=bfloat16 --port 8500\n"
        "  curl -F prompt='a red circle' -F image=@circle.png http://127.0.0.1:8500/score\n"
        '  in the configuration of a run:\n    [[rewards]]\n    model = "remote"\n    name = "pick_score"\n'
        '    options = { url = "http://127.0.0.1:8500" }',
    )
    serve.add_argument("reward", help="name in reward_models or import path")
    serve.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the reward; can be given again",
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; beyond this machine a token is required (default: %(default)s)",
    )
    serve.add_argument("--port", type=int, default=8500, help="0 for any (default: %(default)s)")
    serve.add_argument(
        "--token",
        default="",
        help="what requests must bear; better in FLOWGRPO_TOKEN, since command lines can be seen",
    )
    serve.add_argument(
        "--max-batch", type=int, default=64, help="samples in one call (default: %(default)s)"
    )
    serve.add_argument(
        "--wait",
        type=float,
        default=0.01,
        help="seconds to wait for more requests after the first one (default: %(default)s)",
    )
    serve.add_argument(
        "--max-megabytes", type=float, default=256, help="of a request (default: %(default)s)"
    )
    serve.add_argument(
        "--max-images", type=int, default=1024, help="of a request (default: %(default)s)"
    )
    serve.add_argument(
        "--max-pixels", type=int, default=4096 * 4096, help="of an image (default: %(default)s)"
    )


def add_learn_rubrics(add: Add) -> None:
    learn = add(
        "learn-rubrics",
        rewards.learn_rubrics,
        "find out which questions to a model tell the pictures that people prefer",
        "flowgrpo learn-rubrics pairs.jsonl --rubrics candidates.txt --model Qwen/Qwen3-VL-8B-Instruct --out rubrics.jsonl\n"
        '  pairs.jsonl: {"prompt": "a cat", "preferred": "a.png", "other": "b.png"} on each line\n'
        '  in the configuration of a run:\n    [[rewards]]\n    model = "vlm_judge"\n'
        '    options = { model = "Qwen/Qwen3-VL-8B-Instruct", rubrics = "rubrics.jsonl" }',
    )
    learn.add_argument("pairs", help="a .jsonl file; its pictures are found beside it")
    learn.add_argument(
        "--rubrics", required=True, help="candidates: a question per line (.txt), or .jsonl"
    )
    learn.add_argument("--model", required=True, help="as the server calls it")
    learn.add_argument(
        "--base-url", default="", help="of the server (default: http://127.0.0.1:8000/v1)"
    )
    learn.add_argument(
        "--judge-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the vlm_judge reward, such as cache=answers; can be given again",
    )
    learn.add_argument("--most", type=int, default=0, help="keep no more (default: no limit)")
    learn.add_argument("--out", required=True, help="file for the rubrics that are kept (.jsonl)")
