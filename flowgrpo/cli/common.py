"""What several commands share: arguments, settings on the command line, models, prompts, images."""

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.config import Config
    from flowgrpo.data.prompts import Prompt
    from flowgrpo.policy import PipelinePolicy, Sampling
    from flowgrpo.policy.settings import Adapter, ModelSource

CONFIG_HELP = "configuration: a .toml file, or the name of one that comes with flowgrpo (quickstart, sd15_dance, ...)"

OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "height": "--size",
    "width": "--size",
    "num_frames": "--frames",
}
"""Arguments of a pipeline's call that have an option of their own."""


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
    """``--checkpoint NAME``, for commands that take a run directory."""
    parser.add_argument(
        "--checkpoint",
        "--weights",
        dest="weights",
        type=checkpoint_name,
        metavar="NAME",
        default="last",
        help="which checkpoint: best, best:NAME (by a held-out number), last, or a number of iterations "
        "(default: %(default)s)",
    )


def checkpoint_name(text: str, base: bool = False) -> str:
    """The name of a checkpoint, for argparse.

    Args:
        text: The argument.
        base: Whether ``base``, the model before training, is one too.

    Raises:
        argparse.ArgumentTypeError: If no checkpoint can have this name.
    """
    from flowgrpo.core.imports import suggest
    from flowgrpo.training.run_checkpoints import NAMES, is_name

    others = ("base",) if base else ()
    if not is_name(text) and text not in others:
        near = suggest(text, ("best", "last", *others))
        names = f"{NAMES}, or base" if base else NAMES
        raise argparse.ArgumentTypeError(f"expected {names}, got {text!r}{near}")
    return text


def checkpoint_or_base(text: str) -> str:
    """As :func:`checkpoint_name`, or ``base``."""
    return checkpoint_name(text, base=True)


CHECKPOINT_HELP = (
    "of a run: best, best:NAME (by a held-out number), last, a number of iterations, or base, the model before "
    "training (default: last)"
)
LORA_HELP = "LoRA adapter that is added to the model: a file, folder, hub id or run directory; can be given again"
SOURCE_OPTIONS = {
    "--base": "pipeline that has what a checkpoint in one file lacks: a hub id or folder (default: the published one)",
    "--revision": "branch, tag or commit of a hub id",
    "--variant": "variant of the weights, such as fp16",
}


def add_lora_argument(parser: argparse.ArgumentParser) -> None:
    """``--lora PATH[:SCALE]``, for commands that generate images."""
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]", help=LORA_HELP
    )


def source_of(options: argparse.Namespace) -> "ModelSource":
    """The model of the options, with its base, revision, variant and adapters.

    Raises:
        ValueError: If an adapter's scale cannot be read.
    """
    from flowgrpo.policy.settings import ModelSource

    return ModelSource(
        path=options.model,
        base=options.base or "",
        revision=options.revision or "",
        variant=options.variant or "",
        adapters=adapters_of(options),
    )


def adapters_of(options: argparse.Namespace) -> "tuple[Adapter, ...]":
    """The adapters of ``--lora``.

    Raises:
        ValueError: If a scale cannot be read.
    """
    from flowgrpo.policy.settings import Adapter

    return tuple(Adapter.parse(text) for text in options.lora)


def add_model_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """The model and how its pipeline is called.

    Options that are not given are None, because the default of a run is the run's own value.

    Args:
        parser: The command's parser.
        steps: Denoising steps by default, for the help.
    """
    parser.add_argument(
        "model",
        help="hub id or folder of a diffusers pipeline, a checkpoint in one file, a run directory, or 'shapes' for the model in the package",
    )
    for name, text in SOURCE_OPTIONS.items():
        parser.add_argument(name, help=text)
    add_lora_argument(parser)
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: {steps})")
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
        help="precision of the denoiser (default: float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


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
        UsageError: If ``--steps`` is below 1, or ``--size`` or ``--call`` cannot be read.
    """
    from flowgrpo.policy import Sampling
    from flowgrpo.policy.settings import SET_BY_POLICY

    if options.steps is not None and options.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {options.steps}")
    width = height = None
    if options.size:
        try:
            width, height = (int(n) for n in options.size.lower().split("x"))
        except ValueError:
            raise UsageError(
                f"--size must be WIDTHxHEIGHT such as 512x512, got {options.size!r}"
            ) from None
    call = dict(parse_setting(s, "--call") for s in options.call)
    sigmas, timesteps = (tuple(call.pop(k, ())) for k in ("sigmas", "timesteps"))
    number = len(sigmas or timesteps) or steps
    for name in call:
        if name in OPTIONS:
            raise UsageError(
                f"--call {name}: use {OPTIONS[name]}, which is the one place of this value"
            )
        if name in SET_BY_POLICY:
            raise UsageError(f"--call {name}: the policy sets this argument itself; remove it")
    return Sampling(
        num_steps=number if options.steps is None else options.steps,
        guidance_scale=options.guidance,
        height=height,
        width=width,
        num_frames=options.frames,
        sigmas=sigmas,
        timesteps=timesteps,
        call=call,
    )


def changed_sampling(sampling: "Sampling", options: argparse.Namespace) -> "Sampling":
    """A run's sampling with the changes of the command line."""
    given = sampling_of(options, sampling.num_steps)
    grid: dict[str, Any] = {
        k: v for k, v in (("sigmas", given.sigmas), ("timesteps", given.timesteps)) if v
    }
    if grid or options.steps is not None:
        # A grid of the command line, or a number of steps, takes the place of the run's own grid.
        grid = {"sigmas": (), "timesteps": (), **grid}
    changes = {
        "num_steps": given.num_steps if given.sigmas or given.timesteps else options.steps,
        "guidance_scale": options.guidance,
        "height": given.height,
        "width": given.width,
        "num_frames": given.num_frames,
        "base_after": getattr(options, "base_after", None),
    }
    changes = {k: v for k, v in changes.items() if v is not None} | grid
    return replace(sampling, **changes, call={**sampling.call, **given.call})


