"""DeQA-Score on a tiny mPLUG-Owl2, against numbers from the authors' layers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from reward_models.deqa import DeQA
from reward_models.shared.mplug_owl2 import Owl2
from tests import zoo
from tests.zoo import PROMPTS, noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_owl2(tmp_path_factory.mktemp("owl2"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> DeQA:
    return DeQA(str(folder), dtype="float32", device="cpu", batch_size=2)


def test_scores_are_those_of_the_authors_layers(reward: DeQA) -> None:
    """From ``MplugOwlVisionEncoderLayer``, ``MplugOwlVisualAbstractorLayer`` and ``LlamaDecoderLayer`` of
    zhiyuanyou/DeQA-Score, with the rotary embedding of transformers 4.36, on the same weights and pixels.
    """
    media = noise(3, 40, 25)
    scores = reward(media, PROMPTS)
    assert scores.tolist() == pytest.approx([2.7876, 1.2738, 2.6192], abs=2e-4)
    media[1, 0, 0, 0] = math.nan
    assert reward(media, PROMPTS).isnan().tolist() == [False, True, False]


def test_images_are_padded_in_the_colour_of_the_mean(reward: DeQA) -> None:
    seen = reward.preprocess(torch.ones(1, 3, 28, 14))[0]
    bars = torch.cat([seen[:, :, :6], seen[:, :, 22:]], 2)
    assert bars.abs().max() < 0.02  # whole levels below the mean
    assert (seen[:, :, 9:19] > 1.8).all()


def test_it_runs_in_16_bits_and_needs_all_weights(
    folder: Path, reward: DeQA, tmp_path: Path
) -> None:
    half = DeQA(str(folder), dtype="bfloat16", device="cpu")
    media = noise(3, 28, 28)
    torch.testing.assert_close(half(media, PROMPTS), reward(media, PROMPTS), rtol=0, atol=0.2)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-00001-of-00002.safetensors"
    state = load_file(shard)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(state | rotary, shard)
    DeQA(str(tmp_path), dtype="float32", device="cpu")
    state.pop("model.layers.0.self_attn.k_proj.multiway.1.weight", None)
    state.pop("lm_head.weight", None)
    save_file(state, shard)
    with pytest.raises(ValueError, match="weights are missing"):
        DeQA(str(tmp_path), device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no DeQA-Score model"):
        DeQA(str(tmp_path), device="cpu")


def test_the_published_size_has_8_billion_weights() -> None:
    """mPLUG-Owl2: Llama 2 7B, ViT-L/14 at 448 pixels and a resampler of 64 queries; 8.2 billion in all."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    resampler = {
        "hidden_size": 1024,
        "encoder_hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_learnable_queries": 64,
        "layer_norm_eps": 1e-6,
    }
    with torch.device("meta"):
        model = Owl2(LlamaConfig(), vision, resampler)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.2e9, rel=0.01)
