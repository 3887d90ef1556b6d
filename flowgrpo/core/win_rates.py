"""Win rates: the share of pairwise comparisons that each member of a group wins."""

import math

from flowgrpo.core.tensors import Float, Tensor, torch

Pair = tuple[int, int]
NORMAL_QUANTILE = 1.959964
"""Quantile of the normal distribution for 95 % intervals."""


def pairs_of(size: int, opponents: int = 0) -> list[Pair]:
    """The pairs of a group's members that are compared, each pair once and in order.

    Args:
        size: Members of the group.
        opponents: If above 0, members are arranged in a ring and member ``i`` is compared with
            ``i + 1`` to ``i + opponents``, so that each has twice as many comparisons; a number that
            is large enough gives all pairs.
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
        pairs: The members compared.
        verdicts: 1 if the first of a pair won, 0 if the second did, 0.5 for a tie; values between
            are shares of a win. NaN is no verdict and counts for neither.

    Returns:
        In [0, 1]; NaN for a member without a verdict.
    """
    wins = torch.zeros(size, dtype=torch.float64)
    counts = torch.zeros(size, dtype=torch.float64)
    for (i, j), verdict in zip(pairs, verdicts.double().tolist(), strict=True):
        if verdict == verdict:  # not NaN
            wins[i] += verdict
            wins[j] += 1 - verdict
            counts[i] += 1
            counts[j] += 1
    return torch.where(counts > 0, wins / counts, torch.nan).float()


def verdicts_by_score(
    scores: Float[Tensor, " size"], pairs: list[Pair], tie_margin: float
) -> Float[Tensor, " pairs"]:
    """Verdicts by the higher score; a difference of up to ``tie_margin`` is a tie, NaN no verdict."""
    first, second = (scores[[pair[k] for pair in pairs]] for k in (0, 1))
    gap = first - second
    verdict = torch.where(gap.abs() <= tie_margin, 0.5, (gap > 0).to(gap.dtype))
    return torch.where(gap.isfinite(), verdict, torch.nan)


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion.

    It also holds for means of values in [0, 1] such as ties counted half, whose variance is at most that of
    a proportion.

    Args:
        share: The proportion, in [0, 1].
        number: Number of observations, at least 1.
    """
    z = NORMAL_QUANTILE
    middle = share + z**2 / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    scale = 1 + z**2 / number
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
