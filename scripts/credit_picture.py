"""Draws how credit differs between the algorithms: ``docs/credit.svg``.

python -m scripts.credit_picture docs/credit.svg

Every row shows an experience that the algorithm really collected, from the embedded world's pipeline
with random weights: which steps were stochastic and trained, and after which step each candidate was
decoded. Only the layout of a row and its two sentences are written by hand.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flowgrpo import PipelinePolicy, Prompt, Random, Reward, RewardScorer, Sampling
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
    TempFlowGRPO,
)
from flowgrpo.core.steps import RandomSteps, RandomWindow, SlidingWindow, Window
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group
from flowgrpo.policy import Noise
from flowgrpo.policy.probe import fit_noise
from flowgrpo.shapes.architecture import build_pipeline

T = 8
"""Denoising steps of every row."""
LEFT, PITCH, RIGHT = 180, 54, 686
"""x of the initial noise, the width of a step, and x of the sentences."""
TOP, ROW, WIDTH = 146, 104, 950
"""y of the first row, the height of a row, and the width of the picture."""
LANES = (-22.0, 0.0, 22.0)
"""y of the samples of a group, relative to the middle of a row."""


@dataclass(frozen=True)
class Facts:
    """What an algorithm collected for one prompt.

    Attributes:
        stochastic: The stochastic steps, ascending.
        trained: The steps of the actions of each sample.
        candidates: (sample, step after which it was decoded, granularity) of each candidate.
    """

    stochastic: Sequence[int]
    trained: dict[int, set[int]]
    candidates: Sequence[tuple[int, int, int]]

    @classmethod
    def of(cls, experience: Experience) -> "Facts":
        a, c = experience.actions, experience.candidates
        trained: dict[int, set[int]] = {}
        for sample, step in zip(a.sample.tolist(), a.step.tolist(), strict=True):
            trained.setdefault(sample, set()).add(step)
        columns = (c.sample.tolist(), c.step.tolist(), c.granularity.tolist())
        return cls(sorted(experience.step_std), trained, sorted(zip(*columns, strict=True)))

    def decoded_after(self, sample: int) -> list[int]:
        """The steps after which a candidate of a sample was decoded, ascending."""
        return sorted({step for owner, step, _ in self.candidates if owner == sample})


Draw = Callable[[Facts], list[str]]


@dataclass(frozen=True)
class Row:
    """One algorithm in the picture.

    Attributes:
        name: As in its paper.
        algorithm: With a small group, so that it can be drawn.
        draw: From what it collected to shapes, relative to the middle of the row.
        text: Two or three lines that say who judges whom.
        iteration: Which iteration is shown.
    """

    name: str
    algorithm: Algorithm
    draw: Draw
    text: Sequence[str]
    iteration: int = 0


def x(node: float) -> float:
    """Where a node of the grid is: 0 is noise, T is data."""
    return LEFT + node * PITCH


def line(kind: str, a: tuple[float, float], b: tuple[float, float]) -> str:
    """A step from one state to another; coordinates are (node, y)."""
    return f'<path class="{kind}" d="M{x(a[0]):.1f} {a[1]:.1f}L{x(b[0]):.1f} {b[1]:.1f}"/>'


def state(node: float, y: float, kind: str = "state") -> str:
    return f'<circle class="{kind}" cx="{x(node):.1f}" cy="{y:.1f}" r="3.5"/>'


def candidate(node: float, y: float, shift: float = 0.0) -> str:
    """A decoded and scored image."""
    return f'<rect class="image" x="{x(node) + shift - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" rx="2"/>'


def words(node: float, y: float, text: str, kind: str = "small mid") -> str:
    return f'<text class="{kind}" x="{x(node):.1f}" y="{y:.1f}">{text}</text>'


def credit(first: int, last: int, text: str, y: float = 43.0) -> str:
    """One advantage for all actions at the steps ``first`` to ``last``."""
    left, width = x(first) + 2, (last - first + 1) * PITCH - 4
    return (
        f'<rect class="credit" x="{left:.1f}" y="{y - 9:.1f}" width="{width:.1f}" height="17" rx="4"/>'
        f'<text class="small mid bold" x="{left + width / 2:.1f}" y="{y + 4:.1f}">{text}</text>'
    )


def sub(number: int) -> str:
    """A number as a subscript."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def lanes(facts: Facts, shared: bool) -> list[str]:
    """Whole trajectories; where noise is shared they are one line up to the first stochastic step."""
    first = facts.stochastic[0] if shared and facts.stochastic else 0
    shapes = []
    for sample, y in enumerate(LANES):
        before = y
        for step in range(T):
            start = 0.0 if shared and step <= first else y
            end = 0.0 if shared and step < first else y
            kind = "ode"
            if step in facts.stochastic:
                kind = "act" if step in facts.trained.get(sample, ()) else "untrained"
            shapes.append(line(kind, (step, start), (step + 1, end)))
            before = end
        shapes += [
            state(step, 0.0 if shared and step <= first else y, "noise" if step == 0 else "state")
            for step in range(T)
        ]
        assert facts.decoded_after(sample) == [T - 1]
        shapes.append(candidate(T, before))
    return shapes


