"""What an algorithm rewards: trajectories with their candidates, rewards and credit, step by step.

For each trajectory a film strip: the candidates that judge it after each step (completions,
projections, or the image alone), their rewards, how much each step changed them or how they compare
with their rivals, and the advantage that the step's action is trained with.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flowgrpo.algorithms import G2RPO, TPGRPO, VGPO, Algorithm, BranchGRPO, TempFlowGRPO
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation.charts import Line, legend, line_chart, number
from flowgrpo.evaluation.curves import section
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer

FILE = "inspection.html"
"""Name of the fragment in a run directory that the report takes in."""
THUMBNAIL = 96
"""Pixels of the longer side of a picture on a strip."""


@dataclass(frozen=True)
class Frame:
    """One candidate on a strip.

    Attributes:
        step: The last step that made it what it is; -1 for the initial noise.
        granularity: Grid intervals per step of its completion; 0 for a projection.
        reward: NaN if its reward failed.
        media: An image ``(C, H, W)`` or a video ``(F, C, H, W)`` in [0, 1].
    """

    step: int
    granularity: int
    reward: float
    media: Float[Tensor, "*frames channels height width"]


@dataclass(frozen=True)
class Strip:
    """One trajectory.

    Attributes:
        prompt: What was asked for.
        sample: Its index in the group.
        frames: Its candidates, by step.
        advantages: Of its trained actions, by step.
        turning: The steps that are turning points, where the algorithm knows any.
        differences: Of each frame of a step: if ``is_path``, from the frame before; else from the mean
            of its rivals.
        is_path: Whether the frames are states of one trajectory, and so follow from each other.
        are_branches: Whether each step's frames are of a branch of its own from a shared path.
    """

    prompt: str
    sample: int
    frames: Sequence[Frame]
    advantages: dict[int, float]
    turning: Sequence[int]
    differences: dict[int, list[float]]
    is_path: bool
    are_branches: bool


def inspect(
    policy: PipelinePolicy,
    algorithm: Algorithm,
    scorer: RewardScorer,
    prompts: Sequence[Prompt],
    samples: int = 3,
    seed: int = 0,
) -> list[Strip]:
    """Collect one iteration on a few prompts, and take out some trajectories of each.

    Args:
        policy: With the weights to look at.
        algorithm: Collects and credits as in training.
        judge: Scores the candidates.
        prompts: One group each.
        samples: Trajectories of each group to show: the best, the worst, and others between.
        seed: For the noise.

    Raises:
        ValueError: If there are no prompts.
    """
    if not prompts or samples < 1:
        raise ValueError("there is nothing to inspect: give at least one prompt and one sample")
    groups = [Group(i, p) for i, p in enumerate(prompts)]
    scorer.keeps_media, before = True, scorer.iteration
    scorer.iteration = None
    try:
        experience = algorithm.collect(policy, groups, scorer, Random(seed).at("train", 0))
    finally:
        scorer.keeps_media, scorer.iteration = False, before
    advantages = algorithm.advantages(experience)
    turning = _turning(algorithm, experience)
    return [
        _strip(algorithm, experience, advantages, turning, group, sample)
        for group in groups
        for sample in _chosen(experience, group.index, samples)
    ]


def _chosen(experience: Experience, group: int, number: int) -> list[int]:
    """Samples of a group from the best to the worst by their last candidate's reward."""
    c = experience.candidates
    mine = c.group == group
    last = {
        int(s): float(c.reward[mine & (c.sample == s)][-1].nan_to_num(-1e9))
        for s in c.sample[mine].unique()
    }
    ranked = sorted(last, key=lambda s: -last[s])
    places = torch.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().int().unique()
    return [ranked[int(i)] for i in places]