def is_run(model: str) -> bool:
    """Whether a model argument is a run directory."""
    return (Path(model) / "config.toml").is_file()


def load_policy(options: argparse.Namespace, steps: int) -> "PipelinePolicy":
    """The policy of the model argument, which is a pipeline or a run directory.

    A run is sampled as in its evaluations, on its device and in its precision; options of the command
    line change that.

    Raises:
        UsageError: If an option is wrong, or ``--checkpoint`` is given for a pipeline.
    """
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.training.cpu import prepare_cpu

    run = is_run(options.model)
    if options.weights is not None and not run:
        raise UsageError(
            f"--checkpoint {options.weights} is for a run directory, and {options.model} is none"
        )
    if options.batch is not None and options.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {options.batch}")
    prepare_cpu(0)
    if run:
        given = [o for o in SOURCE_OPTIONS if getattr(options, o.removeprefix("--"))]
        if given:
            raise UsageError(f"{given[0]} is for models; a run has its own")
        sampling = changed_sampling(run_config(Path(options.model)).evaluation_sampling(), options)
        sampling.check()
        policy, _ = load_run(
            Path(options.model),
            options.weights or "last",
            sampling=sampling,
            device=options.device,
            dtype=options.dtype,
            adapters=adapters_of(options),
        )
        policy.batch_size = options.batch or policy.batch_size
        return policy
    return PipelinePolicy.from_pretrained(
        source_of(options),
        sampling=sampling_of(options, steps),
        batch_size=options.batch or 16,
        dtype=options.dtype or "float32",
        device=device_of(options.device or "auto"),
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


def _device_of_run(config: "Config", device: str | None) -> str:
    """The device that was asked for, else the run's. Raises ConfigError if there is none such here."""
    from flowgrpo.config import ConfigError

    try:
        return device_of(device or config.run.device)
    except ValueError as error:
        own = "" if device else f"the run's device, run.device = {config.run.device!r}: "
        raise ConfigError(f"{own}{error}") from error


def checkpoint_of(folder: Path, weights: str) -> Path:
    """The folder of a run's checkpoint, as :func:`flowgrpo.training.run_checkpoints.find_checkpoint` finds it."""
    from flowgrpo.training.run_checkpoints import find_checkpoint

    return find_checkpoint(folder, weights)


def check_folder(path: str) -> None:
    """Raise UsageError if a model argument is a folder with neither a run nor a pipeline in it."""
    folder = Path(path)
    if folder.is_dir() and not is_run(path) and not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{path} is neither a run directory (config.toml) nor a pipeline (model_index.json)"
        )


def load_run(
    folder: Path,
    weights: str,
    base: bool = False,
    sampling: "Sampling | None" = None,
    adapters: "Sequence[Adapter]" = (),
    device: str | None = None,
    dtype: str | None = None,
    with_reference: bool = False,
) -> "tuple[PipelinePolicy, int]":
    """The model of a run, and the iteration of its checkpoint.

    Args:
        folder: The run directory.
        weights: Which checkpoint: ``best``, ``best:NAME``, ``last`` or the number of its iterations; or
            ``base``, the frozen model before training, which needs no checkpoint.
        base: Leave the weights of the checkpoint's policy as they were before training.
        sampling: How the pipeline is called; by default as in the run's evaluations.
        adapters: Adapters that are added to the model, after those of the run's configuration.
        device: Device; by default the run's.
        dtype: Precision of the denoiser; by default the run's.
        with_reference: Whether the model before training is needed too, apart from where the sampling
            says so.

    Raises:
        FileNotFoundError: If the folder is not a run directory or has no checkpoint.
        ConfigError: If there is no such device here.
    """
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.training import checkpoints

    config = run_config(folder)
    place = None if weights == "base" else checkpoint_of(folder, weights)
    source, sampling = config.model.source, sampling or config.evaluation_sampling()
    policy = PipelinePolicy.from_pretrained(
        replace(source, adapters=(*source.adapters, *adapters)),
        sampling=sampling,
        with_reference=with_reference or sampling.base_after is not None,
        weights=None if weights == "base" else config.model.weights,
        batch_size=config.train.rollout_batch,
        dtype=dtype or config.model.dtype,
        device=_device_of_run(config, device),
        seed=config.run.seed,
        memory=config.memory,
    )
    if place is None:
        return policy, 0
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
    from flowgrpo.data.prompt_files import check_text, names_prompts
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.data.prompts import Prompt

    prompts: list[Prompt] = []
    for value in values:
        if names_prompts(value):
            prompts += PromptSet.load(find(value)).prompts
        elif not value.strip():
            raise UsageError("a prompt is empty")
        else:
            check_text(value)
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