def trajectories(shared: bool) -> Draw:
    def draw(facts: Facts) -> list[str]:
        steps = facts.stochastic
        return [*lanes(facts, shared), credit(steps[0], steps[-1], "R of the image")]

    return draw


def fractions(facts: Facts) -> list[str]:
    """DanceGRPO: every sample trains on its own part of the steps."""
    own = sorted(facts.trained[0])
    bars = [credit(step, step, "R") for step in own]
    return [*lanes(facts, True), *bars, words(-0.2, 47, "top sample:", "small end")]


def fan(labels: Callable[[int], str]) -> Draw:
    """Branches from the states of one deterministic path, each with one stochastic step."""

    def draw(facts: Facts) -> list[str]:
        steps, shapes = facts.stochastic, []
        last = steps[-1]
        granularities = sorted({g for _, _, g in facts.candidates})
        for place, step in enumerate(steps):
            height = 28.0 - 11.0 * place
            for y in (-height, height):
                shapes.append(line("complete", (step + 1, y), (T, y)))
                shapes.append(line("act", (step, 0), (step + 1, y)))
                shapes.append(state(step + 1, y))
                shapes += [candidate(T, y, 14.0 * number) for number in range(len(granularities))]
            shapes.append(credit(step, step, labels(step)))
        shapes += [line("ode", (step, 0), (step + 1, 0)) for step in range(last)]
        shapes += [state(step, 0, "state" if step else "noise") for step in range(last + 1)]
        return shapes

    return draw


def completions(facts: Facts) -> list[str]:
    """TP-GRPO: one sample's trajectory, and the ODE completion of the state before each step."""
    shapes, y, top = [], 12.0, -22.0
    before = [step + 1 for step in facts.decoded_after(0) if step < T - 1]
    for node in before:
        shapes += [
            f'<path class="complete" d="M{x(node):.1f} {y}Q{x(node):.1f} {top} {x(node) + 20:.1f} {top}"/>',
            candidate(node, top, 25), words(node + 0.6, top + 4, f"R{sub(node)}", "small"),
        ]  # fmt: skip
    for step in range(T):
        shapes.append(line("act" if step in facts.trained[0] else "ode", (step, y), (step + 1, y)))
    shapes += [state(step, y, "state" if step else "noise") for step in range(T)]
    final = before[-1] + 1
    shapes += [candidate(T, y), words(T, y - 10, f"R{sub(final)}")]
    shapes += [
        credit(step, step, f"R{sub(step + 1)}−R{sub(step)}") for step in sorted(facts.trained[0])
    ]
    return shapes


