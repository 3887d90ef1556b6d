"""Inspection of an algorithm's credit: trajectories with candidates, rewards and advantages by step.

Each trajectory is shown as a film strip: the candidates that judge it after each step (completions,
projections, or the image alone), their rewards, the change of the reward by each step or the distance
to the candidates that they are compared with, and the advantage of each action. How candidates are
arranged is declared by the algorithm (:class:`flowgrpo.algorithms.base.CreditView`).
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

from flowgrpo.algorithms.base import Algorithm, CreditView
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation.charts import Line, legend, line_chart, number
from flowgrpo.evaluation.curves import section
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer

FILE = "inspection.html"
"""Name of the fragment in a run directory that the report includes."""
THUMBNAIL = 96
"""Pixels of the longer side of a picture on a strip."""


@dataclass(frozen=True)
class Frame:
    """One candidate on a strip.

    Attributes:
        step: The step under which it is shown; -1 for the initial noise.
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
        prompt: The caption.
        sample: Its index in the group.
        frames: Its candidates, by step.
        advantages: The advantages of its trained actions, by step.
        turning: The steps that are turning points, for algorithms that have them.
        differences: For each frame of a step, the difference of its reward: to the frame before if
            ``is_path``, else to the mean of the candidates that it is compared with.
        is_path: Whether the frames are states of one trajectory.
        are_branches: Whether the frames of each step belong to a branch of its own from a shared
            path.
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
    """Collect one iteration on a few prompts, and return some trajectories of each.

    Args:
        policy: With the weights to inspect.
        algorithm: Collects and computes advantages as in training.
        scorer: Scores the candidates.
        prompts: One group each.
        samples: Trajectories of each group to show: the best, the worst, and others between.
        seed: Seed of the noise.

    Raises:
        ValueError: If there are no prompts.
    """
    if not prompts or samples < 1:
        raise ValueError("there is nothing to inspect: give at least one prompt and one sample")
    groups = [Group(i, p) for i, p in enumerate(prompts)]
    scorer.keeps_media, before = True, scorer.iteration
    scorer.iteration = None
    try:
        random = Random(seed).at("train", 0)
        experience = algorithm.collect(policy, groups, scorer, random, 0)
    finally:
        scorer.keeps_media, scorer.iteration = False, before
    advantages, view = algorithm.advantages(experience), algorithm.credit_view(experience)
    return [
        _strip(view, experience, advantages, group, sample)
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
    view: CreditView,
    experience: Experience,
    advantages: Float[Tensor, " actions"],
    group: Group,
    sample: int,
) -> Strip:
    c, a = experience.candidates, experience.actions
    assert experience.media is not None
    own = c.sample == sample
    if view.shares_baseline:
        own |= (c.sample == 0) & (c.step == c.step.min())
    rows = ((c.group == group.index) & own).nonzero().squeeze(1)
    order = sorted(rows.tolist(), key=lambda i: (int(c.step[i]), int(c.granularity[i])))
    frames = [
        Frame(
            view.column.get(int(c.step[i]), int(c.step[i])),
            int(c.granularity[i]),
            float(c.reward[i]),
            experience.media[i],
        )
        for i in order
    ]
    credit = {
        int(step): float(advantage)
        for g, s, step, advantage in zip(a.group, a.sample, a.step, advantages, strict=True)
        if g == group.index and s == view.action_sample(sample, int(step))
    }
    is_path = view.candidates == "states"
    return Strip(
        group.prompt.text,
        sample,
        frames,
        dict(sorted(credit.items())),
        view.turning_points.get((group.index, sample), []),
        _changes(frames) if is_path else _against_rivals(view.rivals, experience, order),
        is_path,
        view.candidates == "branches",
    )


def _changes(frames: Sequence[Frame]) -> dict[int, list[float]]:
    """The change of the reward from each frame to the next."""
    return {b.step: [b.reward - a.reward] for a, b in pairwise(frames)}


def _against_rivals(
    rivals: int, experience: Experience, rows: Sequence[int]
) -> dict[int, list[float]]:
    """The distance of each candidate's reward to the mean of those that it is compared with."""
    c, found = experience.candidates, dict[int, list[float]]()
    for i in rows:
        same = (c.group == c.group[i]) & (c.step == c.step[i]) & (c.granularity == c.granularity[i])
        same &= c.sample // rivals == c.sample[i] // rivals
        gap = c.reward[i] - c.reward[same & c.valid].mean()
        found.setdefault(int(c.step[i]), []).append(float(gap))
    return found


def fragment(strips: Sequence[Strip]) -> str:
    """The strips as a section of a page, by prompt."""
    prompts = list(dict.fromkeys(s.prompt for s in strips))
    parts = [_group(p, [s for s in strips if s.prompt == p]) for p in prompts]
    return section("Credit", " ".join(_notes(strips)), "".join(parts))


def _notes(strips: Sequence[Strip]) -> list[str]:
    """How to read the strips; only notes that apply to them."""
    first = strips[0]
    if first.are_branches:
        shown = (
            "Each column is a branch of its own: the path that the group shares, one stochastic step, "
            "and the image that this step leads to without further noise."
        )
    elif any(f.granularity == 0 for f in first.frames):
        shown = "A picture is the image that the model predicts from the state after a step."
    elif first.is_path:
        shown = "A picture is the image that the state after a step leads to without further noise."
    else:
        shown = "The picture is the image at the end, which judges all steps."
    notes = [
        "Samples of one iteration, each prompt's best first.",
        shown,
        "<b>change</b> is the change of the reward by a step."
        if first.is_path
        else "<b>vs. others</b> is the distance to the mean of the samples that it is compared with.",
        "Green steps are made more likely, red ones less; the darker, the more.",
    ]
    if any(f.granularity > 1 for s in strips for f in s.frames):
        notes.append("Pictures below each other were completed in strides of 1, 2, … intervals.")
    if any(s.turning for s in strips):
        notes.append("◆ marks a turning point, whose credit includes the steps after it.")
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
    """One trajectory: a column per step, and rows for pictures, rewards, changes and advantages."""
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
    """A thumbnail (of a video's middle frame), with its granularity as tooltip."""
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
    """Write the fragment into a run directory, for the report."""
    path = folder / FILE
    path.write_text(fragment(strips), "utf-8")
    return path
