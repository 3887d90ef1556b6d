"""What clients of reward servers share: a batch is sent in parts, to several servers at a time."""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving.client import Endpoints

log = logging.getLogger(__name__)

Ask = Callable[[Float[Tensor, "part *media"], Sequence[Prompt]], list[float]]
"""Sends a part and returns its scores."""


def scored_in_parts(
    endpoints: Endpoints,
    media: Float[Tensor, "batch *media"],
    prompts: Sequence[Prompt],
    size: int,
    ask: Ask,
) -> Float[Tensor, " batch"]:
    """Scores of a batch; NaN for media that are not finite and for parts that no server scored.

    Args:
        endpoints: The servers.
        media: In [0, 1].
        prompts: One per sample.
        size: Samples in one request.
        ask: Sends a part.

    Raises:
        RuntimeError: If no part was scored; says why.
    """
    scores = torch.full((len(prompts),), math.nan)
    parts = media.isfinite().flatten(1).all(1).nonzero().squeeze(1).split(size)

    def ask_one(index: int) -> list[float]:
        rows = parts[index]
        return ask(media[rows], [prompts[int(r)] for r in rows])

    answers = endpoints.ask_all(len(parts), ask_one)
    errors = [a for a in answers if isinstance(a, Exception)]
    if errors and len(errors) == len(answers):
        raise RuntimeError(f"the reward server failed: {errors[0]}") from errors[0]
    for rows, answer in zip(parts, answers, strict=True):
        if isinstance(answer, Exception):
            log.warning("%d of %d samples have no score: %s", len(rows), len(prompts), answer)
        else:
            scores[rows] = torch.tensor(answer)
    return scores
