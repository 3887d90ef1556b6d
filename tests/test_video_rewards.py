"""Image rewards over frames, motion and temporal consistency, against slow computations."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.frames import FrameMean, FrameScore
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from reward_models.consistency import TemporalConsistency
from reward_models.jpeg_size import JPEGSize
from reward_models.motion import Motion
from tests.zoo import PROMPTS, films

VIDEOS = films(3, 7, 40, 56)


def frame_scores() -> Tensor:
    """JPEG sizes, frame by frame."""
    return torch.stack([torch.cat([JPEGSize()(f[None], PROMPTS[:1]) for f in v]) for v in VIDEOS])


# Image rewards over frames.
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda s: s.mean(1)),
        ({"every": 3}, lambda s: s[:, [0, 3, 6]].mean(1)),
        ({"reduce": "min"}, lambda s: s.amin(1)),
        ({"frames": [0, -1]}, lambda s: s[:, [0, 6]].mean(1)),
        ({"frames": [2], "reduce": "min"}, lambda s: s[:, 2]),
        ({"every": 2, "batch_size": 5}, lambda s: s[:, ::2].mean(1)),
    ],
)
def test_frame_score(options: dict[str, Any], expected: Any) -> None:
    scores = FrameScore("jpeg_size", **options)(VIDEOS, PROMPTS)
    torch.testing.assert_close(scores, expected(frame_scores()))


class Sees:
    """Remembers the largest batch, and tells prompts apart."""

    def __init__(self) -> None:
        self.largest = 0

    def __call__(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        self.largest = max(self.largest, len(media))
        assert len(media) == len(prompts)
        return torch.tensor([float(len(p.text)) for p in prompts])


def test_frames_keep_their_prompt_and_come_in_small_batches() -> None:
    frames = FrameScore("tests.test_video_rewards:Sees", batch_size=4)
    assert frames(VIDEOS, PROMPTS).tolist() == [float(len(p.text)) for p in PROMPTS]
    assert frames.reward.largest == 4  # type: ignore[attr-defined]


def test_frame_mean_keeps_its_name() -> None:
    (model,) = RewardScorer(
        [Reward(model="flowgrpo.rewards.frames:FrameMean", options={"model": "jpeg_size"})]
    ).models
    assert isinstance(model, FrameMean)
    torch.testing.assert_close(model(VIDEOS, PROMPTS), frame_scores().mean(1))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"every": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"every": 2, "frames": [1]}, "either every or frames"),
    ],
)
def test_frame_score_refuses_wrong_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FrameScore("jpeg_size", **options)


def test_frame_score_refuses_absent_frames_and_passes_on_failures() -> None:
    with pytest.raises(ValueError, match="no frame 7 in a video of 7"):
        FrameScore("jpeg_size", frames=[0, 7])(VIDEOS, PROMPTS)
    broken = VIDEOS.clone()
    broken[1, 4, 0, 0, 0] = math.nan
    for reduce in ("mean", "min"):
        scores = FrameScore("jpeg_size", reduce=reduce)(broken, PROMPTS)  # type: ignore[arg-type]
        assert scores.isnan().tolist() == [False, True, False]


# Motion.
def grey(video: Tensor) -> np.ndarray:
    rgb = np.round(video.double().numpy() * 255) / 255
    return 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]


@pytest.mark.parametrize(("tile", "fps"), [(1, 0.0), (8, 0.0), (6, 16.0)])
def test_motion_is_the_mean_change_of_tiles(tile: int, fps: float) -> None:
    expected = []
    for video in VIDEOS:
        y, changes = grey(video), []
        for t in range(6):
            for i in range(40 // tile):
                for j in range(56 // tile):
                    box = slice(i * tile, (i + 1) * tile), slice(j * tile, (j + 1) * tile)
                    changes.append(abs(y[t + 1][box].mean() - y[t][box].mean()))
        expected.append((fps or 1) * np.mean(changes))
    scores = Motion(tile=tile, fps=fps, ceiling=100.0)(VIDEOS, PROMPTS)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_motion_range() -> None:
    still = VIDEOS[:1, :1].expand(-1, 4, -1, -1, -1)
    flash = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)] * 2)[None]
    assert Motion()(still, PROMPTS[:1]).tolist() == [0.0]
    assert Motion()(flash, PROMPTS[:1]).tolist() == pytest.approx([1.0])
    assert Motion(ceiling=0.02)(flash, PROMPTS[:1]).tolist() == pytest.approx([0.02])


def test_tiles_do_not_take_noise_for_motion() -> None:
    random = torch.Generator().manual_seed(0)
    noisy = 0.5 + 0.1 * torch.randn(1, 5, 3, 64, 64, generator=random).clamp(-3, 3)
    moving = torch.zeros(1, 5, 3, 64, 64)
    for t in range(5):
        moving[0, t, :, 16:48, 8 * t : 8 * t + 24] = 1
    every_pixel, tiles = Motion(tile=1), Motion(tile=8)
    assert tiles(noisy, PROMPTS[:1]) < 0.2 * every_pixel(noisy, PROMPTS[:1])
    assert tiles(moving, PROMPTS[:1]) > 0.9 * every_pixel(moving, PROMPTS[:1])


# Consistency.
def by_hand(measure: str, video: Tensor) -> float:
    x = np.round(video.double().numpy() * 255) / 255
    if measure == "flicker":
        return float(1 - np.mean([np.abs(b - a).mean() for a, b in itertools.pairwise(x)]))
    if measure == "smoothness":
        gaps = [x[t] - (x[t - 1] + x[t + 1]) / 2 for t in range(1, len(x) - 1)]
        return float(1 - np.mean([np.abs(g).mean() for g in gaps]))

    def mean(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    values = []
    y = grey(video)
    for a, b in itertools.pairwise(y):
        ma, mb = mean(a), mean(b)
        va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        top = (2 * ma * mb + 0.01**2) * (2 * vab + 0.03**2)
        values.append((top / ((ma**2 + mb**2 + 0.01**2) * (va + vb + 0.03**2))).mean())
    return float(np.mean(values))


MEASURES = ["flicker", "smoothness", "ssim"]


@pytest.mark.parametrize("measure", MEASURES)
def test_consistency_is_its_formula(measure: Any) -> None:
    scores = TemporalConsistency(measure)(VIDEOS, PROMPTS)
    expected = [by_hand(measure, v) for v in VIDEOS]
    assert 0.1 < min(expected) < 0.99
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_still_is_most_consistent_and_a_flash_least(measure: Any) -> None:
    model = TemporalConsistency(measure)
    still = VIDEOS[:1, :1].expand(-1, 7, -1, -1, -1)
    shuffled = torch.stack([VIDEOS[0, 0], 1 - VIDEOS[0, 0]] * 3)[None]
    assert model(still, PROMPTS[:1]).item() == pytest.approx(1, abs=1e-6)
    assert model(shuffled, PROMPTS[:1]) < model(VIDEOS[:1], PROMPTS[:1]) - 0.1


def test_smoothness_forgives_fades_and_flicker_does_not() -> None:
    levels = torch.tensor([0, 51, 102, 153, 204, 255]) / 255
    fade = levels.view(1, 6, 1, 1, 1).expand(-1, -1, 3, 16, 16).contiguous()
    assert TemporalConsistency("smoothness")(fade, PROMPTS[:1]).item() == pytest.approx(1)
    assert TemporalConsistency("flicker")(fade, PROMPTS[:1]).item() == pytest.approx(0.8)


@pytest.mark.parametrize("model", [Motion(), *map(TemporalConsistency, MEASURES)])  # type: ignore[arg-type]
def test_videos_one_by_one_and_broken_ones(model: Any) -> None:
    together = model(VIDEOS, PROMPTS)
    alone = torch.cat([model(v[None], PROMPTS[:1]) for v in VIDEOS])
    torch.testing.assert_close(together, alone)
    broken = VIDEOS.clone()
    broken[0, 2, 1, 3, 3] = math.nan
    scores = model(broken, PROMPTS)
    assert scores[0].isnan()
    torch.testing.assert_close(scores[1:], together[1:])


def test_refuse_what_is_no_video() -> None:
    for model in (Motion(), TemporalConsistency(), TemporalConsistency("ssim")):
        with pytest.raises(ValueError, match="frames"):
            model(VIDEOS[:, :1], PROMPTS)
        with pytest.raises(ValueError, match="in \\[0, 1\\]"):
            model(VIDEOS * 255, PROMPTS)
    with pytest.raises(ValueError, match="at least 8x8 pixels"):
        Motion()(VIDEOS[..., :7], PROMPTS)
    with pytest.raises(ValueError, match="11x11 pixels"):
        TemporalConsistency("ssim")(VIDEOS[..., :10], PROMPTS)
    with pytest.raises((ValueError, TypeError), match="ncc"):
        TemporalConsistency("ncc")  # type: ignore[arg-type]
    for options in ({"tile": 0}, {"ceiling": 0.0}, {"fps": -1.0}):
        with pytest.raises(ValueError, match="got"):
            Motion(**options)  # type: ignore[arg-type]
