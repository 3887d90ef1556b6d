"""Checkpoints that were distilled to a few steps are recognised, and warned about where an algorithm may blur them."""

import json
from pathlib import Path
from typing import Any

import pytest

import flowgrpo
from flowgrpo.config.few_steps import few_step_notes, few_step_sign, parts_in
from flowgrpo.training.setup import _parts
from tests.conftest import MakePolicy


def config(path: str = "Tongyi-MAI/Z-Image-Turbo", *settings: str) -> flowgrpo.Config:
    return flowgrpo.load("quickstart_flow_grpo", [f"model.path='{path}'", *settings])


@pytest.mark.parametrize(
    "name",
    [
        "stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-3.5-large-turbo", "Tongyi-MAI/Z-Image-Turbo",
        "ByteDance/SDXL-Lightning", "black-forest-labs/FLUX.1-schnell", "latent-consistency/lcm-lora-sdxl",
        "ByteDance/Hyper-SD", "black-forest-labs/FLUX.2-klein-4B", "tianweiy/DMD2", "Harahan/SD35M-RTDMD",
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "models/sdxl_lightning_4step_lora.safetensors",
    ],
)  # fmt: skip
def test_few_step_models_are_known_by_their_names(name: str) -> None:
    assert "is called" in few_step_sign(config(name))
    adapted = config("stabilityai/stable-diffusion-xl-base-1.0", f"model.adapters=[{{path='{name}'}}]")  # fmt: skip
    assert "model.adapters[0]" in few_step_sign(adapted)


@pytest.mark.parametrize(
    "name",
    [
        "shapes", "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image",
        "black-forest-labs/FLUX.2-klein-base-9B", "Tongyi-MAI/Z-Image", "hunyuanvideo-community/HunyuanVideo",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "stabilityai/stable-diffusion-xl-base-1.0", "SG161222/hyperreal-v2",
        "timbrooks/instruct-pix2pix", "/turbo/home/models/sd3",
    ],
)  # fmt: skip
def test_other_models_are_not(name: str) -> None:
    assert few_step_sign(config(name), {}) == ""
    assert few_step_notes(config("shapes")) == []


@pytest.mark.parametrize(
    ("file", "content", "sign"),
    [
        ("model_index.json", {"_class_name": "Flux2KleinPipeline", "is_distilled": True}, "is_distilled = true"),
        ("model_index.json", {"_class_name": "Flux2KleinPipeline", "is_distilled": False}, ""),
        ("transformer/config.json", {"guidance_embeds": False}, "guidance_embeds = false"),
        ("transformer/config.json", {"guidance_embeds": True}, ""),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, ""),
        ("scheduler/scheduler_config.json", [], ""),
    ],
)  # fmt: skip
def test_folders_are_known_by_their_configurations(tmp_path: Path, file: str, content: Any, sign: str) -> None:  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    found = few_step_sign(config("somebody/model"), parts_in(tmp_path))
    assert sign in found
    assert bool(sign) == bool(found)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["algorithm={kind='diffusion_nft'}", "loss={kind='nft'}"], ["DiffusionNFT trains it as a flow model"]),
        (["algorithm={kind='matching'}", "loss={kind='dgpo'}"], ["Matching trains it as a flow model"]),
        (["loss.kl_coef=0.0"], ["there is no KL to hold it"]),
        (["loss.kl_coef=0.1"], []),
        (["algorithm.transition={kind='flow_sde'}"], ["'flow_sde' is exact for short steps only", "no KL"]),
        (["algorithm.transition={kind='dance_sde'}", "loss.kl_coef=0.1"], ["'dance_sde' is exact for short"]),
        (["algorithm={kind='find'}", "model.weights={kind='noise'}"], []),
        (["algorithm={kind='distillation'}", "loss={kind='distillation', teachers=[{path='a'}]}"], []),
    ],
)  # fmt: skip
def test_the_warning_names_what_does_not_suit(settings: list[str], wanted: list[str]) -> None:
    notes = few_step_notes(config("Tongyi-MAI/Z-Image-Turbo", *settings))
    assert len(notes) == len(wanted)
    for note, part in zip(notes, wanted, strict=True):
        assert part in note


def test_a_loaded_pipeline_is_known_by_its_parts(make_policy: MakePolicy) -> None:
    """As a hub model under a name that says nothing; other loaded pipelines show no sign."""
    flux, sd3 = (_parts(make_policy(name, weights=None)) for name in ("flux", "sd3"))
    quiet = config("somebody/model", "loss.kl_coef=0.0")
    assert few_step_notes(quiet, sd3) == []
    flux["transformer/config.json"]["guidance_embeds"] = False
    assert "guidance_embeds = false" in few_step_notes(quiet, flux)[0]
    flux["transformer/config.json"]["guidance_embeds"] = True
    assert few_step_notes(quiet, flux) == []
