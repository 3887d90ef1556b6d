"""Inspection of credit: trajectories with their candidates, rewards and advantages by denoising step.

Each trajectory is shown as a strip with one column per step: the candidates that are scored after the
step (completions, projections, or only the final image), their rewards, the difference to the previous
step or to the candidates they are compared with, and the advantage of the step's action. The algorithm
declares how its candidates are arranged (:class:`flowgrpo.algorithms.base.CreditView`).
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

from flowgrpo.algorithms.base import Algorithm, CreditView
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience
from flowgrpo.data.files import write_whole
from flowgrpo.data.pictures import picture_of
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation.charts import Line, legend, line_chart, number
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.records import CREDIT_FILE
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer

THUMBNAIL = 96
"""Longer side of an image on a strip, in pixels."""


@dataclass(frozen=True)
class Frame:
    """One candidate on a strip.

    Attributes:
        step: The step under which it is shown, the last stochastic step that it depends on; -1 for the
            initial noise.
        granularity: Grid intervals per step of its completion; 0 for a one-step projection.
        reward: Its reward; NaN if it could not be scored.
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
        prompt: Text of the prompt.
        sample: Index of the trajectory in its group.
        frames: Its candidates in order of step.
        advantages: Advantages of its trained actions, by step.
        turning: Steps that are turning points; empty for algorithms without turning points.
        differences: Reward differences by step: if ``is_path``, to the previous frame; else to the
            mean of the candidates that the frame is compared with.
        is_path: Whether the frames come from successive states of one trajectory.
        are_branches: Whether each frame ends a separate branch from a path that the group shares.
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
    """Collect one iteration on a few prompts, and describe some trajectories of each.

    Args:
        policy: The policy, with the weights to inspect.
        algorithm: Collects the experience and computes advantages, as in training.
        scorer: Scores the candidates.
        prompts: Prompts, each of which gets one group.
        samples: Trajectories to show per group, from the best to the worst at equal distances of rank.
        seed: Seed of the noise.

    Raises:
        ValueError: If there are no prompts, or ``samples`` is below 1.
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
    if advantages.ndim == 2:  # one for each reward
        advantages = advantages.sum(1)
    return [
        _strip(view, experience, advantages, group, sample)
        for group in groups
        for sample in _chosen(experience, group.index, samples)
    ]


def _chosen(experience: Experience, group: int, number: int) -> list[int]:
    """Choose samples of a group, from the best to the worst by the reward of their last candidate."""
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
    """Difference between the reward of each frame and that of the frame before, by step."""
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
    """The strips as an HTML section, grouped by prompt."""
    prompts = list(dict.fromkeys(s.prompt for s in strips))
    parts = [_group(p, [s for s in strips if s.prompt == p]) for p in prompts]
    return section("Credit", " ".join(_notes(strips)), "".join(parts))


def _notes(strips: Sequence[Strip]) -> list[str]:
    """Sentences that explain the strips, as HTML."""
    first = strips[0]
    if first.are_branches:
        shown = (
            "Each column is a separate branch: the path that the group shares, one stochastic step, "
            "and the image that follows without further noise."
        )
    elif any(f.granularity == 0 for f in first.frames):
        shown = "Each image is the model's prediction from the state after a step."
    elif first.is_path:
        shown = "Each image is the completion, without further noise, of the state after a step."
    else:
        shown = "The image is the final one, whose reward is the credit of all steps."
    notes = [
        "Samples of one iteration, the best of each prompt first.",
        shown,
        "<b>change</b> is the difference that a step makes to the reward."
        if first.is_path
        else "<b>vs. others</b> is the difference to the mean reward of the compared samples.",
        "Training makes green steps more likely and red steps less likely; darker means more.",
    ]
    if any(f.granularity > 1 for s in strips for f in s.frames):
        notes.append("Images below each other are completions in steps of 1, 2, … intervals.")
    if any(s.turning for s in strips):
        notes.append("◆ marks a turning point, which is credited with all later changes.")
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
    """One trajectory as a table: a column per step, rows for images, rewards and advantages."""
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
    """A thumbnail of the image, or of a video's middle frame, with the granularity on hovering."""
    image = frame.media[len(frame.media) // 2] if frame.media.ndim == 4 else frame.media
    picture = picture_of(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    source = base64.b64encode(stream.getvalue()).decode()
    title = (
        "projection" if frame.granularity == 0 else f"completion in steps of {frame.granularity}"
    )
    return f'<img alt="{title}" title="{title}" src="data:image/png;base64,{source}">'


def write_fragment(strips: Sequence[Strip], folder: Path) -> Path:
    """Write the strips into a run directory as an HTML fragment, which the report includes."""
    path = folder / CREDIT_FILE
    write_whole(path, fragment(strips))
    return path
