"""Checkpoints in one file go in, and hub ids with a revision or a variant.

The files have the original layouts: Stable Diffusion's of CompVis and Stability (``model.diffusion_model``,
``first_stage_model``, ``cond_stage_model``), and FLUX's of Black Forest Labs, alone and in ComfyUI's
arrangement with its encoders.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.settings import ModelSource
from flowgrpo.policy.single_file import PUBLISHED, _clip_tokenizer
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


def test_the_tokenizer_is_clips() -> None:
    """Ids that CLIP's published tokenizer gives."""
    tokenizer = _clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("Hello, world!", padding="max_length", max_length=8).input_ids
    assert padded == [49406, 3306, 267, 1002, 256, 49407, 49407, 49407]
    assert _clip_tokenizer("!").pad_token_id == 0
