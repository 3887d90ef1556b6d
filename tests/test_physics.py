"""V-JEPA 2's surprise on a tiny model, against the model's own forward pass window by window."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

from flowgrpo.data.prompts import Prompt
from reward_models.physics import Physics
from tests import zoo

VIDEOS = zoo.films(2, 9, 40, 50)
PROMPTS = [Prompt("a cat"), Prompt("a dog")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_vjepa2(tmp_path_factory.mktemp("vjepa2"))


def make(folder: Path, **options: Any) -> Physics:
    sizes = {"window": 6, "context": 4, "stride": 2} | options
    return Physics(str(folder), device="cpu", **sizes)


def by_hand(model: VJEPA2Model, video: Tensor, start: int) -> Tensor:
    """The surprise of one window; masks select what the model's own encoder and predictor see."""
    processor = VJEPA2VideoProcessor(crop_size=32)
    frames = (video[start : start + 6] * 255).round().to(torch.uint8)
    pixels = processor(frames, return_tensors="pt", do_sample_frames=False)["pixel_values_videos"]
    tokens = 4  # of 32x32 pixels, in patches of 16
    with torch.no_grad():
        alone = model(pixels[:, :4], skip_predictor=True).last_hidden_state
        every = model(pixels, skip_predictor=True).last_hidden_state
        ids = [torch.arange(3 * tokens)[None]]
        padded = torch.cat([alone, torch.full_like(alone[:, :tokens], math.nan)], 1)
        out = model.predictor(padded, [ids[0][:, : 2 * tokens]], [ids[0][:, 2 * tokens :]])
    target = every[:, 2 * tokens :]
    target = (target - target.mean(-1, keepdim=True)) / (
        target.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    return (out.last_hidden_state - target).abs().mean()


def test_score_is_minus_the_surprise_over_the_windows(folder: Path) -> None:
    model = VJEPA2Model.from_pretrained(folder).eval()
    each = torch.stack([torch.stack([by_hand(model, v, s) for s in (0, 2, 3)]) for v in VIDEOS])
    assert each.std() > 1e-4
    scores = make(folder)(VIDEOS, PROMPTS)
    torch.testing.assert_close(scores, -each.mean(1), rtol=0, atol=2e-3)
    highest = make(folder, reduce="max", batch_size=1)(VIDEOS, PROMPTS)
    torch.testing.assert_close(highest, -each.amax(1), rtol=0, atol=2e-3)
    alone = torch.cat([make(folder)(v[None], PROMPTS[:1]) for v in VIDEOS])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-5)
    broken = VIDEOS.clone()
    broken[1, 3, 0, 0, 0] = math.nan
    assert make(folder)(broken, PROMPTS).isnan().tolist() == [False, True]


def test_the_context_does_not_know_what_follows(folder: Path) -> None:
    reward = make(folder)
    seen: list[Tensor] = []
    reward.model.predictor.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    other = VIDEOS.clone()
    other[:, 4:6] = 1 - other[:, 4:6]
    for media in (VIDEOS, other):
        reward(media[:, :6], PROMPTS)
    assert torch.equal(seen[0], seen[1])


def test_wrong_options_and_short_videos_are_refused(folder: Path) -> None:
    for options in ({"window": 5}, {"context": 6}, {"context": 3}, {"stride": 0}):
        with pytest.raises(ValueError, match="got"):
            make(folder, **options)
    with pytest.raises(ValueError, match="physics needs 6 frames, got 5: set window or every"):
        make(folder, every=2)(VIDEOS, PROMPTS)
    half = make(folder, dtype="bfloat16")(VIDEOS, PROMPTS)
    torch.testing.assert_close(half, make(folder)(VIDEOS, PROMPTS), rtol=0.1, atol=0.1)
    assert VJEPA2Config().tubelet_size == 2