def _strip(
    algorithm: Algorithm,
    experience: Experience,
    advantages: Float[Tensor, " actions"],
    turning: dict[tuple[int, int], list[int]],
    group: Group,
    sample: int,
) -> Strip:
    c, a = experience.candidates, experience.actions
    assert experience.media is not None
    own = c.sample == sample
    if isinstance(algorithm, TPGRPO) and algorithm.shared_noise:
        # The group's one baseline was completed for its first sample.
        own |= (c.sample == 0) & (c.step == c.step.min())
    rows = ((c.group == group.index) & own).nonzero().squeeze(1)
    order = sorted(rows.tolist(), key=lambda i: (int(c.step[i]), int(c.granularity[i])))
    shown = _shown_after(algorithm, experience)
    frames = [
        Frame(shown[int(c.step[i])], int(c.granularity[i]), float(c.reward[i]), experience.media[i])
        for i in order
    ]
    credit = {
        int(step): float(advantage)
        for g, s, step, advantage in zip(a.group, a.sample, a.step, advantages, strict=True)
        if g == group.index and s == _actor(algorithm, sample, int(step))
    }
    is_path = isinstance(algorithm, TPGRPO | VGPO)
    return Strip(
        group.prompt.text,
        sample,
        frames,
        dict(sorted(credit.items())),
        turning.get((group.index, sample), []),
        _changes(frames) if is_path else _against_rivals(algorithm, experience, order),
        is_path,
        isinstance(algorithm, G2RPO | TempFlowGRPO),
    )


def _shown_after(algorithm: Algorithm, experience: Experience) -> dict[int, int]:
    """For the step of each candidate the one that made it what it is.

    What follows the ODE leads to the same image: a completion belongs to the last stochastic step
    before it, and an image without a projection before it to the step where that would be.
    """
    steps = sorted(set(experience.candidates.step.tolist()))
    trained = sorted(set(experience.actions.step.tolist()))
    if isinstance(algorithm, TPGRPO):
        return {s: max((t for t in trained if t <= s), default=-1) for s in steps}
    last = steps[-1]
    if isinstance(algorithm, VGPO) and last - 1 not in steps:
        return {s: s - (s == last) for s in steps}
    return {s: s for s in steps}


def _actor(algorithm: Algorithm, sample: int, step: int) -> int:
    """Under whose number a step of a sample was noted: in a tree, its branch's first leaf."""
    return algorithm.branch_of(sample, step) if isinstance(algorithm, BranchGRPO) else sample


def _changes(frames: Sequence[Frame]) -> dict[int, list[float]]:
    """By how much each step changed the reward of what its state leads to."""
    return {b.step: [b.reward - a.reward] for a, b in pairwise(frames)}


def _against_rivals(
    algorithm: Algorithm, experience: Experience, rows: Sequence[int]
) -> dict[int, list[float]]:
    """How far each candidate's reward is from the mean of those that it is compared with."""
    c, found = experience.candidates, dict[int, list[float]]()
    share = algorithm.group_size
    if isinstance(algorithm, TempFlowGRPO):
        share //= algorithm.seeds
    for i in rows:
        same = (c.group == c.group[i]) & (c.step == c.step[i]) & (c.granularity == c.granularity[i])
        same &= c.sample // share == c.sample[i] // share
        rivals = c.reward[same]
        gap = c.reward[i] - rivals[rivals.isfinite()].mean()
        found.setdefault(int(c.step[i]), []).append(float(gap))
    return found


def _turning(algorithm: Algorithm, experience: Experience) -> dict[tuple[int, int], list[int]]:
    """The turning points of each trajectory; none for algorithms without such a notion."""
    if not isinstance(algorithm, TPGRPO):
        return {}
    table = algorithm.turns(experience)
    return {
        (int(g), int(s)): [table.steps[int(j)] for j in row.nonzero().flatten()]
        for g, s, row in zip(table.group, table.sample, table.values, strict=True)
    }


def fragment(strips: Sequence[Strip]) -> str:
    """The strips as a section of a page, by prompt."""
    prompts = list(dict.fromkeys(s.prompt for s in strips))
    parts = [_group(p, [s for s in strips if s.prompt == p]) for p in prompts]
    return section("Credit", " ".join(_notes(strips)), "".join(parts))


