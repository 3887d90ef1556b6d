"""The rows of each group, and whether their rewards vary: what all kinds of advantage count with."""

from collections.abc import Iterator

from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch

RELATIVE_FLOOR = 1e-6
"""A standard deviation below this share of the rewards' magnitude is rounding, not signal."""


def check_clip(clip: float, epsilon: float = 0.0) -> None:
    """Raise ValueError if every advantage would be zero, or of the wrong sign."""
    if not clip > 0:
        raise ValueError(f"advantage.clip must be above 0, got {clip}")
    if not epsilon >= 0:
        raise ValueError(f"advantage.epsilon must be at least 0, got {epsilon}")


def has_no_variance(values: Float[Tensor, " values"]) -> bool:
    """Whether rewards are equal up to rounding, or fewer than two."""
    if values.numel() < 2:
        return True
    scale = float(values.abs().max())
    return float(values.max() - values.min()) <= RELATIVE_FLOOR * max(scale, 1e-12)


def zero_variance_groups(
    rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
) -> Bool[Tensor, " groups"]:
    """For each group, in ascending order, whether its rewards have no variance."""
    flags = [has_no_variance(rewards[(groups == g) & rewards.isfinite()]) for g in groups.unique()]
    return torch.tensor(flags, dtype=torch.bool)


def members(
    rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]]:
    """For each group, in ascending order: its rows with a finite reward, and these rewards in fp64."""
    for group in groups.unique():
        rows = ((groups == group) & rewards.isfinite()).nonzero().squeeze(1)
        if len(rows):
            yield rows, rewards[rows].double()