def projections(facts: Facts) -> list[str]:
    """VGPO: one sample's trajectory, and the image that the model predicts after each step."""
    shapes, y, top = [], 12.0, -22.0
    inner = [step for step in facts.decoded_after(0) if step < T - 1]
    for step in inner:
        shapes += [
            line("predict", (step + 1, y), (step + 1, top + 5)),
            candidate(step + 1, top), words(step + 1.15, top + 4, f"R{sub(step)}", "small"),
        ]  # fmt: skip
    for step in range(T):
        shapes.append(line("act" if step in facts.trained[0] else "ode", (step, y), (step + 1, y)))
    shapes += [state(step, y, "state" if step else "noise") for step in range(T)]
    final = inner[-1] + 1
    shapes += [candidate(T, y), words(T, y - 10, f"R{sub(final)}")]
    shapes += [
        credit(step, step, f"R{sub(step)}…R{sub(final)}" if step < final else f"R{sub(step)}")
        for step in sorted(facts.trained[0])
    ]
    return shapes


def tree(splits: Sequence[int], leaves: int) -> Draw:
    """BranchGRPO: every branch becomes two at a split."""

    def place(leaf: int, width: int) -> float:
        """y of the branch that a leaf descends from, where branches have ``width`` leaves."""
        spacing = 56.0 / (leaves - 1)
        return -28.0 + spacing * (leaf // width * width + (width - 1) / 2)

    def draw(facts: Facts) -> list[str]:
        shapes, dots = [], []
        for step in range(T):
            width = leaves // 2 ** sum(split < step for split in splits)
            after = leaves // 2 ** sum(split <= step for split in splits)
            for leaf in range(0, leaves, after):
                a, b = (step, place(leaf, width)), (step + 1, place(leaf, after))
                owner = leaf // after * after
                shapes.append(line("act" if step in facts.trained.get(owner, ()) else "ode", a, b))
                dots.append(state(step, a[1], "state" if step else "noise"))
                if step == T - 1:
                    dots.append(candidate(T, b[1]))
            if step in facts.stochastic:
                text = "mean R" if after > 1 else "R"
                shapes.append(credit(step, step, text))
        return [*shapes, *dots]

    return draw


def forward_process(facts: Facts) -> list[str]:
    """DiffusionNFT: images from the ODE; noise is added to them again, and there they are trained."""
    shapes = []
    for y in (-28.0, -14.0):
        shapes += [line("ode", (step, y), (step + 1, y)) for step in range(T)]
        shapes += [state(step, y, "state" if step else "noise") for step in range(T)]
        shapes.append(candidate(T, y))
    times = sorted(facts.trained[0])
    for time in times:
        shapes.append(
            f'<path class="again" d="M{x(T) - 2:.1f} -8Q{x((T + time) / 2):.1f} {14 if time < T - 1 else 8} {x(time):.1f} 15"/>'
        )
    shapes += [f'<circle class="noised" cx="{x(time):.1f}" cy="17" r="4.5"/>' for time in times]
    shapes.append(credit(times[0], times[-1], "R of the image, at every noised version"))
    return shapes


def initial_noise(facts: Facts) -> list[str]:
    """FIND: the action is the draw of the initial noise."""
    assert all(steps == {-1} for steps in facts.trained.values())
    shapes = []
    for y in LANES:
        shapes += [line("ode", (step, y), (step + 1, y)) for step in range(T)]
        shapes += [state(step, y) for step in range(1, T)]
        shapes += [
            f'<circle class="noised" cx="{x(0):.1f}" cy="{y:.1f}" r="5.5"/>', candidate(T, y)
        ]  # fmt: skip
    left = x(0) - 34
    shapes.append(
        f'<rect class="credit" x="{left:.1f}" y="34" width="100" height="17" rx="4"/>'
        f'<text class="small mid bold" x="{left + 50:.1f}" y="47">R of the image</text>'
    )
    return shapes


ROWS = [
    Row(
        "Flow-GRPO", FlowGRPO(group_size=3), trajectories(False),
        ["Every sample has its own noise.", "Its image judges all of its", "stochastic steps alike."],
    ),
    Row(
        "Flow-GRPO-Fast", FlowGRPO(group_size=3, steps=RandomWindow(size=2, first=1, last=5), shared_noise=True),
        trajectories(True),
        ["One path until a random window,", "then each sample takes its own.", "The image judges the window."],
    ),
    Row(
        "MixGRPO", MixGRPO(group_size=3, steps=SlidingWindow(size=2)), trajectories(True),
        ["The same, but the window slides", "from noise to data over the", "iterations (here: iteration 75)."],
        iteration=75,
    ),
    Row(
        "DanceGRPO", DanceGRPO(group_size=3), fractions,
        ["Shared noise, all steps stochastic.", "The image judges a random part of", "the steps, another for each sample."],
    ),
    Row(
        "TempFlow-GRPO", TempFlowGRPO(group_size=2, seeds=1, steps=RandomSteps(count=3, first=0, last=T - 1)),
        fan(lambda step: f"w{sub(step)} R"),
        ["Branches leave the ODE path with", "one stochastic step each. A branch’s", "image judges it; w weights the step."],
        iteration=4,
    ),
    Row(
        "G²RPO", G2RPO(group_size=2, steps=Window(start=0, size=3)), fan(lambda step: "Σ R"),
        ["Likewise, but every branch is", "completed on three sub-grids; the", "three comparisons are added."],
    ),
    Row(
        "TP-GRPO", TPGRPO(group_size=2), completions,
        ["One sample of the group is shown.", "Completions before and after a step", "give its gain; turning points get more."],
    ),
    Row(
        "VGPO", VGPO(group_size=2), projections,
        ["One sample of the group is shown.", "The predicted images from a step to", "the end, discounted, judge the step."],
    ),
    Row(
        "BranchGRPO", BranchGRPO(group_size=4, splits=(0, 3)), tree((0, 3), 4),
        ["Samples grow as a tree. A branch is", "judged by the mean of its leaves,", "among the branches at its depth."],
    ),
    Row(
        "DiffusionNFT", DiffusionNFT(group_size=2, timestep_fraction=1.0), forward_process,
        ["No stochastic step: the image is", "noised again, and its reward says", "whether to move to it or away."],
    ),
    Row(
        "FIND", FIND(group_size=3), initial_noise,
        ["The action is the initial noise; the", "sampler is deterministic and the", "model frozen. The image judges it."],
    ),
]  # fmt: skip

STYLE = """
    .page { fill: #ffffff; stroke: #d5dbe3; }
    .rule { stroke: #e3e8ee; }
    .grid { stroke: #eef1f5; }
    .name { fill: #1c2430; font-size: 15px; font-weight: 600; }
    .text { fill: #3c4756; font-size: 12.5px; }
    .small { fill: #3c4756; font-size: 11px; }
    .mid { text-anchor: middle; }
    .end { text-anchor: end; }
    .bold { font-weight: 600; }
    .state { fill: #ffffff; stroke: #5f6b7a; stroke-width: 1.3; }
    .noise { fill: #8c97a5; stroke: #5f6b7a; stroke-width: 1.3; }
    .noised { fill: #fbe3d3; stroke: #c2571a; stroke-width: 2; }
    .image { fill: #2f9e6e; stroke: #1d6f4c; }
    .ode { fill: none; stroke: #8c97a5; stroke-width: 1.5; }
    .act { fill: none; stroke: #c2571a; stroke-width: 3; }
    .untrained { fill: none; stroke: #c2571a; stroke-width: 1.4; stroke-dasharray: 5 3; }
    .complete { fill: none; stroke: #8c97a5; stroke-width: 1.3; stroke-dasharray: 5 4; }
    .predict { fill: none; stroke: #8c97a5; stroke-width: 1.5; stroke-dasharray: 1.5 3; }
    .again { fill: none; stroke: #c2571a; stroke-width: 1; stroke-dasharray: 2 3; }
    .credit { fill: #e9e2fb; stroke: #7a5bd0; }
"""
DARK = """
      .page { fill: #12161c; stroke: #2c3540; }
      .rule { stroke: #2c3540; }
      .grid { stroke: #1c232c; }
      .name { fill: #eef2f7; }
      .text, .small { fill: #c9d2dd; }
      .state { fill: #12161c; stroke: #a9b4c2; }
      .noise { fill: #7b8694; stroke: #a9b4c2; }
      .noised { fill: #4a2c18; stroke: #f0924f; }
      .image { fill: #3fb383; stroke: #8fe0bd; }
      .ode, .complete, .predict { stroke: #8593a3; }
      .act, .untrained, .again { stroke: #f0924f; }
      .credit { fill: #2f2750; stroke: #a48cf0; }
"""


def legend() -> list[str]:
    """The meaning of lines, squares and bars."""

    def entry(column: int, row: int, shape: str, text: str) -> str:
        left, y = 24 + 231 * column, 50 + 22 * row
        return f'<g transform="translate({left} {y})">{shape}<text class="text" x="44" y="4">{text}</text></g>'

    def stroke(kind: str) -> str:
        return f'<path class="{kind}" d="M2 0H34"/>'

    return [
        entry(0, 0, stroke("act"), "stochastic step: an action"),
        entry(0, 1, stroke("untrained"), "stochastic, not trained"),
        entry(1, 0, stroke("ode"), "deterministic (ODE) step"),
        entry(1, 1, stroke("complete"), "completion by the ODE"),
        entry(2, 0, '<rect class="image" x="13" y="-5" width="10" height="10" rx="2"/>', "candidate: decoded, scored"),
        entry(2, 1, stroke("predict"), "image predicted in one step"),
        entry(3, 0, '<rect class="credit" x="2" y="-8" width="32" height="16" rx="4"/>', "one advantage, computed"),
        f'<text class="text" x="{24 + 231 * 3 + 44}" y="76">from the rewards R</text>',
    ]  # fmt: skip


def collect(row: Row) -> Facts:
    """Let the algorithm collect from one prompt."""
    torch.manual_seed(0)
    weights = Noise() if isinstance(row.algorithm, FIND) else None
    sampling = Sampling(num_steps=T, guidance_scale=1.0)
    policy = PipelinePolicy(build_pipeline(), sampling=sampling, weights=weights)
    scorer = RewardScorer([Reward(model="jpeg_size")])
    groups = [Group(0, Prompt("a photo of a circle"))]
    fit_noise(policy, [g.prompt for g in groups])
    random = Random(0).at("train", row.iteration)
    experience = row.algorithm.collect(policy, groups, scorer, random, row.iteration)
    scorer.close()
    return Facts.of(experience)


def picture() -> str:
    """The picture as SVG."""
    height = TOP + ROW * len(ROWS) + 12
    body = []
    for step in range(T):
        body.append(words(step + 0.5, 118, str(step), "text mid"))
    body += [
        '<text class="name" x="24" y="26">How credit differs: one prompt, eight denoising steps</text>',
        f'<text class="text end" x="{LEFT - 14}" y="118">denoising step</text>',
        words(0, 136, "noise"), words(T, 136, "image"),
        f'<path class="grid" d="{"".join(f"M{x(n):.1f} {TOP}V{height - 12}" for n in range(T + 1))}"/>',
    ]  # fmt: skip
    for number, row in enumerate(ROWS):
        middle = TOP + ROW * number + 43
        lines = "".join(
            f'<text class="text" x="{RIGHT}" y="{-12 + 17 * i}">{text}</text>'
            for i, text in enumerate(row.text)
        )
        body += [
            f'<path class="rule" d="M16 {middle - 43}H{WIDTH - 16}"/>',
            f'<g transform="translate(0 {middle})"><text class="name" x="24" y="5">{row.name}</text>',
            *row.draw(collect(row)), lines, "</g>",
        ]  # fmt: skip
    about = " ".join(f"{row.name}: {' '.join(row.text)}" for row in ROWS)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title about" font-family="system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif">
  <title id="title">Which candidates judge which denoising steps, by algorithm</title>
  <desc id="about">{about}</desc>
  <style>{STYLE}    @media (prefers-color-scheme: dark) {{{DARK}    }}
  </style>
  <rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>
  {chr(10).join([*legend(), *body])}
</svg>
"""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.credit_picture docs/credit.svg")
    Path(sys.argv[1]).write_text(picture())
