"""Every format of an export loads back to the same image; a finished run can be pushed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import flowgrpo
from flowgrpo.cli import main
from flowgrpo.cli.push import push_run
from flowgrpo.core.random import Random
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import KOHYA_FILE, export, export_kohya, export_merged
from tests.conftest import MakePolicy, noise_of, sampling_of
from tests.tiny import FAMILIES, save

Tiny = Callable[[str], Path]
PROMPTS = [Prompt("a red cube"), Prompt("two dogs")]


def images(policy: PipelinePolicy) -> Tensor:
    return policy.images(PROMPTS, noise_of(0, 1))


def tuned_policy(name: str, make_policy: MakePolicy, **options: Any) -> PipelinePolicy:
    """A policy whose adapter changes the image; its alpha / rank is what no loader would assume."""
    policy = make_policy(name, **({"weights": LoRA(rank=8, alpha=4)} | options))
    generator = Random(3).generator()
    assert policy.trainable is not None
    with torch.no_grad():
        for p in policy.trainable.parameters.values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return policy


def loaded(pipeline: DiffusionPipeline, like: PipelinePolicy) -> Tensor:
    return images(PipelinePolicy(pipeline, sampling=like.sampling))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "qwen_image", "z_image"])
def test_diffusers_loads_kohya_files(
    name: str, make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    untouched = images(make_policy(name, weights=None))
    policy = tuned_policy(name, make_policy)
    tuned = images(policy)
    assert (tuned - untouched).abs().max() > 0.01
    assert policy.trainable is not None
    export(policy.stock_pipeline(), policy.trainable, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.load_lora_weights(tmp_path / KOHYA_FILE)
    torch.testing.assert_close(loaded(pipeline, policy), tuned, atol=1e-4, rtol=0)


def test_sd3_has_the_names_that_comfyui_looks_for(
    make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    """ComfyUI adds ``alpha / rank * up @ down`` to the layer of that name."""
    policy = tuned_policy("sd3", make_policy)
    tuned = images(policy)
    assert policy.trainable is not None
    tensors = load_file(export_kohya(policy.trainable, tmp_path))
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd3"))
    used = set()
    with torch.no_grad():
        for name, layer in pipeline.transformer.named_modules():
            key = f"lora_transformer_{name.replace('.', '_')}"
            if f"{key}.alpha" in tensors:
                down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
                layer.weight += tensors[f"{key}.alpha"] / len(down) * up @ down
                used |= {f"{key}.alpha", f"{key}.lora_down.weight", f"{key}.lora_up.weight"}
    assert used == set(tensors)
    torch.testing.assert_close(loaded(pipeline, policy), tuned, atol=1e-4, rtol=0)


def test_names_are_those_of_diffusers_and_alpha_is_ours(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy("sd15", weights=LoRA(rank=8, alpha=4))
    assert policy.trainable is not None
    ours = load_file(export_kohya(policy.trainable, tmp_path))
    layers = get_peft_model_state_dict(policy.pipeline.unet, adapter_name="default")
    theirs = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in layers.items()})
    assert ours.keys() == theirs.keys()
    assert {float(v) for k, v in ours.items() if k.endswith("alpha")} == {4.0}
    # Why theirs is not used.
    assert {float(v) for k, v in theirs.items() if k.endswith("alpha")} == {8.0}


def test_models_without_kohya_names_are_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("wan22")
    assert policy.trainable is not None
    with pytest.raises(
        ValueError, match="no kohya format for WanTransformer3DModel; there is one for"
    ):
        export_kohya(policy.trainable, tmp_path)
    export(policy.stock_pipeline(), policy.trainable, tmp_path)
    assert not (tmp_path / KOHYA_FILE).exists()
    full = make_policy("sd15", weights=Full())
    assert full.trainable is not None
    with pytest.raises(ValueError, match="no adapter; export them as 'merged'"):
        export_kohya(full.trainable, tmp_path)


@pytest.mark.parametrize("name", ["sd15", "wan22"])
def test_merged_weights_are_a_pipeline(name: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = tuned_policy(name, make_policy)
    shipped, tuned = type(policy.shipped_scheduler), images(policy)
    assert policy.trainable is not None
    export_merged(policy.stock_pipeline(), policy.trainable, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler) is shipped
    assert not any("lora" in k for k in pipeline.components["vae"].state_dict())
    torch.testing.assert_close(loaded(pipeline, policy), tuned, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one iteration on a tiny SD3."""
    folder = tmp_path_factory.mktemp("export")
    model = save("sd3", folder / "model")
    call = {"max_sequence_length": FAMILIES["sd3"].call["max_sequence_length"]}
    settings = [
        f"model.path='{model}'",
        "model.dtype='float32'",
        "sampling.num_steps=3",
        "sampling.height=16",
        "sampling.width=16",
        f"sampling.call={json.dumps(call).replace(':', '=')}",
        "algorithm.group_size=2",
        "rewards=[{model='tests.test_train:darkness_of_any', name='dark', weight=0.5}]",
        "prompts.train='prompts/shapes_train.jsonl'",
        "prompts.held_out='prompts/shapes_held_out.jsonl'",
        "prompts.balance='tag'",
        "train.iterations=1",
        "train.groups=2",
        "train.lr=1e-2",
        "evaluation.every=0",
        "evaluation.images=12",
        "evaluation.num_steps=2",
        "evaluation.grid_prompts=1",
        "evaluation.grid_samples=1",
        f"run.folder='{folder / 'run'}'",
        "run.device=cpu",
        "run.trackers=[]",
        "failures.probe=off",
    ]
    return flowgrpo.train(flowgrpo.load("sd35_medium_pickscore", settings)).folder


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("diffusers", "pytorch_lora_weights.safetensors"),
        ("kohya", KOHYA_FILE),
        ("merged", "model_index.json"),
    ],
)
def test_a_run_is_exported_by_command(
    kind: str, file: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(finished), "--format", kind, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert (tmp_path / "out" / file).exists()
    if kind == "diffusers":
        ours, run = load_file(tmp_path / "out" / file), load_file(finished / "export" / file)
        assert ours.keys() == run.keys()
        assert all(torch.equal(ours[k], run[k]) for k in run)
    assert main(command) == 1
    assert "not empty" in capsys.readouterr().err


def test_without_a_format_what_was_trained_is_exported(
    finished: Path, tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(finished), "--out", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").exists()
    policy = PipelinePolicy.from_pretrained(
        tiny("sd3"), sampling=sampling_of("sd3"), weights=Full()
    )
    monkeypatch.setattr("flowgrpo.cli.export.load_run", lambda run, weights: (policy, 1))
    assert main(["export", str(finished), "--out", str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "model_index.json").exists()


class Hub:
    """Takes the calls of ``huggingface_hub.HfApi`` that a push makes, and keeps what was sent."""

    def __init__(self, kept: Path):
        self.kept, self.created = kept, {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool, repo_type: str) -> str:
        self.created = {"id": repo_id, "private": private, "type": repo_type, "ok": exist_ok}
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        assert repo_id == self.created["id"]
        assert commit_message
        shutil.copytree(folder_path, self.kept)


def test_a_run_is_pushed_with_its_card(finished: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    assert push_run(finished, "me/darker", hub) == "https://hub/me/darker"
    assert hub.created == {"id": "me/darker", "private": True, "type": "model", "ok": True}
    sent = {str(f.relative_to(hub.kept)) for f in hub.kept.rglob("*") if f.is_file()}
    assert sent == {
        "README.md", "config.toml", "grid.png", KOHYA_FILE, "pytorch_lora_weights.safetensors"
    }  # fmt: skip
    card = (hub.kept / "README.md").read_text()
    first, last = (
        json.loads(line) for line in (finished / "evaluations.jsonl").read_text().splitlines()
    )
    assert "library_name: diffusers" in card
    assert "pipeline_tag: text-to-image" in card
    assert "# darker" in card
    assert "- dark: weight 0.5" in card
    assert "(`shapes_train.jsonl`)" in card
    assert "![Base and tuned model, same prompts and same noise](grid.png)" in card
    assert 'pipe.load_lora_weights("me/darker"' in card
    assert "The licence of" in card
    assert "clip_range" in card
    for task in first["by_class"]:
        assert f"| {task} | dark" in card
    assert f"{first['images']} images before, {last['images']} after" in card


def test_an_unfinished_run_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    hub = Hub(tmp_path / "hub")
    with pytest.raises(FileNotFoundError, match="nothing to push"):
        push_run(tmp_path / "run", "me/x", hub)
    assert not hub.created
