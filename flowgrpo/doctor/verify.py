"""Verifies a recipe at one level of evidence: ``flowgrpo verify RECIPE``.

- ``tiny``: one iteration on a pipeline of the same class with tiny random parts, on the CPU.
- ``device``: one iteration at real size on a device, with random weights in place of the model's.
- ``rises``: the recipe itself, for a number of iterations, on the model's weights.

Each is a run of ``flowgrpo train`` with the recipe's algorithm, loss, weights and sampling. What is
replaced is listed in the result.
"""

import importlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn

from flowgrpo.config import Config, load
from flowgrpo.config.evidence import fingerprint
from flowgrpo.data import strict_json
from flowgrpo.data.prompts import Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.memory.meta_pipeline import PaddingTokenizer, build, with_real_buffers
from flowgrpo.policy.placement import resolve_device
from flowgrpo.training.ending import Result
from flowgrpo.training.loop import train

TINY = {
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "black-forest-labs/FLUX.2-klein-base-9B": "flux2_klein",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan_t2v",
    "hunyuanvideo-community/HunyuanVideo": "hunyuan_video",
    "models/SkyReels-V1-Hunyuan-I2V": "skyreels_i2v",
    "Qwen/Qwen-Image": "qwen_image",
    "Qwen/Qwen-Image-Edit": "qwen_image_edit",
    "Tongyi-MAI/Z-Image": "z_image",
}
"""The tiny family of each recipe's pipeline class, in ``tests.tiny``."""
FITTED = {
    "g2rpo": {"algorithm.steps.size": "2"},
    "branch_grpo": {"algorithm.splits": "[1]"},
    "matching": {"algorithm.num_times": "2"},
    "neighbor_grpo": {"algorithm.anchors": "1"},
    "tempflow_grpo": {"algorithm.seeds": "1"},
    "self_opd": {
        "algorithm.seeds": "1",
        "algorithm.steps": "{kind='random_steps', count=2, last=4}",
    },
    "draft": {"algorithm.last": "6"},
    "srpo": {"algorithm.step_range": "[0.0, 0.7]"},
}
"""Settings of an algorithm that do not fit into six steps and a group of two."""
CALLED = ("max_sequence_length", "prompt_template", "text_encoder_out_layers")
"""Arguments of a call that depend on the sizes of a family's parts."""
FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model")
"""The files of a pipeline without its weights."""


def darkness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward without weights for images and videos, in place of a recipe's own."""
    return 1 - media.flatten(1).mean(1)


