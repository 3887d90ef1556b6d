"""The cost of each algorithm per prompt at its paper's settings, as a table for the documentation.

python -m scripts.cost_table docs/algorithms.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from flowgrpo.algorithms import (
    FIND,
    G2RPO,
    TPGRPO,
    VGPO,
    Algorithm,
    BranchGRPO,
    DanceGRPO,
    DiffusionNFT,
    FlowGRPO,
    MixGRPO,
    PrefGRPO,
    TempFlowGRPO,
)
from flowgrpo.core.random import Random
from flowgrpo.core.steps import RandomWindow

BEGIN, END = "<!-- cost table: begin -->", "<!-- cost table: end -->"


SETTINGS: Sequence[tuple[str, int, Algorithm]] = [
    ("Flow-GRPO, SD3.5", 10, FlowGRPO()),
    ("Flow-GRPO-Fast, SD3.5, window of 3", 10, FlowGRPO(steps=RandomWindow(size=3))),
    ("DanceGRPO, FLUX", 16, DanceGRPO()),
    ("MixGRPO, FLUX, window of 4", 25, MixGRPO()),
    ("MixGRPO-Flash, FLUX, 0.4", 25, MixGRPO(flash=0.4, solver="dpm_2m")),
    ("Pref-GRPO, FLUX, without comparisons", 25, PrefGRPO()),
    ("DiffusionNFT, SD3.5", 10, DiffusionNFT()),
    ("TempFlow-GRPO, 4 seeds", 10, TempFlowGRPO()),
    ("G²RPO, FLUX, granularities 1, 2, 3", 16, G2RPO()),
    ("G²RPO, released script, granularities 1, 2", 16, G2RPO(granularities=(1, 2))),
    ("TP-GRPO, SD3.5", 10, TPGRPO()),
    ("VGPO, SD3.5", 10, VGPO()),
    ("BranchGRPO, FLUX, splits at 0, 3, 6, 9", 20, BranchGRPO()),
    ("FIND, SD 1.5", 50, FIND()),
]
"""Name, number of denoising steps, algorithm with its paper's defaults."""


def table() -> str:
    """The costs in Markdown, a row for each of :data:`SETTINGS`."""
    lines = [
        "| algorithm | T | G | NFE | NFE / (G · T) | decodes | reward calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, num_steps, algorithm in SETTINGS:
        algorithm.check(num_steps)
        cost, size = algorithm.cost(num_steps, 0, Random(0)), algorithm.group_size
        share = cost.nfe / (size * num_steps)
        lines.append(
            f"| {name} | {num_steps} | {size} | {cost.nfe:,.0f} | {share:.2f} | {cost.decodes:,.0f} "
            f"| {cost.rewards:,.0f} |"
        )
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: If the page has not exactly one pair of markers, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page needs one line {BEGIN!r} and below it one line {END!r}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.cost_table docs/algorithms.md")
    page = Path(sys.argv[1])
    page.write_text(with_table(page.read_text()))
