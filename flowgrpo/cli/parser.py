"""The command line: ``flowgrpo train``, ``sample``, ``grid``, ``score``, ``doctor``, ..."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from flowgrpo.cli import commands, exports, inspection
from flowgrpo.cli.bench import add_bench
from flowgrpo.cli.parser_rewards import add_learn_rubrics, add_score, add_serve_reward

EPILOG = """\
first steps:
  flowgrpo train quickstart              teach the model in the package; minutes on two CPU cores
  flowgrpo train quickstart --dry-run    what that would do, without loading a model
  flowgrpo doctor shapes                 prove that a model can be trained
  flowgrpo config explain train.lr       what a key of a configuration means
  flowgrpo serve-reward pick_score       a reward in an environment of its own
"""

CONFIG_HELP = "configuration: a .toml file, or the name of one that comes with flowgrpo (quickstart, sd15_dance, ...)"
SET_HELP = "change one key, for instance --set train.lr=1e-4; can be given again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0 done, 1 failed, 2 misused, 130 interrupted."""
    options = parser().parse_args(arguments)
    # Threads that spin while they wait take the time of those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # So that import paths in a configuration find modules beside it, as with python -m flowgrpo.
    sys.path.insert(0, os.getcwd())
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        print(f"flowgrpo: {error}", file=sys.stderr)
        return 1


EXPECTED = (ValueError, OSError, RuntimeError, ImportError, OverflowError)
"""What users can mend; the message says how. Anything else is a defect and shows its traceback."""


Add = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]
"""Adds a command: its name, what runs it, its summary, an example."""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="flowgrpo",
        description="Reinforcement learning for image and video generators: any diffusers pipeline is a policy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=run)
        return sub

    _train(add)
    _sample(add)
    _grid(add)
    _inspect(add)
    add_score(add)
    add_serve_reward(add)
    add_learn_rubrics(add)
    _export(add)
    _push(add)
    _doctor(add)
    add_bench(add)
    _config(add)
    return top


def _train(add: Add) -> None:
    train = add(
        "train",
        commands.train,
        "fine-tune a model, or go on where a run stopped",
        "flowgrpo train quickstart --set run.seed=1",
    )
    train.add_argument("config", help=CONFIG_HELP)
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without the model, print the plan and the memory "
        "that it takes, stop",
    )
    train.add_argument(
        "--memory-gb",
        type=float,
        metavar="N",
        help="with --dry-run: the device's memory to compare with (default: that of the GPU here)",
    )


def _sample(add: Add) -> None:
    sample = add(
        "sample",
        commands.sample,
        "draw images of prompts, with the deterministic sampler",
        'flowgrpo sample shapes "a photo of two circles" --out images',
    )
    _model_arguments(sample)
    sample.add_argument(
        "prompts", nargs="+", help="prompts, or files of prompts (.txt, .jsonl, .csv)"
    )
    sample.add_argument(
        "--out",
        required=True,
        help="folder for the images, as {prompt number}_{sample number}.png, and index.jsonl",
    )
    sample.add_argument(
        "--samples", type=int, default=4, help="images per prompt (default: %(default)s)"
    )


def _grid(add: Add) -> None:
    grid = add(
        "grid",
        commands.grid,
        "draw a labelled grid: base beside tuned, same noise",
        "flowgrpo grid runs/quickstart --out grid.png",
    )
    grid.add_argument("run", help="run directory")
    grid.add_argument("--out", required=True, help="PNG file")
    grid.add_argument("--prompts", help="file of prompts (default: the run's held-out prompts)")
    grid.add_argument("--rows", type=int, default=6, help="prompts (default: %(default)s)")
    grid.add_argument(
        "--samples", type=int, default=4, help="images per prompt and model (default: %(default)s)"
    )
    grid.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    grid.add_argument(
        "--weights",
        choices=("best", "last"),
        default="last",
        help="which checkpoint (default: %(default)s)",
    )
    grid.add_argument(
        "--steps", type=int, help="denoising steps (default: as in the run's evaluations)"
    )
    grid.add_argument(
        "--guidance", type=float, help="guidance scale (default: as in the run's evaluations)"
    )