def evenness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A second reward without weights, in place of those that a recipe only measures."""
    return -media.flatten(1).std(1)


# Both are differentiable as they are.
for _stand_in in (darkness, evenness):
    _stand_in.scores_with_gradient = _stand_in  # type: ignore[attr-defined]


@dataclass(frozen=True)
class CheckResult:
    """A number of the run, and whether it is as it must be."""

    name: str
    value: float
    required: str
    passed: bool


@dataclass
class Record:
    """The result of a verification, which is written as JSON.

    Attributes:
        recipe: Name of the recipe.
        level: The level that was verified, a key of ``flowgrpo.config.evidence.LEVELS``.
        passed: Whether all checks passed.
        fingerprint: Hash of the recipe's settings.
        replaced: What took the place of parts of the recipe, in words.
        settings: All changes of settings.
        checks: The checks.
        metrics: The metrics of the last iteration.
        environment: Versions, device and date.
        seconds: Duration of the run.
    """

    recipe: str
    level: str
    passed: bool
    fingerprint: str
    replaced: list[str]
    settings: list[str]
    checks: list[CheckResult] = field(default_factory=list)
    metrics: dict[str, int | float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> str:
        """The record as text."""
        return strict_json.dumps(asdict(self), indent=1) + "\n"


def verify(
    name: str, level: str, folder: Path, *, iterations: int = 40, device: str = "auto"
) -> Record:
    """Run a recipe at a level of evidence.

    Args:
        name: The recipe.
        level: ``tiny``, ``device`` or ``rises``.
        folder: An empty folder for the model and the run.
        iterations: Iterations of ``rises``.
        device: Device of ``device`` and ``rises``.

    Raises:
        ValueError: If the recipe has no tiny family, or the pipeline cannot be built.
        ConfigError: If the recipe cannot be run here.
    """
    recipe = load(name)
    if level == "tiny":
        replaced, settings = _tiny(recipe, folder)
    elif level == "device":
        replaced, settings = _random_weights(recipe, folder, device)
    else:
        replaced = []
        settings = [f"train.iterations={iterations}", "evaluation.every=0", f"run.device={device}"]
    record = Record(Path(name).stem, level, False, fingerprint(name), replaced, list(settings))
    config = load(name, [*settings, f"run.folder='{folder / 'run'}'", "run.trackers=[]"])
    began = time.monotonic()
    result = train(config)
    record.seconds = round(time.monotonic() - began, 1)
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    record.checks = _checks(level, config, result, metrics)
    record.passed = all(check.passed for check in record.checks)
    record.metrics = metrics[-1]
    record.environment = _environment(config)
    # The folder is of this machine, and says nothing to others.
    record.settings = [s.replace(str(folder), ".") for s in record.settings]
    return record


def _checks(
    level: str, config: Config, result: Result, metrics: Sequence[Mapping[str, int | float]]
) -> list[CheckResult]:
    """What a run at a level must show."""
    # Iterations in which a reward learns alone have no gradient.
    last = [m for m in metrics if "grad_norm" in m][-1]
    failures = float(sum(m["failures"] for m in metrics))
    found = [
        CheckResult("iterations", float(len(metrics)), "all", result.finished),
        CheckResult("grad_norm", last["grad_norm"], "above 0", last["grad_norm"] > 0),
    ]
    if level != "rises":
        found.append(CheckResult("failures", failures, "0", failures == 0))
        files = float(len(list((Path(config.run.folder) / "export").iterdir())))
        found.append(CheckResult("exported files", files, "at least 1", files > 0))
    if level == "tiny" and isinstance(config.loss, ClippedLoss):
        noise, limit = last["log_prob/noise"], config.loss.bound
        found.append(CheckResult("log_prob/noise", noise, f"below {limit:g}", noise < limit))
    if level == "rises":
        rise = standardised_rise([m["reward"] for m in metrics])
        found.append(CheckResult("rise of the reward", rise, "above 2 standard errors", rise > 2))
        before, after = (result.evaluations[i]["reward"] for i in (0, -1))
        change = after - before
        found.append(CheckResult("change of the held-out reward", change, "above 0", change > 0))
    return found


def standardised_rise(rewards: Sequence[float]) -> float:
    """The mean reward of the last quarter minus that of the first, in standard errors.

    Raises:
        ValueError: With fewer than 8 iterations, whose quarters have no spread.
    """
    if len(rewards) < 8:
        raise ValueError(f"whether a reward rises needs at least 8 iterations, got {len(rewards)}")
    size = len(rewards) // 4
    first, last = rewards[:size], rewards[-size:]
    error = ((variance(first) + variance(last)) / size) ** 0.5
    return (mean(last) - mean(first)) / max(error, 1e-12)


def _environment(config: Config) -> dict[str, str]:
    packages = ("flowgrpo", "torch", "diffusers", "transformers", "accelerate", "peft")
    device = torch.device(resolve_device(config.run.device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "device": name,
        **{package: version(package) for package in packages},
    }


def _short(recipe: Config, updates: int) -> list[str]:
    """Settings for one iteration with as few groups and pictures as there can be."""
    # A grid that is given has its own number of steps.
    given = len(recipe.sampling.sigmas or recipe.sampling.timesteps)
    return [
        "train.iterations=1",
        f"train.updates={updates}",
        f"train.groups={updates if recipe.train.split == 'groups' else 1}",
        "train.refill=0",
        "evaluation.every=0",
        # Its judge needs weights; it has tests of its own.
        "evaluation.bench=[]",
        "evaluation.images=6",
        f"evaluation.num_steps={given or 2}",
        "evaluation.grid_prompts=1",
        "evaluation.grid_samples=1",
        "failures.probe=off",
    ]


def _stand_ins(recipe: Config) -> list[str]:
    """Rewards and features without weights, in place of a recipe's own."""
    here, guard = "flowgrpo.doctor.verify", recipe.guard
    if guard.kl == "all":
        rewards = [f"rewards=[{{model='{here}:darkness'}}]"]
    else:
        rewards = [
            f"rewards=[{{model='{here}:darkness'}}, {{model='{here}:evenness', weight=0.0}}]",
            "guard.measured=[]",
        ]
    features = ["guard.features=''", "guard.features_options={}"] if guard.features else []
    return [*rewards, *features]


