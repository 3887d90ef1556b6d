"""Checkpoints in one file go in, and hub ids with a revision or a variant.

The files have the original layouts: Stable Diffusion's of CompVis and Stability (``model.diffusion_model``,
``first_stage_model``, ``cond_stage_model``), and FLUX's of Black Forest Labs, alone and in ComfyUI's
arrangement with its encoders.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.meta_pipeline import config_folder
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.export.checkpoint_file import original_weights
from flowgrpo.policy.export.original_parts import (
    hugging_face_clip,
    open_clip,
    original_encoders,
    original_vae,
)
from flowgrpo.policy.loading import load_pipeline
from flowgrpo.policy.settings import ModelSource
from flowgrpo.policy.single_file import PUBLISHED, _clip_tokenizer, _holds, base_folder
from tests.conftest import noise_of, sampling_of

Tiny = Callable[[str], Path]
PROMPTS = [Prompt("a red cube")]


def images(source: ModelSource, family: str) -> Tensor:
    policy = PipelinePolicy.from_pretrained(source, sampling=sampling_of(family))
    return policy.images(PROMPTS, noise_of(0))


@pytest.mark.parametrize(
    ("folder", "part", "parameters"),
    [
        ("sd15", "unet", 859_520_964),
        ("sd15", "vae", 83_653_863),
        ("sd15", "text_encoder", 123_060_480),
        ("sdxl_base", "unet", 2_567_463_684),
        ("sdxl_base", "vae", 83_653_863),
        ("sdxl_base", "text_encoder", 123_060_480),
        ("sdxl_base", "text_encoder_2", 694_659_840),
    ],
)
def test_shipped_configurations_have_the_published_sizes(
    folder: str, part: str, parameters: int
) -> None:
    place = PUBLISHED / folder
    _, cls = json.loads((place / "model_index.json").read_text())[part]
    with torch.device("meta"):
        if cls.startswith("CLIP"):
            kind = {"CLIPTextModel": CLIPTextModel}.get(cls, CLIPTextModelWithProjection)
            model = kind(CLIPTextConfig.from_pretrained(place / part))
        else:
            kind = {"AutoencoderKL": AutoencoderKL}.get(cls, UNet2DConditionModel)
            model = kind.from_config(kind.load_config(place, subfolder=part))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("part", "weights", "some"),
    [
        (
            "vae",
            248,
            {
                "decoder.up.3.block.2.norm1.weight": (512,),
                "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
                "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
                "encoder.down.2.downsample.conv.bias": (512,),
                "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
                "encoder.mid.block_2.conv2.bias": (512,),
                "post_quant_conv.weight": (4, 4, 1, 1),
            },
        ),
        (
            "text_encoder",
            196,
            {
                "text_model.embeddings.position_embedding.weight": (77, 768),
                "text_model.encoder.layers.11.self_attn.q_proj.bias": (768,),
                "text_model.final_layer_norm.weight": (768,),
            },
        ),
        (
            "text_encoder_2",
            389,
            {
                "positional_embedding": (77, 1280),
                "text_projection": (1280, 1280),
                "token_embedding.weight": (49408, 1280),
                "ln_final.bias": (1280,),
                "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
                "transformer.resblocks.31.attn.out_proj.bias": (1280,),
                "transformer.resblocks.9.mlp.c_proj.bias": (1280,),
                "transformer.resblocks.0.ln_2.weight": (1280,),
            },
        ),
    ],
)
def test_parts_have_the_names_of_published_checkpoints(
    part: str, weights: int, some: dict[str, tuple[int, ...]]
) -> None:
    """Names, numbers and sizes in SDXL's checkpoint, as ComfyUI's classes have them."""
    place = PUBLISHED / "sdxl_base"
    with torch.device("meta"):
        if part == "vae":
            found = original_vae(
                AutoencoderKL.from_config(AutoencoderKL.load_config(place, subfolder=part))
            )
        elif part == "text_encoder":
            found = hugging_face_clip(CLIPTextModel(CLIPTextConfig.from_pretrained(place / part)))
        else:
            found = open_clip(
                CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(place / part))
            )
    assert len(found) == weights
    assert {k: tuple(found[k].shape) for k in some} == some


def test_the_tokenizer_is_clips() -> None:
    """Ids that CLIP's published tokenizer gives."""
    tokenizer = _clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("Hello, world!", padding="max_length", max_length=8).input_ids
    assert padded == [49406, 3306, 267, 1002, 256, 49407, 49407, 49407]
    assert _clip_tokenizer("!").pad_token_id == 0


