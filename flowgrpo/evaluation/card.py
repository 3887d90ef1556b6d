"""Writes the model card of a finished run: base model, data, rewards and held-out results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from flowgrpo import config as configuration
from flowgrpo.config import Config
from flowgrpo.config.training_data import training_prompts
from flowgrpo.core.secrets import redact_table
from flowgrpo.core.text import counted, tag_words
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation.records import Records
from flowgrpo.policy.export.adapter_files import COMFYUI_FOLDER, DIFFUSERS_FILE, KOHYA_FOLDER
from flowgrpo.policy.settings import ModelSource
from flowgrpo.policy.single_file import is_single_file
from flowgrpo.policy.weights import NOISE_FILE

GRID = "grid.png"
METHODS = {0: "with reinforcement learning", 1: "on pictures", 2: "on preference pairs"}
"""By the number of given pictures of each training prompt."""
LICENCES: Mapping[str, tuple[str, str | None]] = {
    "Qwen/Qwen-Image": ("apache-2.0", None),
    "Tongyi-MAI/Z-Image-Turbo": ("apache-2.0", None),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("apache-2.0", None),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("apache-2.0", None),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-Kontext-dev": ("other", "flux-1-dev-non-commercial-license"),
    "shapes": ("apache-2.0", None),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", None),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", None),
}
"""Licences of base models, which also apply to models fine-tuned from them: the hub's identifier, and
the licence's name if the identifier is ``other``."""


def newest_grid(run: Path) -> Path | None:
    """The newest comparison grid of a run; ``None`` if it has none."""
    grids = sorted((run / "grids").glob("[0-9]*.png"))
    return grids[-1] if grids else None


def model_card(run: Path, repo_id: str, benchmarks: Sequence[Mapping[str, Any]] = ()) -> ModelCard:
    """The model card of a run's export.

    Args:
        run: The run directory, with at least two evaluations.
        repo_id: Repository on the hub to which the export is uploaded.
        benchmarks: Contents of ``bench.json`` files about the exported weights. Their main results
            become the card's ``model-index`` metadata, which the hub shows beside the model.

    Raises:
        ValueError: If the run was not evaluated before and after training.
    """
    config, records = configuration.load(str(run / "config.toml")), Records(run)
    if len(records.evaluations) < 2:
        raise ValueError(
            f"{run} has {counted(len(records.evaluations), 'held-out evaluation')}; a model card needs one before "
            "and one after training"
        )
    base = config.model.path
    hub = "/" in base and not Path(base).exists()
    licence, name = LICENCES.get(base, (None, None))
    video = config.sampling.num_frames is not None
    data = ModelCardData(
        base_model=base if hub else None,
        library_name="diffusers",
        license=licence,
        license_name=name,
        pipeline_tag="text-to-video" if video else "text-to-image",
        tags=["flowgrpo", *_method_tags(config), config.model.weights.kind],
        model_name=repo_id.rsplit("/", 1)[-1] if benchmarks else None,
        eval_results=[
            r for b in benchmarks for r in model_index_to_eval_results(b["model_index"])[1]
        ]
        or None,
    )
    algorithm = getattr(config.algorithm, "kind", type(config.algorithm).__name__)
    first, last = records.evaluations[0], records.evaluations[-1]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.rsplit('/', 1)[-1]}",
        f"`{base}`, fine-tuned {METHODS[config.algorithm.num_targets]} by flowgrpo "
        f"({algorithm}, {config.model.weights.kind}, {counted(last['iteration'], 'iteration')}).",
        _licence(base, licence, name),
        f"![Base and tuned model, same prompts and same noise]({GRID})" if newest_grid(run) else "",
        "## Before and after\n\n"
        f"Held-out prompts, deterministic sampler, same noise; {counted(first['images'], 'image')} before, "
        f"{last['images']} after. A change of at most two standard errors counts as noise."
        f"\n\n{_changes(records)}",
        *(
            f"Sampled with {tag_words(tag)}:\n\n{_changes(records.regime(tag))}"
            for tag in records.regimes()
        ),
        f"## Benchmarks\n\n{_benchmarks(benchmarks)}" if benchmarks else "",
        f"## Use\n\n```python\n{_usage(run, config, repo_id)}\n```",
        f"## Data\n\n{_data(config)}",
        f"## Rewards\n\n{_rewards(config)}",
        "## Configuration\n\nThe run can be repeated with `flowgrpo train config.toml`.\n\n"
        f"```toml\n{configuration.dump(config).strip()}\n```",
    ]
    return ModelCard("\n\n".join(p for p in parts if p) + "\n")


def _method_tags(config: Config) -> list[str]:
    """The method by its name on the hub."""
    return {1: [], 2: ["dpo"]}.get(config.algorithm.num_targets, ["reinforcement-learning"])