def _own_teachers(recipe: Config) -> list[str]:
    """No adapter to start from, and the model with another guidance in place of a distillation's teachers."""
    start = ["model.weights.init=''"] if getattr(recipe.model.weights, "init", "") else []
    if recipe.loss.needs.teachers is None:
        return start
    guidance = (recipe.sampling.guidance_scale or 1.0) + 3.0
    return [*start, f"loss.teachers=[{{path='base', guidance_scale={guidance}}}]"]


def _without_judge(recipe: Config) -> list[str]:
    """A comparison of scores in place of a judge of pairs."""
    preference = getattr(recipe.algorithm, "preference", None)
    if preference is None:
        return []
    reward = f"reward='darkness', weight={preference.weight}"
    return [f"algorithm.preference={{kind='compared', {reward}}}"]


def _tiny(recipe: Config, folder: Path) -> tuple[list[str], list[str]]:
    """What is replaced, and the settings, for a run on tiny parts."""
    if recipe.model.path == "shapes":
        raise ValueError("the embedded model is tiny and has weights: verify --level rises")
    if recipe.model.path not in TINY:
        raise ValueError(
            f"there are no tiny parts for {recipe.model.path}; known models: {', '.join(TINY)}"
        )
    try:
        tiny = importlib.import_module("tests.tiny")
    except ModuleNotFoundError as error:
        raise ValueError(
            "the tiny parts are in the repository's tests: run this in a checkout of flowgrpo, or "
            "verify another level with --level"
        ) from error
    family = tiny.FAMILIES[TINY[recipe.model.path]]
    model = tiny.save(family.name, folder / "model")
    sizes = [f"sampling.{k}={family.call[k]}" for k in ("height", "width", "num_frames") if k in family.call]  # fmt: skip
    call = {k: v for k, v in recipe.sampling.call.items() if k not in CALLED}
    call |= {k: v for k, v in family.call.items() if k in CALLED}
    fitted = dict(FITTED.get(getattr(recipe.algorithm, "kind", ""), {}))
    if getattr(recipe.algorithm, "best_of", 0):
        fitted["algorithm.best_of"] = "2"
    if getattr(getattr(recipe.algorithm, "steps", None), "last", 0) > 5:
        fitted["algorithm.steps.last"] = "5"
    if getattr(getattr(recipe.algorithm, "previews", None), "number", 0):
        fitted["algorithm.previews"] = "{number = 4, num_steps = 2}"
    settings = [
        f"model.path='{model}'",
        "model.dtype='float32'",
        # As many steps as the recipe's windows need.
        f"sampling.num_steps={min(6, recipe.sampling.num_steps)}",
        *sizes,
        f"sampling.call={_inline(call)}",
        *(f"{k}={v}" for k, v in fitted.items()),
        "algorithm.group_size=2",
        *_stand_ins(recipe),
        *_own_teachers(recipe),
        *_without_judge(recipe),
        *_short(recipe, min(recipe.train.updates, 2)),
        "train.lr=1e-3",
        # These need an accelerator.
        "memory.quantize=none",
        "train.optimizer=adamw",
        "run.device=cpu",
    ]
    replaced = [
        "the model by tiny random parts of the same classes",
        "the rewards, and a judge or teachers if there are any, by stand-ins without weights",
        "sizes, steps, group and updates by small ones",
    ]
    if recipe.algorithm.num_targets:
        # A pair is a group by itself.
        settings.remove("algorithm.group_size=2")
        settings += _pictures(folder, recipe.algorithm.num_targets)
        replaced.append("the pictures by generated ones")
    if "image" in family.call:
        settings += _prompts_with_images(folder, family.call["image"])
        replaced.append("the prompts and their images by generated ones")
    return replaced, settings