def save(pipeline: Any, file: Path, leave_out: str = "") -> Path:
    """A checkpoint of Stable Diffusion 1.5 with the published names, without the keys of a part."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in original_weights(pipeline.unet).items()}
    tensors |= original_encoders(pipeline)
    kept = {
        k: v.contiguous() for k, v in tensors.items() if not (leave_out and k.startswith(leave_out))
    }
    save_file(kept, file)
    return file


def test_what_a_file_lacks_comes_from_its_base(tiny: Tiny, tmp_path: Path) -> None:
    pipeline = load_pipeline(tiny("sd15"))
    expected = images(ModelSource(path=str(tiny("sd15"))), "sd15")
    file = save(pipeline, tmp_path / "unet.safetensors", "first_stage_model.")
    source = ModelSource(path=str(file), base=str(tiny("sd15")))
    torch.testing.assert_close(images(source, "sd15"), expected, atol=1e-5, rtol=0)
    assert config_folder(source) == tiny("sd15")
    # A base with the configuration only, as one that was downloaded for it.
    shutil.copytree(
        tiny("sd15"), tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors")
    )
    bare = ModelSource(path=str(file), base=str(tmp_path / "configs"))
    with pytest.raises(FileNotFoundError, match=r"have no vae; set model\.base to the hub id"):
        load_pipeline(bare)
    whole = save(pipeline, tmp_path / "whole.safetensors")
    source = ModelSource(path=str(whole), base=str(tmp_path / "configs"))
    torch.testing.assert_close(images(source, "sd15"), expected, atol=1e-5, rtol=0)


def test_files_that_are_no_checkpoints_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """In one sentence that names what to set."""

    def refused(tensors: dict[str, Tensor], name: str = "a.safetensors", **more: str) -> str:
        file = tmp_path / name
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_pipeline(ModelSource(path=str(file), **more))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    one = torch.zeros(1)
    base = {"base": str(tiny("sd15"))}
    assert "is a LoRA adapter, not a model" in refused({"lora_unet_x.lora_down.weight": one})
    assert "quantised weights" in refused({"a.weight": one, "a.scale_weight": one + 1})
    assert "not a checkpoint of a published model" in refused({"a.weight": one})
    pipeline = load_pipeline(tiny("sd15"))
    tensors = {f"model.diffusion_model.{k}": v for k, v in original_weights(pipeline.unet).items()}
    tensors |= original_encoders(pipeline)
    broken = dict(tensors)
    del broken["model.diffusion_model.out.2.bias"]
    assert "the weights of UNet2DConditionModel in" in refused(broken, **base)
    assert "some of its weights are missing in the file" in refused(broken, **base)
    wide = {**tensors, "model.diffusion_model.out.2.bias": torch.zeros(7)}
    assert "do not fit the configuration" in refused(wide, **base)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for source, message in (
        (
            ModelSource(path=str(tmp_path / "torn.safetensors"), **base),
            "cannot be read as a checkpoint",
        ),
        (ModelSource(path=str(tmp_path / "absent.safetensors")), "no such file"),
        (ModelSource(path=str(tiny("sd15")), **base), "completes a checkpoint in one file"),
        (ModelSource(path=str(tiny("sd15")), revision="v1"), "is for hub ids"),
        (ModelSource(path=str(tiny("sd15")), variant="fp16"), "has no weights of this variant"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_pipeline(source)


def test_the_kinds_of_files_are_told_apart() -> None:
    """The published names of one weight each; a base is needed where flowgrpo ships no configuration."""
    v1 = {"model.diffusion_model.output_blocks.11.0.skip_connection.weight": torch.zeros(1)}
    xl = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}
    source = ModelSource(path="file.safetensors")
    assert base_folder(source, v1).name == "sd15"
    assert base_folder(source, xl).name == "sdxl_base"
    encoders = {
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(1),
        "vae.decoder.conv_in.bias": torch.zeros(1),
    }
    held = {
        n: _holds(encoders, n, c)
        for n, c in {
            "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModel",
            "text_encoder_2": "T5EncoderModel",
        }.items()
    }
    assert held == {"vae": True, "text_encoder": False, "text_encoder_2": True}


@pytest.fixture
def hub(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub id that is cached with two revisions, the second in fp16 only; there is no network."""
    cache = tmp_path / "cache" / "models--me--model"
    commits = {"main": "a" * 40, "half": "b" * 40}
    for name, commit in commits.items():
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / name).write_text(commit)
    shutil.copytree(tiny("sd15"), cache / "snapshots" / commits["main"])
    pipeline = load_pipeline(tiny("sd15"))
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(0.5)
    pipeline.save_pretrained(cache / "snapshots" / commits["half"], variant="fp16")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "me/model"


def test_cached_hub_ids_have_revisions_and_variants(hub: str) -> None:
    half = {"path": hub, "revision": "half"}
    for source, bias in (
        (ModelSource(path=hub), False),
        (ModelSource(**half), True),
        (ModelSource(**half, variant="fp16"), True),
        (ModelSource(path=hub, revision="b" * 40), True),
    ):
        pipeline = load_pipeline(source)
        assert bool((pipeline.unet.conv_out.bias == 0.5).all()) == bias
        # From here an export copies the other components.
        assert Path(pipeline.config["_name_or_path"]).name == ("b" if bias else "a") * 40
    for source, message in (
        (ModelSource(path=hub, revision="other"), "revision other is neither"),
        (
            ModelSource(path="me/absent"),
            "me/absent is neither a folder here nor a pipeline .*: it is not in the cache",
        ),
        (ModelSource(path=hub, variant="fp16"), "no weights of this variant"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
            load_pipeline(source)
        assert "\n" not in str(caught.value)
