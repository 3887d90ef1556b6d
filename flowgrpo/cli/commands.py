"""What the commands do. Heavy imports are inside, so that ``--help`` answers at once."""

import argparse
import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from flowgrpo.config import Config
    from flowgrpo.data.prompts import Prompt
    from flowgrpo.policy import PipelinePolicy, Sampling


def train(options: argparse.Namespace) -> int:
    """``flowgrpo train``."""
    from flowgrpo import config as configuration

    quiet()
    loaded = configuration.load(options.config, options.set)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    loaded.check(num_processes)
    if options.dry_run:
        return _dry_run(loaded, num_processes, options.memory_gb)
    from flowgrpo.training.loop import train as run

    return 0 if run(loaded).finished else 130


def _dry_run(config: "Config", num_processes: int, memory_gb: float | None) -> int:
    """Everything that can be checked without the model."""
    from flowgrpo.config import find
    from flowgrpo.core.imports import import_path, suggest
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.memory.printing import print_estimate
    from flowgrpo.rewards.scorer import available_rewards
    from flowgrpo.training.console import Console

    rows = list(config.geometry(num_processes).items())
    for label, file in (
        ("training prompts", config.prompts.train),
        ("held-out prompts", config.prompts.held_out),
    ):
        prompts = PromptSet.load(find(file), config.prompts.balance)
        classes = f" in {len(prompts.classes())} classes" if config.prompts.balance else ""
        rows.append((label, f"{len(prompts.prompts)}{classes} ({file})"))
    for reward in config.rewards:
        # Reward models are not loaded: they may be large, or need weights that are not here.
        if ":" in reward.model:
            import_path(reward.model)
        elif reward.model not in available_rewards():
            raise ValueError(
                f"unknown reward {reward.model!r}{suggest(reward.model, available_rewards())}"
            )
        rows.append((f"reward {reward.label}", f"weight {reward.weight:g} ({reward.model})"))
    for metric in config.evaluation.metrics:
        import_path(metric)
        rows.append(("metric", metric))
    rows.append(("run directory", config.run.folder))
    console = Console()
    for name, value in rows:
        console.say(f"{name:>20}  {value}")
    print_estimate(config, num_processes, memory_gb, console)
    console.say("the configuration is valid; nothing was loaded")
    return 0