def _prompts_with_images(folder: Path, image: Any) -> list[str]:
    """Files of prompts with a condition image."""
    image.save(folder / "condition.png")
    lines = [strict_json.dumps({"prompt": text, "image": "condition.png"}) for text in ("a red cube", "two dogs")]  # fmt: skip
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"prompts.{part}='{folder / 'prompts.jsonl'}'" for part in ("train", "held_out")]


def _pictures(folder: Path, number: int) -> list[str]:
    """A file of generated pictures, or pairs, to train on."""
    names = ["picture"] if number == 1 else ["chosen", "rejected"]
    lines = []
    for index, text in enumerate(("a red cube", "two dogs")):
        line = {"prompt": text}
        for place, name in enumerate(names):
            line[name] = f"{name}{index}.png"
            shade = Image.linear_gradient("L").rotate(90 * (2 * index + place)).convert("RGB")
            shade.save(folder / line[name])
        lines.append(strict_json.dumps(line) + "\n")
    file = folder / "examples.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return [f"prompts.train='{file}'"]


def _inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def _random_weights(recipe: Config, folder: Path, device: str) -> tuple[list[str], list[str]]:
    """What is replaced, and the settings, for a run at real size with random weights."""
    model = save_random(recipe.model.path, folder / "model", getattr(torch, recipe.model.dtype))
    if recipe.algorithm.num_targets:
        pictures, replaced = (
            _pictures(folder, recipe.algorithm.num_targets),
            ["the pictures by generated ones"],
        )
    else:
        pictures, replaced = [], []
    settings = [
        f"model.path='{model}'",
        *_stand_ins(recipe),
        *_own_teachers(recipe),
        *_without_judge(recipe),
        *_short(recipe, recipe.train.updates),
        *pictures,
        f"run.device={device}",
    ]
    return [
        *replaced,
        "the model's weights by random ones",
        "the rewards, and a judge or teachers if there are any, by stand-ins without weights",
        "the number of prompts by the smallest that can be",
    ], settings


def save_random(model: str, folder: Path, dtype: torch.dtype) -> Path:
    """Save a pipeline of a model's real classes and sizes with random weights.

    Matrices are normal with a standard deviation of 0.02, scales are 1 and biases 0.

    Args:
        model: Hub id or folder, of which the files other than weights are read.
        folder: Where to save.
        dtype: Of the models.

    Raises:
        ValueError: If the files cannot be had, or do not suffice.
    """
    source = Path(model)
    if not source.is_dir():
        try:
            source = Path(snapshot_download(model, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the files of {model} cannot be downloaded ({reason})") from error
    pipeline = build(source, dtype)
    generator = torch.Generator().manual_seed(0)
    for name, component in pipeline.components.items():
        if isinstance(component, PaddingTokenizer):
            raise ValueError(f"{model} has no files for its {name}, which prompts need")
        if isinstance(component, nn.Module):
            fill_randomly(component, generator)
    pipeline.save_pretrained(folder)
    return folder


@torch.no_grad()
def fill_randomly(module: nn.Module, generator: torch.Generator) -> None:
    """Give a module on the meta device memory: random parameters, and the buffers of its class."""
    if isinstance(module, ModelMixin) and any(b.is_meta for b in module.buffers()):
        made = with_real_buffers(lambda: type(module).from_config(module.config))
        buffers = dict(made.named_buffers())
        for prefix, part in module.named_modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    own = buffers[f"{prefix}.{name}" if prefix else name]
                    part._buffers[name] = own.to(buffer.dtype)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            value = torch.empty_like(parameter, device="cpu")
            if parameter.ndim >= 2:
                value.normal_(0.0, 0.02, generator=generator)
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            part._parameters[name] = nn.Parameter(value, requires_grad=False)
