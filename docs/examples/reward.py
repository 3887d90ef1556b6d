"""A reward of your own. In a configuration: ``model = "reward:Darkness"``."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flowgrpo import Prompt, Reward, RewardScorer


class Darkness:
    """How dark an image is, from 0 (white) to 1 (black)."""

    ignores_prompt = True

    def __init__(self, power: float = 1.0):
        self.power = power

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        # Media is (B, C, H, W) or (B, F, C, H, W), fp32 in [0, 1]; one finite score per sample.
        return (1 - media.flatten(1).mean(1)) ** self.power


def num_colors(media: Tensor, prompts: Sequence[Prompt]) -> list[float]:
    """A function that needs PIL images; texts are prompts[i].text, other keys prompts[i].metadata."""
    images = [to_pil_image((image * 255).round().byte()) for image in media]
    return [float(len(image.getcolors(maxcolors=2**24))) for image in images]


if __name__ == "__main__":
    scorer = RewardScorer([Reward(model="reward:Darkness", weight=0.5, options={"power": 2.0})])
    grey = torch.stack([torch.full((3, 8, 8), level) for level in (0.0, 0.5, 1.0)])
    scores = scorer.score(grey, [Prompt("a photo of nothing")] * 3)
    print("scores", scores.raw["Darkness"].tolist(), "rewards", scores.reward.tolist())
    assert scores.raw["Darkness"].tolist() == [1.0, 0.25, 0.0]
    scorer.close()
    assert num_colors(grey, [Prompt("a photo of nothing")] * 3) == [1.0, 1.0, 1.0]