def _licence(base: str, licence: str | None, name: str | None) -> str:
    if licence is None:
        return f"The licence of `{base}` is unknown to flowgrpo; it also applies to these weights."
    return f"Licence of the base model: {name or licence}. It also applies to these weights."


def _changes(records: Records) -> str:
    if not records.scores():
        return "No reward was measured."
    lines = ["| prompts | score | before | after | change | |", "|---|---|---|---|---|---|"]
    for task in (None, *records.tasks()):
        for score in records.scores():
            change = records.change(score, task)
            unit = " (points)" if change.in_points else ""
            before, after = change.show(change.before), change.show(change.after)
            lines.append(
                f"| {task or 'all'} | {score}{unit} | {before} | {after} | {change.difference} "
                f"| {change.words} |"
            )
    return "\n".join(lines)


def _benchmarks(results: Sequence[Mapping[str, Any]]) -> str:
    """A table of the main results, and what limits their comparison."""
    lines = [
        "| benchmark (judge) | result | value | 95 % interval | images |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for result in results:
        for m in (m for m in result["metrics"] if m["headline"] and m["value"] is not None):
            ends = "–" if m["low"] is None else f"{m['low']:.4g} to {m['high']:.4g}"
            lines.append(
                f"| {result['title']} | {m['name']} | {m['value']:.4g} | {ends} "
                f"| {result['counts']['judged']} |"
            )
        notes += [f"- {result['title']}: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")


def _usage(run: Path, config: Config, repo_id: str) -> str:
    if config.model.weights.kind == "full":
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{repo_id}")'
        )
    if config.model.weights.kind == "noise":
        return "\n".join(
            [
                "import torch",
                "from diffusers import DiffusionPipeline",
                "from huggingface_hub import hf_hub_download",
                "from safetensors.torch import load_file",
                "",
                *_base_lines(config.model.source),
                f'noise = load_file(hf_hub_download("{repo_id}", "{NOISE_FILE}"))',
                'latents = noise["mean"] + noise["std"] * torch.randn(1, *noise["mean"].shape)',
                'pipe("...", latents=latents)',
            ]
        )
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        *_base_lines(config.model.source),
        f'pipe.load_lora_weights("{repo_id}", weight_name="{DIFFUSERS_FILE}")',
    ]
    for folder in sorted(f.name for f in (run / "export").glob("*_2") if f.is_dir()):
        lines.append(
            f'pipe.{folder}.load_lora_adapter("{repo_id}", prefix=None, subfolder="{folder}", '
            f'weight_name="{DIFFUSERS_FILE}")'
        )
    programs = {COMFYUI_FOLDER: "ComfyUI", KOHYA_FOLDER: "sd-scripts"}
    for folder, program in programs.items():
        for file in sorted((run / "export" / folder).glob("*.safetensors")):
            lines.append(f"# For {program}: {folder}/{file.name}")
    return "\n".join(lines)


def _base_lines(source: ModelSource) -> list[str]:
    """Code that loads the base model as the run did."""
    more = "".join(
        f', {name}="{value}"'
        for name, value in (("revision", source.revision), ("variant", source.variant))
        if value
    )
    if is_single_file(Path(source.path)):
        name = Path(source.path).name
        lines = [
            f"# PipelineClass is the class of {name}, such as StableDiffusionXLPipeline.",
            f'pipe = PipelineClass.from_single_file("{name}")',
        ]
    else:
        lines = [f'pipe = DiffusionPipeline.from_pretrained("{source.path}"{more})']
    for adapter in source.adapters:
        lines += [
            f'pipe.load_lora_weights("{Path(adapter.path).name}")',
            f"pipe.fuse_lora(lora_scale={adapter.scale:g})",
            "pipe.unload_lora_weights()",
        ]
    return lines


def _data(config: Config) -> str:
    rows = []
    for label, file in (("training", config.prompts.train), ("held out", config.prompts.held_out)):
        rows.append(f"- {label}: {_count(config, label == 'training')} (`{Path(file).name}`)")
    of = {1: "pictures with prompts", 2: "pairs of a chosen and a rejected picture"}
    data = of.get(config.algorithm.num_targets, "prompts, without images")
    return f"Trained on {data}.\n\n" + "\n".join(rows)


def _count(config: Config, training: bool) -> str:
    """The number of prompts in a file, if it still exists."""
    try:
        known = (
            training_prompts(config)
            if training
            else PromptSet.load(configuration.find(config.prompts.held_out))
        )
        return f"{counted(len(known.prompts), 'prompt')}"
    except FileNotFoundError:
        return "prompts of a file that no longer exists"


def _rewards(config: Config) -> str:
    lines = []
    for reward in config.rewards:
        options: dict[str, Any] = redact_table(dict(reward.options))
        settings = f", with {options}" if options else ""
        use = f"weight {reward.weight:g}" if reward.weight else "not trained on"
        lines.append(f"- {reward.label}: {use} (`{reward.model}`{settings})")
    return "\n".join(lines)
