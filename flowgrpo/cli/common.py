"""What several commands share: arguments, settings on the command line, models, prompts, images."""

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.config import Config
    from flowgrpo.data.prompts import Prompt
    from flowgrpo.policy import PipelinePolicy, Sampling

CONFIG_HELP = "configuration: a .toml file, or the name of one that comes with flowgrpo (quickstart, sd15_dance, ...)"


class UsageError(ValueError):
    """Arguments of a command that are wrong; the exit status is 2."""


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """``--set KEY=VALUE``."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key, for instance --set train.lr=1e-4; can be given again",
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """``--weights best|last``, for commands that take a run directory."""
    parser.add_argument(
        "--weights",
        choices=("best", "last"),
        default="last",
        help="which checkpoint (default: %(default)s)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how its pipeline is called."""
    parser.add_argument(
        "model",
        help="hub id or folder of a diffusers pipeline, a run directory, or 'shapes' for the model in the package",
    )
    parser.add_argument("--steps", type=int, help="denoising steps (default: 28; the doctor takes 4)")  # fmt: skip
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the pipeline's)")
    parser.add_argument("--frames", type=int, help="frames of a video (default: the pipeline's)")
    parser.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the pipeline's call",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision of the denoiser (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=int,
        default=16,
        help="images in one call of the pipeline (default: %(default)s)",
    )


def parse_setting(text: str, option: str = "") -> tuple[str, Any]:
    """Key and value of ``key=value``; the value is TOML, or else a string.

    Args:
        text: The setting.
        option: The option that it was given to, for the error.

    Raises:
        UsageError: If there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{option} expected KEY=VALUE, got {text!r}".lstrip())
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def quiet() -> None:
    """Turn off the progress bars and the warnings of diffusers and transformers."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def device_of(name: str) -> str:
    """The device that a name means here; ValueError if there is none."""
    from flowgrpo.policy.placement import resolve_device

    return resolve_device(name)


def sampling_of(options: argparse.Namespace, steps: int) -> "Sampling":
    """How the pipeline is called, from the arguments of :func:`add_model_arguments`.

    Args:
        options: Parsed arguments.
        steps: Denoising steps where ``--steps`` is not given.

    Raises:
        UsageError: If ``--size`` or ``--call`` cannot be read.
    """
    from flowgrpo.policy import Sampling

    width = height = None
    if options.size:
        try:
            width, height = (int(n) for n in options.size.lower().split("x"))
        except ValueError:
            raise UsageError(
                f"--size must be WIDTHxHEIGHT such as 512x512, got {options.size!r}"
            ) from None
    return Sampling(
        num_steps=options.steps or steps,
        guidance_scale=options.guidance,
        height=height,
        width=width,
        num_frames=options.frames,
        call=dict(parse_setting(s, "--call") for s in options.call),
    )


def load_policy(options: argparse.Namespace, steps: int) -> "PipelinePolicy":
    """The policy of the model argument, which is a pipeline or a run directory."""
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.training.cpu import prepare_cpu

    prepare_cpu(0)
    sampling = sampling_of(options, steps)
    if (Path(options.model) / "config.toml").exists():
        policy, _ = load_run(Path(options.model), "last")
        policy.sampling = sampling
        policy.check_sampling(sampling)
        policy.batch_size = options.batch
        return policy
    return PipelinePolicy.from_pretrained(
        options.model,
        sampling=sampling,
        batch_size=options.batch,
        dtype=options.dtype,
        device=device_of(options.device),
    )


def run_config(folder: Path) -> "Config":
    """The configuration of a run.

    Raises:
        FileNotFoundError: If a folder is not a run directory.
    """
    from flowgrpo.config import load

    if not (folder / "config.toml").is_file():
        raise FileNotFoundError(f"{folder} is not a run directory: it has no config.toml")
    return load(str(folder / "config.toml"))


def load_run(
    folder: Path, weights: str, base: bool = False, sampling: "Sampling | None" = None
) -> "tuple[PipelinePolicy, int]":
    """The model of a run, and the iteration of its checkpoint.

    Args:
        folder: The run directory.
        weights: Which checkpoint, ``best`` or ``last``.
        base: Leave the weights as they were before training.
        sampling: How the pipeline is called; by default as in the run's evaluations.

    Raises:
        FileNotFoundError: If the folder is not a run directory or has no checkpoint.
    """
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.training import checkpoints

    config = run_config(folder)
    place = (
        folder / "checkpoints" / "best"
        if weights == "best"
        else checkpoints.newest(folder / "checkpoints")
    )
    if place is None or not place.exists():
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    policy = PipelinePolicy.from_pretrained(
        config.model.path,
        sampling=sampling or config.evaluation_sampling(),
        weights=config.model.weights,
        batch_size=config.train.rollout_batch,
        dtype=config.model.dtype,
        device=device_of(config.run.device),
        seed=config.run.seed,
        memory=config.memory,
    )
    parts, state = checkpoints.load(place)
    if not base:
        assert policy.trainable is not None
        policy.trainable.load(parts.get("ema", parts["weights"]))
    return policy, int(state["iteration"])


def prompts_of(values: Sequence[str]) -> "list[Prompt]":
    """Prompts from the command line; a value that names a prompt file or a dataset is read.

    Raises:
        FileNotFoundError: If a value ends like a prompt file, and there is no such file.
        PromptError: If a file or a dataset cannot be read.
    """
    from flowgrpo.config import find
    from flowgrpo.data.prompt_files import names_prompts
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.data.prompts import Prompt

    prompts: list[Prompt] = []
    for value in values:
        if names_prompts(value):
            prompts += PromptSet.load(find(value)).prompts
        else:
            prompts.append(Prompt(value))
    return prompts


def read_image(file: Path) -> "Tensor":
    """``(3, H, W)`` in [0, 1].

    Raises:
        ValueError: If the file is not an image.
    """
    import torch
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from flowgrpo.data.pictures import UNREADABLE, as_rgb

    try:
        with Image.open(file) as image:
            return pil_to_tensor(as_rgb(image)).to(torch.float32) / 255
    except UNREADABLE as error:
        raise ValueError(f"{file} is not an image that can be read: {error}") from error
