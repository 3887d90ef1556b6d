"""Writes the cost of each algorithm per prompt, at its paper's settings, as a table into a page.

python -m scripts.cost_table docs/algorithms.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from flowgrpo.algorithms import (
    DMD,
    FIND,
    G2RPO,
    RTDMD,
    SRPO,
    TPGRPO,
    VGPO,
    Algorithm,
    BranchGRPO,
    DanceGRPO,
    DiffusionNFT,
    Distillation,
    DRaFT,
    FlowGRPO,
    Matching,
    MixGRPO,
    NeighborGRPO,
    PrefGRPO,
    ReFL,
    SelfOPD,
    TempFlowGRPO,
)
from flowgrpo.core.random import Random
from flowgrpo.core.steps import RandomWindow, Window
from scripts.page_tables import markdown_table, write_marked_text

MARKER = "cost table"
"""Name of the table's markers in the page."""


SETTINGS: Sequence[tuple[str, int, Algorithm]] = [
    ("Flow-GRPO, SD3.5", 10, FlowGRPO()),
    ("Flow-GRPO-Fast, SD3.5, window of 3", 10, FlowGRPO(steps=RandomWindow(size=3))),
    (
        "Flash-GRPO, Wan 2.1, groups of 8",
        20,
        FlowGRPO(group_size=8, steps_per="group", steps=RandomWindow(size=1, last=10)),
    ),
    ("DanceGRPO, FLUX", 16, DanceGRPO()),
    ("MixGRPO, FLUX, window of 4", 25, MixGRPO()),
    ("MixGRPO-Flash, FLUX, 0.4", 25, MixGRPO(flash=0.4, solver="dpm_2m")),
    ("Pref-GRPO, FLUX, without comparisons", 25, PrefGRPO()),
    ("DiffusionNFT, SD3.5", 10, DiffusionNFT()),
    ("AWM, SD3.5", 14, Matching()),
    ("DGPO, SD3.5", 10, Matching(group_size=16)),
    ("DiffusionOPD, SD3.5", 10, Distillation()),
    ("DMD, SD3.5, last step", 4, DMD(matched="last")),
    ("RTDMD, SD3.5", 4, RTDMD()),
    ("Neighbor GRPO, FLUX", 8, NeighborGRPO()),
    ("TempFlow-GRPO, 4 seeds", 10, TempFlowGRPO()),
    ("Self-OPD, SD3.5, 2 steps", 10, SelfOPD()),
    ("G²RPO, FLUX, granularities 1, 2, 3", 16, G2RPO()),
    ("G²RPO, released script, granularities 1, 2", 16, G2RPO(granularities=(1, 2))),
    ("TP-GRPO, SD3.5", 10, TPGRPO()),
    ("DenseGRPO, SD3.5", 10, TPGRPO(turning_points="none")),
    (
        "Stepwise-Flow-GRPO, SD3.5, completions of 5",
        10,
        TPGRPO(
            turning_points="none",
            rivals="group",
            completion_steps=5,
            shared_noise=True,
            steps=Window(start=1, size=8),
        ),
    ),
    ("VGPO, SD3.5", 10, VGPO()),
    ("BranchGRPO, FLUX, splits at 0, 3, 6, 9", 20, BranchGRPO()),
    (
        "TreeGRPO, SD3.5, 3 splits into 3 from step 0",
        10,
        BranchGRPO(group_size=27, children=3, splits=(0, 1, 2), between="ode", rivals="leaves"),
    ),
    ("FIND, SD 1.5", 50, FIND()),
    ("DRaFT-1 and AlignProp, SD 1.5", 50, DRaFT()),
    ("ReFL, SD 1.4", 40, ReFL()),
    ("SRPO, FLUX", 25, SRPO()),
]
"""Name, number of denoising steps, algorithm with its paper's defaults."""


def table() -> str:
    """The costs in Markdown, one row for each of :data:`SETTINGS`."""
    rows = []
    for name, num_steps, algorithm in SETTINGS:
        algorithm.check(num_steps)
        cost, size = algorithm.cost(num_steps, 0, Random(0)), algorithm.group_size
        share = cost.nfe / (size * num_steps)
        counts = (
            f"{cost.nfe:,.0f}",
            f"{share:.2f}",
            f"{cost.decodes:,.0f}",
            f"{cost.rewards:,.0f}",
        )
        rows.append((name, str(num_steps), str(size), *counts))
    heads = ("algorithm", "T", "G", "NFE", "NFE / (G · T)", "decodes", "reward calls")
    return markdown_table(heads, rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.cost_table docs/algorithms.md")
    write_marked_text(Path(sys.argv[1]), MARKER, table())
