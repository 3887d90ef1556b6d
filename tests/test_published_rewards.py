"""The published weights themselves. Run with ``FLOWGRPO_NETWORK=1 pytest -m network``."""

import io
import os
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrpo.data.prompts import Prompt
from reward_models.aesthetic import Aesthetic
from reward_models.dino import DINOSimilarity
from reward_models.hpsv2 import HPSv2
from reward_models.hpsv3 import HPSv3
from reward_models.image_reward import ImageReward
from reward_models.physics import Physics
from reward_models.pick_score import PickScore
from reward_models.siglip import SigLIPSimilarity
from reward_models.subject_identity import SubjectIdentity
from reward_models.unified_reward import UnifiedReward
from reward_models.video_align import VideoAlign
from reward_models.video_score2 import VideoScore2

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif("FLOWGRPO_NETWORK" not in os.environ, reason="needs a model hub"),
]
LARGE: list[Callable[..., Any]] = [HPSv3, UnifiedReward, VideoAlign, VideoScore2]
SMALL: list[Callable[..., Any]] = [
    Aesthetic,
    DINOSimilarity,
    HPSv2,
    ImageReward,
    Physics,
    PickScore,
    SigLIPSimilarity,
    SubjectIdentity,
]
EXAMPLES = "https://github.com/zai-org/ImageReward/raw/main/assets/images"


@pytest.mark.parametrize("kind", SMALL)
def test_published_weights_fit(kind: Callable[..., Any]) -> None:
    """Every class refuses weights that are missing or left over."""
    kind()


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 24 GB")
def test_large_published_weights_fit(kind: Callable[..., Any]) -> None:
    kind()


def test_image_reward_gives_the_scores_in_its_readme() -> None:
    prompt = Prompt(
        "a painting of an ocean with clouds and birds, day time, low depth field effect"
    )
    reward, scores = ImageReward(), []
    for number in (1, 2, 3, 4):
        with urlopen(f"{EXAMPLES}/{number}.webp") as file:
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
        media = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        scores += reward(media, [prompt]).tolist()
    assert scores == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=0.01)