def _inspect(add: Add) -> None:
    inspect = add(
        "inspect",
        inspection.inspect,
        "show which denoising steps a run's algorithm rewards, trajectory by trajectory",
        "flowgrpo inspect runs/quickstart --number 2",
    )
    inspect.add_argument("run", help="run directory")
    inspect.add_argument(
        "--prompts", nargs="+", help="prompts or prompt files (default: training prompts)"
    )
    inspect.add_argument(
        "--number", type=int, default=2, help="training prompts (default: %(default)s)"
    )
    inspect.add_argument(
        "--samples", type=int, default=3, help="trajectories per prompt (default: %(default)s)"
    )
    inspect.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    inspect.add_argument(
        "--weights",
        choices=("best", "last"),
        default="last",
        help="which checkpoint (default: %(default)s)",
    )
    inspect.add_argument("--base", action="store_true", help="the model as it was before training")
    inspect.add_argument("--out", help="HTML file (default: inspect.html in the run directory)")


def _export(add: Add) -> None:
    export = add(
        "export",
        exports.export,
        "write a run's weights in another format",
        "flowgrpo export runs/quickstart --format merged --out model",
    )
    export.add_argument("run", help="run directory")
    export.add_argument(
        "--format",
        choices=("diffusers", "kohya", "merged"),
        help="an adapter for diffusers, or for ComfyUI and its kin; or a whole pipeline with the "
        "adapter added to its weights (default: an adapter for diffusers, or the whole pipeline where "
        "all weights were trained)",
    )
    export.add_argument("--out", required=True, help="new or empty folder")
    export.add_argument(
        "--weights",
        choices=("best", "last"),
        default="last",
        help="which checkpoint (default: %(default)s)",
    )


def _push(add: Add) -> None:
    push = add(
        "push",
        exports.push,
        "upload a finished run's weights to the Hugging Face hub, with a model card",
        "flowgrpo push runs/quickstart me/shapes-tuned",
    )
    push.add_argument("run", help="run directory")
    push.add_argument("repo_id", help="repository, as USER/NAME; made if it is not there")
    push.add_argument(
        "--public", action="store_true", help="make a new repository public (default: private)"
    )


def _doctor(add: Add) -> None:
    doctor = add(
        "doctor",
        commands.doctor,
        "prove on a model that it can be trained",
        "flowgrpo doctor stabilityai/stable-diffusion-3.5-medium --dtype bfloat16",
    )
    _model_arguments(doctor)
    doctor.add_argument("--full", action="store_true", help="full fine-tuning instead of LoRA")
    doctor.add_argument(
        "--clip-range",
        type=float,
        default=1e-4,
        help="compared with the numerical noise of ratios (default: %(default)s)",
    )
    doctor.add_argument(
        "--image",
        metavar="FILE",
        help="condition image for editing and image-to-video (default: a gradient where one is needed)",
    )
    doctor.add_argument("--json", metavar="FILE", help="file for the result")


def _config(add: Add) -> None:
    config = add(
        "config",
        commands.config,
        "explain, list or show configurations",
        "flowgrpo config explain algorithm.steps",
    )
    config.add_argument(
        "action",
        choices=("explain", "list", "show"),
        help="explain a key; list the configurations that come with flowgrpo; show one with all defaults",
    )
    config.add_argument("name", nargs="?", help="a key such as train.lr, or a configuration")
    config.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)


def _model_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "model",
        help="hub id or folder of a diffusers pipeline, a run directory, or 'shapes' for the model in the package",
    )
    sub.add_argument("--steps", type=int, help="denoising steps (default: 28; the doctor takes 4)")
    sub.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    sub.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the pipeline's)")
    sub.add_argument("--frames", type=int, help="frames of a video (default: the pipeline's)")
    sub.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the pipeline's call",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the denoiser (default: %(default)s)",
    )
    sub.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    sub.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    sub.add_argument(
        "--batch",
        type=int,
        default=16,
        help="images in one call of the pipeline (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
