"""The measures of GARDO (arXiv:2512.24138): uncertainty of a reward, and novelty within a group."""

from collections.abc import Sequence

from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch


def share_beaten(values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """The share of all rows whose value is smaller; rows of equal value count half (eq. 7's ``w``).

    The released code ranks by sorting, which breaks ties by position; rewards of 0 and 1 are mostly ties.

    Args:
        values: Without NaN.
    """
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values, side="left")
    up_to = torch.searchsorted(ordered, values, side="right")
    # A row is among those of its own value.
    return (below + up_to - 1).double() / (2 * len(values))


def uncertainty(
    reward: Float[Tensor, " rows"], measured: Sequence[Float[Tensor, " rows"]]
) -> Float[Tensor, " rows"]:
    """How much higher the trained reward ranks a row than the measured rewards do (eq. 7), in (-1, 1).

    ``U_i = w(R_i) - mean over n of w(R^_n,i)``, over the rows for which all of them are known; NaN for
    the others. The released code computes the ranks from the best to the worst and so has the opposite sign:
    its gate selects the rows that the trained reward ranks *lower*.

    Args:
        reward: The trained reward; NaN where it failed.
        measured: Rewards that are not trained on, at least one.
    """
    known = torch.stack([reward, *measured]).isfinite().all(0)
    result = torch.full(reward.shape, torch.nan, dtype=torch.float64)
    others = torch.stack([share_beaten(values[known]) for values in measured])
    result[known] = share_beaten(reward[known]) - others.mean(0)
    return result


def gated(uncertain: Float[Tensor, " rows"], share: float) -> Bool[Tensor, " rows"]:
    """The rows of highest uncertainty: of those that are not below 0, the given share.

    Rows from the quantile ``1 - share`` on, as in the released code (which excludes the quantile itself, so
    that a single row would never be chosen). Rows with an uncertainty of 0 or NaN are not chosen.
    """
    candidates = uncertain[uncertain >= 0]
    if not len(candidates):
        return torch.zeros(uncertain.shape, dtype=torch.bool)
    return (uncertain >= candidates.quantile(1 - share)) & (uncertain > 0)


def nearest_distance(
    features: Float[Tensor, "rows size"], groups: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """One minus the largest cosine with another row of the group, in [0, 2]; NaN without another row.

    Args:
        features: A vector for each row, of any length. A row with NaN has no distance and is none of
            the others' neighbours.
        groups: Rows with the same label are compared.
    """
    directions = torch.nn.functional.normalize(features.double(), dim=1)
    result = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for group in groups.unique():
        rows = ((groups == group) & directions.isfinite().all(1)).nonzero().squeeze(1)
        if len(rows) > 1:
            cosines = (directions[rows] @ directions[rows].T).clamp(-1, 1)
            result[rows] = 1 - cosines.fill_diagonal_(-1).max(1).values
    return result


def relative_to_group(
    values: Float[Tensor, " rows"], groups: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Values over the mean of their group without NaN; NaN where that mean is 0 or there is none."""
    result = torch.full_like(values, torch.nan)
    for group in groups.unique():
        rows = groups == group
        mean = values[rows].nanmean()
        if mean > 0:
            result[rows] = values[rows] / mean
    return result


def thumbnail(
    media: Float[Tensor, "batch *frames channels height width"],
) -> Float[Tensor, "batch pixels"]:
    """8x8 averages of an image, or of a video's middle frame, by which samples are compared."""
    image = media[:, media.shape[1] // 2] if media.ndim == 5 else media
    return torch.nn.functional.adaptive_avg_pool2d(image, 8).flatten(1)