def _notes(strips: Sequence[Strip]) -> list[str]:
    """How to read the strips; only what they have."""
    first = strips[0]
    if first.are_branches:
        shown = (
            "Each column is a branch of its own: the path that the group shares, one stochastic step, "
            "and the image that this step leads to without further noise."
        )
    elif any(f.granularity == 0 for f in first.frames):
        shown = "A picture is the image that the model predicts from the state after a step."
    elif first.is_path:
        shown = "A picture is what the state after a step leads to without further noise."
    else:
        shown = "The picture is the image at the end, which judges all steps."
    notes = [
        "Samples of one iteration, each prompt's best first.",
        shown,
        "<b>change</b> is what a step made of the reward."
        if first.is_path
        else "<b>vs. others</b> is the distance from the mean of those that a sample is compared with.",
        "Green steps are made more likely, red ones less; the darker, the more.",
    ]
    if any(f.granularity > 1 for s in strips for f in s.frames):
        notes.append("Pictures below each other were completed in strides of 1, 2, … intervals.")
    if any(s.turning for s in strips):
        notes.append("◆ marks a turning point, which gets all that follows from it.")
    return notes


def _group(prompt: str, strips: Sequence[Strip]) -> str:
    curves = [
        Line(
            f"sample {s.sample}", [(f.step, f.reward) for f in s.frames], i, dots=True, axis="step"
        )
        for i, s in enumerate(strips)
        if s.is_path and len({f.step for f in s.frames}) > 1
    ]
    chart = ""
    if curves:
        names = legend([(line.name, line.color) for line in curves])
        chart = (
            f'<div class="chart"><p class="note">Reward after each step</p>{names}'
            f"{line_chart(curves)}</div>"
        )
    tables = "".join(_table(s) for s in strips)
    return f'<div class="card"><h3>{escape(prompt)}</h3>{chart}{tables}</div>'


def _table(strip: Strip) -> str:
    """One trajectory: a column per step, rows for pictures, rewards, changes and advantages."""
    steps = sorted({f.step for f in strip.frames} | set(strip.advantages))
    by_step = {s: [f for f in strip.frames if f.step == s] for s in steps}
    heads = "".join(f"<th>{'noise' if s < 0 else f'step {s}'}</th>" for s in steps)
    pictures = "".join(f"<td>{''.join(map(_picture, by_step[s]))}</td>" for s in steps)
    rewards = "".join(
        f"<td>{'<br>'.join(number(f.reward) for f in by_step[s]) or '·'}</td>" for s in steps
    )
    most = max((abs(v) for v in strip.advantages.values()), default=0.0) or 1.0
    credit = "".join(
        _credit(strip.advantages[s], most, s in strip.turning)
        if s in strip.advantages
        else "<td></td>"
        for s in steps
    )
    rows = [
        f"<tr><th></th>{heads}</tr>",
        f"<tr><td>candidate</td>{pictures}</tr>",
        f"<tr><td>reward</td>{rewards}</tr>",
        f"<tr><td>{'change' if strip.is_path else 'vs. others'}</td>{_differences(strip, steps)}</tr>",
        f"<tr><td>advantage</td>{credit}</tr>",
    ]
    return (
        f"<h4>sample {strip.sample}</h4>"
        f'<div class="scroll"><table class="strip">{"".join(rows)}</table></div>'
    )


def _differences(strip: Strip, steps: Sequence[int]) -> str:
    found = strip.differences
    return "".join(f"<td>{'<br>'.join(map(_signed, found.get(s, [])))}</td>" for s in steps)


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _credit(value: float, most: float, turning: bool) -> str:
    color = "46, 160, 67" if value > 0 else "218, 54, 51"
    shade = f"background: rgba({color}, {0.6 * abs(value) / most:.2f})" if value else ""
    return f'<td style="{shade}">{_signed(value)}{" ◆" if turning else ""}</td>'


def _picture(frame: Frame) -> str:
    """A thumbnail, of a video's middle frame, with its granularity on hovering."""
    image = frame.media[len(frame.media) // 2] if frame.media.ndim == 4 else frame.media
    picture = to_pil_image(image.float().clamp(0, 1))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    source = base64.b64encode(stream.getvalue()).decode()
    title = (
        "projected" if frame.granularity == 0 else f"completed in strides of {frame.granularity}"
    )
    return f'<img alt="{title}" title="{title}" src="data:image/png;base64,{source}">'


def keep(strips: Sequence[Strip], folder: Path) -> Path:
    """Write the fragment into a run directory, where the report finds it."""
    path = folder / FILE
    path.write_text(fragment(strips), "utf-8")
    return path
