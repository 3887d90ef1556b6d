"""A metric of your own. In a configuration: ``metrics = ["metric:pixel_diversity"]``."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowgrpo import PipelinePolicy, Prompt, Reward, RewardScorer, Sampling
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation import held_out


def pixel_diversity(prompts: Sequence[Prompt], media: Sequence[Tensor]) -> Mapping[str, float]:
    """Mean standard deviation of pixels over a prompt's images; ``media[i]`` are those of prompt i."""
    spreads = [m.std(0, correction=0).mean() for m in media if len(m) > 1]
    return {"diversity/pixels": float(torch.stack(spreads).mean()) if spreads else 0.0}


if __name__ == "__main__":
    sampling = Sampling(num_steps=4, guidance_scale=1.0)
    policy = PipelinePolicy.from_pretrained("shapes", sampling=sampling)
    scorer = RewardScorer([Reward(model="jpeg_size")])
    prompts = PromptSet([Prompt("a photo of a triangle"), Prompt("a photo of two squares")])
    images = held_out.plan(prompts, 8)  # four of each prompt
    metrics = [pixel_diversity]
    print(held_out.evaluate(policy, scorer, images, seed=0, sampling=sampling, metrics=metrics))
    scorer.close()