def sample(options: argparse.Namespace) -> int:
    """``flowgrpo sample``."""
    from flowgrpo.core.random import Random, SampleNoise
    from flowgrpo.training.console import Console

    quiet()
    if options.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {options.samples}")
    prompts = prompts_of(options.prompts)
    policy = _policy(options, steps=28)
    owners = [(i, s) for i in range(len(prompts)) for s in range(options.samples)]
    noise = SampleNoise([Random(options.seed).at("sample", i, s) for i, s in owners])
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    console, records = Console(), []
    rollouts = policy.run([prompts[i] for i, _ in owners], noise)
    for rollout in console.track(rollouts, "sampling", total=-(-len(owners) // options.batch)):
        assert rollout.media is not None
        for row, media in zip(rollout.rows, rollout.media, strict=True):
            i, s = owners[row]
            name = f"{i:05d}_{s}.png"
            _save(media, out / name)
            prompt = prompts[i]
            records.append({"file": name, "prompt": prompt.text, "metadata": dict(prompt.metadata)})
    (out / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    console.say(f"{len(records)} images in {out}")
    return 0


def grid(options: argparse.Namespace) -> int:
    """``flowgrpo grid``."""
    from flowgrpo import config as configuration
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.evaluation.comparison_grid import ComparisonGrid
    from flowgrpo.rewards.scorer import RewardScorer

    quiet()
    config = run_config(Path(options.run))
    prompts = PromptSet.load(configuration.find(options.prompts or config.prompts.held_out))
    sampling = config.evaluation_sampling()
    changes = {"num_steps": options.steps, "guidance_scale": options.guidance}
    sampling = replace(sampling, **{k: v for k, v in changes.items() if v is not None})
    policy, iteration = load_run(Path(options.run), options.weights, base=True)
    comparison_grid = ComparisonGrid.of(prompts, options.rows, options.samples, options.seed)
    base = comparison_grid.generate(policy, sampling)
    policy, iteration = load_run(Path(options.run), options.weights)
    tuned = comparison_grid.generate(policy, sampling)
    scorer = RewardScorer(config.rewards, config.failures)
    title = f"{config.model.path}: {Path(options.run).name}"
    comparison_grid.save(
        ["base", f"after {iteration} iterations"],
        [base, tuned],
        scorer,
        sampling,
        title,
        Path(options.out),
    )
    scorer.close()
    print(options.out)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """``flowgrpo doctor``."""
    from flowgrpo.doctor import Settings, examine, show
    from flowgrpo.policy import Full
    from flowgrpo.training.console import Console

    quiet()
    sampling = _sampling(options, 4)
    if options.image:
        sampling = replace(sampling, call=sampling.call | {"image": _open(options.image)})
    settings = Settings(
        sampling=sampling,
        weights=Full() if options.full else None,
        dtype=options.dtype,
        device=_device(options.device),
        clip_range=options.clip_range,
    )
    try:
        diagnosis = examine(options.model, settings)
    except ValueError as error:
        _write_json(options.json, {"model": options.model, "passed": False, "refused": str(error)})
        raise
    show(diagnosis, Console())
    _write_json(options.json, diagnosis.to_json())
    return 0 if diagnosis.passed else 1


def _write_json(file: str | None, table: dict[str, Any]) -> None:
    if file:
        Path(file).write_text(json.dumps(table, indent=1) + "\n")


def config(options: argparse.Namespace) -> int:
    """``flowgrpo config``."""
    import tomli_w

    from flowgrpo import config as configuration
    from flowgrpo.config.reader import explain, to_table

    if options.action == "list":
        for file in sorted(configuration.find("quickstart").parent.glob("*.toml")):
            first = file.read_text().splitlines()[0].lstrip("# ")
            print(f"{file.stem:<24} {first}")
    elif options.name is None:
        raise ValueError(
            f"config {options.action} needs a {'key' if options.action == 'explain' else 'configuration'}"
        )
    elif options.action == "explain":
        print(explain(configuration.Config, options.name))
    else:
        print(tomli_w.dumps(to_table(configuration.load(options.name, options.set))), end="")
    return 0


def quiet() -> None:
    """Keep libraries from drawing bars and warning about what is as it should be."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sampling(options: argparse.Namespace, steps: int) -> "Sampling":
    from flowgrpo.policy import Sampling

    width = height = None
    if options.size:
        try:
            width, height = (int(n) for n in options.size.lower().split("x"))
        except ValueError:
            raise ValueError(
                f"--size must be WIDTHxHEIGHT such as 512x512, got {options.size!r}"
            ) from None
    call = {}
    for setting in options.call:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--call needs NAME=VALUE, got {setting!r}")
        try:
            call[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            call[name] = text
    return Sampling(
        num_steps=options.steps or steps,
        guidance_scale=options.guidance,
        height=height,
        width=width,
        num_frames=options.frames,
        call=call,
    )


def _policy(options: argparse.Namespace, steps: int) -> "PipelinePolicy":
    """The policy of a model argument: a pipeline, or a run directory."""
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.training.cpu import prepare_cpu

    prepare_cpu(0)
    sampling = _sampling(options, steps)
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
        device=_device(options.device),
    )


def run_config(folder: Path) -> "Config":
    """The configuration of a run. Raises FileNotFoundError if a folder is no run directory."""
    from flowgrpo import config as configuration

    if not (folder / "config.toml").is_file():
        raise FileNotFoundError(f"{folder} is no run directory: it has no config.toml")
    return configuration.load(str(folder / "config.toml"))


def load_run(
    folder: Path, weights: str, base: bool = False, sampling: "Sampling | None" = None
) -> "tuple[PipelinePolicy, int]":
    """The model of a run with the weights of a checkpoint (``best`` or ``last``), or as it was before.

    It samples as in evaluations unless told otherwise.
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
        device=_device(config.run.device),
        seed=config.run.seed,
        memory=config.memory,
    )
    parts, state = checkpoints.load(place)
    if not base:
        assert policy.trainable is not None
        policy.trainable.load(parts.get("ema", parts["weights"]))
    return policy, int(state["iteration"])


def prompts_of(values: Sequence[str]) -> "list[Prompt]":
    from flowgrpo.config import find
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.data.prompts import Prompt

    prompts: list[Prompt] = []
    for value in values:
        if value.endswith((".txt", ".jsonl", ".csv")):
            prompts += PromptSet.load(find(value)).prompts
        else:
            prompts.append(Prompt(value))
    return prompts


def _open(file: str | Path) -> "Image":
    """An image in RGB."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is no image that can be read") from error


def _save(media: "Tensor", path: Path) -> None:
    """An image as PNG; a video as one PNG per frame."""
    from torchvision.transforms.functional import to_pil_image

    if media.ndim == 4:
        for i, frame in enumerate(media):
            to_pil_image(frame).save(path.with_stem(f"{path.stem}_frame{i:03d}"))
    else:
        to_pil_image(media).save(path)
