"""What papers claim about their methods against others, and what the study shows of it in miniature."""

import math
from dataclasses import dataclass

from benchmarks.study.results import AXES, Runs
from benchmarks.study.statistics import contrast
from scripts.page_tables import markdown_table


@dataclass(frozen=True)
class Claim:
    """A claim that one method learns faster than another.

    Attributes:
        words: The claim, with its paper.
        better: The method that is claimed to be better.
        than: The method that it is compared with.
        axis: What both spend equal amounts of.
    """

    words: str
    better: str
    than: str
    axis: str


CLAIMS = (
    Claim("MixGRPO takes half of DanceGRPO's time (arXiv:2507.21802)", "MixGRPO", "DanceGRPO", "seconds"),
    Claim("MixGRPO is faster than Flow-GRPO on all steps (arXiv:2507.21802)", "MixGRPO", "Flow-GRPO", "seconds"),
    Claim("Flow-GRPO-Fast is faster than Flow-GRPO (its released code)", "Flow-GRPO-Fast", "Flow-GRPO", "seconds"),
    Claim("DiffusionNFT is up to 25 times as efficient as Flow-GRPO (arXiv:2509.16117)", "DiffusionNFT", "Flow-GRPO", "seconds"),
    Claim("the same, for equal images", "DiffusionNFT", "Flow-GRPO", "images"),
    Claim("AWM is up to 24 times as fast as Flow-GRPO (arXiv:2509.25050)", "Matching (AWM, V-GRPO)", "Flow-GRPO", "seconds"),
    Claim("DGPO is about 20 times as fast as Flow-GRPO (arXiv:2510.08425)", "DGPO", "Flow-GRPO", "seconds"),
    Claim("TempFlow-GRPO's credit learns more than Flow-GRPO's (arXiv:2508.04324)", "TempFlow-GRPO", "Flow-GRPO", "images"),
    Claim("TP-GRPO's credit learns more than Flow-GRPO's (arXiv:2602.06422)", "TP-GRPO", "Flow-GRPO", "images"),
    Claim("Stepwise-Flow-GRPO gains more than Flow-GRPO in a given time (arXiv:2603.28718)", "Stepwise-Flow-GRPO", "Flow-GRPO", "seconds"),
    Claim("ratios of chunks gain more than those of single steps (Chunk-GRPO, arXiv:2510.21583; without the Guard ratio that Flow-GRPO has here)", "Chunk-GRPO", "Flow-GRPO", "images"),
    Claim("Flash-GRPO is 6 times as fast as Flow-GRPO (arXiv:2605.15980)", "Flash-GRPO", "Flow-GRPO", "seconds"),
    Claim("Neighbor GRPO gains more than MixGRPO (arXiv:2511.16955)", "Neighbor GRPO", "MixGRPO", "seconds"),
)  # fmt: skip


def paper_claims(runs: Runs) -> str:
    """A row per claim whose methods have two common seeds: the difference of their gains."""
    rows, lost, runs = [], runs.collapsed(), runs.steady()
    for claim in CLAIMS:
        if claim.better in lost:
            rows.append([claim.words, claim.axis, "", "", "not shown: destroys the model"])
        if not {claim.better, claim.than} <= runs.by_method.keys():
            continue
        least = {axis: runs.least_spent(axis) for axis in AXES}
        difference, half, seeds = contrast(
            runs.gains_at(claim.axis, least[claim.axis]), claim.better, claim.than
        )
        if math.isnan(half):
            continue
        verdict = "not shown"
        if abs(difference) > half:
            verdict = "**shown**" if difference > 0 else "**the contrary**"
        cells = [claim.words, claim.axis, str(seeds), f"{100 * difference:+.1f} ± {100 * half:.1f}"]
        rows.append([*cells, verdict])
    if not rows:
        return ""
    heads = ["claim", "equal", "seeds", "difference of the gains, points", "here"]
    note = (
        "The interval is that of this one difference (95 %), with the residuals of all methods. Only the direction "
        "is tested: after a minute, factors of speed cannot be read off."
    )
    return f"### What the papers claim, in miniature\n\n{markdown_table(heads, rows)}\n\n{note}"
