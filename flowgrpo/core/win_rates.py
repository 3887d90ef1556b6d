"""From verdicts on pairs to the share of comparisons that each member of a group wins."""

import torch
from jaxtyping import Float
from torch import Tensor

Pair = tuple[int, int]


def pairs_of(size: int, opponents: int = 0) -> list[Pair]:
    """Which members of a group of ``size`` meet, each pair once and in order.

    Args:
        size: Members of the group.
        opponents: If above 0, member ``i`` meets only ``i + 1`` to ``i + opponents``, around a ring,
            so that each has twice as many comparisons; with enough of them these are all pairs.
    """
    reach = opponents if 0 < 2 * opponents < size - 1 else size
    return [
        (i, j)
        for i in range(size)
        for j in range(i + 1, size)
        if min(j - i, size - (j - i)) <= reach
    ]


def win_rates(
    size: int, pairs: list[Pair], verdicts: Float[Tensor, " pairs"]
) -> Float[Tensor, " size"]:
    """The share of its comparisons that each member won (arXiv:2508.20751).

    Args:
        size: Members of the group.
        pairs: Who met.
        verdicts: 1 where the first of a pair won, 0 where the second did, 0.5 for a tie; NaN for no
            verdict, which counts for neither. Values between are shares of a win.

    Returns:
        In [0, 1]; NaN for a member without a verdict.
    """
    wins = torch.zeros(size, dtype=torch.float64)
    counts = torch.zeros(size, dtype=torch.float64)
    for (i, j), verdict in zip(pairs, verdicts.double().tolist(), strict=True):
        if verdict == verdict:
            wins[i] += verdict
            wins[j] += 1 - verdict
            counts[i] += 1
            counts[j] += 1
    return torch.where(counts > 0, wins / counts, torch.nan).float()


def verdicts_by_score(
    scores: Float[Tensor, " size"], pairs: list[Pair], tie_margin: float
) -> Float[Tensor, " pairs"]:
    """Who scores higher; a difference of up to ``tie_margin`` is a tie, NaN has no verdict."""
    first, second = (scores[[pair[k] for pair in pairs]] for k in (0, 1))
    gap = first - second
    verdict = torch.where(gap.abs() <= tie_margin, 0.5, (gap > 0).to(gap.dtype))
    return torch.where(gap.isfinite(), verdict, torch.nan)
