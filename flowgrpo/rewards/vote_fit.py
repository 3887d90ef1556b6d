"""A linear reward fitted to votes: a Bradley-Terry model over frozen features.

The probability that a picture with features ``f`` is preferred to one with features ``g`` is
``sigmoid(w . (f - g))`` (R. A. Bradley and M. E. Terry, Biometrika 39, 1952), so that ``w . f`` is a score
of one picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit

from flowgrpo.core.text import counted
from flowgrpo.core.win_rates import wilson
from flowgrpo.data.votes import VALUES, Ballot, Vote

FOLDS = 5
PENALTIES = np.logspace(1, -3, 9)
"""Strengths of the L2 penalty that are tried, strongest first, for features of mean 0 and standard deviation 1."""
FEWEST = 20
"""Fewest pairs with a preference."""


@dataclass(frozen=True)
class VotedPairs:
    """The pairs that have a verdict, with the votes of all voters pooled.

    Attributes:
        wins: Share of its votes that the first picture got, in [0, 1]; ties count half.
        votes: Number of votes on it.
        groups: Number of its prompt. Pairs of one prompt share pictures, so they stay together.
    """

    wins: Float[np.ndarray, " pairs"]
    votes: Float[np.ndarray, " pairs"]
    groups: Sequence[int]


@dataclass(frozen=True)
class VoteFit:
    """A fitted head.

    Attributes:
        weight: Weight of each feature; the score of a picture is ``(features - mean) @ weight``.
        mean: Mean of each feature over the pictures.
        penalty: The chosen strength of the L2 penalty.
        accuracy: Share of held-out pairs with a preference that are ordered as voters did.
        low: Lower end of its 95 % interval. Likewise ``high``.
        pairs: Number of these pairs.
    """

    weight: Float[np.ndarray, " size"]
    mean: Float[np.ndarray, " size"]
    penalty: float
    accuracy: float
    low: float
    high: float
    pairs: int


def pooled_pairs(
    read: Sequence[tuple[Ballot, Sequence[Vote]]],
) -> tuple[VotedPairs, list[tuple[Path, Path]]]:
    """Pool the votes on each pair; skipped ones are left out.

    Args:
        read: Ballots with their votes.

    Returns:
        The pairs with a verdict, and the files of their pictures.
    """
    wins, votes, groups, files = [], [], [], []
    prompts: dict[str, int] = {}
    for ballot, cast in read:
        by_pair: dict[int, list[float]] = {}
        for vote in cast:
            if vote.choice in VALUES:
                by_pair.setdefault(vote.pair, []).append(VALUES[vote.choice])
        for number, values in by_pair.items():
            pair = ballot.pairs[number]
            wins.append(sum(values) / len(values))
            votes.append(float(len(values)))
            groups.append(prompts.setdefault(pair.prompt, len(prompts)))
            files.append((ballot.picture(pair.first), ballot.picture(pair.second)))
    return VotedPairs(np.array(wins), np.array(votes), groups), files


def fit_votes(
    first: Float[np.ndarray, "pairs size"],
    second: Float[np.ndarray, "pairs size"],
    voted: VotedPairs,
    *,
    seed: int = 0,
) -> VoteFit:
    """Fit a head, with the L2 penalty chosen by cross-validation.

    The accuracy is that of a nested cross-validation: the penalty is chosen anew within the training part
    of each fold. All pairs of a prompt are in one fold, because they may share pictures.

    Args:
        first: Features of the first picture of each pair.
        second: Features of the second picture of each pair.
        voted: The votes.
        seed: Seed of the division into folds.

    Raises:
        ValueError: If there are too few preferences or prompts, or features are not finite or constant.
    """
    preferred = voted.wins != 0.5
    prompts = {g for g, p in zip(voted.groups, preferred, strict=True) if p}
    if preferred.sum() < FEWEST or len(prompts) < FOLDS:
        raise ValueError(
            f"{counted(int(preferred.sum()), 'pair')} of {counted(len(prompts), 'prompt')} have a preference; at least {FEWEST} pairs "
            f"of {FOLDS} prompts are needed: go on with 'flowgrpo vote'"
        )
    both = np.concatenate([first, second]).astype(np.float64)
    if not np.isfinite(both).all():
        raise ValueError("a picture has features that are not finite: choose other --features")
    mean, scale = both.mean(axis=0), both.std(axis=0)
    if not (scale > 1e-8).any():
        raise ValueError("all pictures have the same features: choose other --features")
    x = np.divide(first - second, scale, out=np.zeros_like(both[: len(first)]), where=scale > 1e-8)
    y, weights, groups = voted.wins, voted.votes, np.asarray(voted.groups)
    margins = np.zeros(len(x))
    for held in _folds(groups, seed):
        rest = ~held
        penalty = _penalty(x[rest], y[rest], weights[rest], groups[rest], seed + 1)
        margins[held] = x[held] @ _solve(x[rest], y[rest], weights[rest], [penalty])[0]
    hits = ((margins > 0) == (y > 0.5)) * 1.0
    hits[margins == 0] = 0.5
    number = int(preferred.sum())
    accuracy = float(hits[preferred].mean())
    low, high = wilson(accuracy, number)
    penalty = _penalty(x, y, weights, groups, seed + 1)
    weight = np.divide(_solve(x, y, weights, [penalty])[0], scale, out=np.zeros_like(scale), where=scale > 1e-8)  # fmt: skip
    return VoteFit(weight, mean, penalty, accuracy, low, high, number)


def _folds(groups: np.ndarray, seed: int) -> list[np.ndarray]:
    """Which pairs are held out, for each fold that has any."""
    names = np.unique(groups)
    fold = dict(zip(np.random.default_rng(seed).permutation(names), np.arange(len(names)) % FOLDS, strict=True))  # fmt: skip
    own = np.array([fold[g] for g in groups])
    return [own == k for k in range(FOLDS) if (own == k).any() and (own != k).any()]


def _penalty(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, groups: np.ndarray, seed: int
) -> float:
    """The penalty with the lowest loss in cross-validation."""
    losses = np.zeros(len(PENALTIES))
    for held in _folds(groups, seed):
        solved = _solve(x[~held], y[~held], weights[~held], PENALTIES)
        losses += [(weights[held] * _loss(x[held] @ w, y[held])).sum() for w in solved]
    return float(PENALTIES[int(losses.argmin())])


def _loss(margin: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cross-entropy between shares of wins and the model's probabilities."""
    loss: np.ndarray = np.logaddexp(0, -margin) + (1 - y) * margin
    return loss


def _solve(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, penalties: Sequence[float] | np.ndarray
) -> list[np.ndarray]:
    """For each penalty the weights that minimise the mean loss plus ``penalty / 2 * |w|^2``.

    They are a combination of the pairs' differences, so the problem is solved in as many dimensions as
    there are pairs or features, whichever are fewer. Each solution is where the next one starts.
    """
    _, values, basis = np.linalg.svd(x, full_matrices=False)
    basis = basis[values > 1e-10 * max(1.0, values.max(initial=0.0))]
    z, shares, found = x @ basis.T, weights / weights.sum(), []
    current = np.zeros(z.shape[1])
    for penalty in penalties:

        def objective(w: np.ndarray, penalty: float = float(penalty)) -> tuple[float, np.ndarray]:
            margin = z @ w
            gradient = z.T @ (shares * (expit(margin) - y)) + penalty * w
            return float(shares @ _loss(margin, y) + penalty / 2 * w @ w), gradient

        current = minimize(objective, current, jac=True, method="L-BFGS-B").x
        found.append(current @ basis)
    return found
