"""Comparisons by votes of people, in the form of other comparisons."""

import math
from collections.abc import Sequence

from flowgrpo.bench.comparison import Row
from flowgrpo.bench.comparison_files import Pair
from flowgrpo.core.text import counted
from flowgrpo.data.votes import Ballot, Vote
from flowgrpo.evaluation.vote_statistics import WinRate, agreement, win_rates

WILSON = (
    "Votes: the share of pairs that each side wins, ties counted half, all voters pooled; several votes on one "
    "pair count as one. The interval is Wilson's, over pairs."
)


def compare_votes(
    read: Sequence[tuple[Ballot, Sequence[Vote]]],
) -> tuple[list[Pair], list[str]]:
    """Compare the two sides of each folder of votes.

    Args:
        read: Ballots with their votes.

    Returns:
        The pairs of sources with their rows, and notes about votes and agreement.

    Raises:
        ValueError: If the votes compare samples of one source, or were all skipped.
    """
    pairs, notes = [], [WILSON]
    for ballot, votes in read:
        rates = win_rates(ballot, votes)
        if not rates:
            raise ValueError(
                f"{ballot.folder} has no votes between two sources: they are on samples of one folder, or all "
                "were skipped; 'flowgrpo learn-reward' uses the former"
            )
        for rate in rates:
            pairs.append(Pair(rate.first, rate.second, [_row(rate)], rate.pairs))
            notes.append(
                f"{counted(rate.second, 'win')} {100 * rate.share:.1f} % of {counted(rate.pairs, 'pair')} against {rate.first} (95 % "
                f"interval {100 * rate.low:.1f} to {100 * rate.high:.1f}; {counted(rate.votes, 'vote')}, {counted(rate.ties, 'tie')})"
            )
        found = agreement(votes)
        if found is None:
            notes.append(f"{ballot.folder}: no pair was judged by two voters, so agreement is unknown")  # fmt: skip
        else:
            alpha = "unknown" if math.isnan(found.alpha) else f"{found.alpha:.2f}"
            notes.append(
                f"{ballot.folder}: {counted(found.voters, 'voter')} agree on {100 * found.share:.1f} % of their verdicts on "
                f"{found.pairs} common pairs (Krippendorff's alpha {alpha})"
            )
    return pairs, notes


def _row(rate: WinRate) -> Row:
    """The share of the second source less that of the first."""
    difference, low, high = (2 * v - 1 for v in (rate.share, rate.low, rate.high))
    return Row(
        "votes", "", 1 - rate.share, rate.share, difference, low, high, rate.share, in_points=True
    )
