"""Every format of an export loads back to the same image; a finished run can be pushed."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import flowgrpo
from flowgrpo.bench.base import BenchError
from flowgrpo.cli import main
from flowgrpo.cli.push import push_run
from flowgrpo.core.random import Random
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import (
    export,
    export_checkpoint,
    export_denoiser,
    export_kohya,
    export_merged,
)
from flowgrpo.policy.export.adapter_files import COMFYUI_FOLDER, DIFFUSERS_FILE, KOHYA_FOLDER
from flowgrpo.policy.settings import ModelSource
from flowgrpo.policy.weights import Trainable
from tests.conftest import MakePolicy, noise_of, sampling_of
from tests.tiny import FAMILIES, save

Tiny = Callable[[str], Path]
COMFYUI_FILE, KOHYA_FILE = (f"{f}/lora.safetensors" for f in (COMFYUI_FOLDER, KOHYA_FOLDER))
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


def loaded_images(pipeline: DiffusionPipeline, like: PipelinePolicy) -> Tensor:
    return PipelinePolicy(pipeline, sampling=like.sampling).images(
        [Prompt("two cats")], noise_of(3)
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_loads_kohya_files(
    name: str, make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    untouched = images(make_policy(name, weights=None))
    policy = tuned_policy(name, make_policy)
    tuned = images(policy)
    assert (tuned - untouched).abs().max() > 0.01
    assert policy.trainable is not None
    export_kohya(policy.stock_pipeline(), policy.trainable, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.load_lora_weights(tmp_path / KOHYA_FILE)
    torch.testing.assert_close(loaded(pipeline, policy), tuned, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd3", "wan22"])
def test_alpha_is_in_the_weights(name: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    """A program that reads no metadata applies ``up @ down``: alpha / rank = 2 must be in it, exactly."""
    policy = make_policy(name, weights=LoRA(rank=4, alpha=8))
    assert policy.trainable is not None
    before = {k: p.detach().clone() for k, p in policy.trainable.parameters.items()}
    exported = export(policy.stock_pipeline(), policy.trainable, tmp_path)
    assert not exported.missing or name == "wan22"
    for part, model in policy.trainable.denoisers.items():
        own = tmp_path / part / DIFFUSERS_FILE
        file, prefix = (own, "") if own.exists() else (tmp_path / DIFFUSERS_FILE, f"{part}.")
        tensors = load_file(file)
        for key, value in get_peft_model_state_dict(model, adapter_name="default").items():
            assert torch.equal(tensors[f"{prefix}{key}"], value * (2 if "lora_B" in key else 1))
        with safe_open(file, "pt") as opened:
            metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert (metadata[f"{prefix}lora_alpha"], metadata[f"{prefix}r"]) == (4, 4)
        assert model.peft_config["default"].lora_alpha == 8
    # Nothing of the policy has changed.
    assert all(torch.equal(p, before[k]) for k, p in policy.trainable.parameters.items())


def test_each_expert_has_a_file_of_its_own(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("wan22")
    assert policy.trainable is not None
    exported = export(policy.stock_pipeline(), policy.trainable, tmp_path)
    readers = {str(f.path.relative_to(tmp_path)): f.readers for f in exported.files}
    assert readers == {
        DIFFUSERS_FILE: "diffusers: pipe.load_lora_weights",
        f"transformer_2/{DIFFUSERS_FILE}": "diffusers: pipe.transformer_2.load_lora_adapter",
        "comfyui/lora_high_noise.safetensors": "ComfyUI: models/loras",
        "comfyui/lora_low_noise.safetensors": "ComfyUI: models/loras",
    }
    (missing,) = exported.missing
    # Nobody asked for the format, so no other one is advised.
    assert (
        missing
        == "an adapter for sd-scripts, whose names for WanTransformer3DModel flowgrpo does not know"
    )
    high = load_file(tmp_path / "comfyui" / "lora_high_noise.safetensors")
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in high


def test_formats_that_do_not_exist_are_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("wan22")
    assert policy.trainable is not None
    with pytest.raises(ValueError, match="no names for WanTransformer3DModel in sd-scripts"):
        export_kohya(policy.stock_pipeline(), policy.trainable, tmp_path)
    assert not list(tmp_path.iterdir())
    full = make_policy("sd15", weights=Full())
    assert full.trainable is not None
    with pytest.raises(ValueError, match="no adapter; export them as 'merged'"):
        export_kohya(full.stock_pipeline(), full.trainable, tmp_path)


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


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_a_denoiser_is_one_file(
    name: str, make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    policy = tuned_policy(name, make_policy)
    tuned = images(policy)
    assert policy.trainable is not None
    (file,) = export_denoiser(policy.stock_pipeline(), policy.trainable, tmp_path).files
    assert "ComfyUI: models/diffusion_models" in file.readers
    part = file.path.stem
    kind = type(policy.pipeline.components[part])
    model = kind.from_single_file(str(file.path), config=str(tiny(name)), subfolder=part)
    pipeline = DiffusionPipeline.from_pretrained(tiny(name), **{part: model})
    torch.testing.assert_close(loaded(pipeline, policy), tuned, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_a_checkpoint_is_the_whole_model(
    name: str, make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    """It loads back with other weights in its base: everything is in the file."""
    policy = tuned_policy(name, make_policy)
    parts = {k: m for k, m in policy.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    with torch.no_grad():
        for part in parts.values():
            for parameter in part.parameters():
                parameter.mul_(1.1)
        if name == "sd3":
            # As published: diffusers and ComfyUI take it to be the identity.
            parts["text_encoder"].text_projection.weight.copy_(torch.eye(16))
    tuned = policy.images([Prompt("two cats")], noise_of(3))
    assert policy.trainable is not None
    stock = policy.stock_pipeline()
    (file,) = export_checkpoint(stock, policy.trainable, tmp_path).files
    assert "ComfyUI: models/checkpoints" in file.readers
    again = PipelinePolicy.from_pretrained(
        ModelSource(path=str(file.path), base=str(tiny(name))), sampling=policy.sampling
    )
    found = again.images([Prompt("two cats")], noise_of(3))
    torch.testing.assert_close(found, tuned, atol=1e-4, rtol=0)
    if name == "sd15":
        pipeline = type(stock).from_single_file(str(file.path), config=str(tiny(name)))
        found = loaded_images(pipeline, policy)
        torch.testing.assert_close(found, tuned, atol=1e-4, rtol=0)
        # An export of it is whole: the base's other components are not those of the file.
        export_merged(
            again.pipeline,
            Trainable(again.denoisers, Full(), seed=0, with_reference=False),
            tmp_path / "merged",
        )
        found = loaded_images(DiffusionPipeline.from_pretrained(tmp_path / "merged"), policy)
        torch.testing.assert_close(found, tuned, atol=1e-4, rtol=0)


def test_other_checkpoints_are_refused_before_the_merge(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy("wan22")
    assert policy.trainable is not None
    with pytest.raises(ValueError, match="not of WanTransformer3DModel; use --format merged"):
        export_denoiser(policy.stock_pipeline(), policy.trainable, tmp_path)
    assert all(m.peft_config for m in policy.trainable.denoisers.values())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_in_half_precision_that_is_read_only(
    sharded: bool, make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    """A base whose files are all named fp16 and read-only is merged into a plain, writable folder."""
    base, out = tmp_path / "base", tmp_path / "out"
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd15"))
    size = {"max_shard_size": "50KB"} if sharded else {}
    pipeline.save_pretrained(base, variant="fp16", **size)
    assert bool(list(base.rglob("*.index.fp16.json"))) == sharded
    for path in [*base.rglob("*"), base]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    policy = PipelinePolicy.from_pretrained(base, sampling=sampling_of("sd15"), weights=LoRA())
    assert policy.trainable is not None
    with torch.no_grad():
        for i, p in enumerate(policy.trainable.parameters.values()):
            p.add_(0.2 * torch.randn(p.shape, generator=Random(i).generator()))
    tuned = images(policy)
    export_merged(policy.stock_pipeline(), policy.trainable, out)
    torch.testing.assert_close(
        loaded(DiffusionPipeline.from_pretrained(out), policy), tuned, atol=1e-4, rtol=0
    )
    assert not [f for f in out.rglob("*") if "fp16" in f.name]
    assert all(f.stat().st_mode & stat.S_IWUSR for f in out.rglob("*"))


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
        "train.ema_decay=0",  # the average has not moved after one update
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
        ("comfyui", COMFYUI_FILE),
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
    programs = {"diffusers": "diffusers", "comfyui": "ComfyUI", "kohya": "sd-scripts"}
    assert programs.get(kind, "from_pretrained") in capsys.readouterr().out
    if kind == "diffusers":
        ours, run = load_file(tmp_path / "out" / file), load_file(finished / "export" / file)
        assert ours.keys() == run.keys()
        assert all(torch.equal(ours[k], run[k]) for k in run)
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_without_a_format_what_was_trained_is_exported(
    finished: Path, tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(finished), "--out", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").exists()
    policy = PipelinePolicy.from_pretrained(
        tiny("sd3"), sampling=sampling_of("sd3"), weights=Full()
    )
    monkeypatch.setattr(
        "flowgrpo.cli.export.load_run", lambda run, weights, with_reference: (policy, 1)
    )
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
        "README.md", "config.toml", "grid.png", COMFYUI_FILE, KOHYA_FILE, DIFFUSERS_FILE
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


def test_benchmarks_of_a_run_are_pushed_as_metadata(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without and with the run's adapter, by one command; the card is read by the hub's own classes."""
    monkeypatch.chdir(tmp_path)
    base, run = str(finished.parent / "model"), str(finished)
    quick = ["--steps", "1", "--size", "16x16", "--samples", "1", "--limit", "4", "--device", "cpu"]
    call = ["--call", f"max_sequence_length={FAMILIES['sd3'].call['max_sequence_length']}"]
    assert (
        main(["bench", "compare", "shapes", "--model", base, "--adapter", run, *quick, *call]) == 0
    )
    assert "second minus first, same prompts" in capsys.readouterr().out
    without, with_adapter = (Path("bench/shapes") / n for n in ("model", f"model+{finished.name}"))
    images = [(f / "images/00000/samples/0000.png").read_bytes() for f in (without, with_adapter)]
    assert images[0] != images[1]
    hub = Hub(tmp_path / "hub")
    push_run(finished, "me/darker", hub, bench=[with_adapter])
    card = ModelCard.load(hub.kept / "README.md")
    result = json.loads((with_adapter / "bench.json").read_text())
    wanted = {m["name"]: m["value"] for m in result["metrics"] if m["headline"]}
    assert card.data.model_name == "darker"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == wanted
    assert {r.dataset_name for r in card.data.eval_results} == {
        "shapes (embedded verifier), 4 of 39 prompts"
    }
    assert {(r.task_type, r.dataset_type) for r in card.data.eval_results} == {("text-to-image", "shapes")}  # fmt: skip
    for name, value in wanted.items():
        assert f"| shapes (embedded verifier) | {name} | {value:.4g} |" in card.text
    with pytest.raises(BenchError, match="is about other weights"):
        push_run(finished, "me/darker", hub, bench=[without])


def test_an_unfinished_run_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    hub = Hub(tmp_path / "hub")
    with pytest.raises(FileNotFoundError, match="nothing to push"):
        push_run(tmp_path / "run", "me/x", hub)
    assert not hub.created
