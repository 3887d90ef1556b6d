"""What votes say: the share of pairs that each side wins, and how far voters agree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowgrpo.core.win_rates import wilson
from flowgrpo.data.votes import VALUES, Ballot, Vote


@dataclass(frozen=True)
class WinRate:
    """How often the second of two sources wins.

    Attributes:
        first: Name of the first source.
        second: Name of the second source.
        share: Share of pairs that the second wins, in [0, 1]; ties count half.
        low: Lower end of its 95 % interval. Likewise ``high``.
        pairs: Number of pairs with a verdict.
        votes: Number of votes, of all voters, without those that were skipped.
        ties: Number of votes for neither.
    """

    first: str
    second: str
    share: float
    low: float
    high: float
    pairs: int
    votes: int
    ties: int


@dataclass(frozen=True)
class Agreement:
    """How far voters agree on the pairs that several of them judged.

    Attributes:
        share: Share of pairs of voters that gave the same verdict on the same pair, in [0, 1].
        alpha: Krippendorff's alpha for nominal data: 1 for agreement, 0 for what chance gives; NaN if all
            verdicts are equal.
        pairs: Number of pairs that at least two voters judged.
        voters: Number of voters.
    """

    share: float
    alpha: float
    pairs: int
    voters: int


def win_rates(ballot: Ballot, votes: Sequence[Vote]) -> list[WinRate]:
    """The win rate of each two sources that were compared.

    The votes of several voters on one pair are averaged first, and the interval counts pairs: voters who
    judge the same pictures are no independent observations. Samples of one source are left out.
    """
    by_sides: dict[tuple[str, str], dict[int, list[float]]] = {}
    for vote in votes:
        pair = ballot.pairs[vote.pair]
        sides = pair.first.source, pair.second.source
        if vote.choice in VALUES and sides[0] != sides[1]:
            by_pair = by_sides.setdefault(sides, {})
            by_pair.setdefault(vote.pair, []).append(1 - VALUES[vote.choice])
    found = []
    for (first, second), by_pair in sorted(by_sides.items()):
        means = [sum(v) / len(v) for v in by_pair.values()]
        share = sum(means) / len(means)
        every = [v for values in by_pair.values() for v in values]
        low, high = wilson(share, len(means))
        found.append(WinRate(first, second, share, low, high, len(means), len(every), every.count(0.5)))  # fmt: skip
    return found


def agreement(votes: Sequence[Vote]) -> Agreement | None:
    """How far voters agree; None if no pair was judged by two voters. Skipped pairs are not judged."""
    by_pair: dict[int, list[str]] = {}
    for vote in votes:
        if vote.choice in VALUES:
            by_pair.setdefault(vote.pair, []).append(vote.choice)
    several = [v for v in by_pair.values() if len(v) > 1]
    if not several:
        return None
    same = sum(v.count(c) * (v.count(c) - 1) for v in several for c in set(v))
    compared = sum(len(v) * (len(v) - 1) for v in several)
    alpha = krippendorff_alpha(several)
    return Agreement(same / compared, alpha, len(several), len({v.voter for v in votes}))


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float:
    """Krippendorff's alpha for nominal data, "Computing Krippendorff's Alpha-Reliability" (2011).

    Args:
        units: The values that coders gave to each unit; units with one value do not count.

    Returns:
        At most 1; NaN if all values are equal.
    """
    counts: dict[str, int] = {}
    total, disagreement = 0, 0.0
    for values in units:
        if len(values) > 1:
            own: Mapping[str, int] = {v: list(values).count(v) for v in values}
            for value, count in own.items():
                counts[value] = counts.get(value, 0) + count
                disagreement += count * (len(values) - count) / (len(values) - 1)
            total += len(values)
    expected = sum(c * (total - c) for c in counts.values()) / (total - 1) if total > 1 else 0.0
    return 1 - disagreement / expected if expected else math.nan
