"""The inspection shows the collected candidates, and the advantages of training."""

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowgrpo.algorithms import (
    G2RPO,
    TPGRPO,
    VGPO,
    Algorithm,
    BranchGRPO,
    FlowGRPO,
    TempFlowGRPO,
)
from flowgrpo.core.random import Random
from flowgrpo.core.steps import SlidingWindow, Window
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation.inspection import Frame, Strip, fragment, inspect, write_fragment
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from tests.conftest import MakePolicy, sampling_of

PROMPTS = [Prompt("a cat"), Prompt("two <dogs>")]
STEPS = Window(start=0, size=2)


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture
def scorer() -> Callable[[], RewardScorer]:
    return lambda: RewardScorer([Reward(model=f"{__name__}:brightness")])


@pytest.mark.parametrize(
    ("algorithm", "frames"),
    [
        (FlowGRPO(group_size=3, transition=CPS(), steps=STEPS), 1),
        (TPGRPO(group_size=3, transition=CPS(), steps=STEPS), 3),
        (VGPO(group_size=3, transition=CPS(), steps=STEPS), 3),
        (G2RPO(group_size=3, transition=CPS(), steps=STEPS, granularities=(1, 2)), 4),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_strips_hold_what_was_collected(
    algorithm: Algorithm, frames: int, make_policy: MakePolicy, scorer: Callable[[], RewardScorer]
) -> None:
    policy, reward_scorer = make_policy("sd3"), scorer()
    strips = inspect(policy, algorithm, reward_scorer, PROMPTS, samples=2)
    assert [s.prompt for s in strips] == ["a cat"] * 2 + ["two <dogs>"] * 2
    random = Random(0).at("train", 0)
    groups = [Group(i, p) for i, p in enumerate(PROMPTS)]
    experience = algorithm.collect(policy, groups, reward_scorer, random, 0)
    assert experience.media is None, "media is kept for inspections only"
    advantages, a = algorithm.advantages(experience), experience.actions
    for strip in strips:
        assert len(strip.frames) == frames
        for frame in strip.frames:
            assert frame.reward == pytest.approx(float(frame.media.mean()), abs=1e-6)
        group = [p.text for p in PROMPTS].index(strip.prompt)
        own = (a.group == group) & (a.sample == strip.sample)
        expected = dict(zip(a.step[own].tolist(), advantages[own].tolist(), strict=True))
        assert strip.advantages == pytest.approx(expected)
    best, worst = strips[0].frames[-1].reward, strips[1].frames[-1].reward
    assert best >= worst
    reward_scorer.close()


def test_a_leaf_shows_the_steps_of_all_branches_that_lead_to_it(
    make_policy: MakePolicy, scorer: Callable[[], RewardScorer]
) -> None:
    policy, reward_scorer = make_policy("sd3", sampling=sampling_of("sd3", num_steps=4)), scorer()
    algorithm = BranchGRPO(group_size=4, splits=(0, 2), transition=CPS())
    strips = inspect(policy, algorithm, reward_scorer, PROMPTS[:1], samples=4)
    reward_scorer.close()
    by_leaf = {s.sample: s.advantages for s in strips}
    assert {tuple(credit) for credit in by_leaf.values()} == {(0, 1, 2)}
    for early in (0, 1):
        assert by_leaf[0][early] == by_leaf[1][early] != by_leaf[2][early] == by_leaf[3][early]
    assert len({credit[2] for credit in by_leaf.values()}) == 4
    mean = sum(s.frames[0].reward for s in strips) / 4
    for strip in strips:
        assert strip.differences == {3: [pytest.approx(strip.frames[0].reward - mean, abs=1e-6)]}


def test_branches_are_compared_with_those_of_their_seed(
    make_policy: MakePolicy, scorer: Callable[[], RewardScorer]
) -> None:
    policy, reward_scorer = make_policy("sd3", sampling=sampling_of("sd3", num_steps=3)), scorer()
    algorithm = TempFlowGRPO(group_size=4, seeds=2, transition=CPS())
    strips = inspect(policy, algorithm, reward_scorer, PROMPTS[:1], samples=4)
    reward_scorer.close()
    reward = {(s.sample, f.step): f.reward for s in strips for f in s.frames}
    for strip in strips:
        other = strip.sample ^ 1
        for step, (gap,) in strip.differences.items():
            half = (reward[strip.sample, step] - reward[other, step]) / 2
            assert gap == pytest.approx(half, abs=1e-6)
    page = fragment(strips)
    assert "vs. others" in page
    assert "a separate branch" in page
    assert "<svg" not in page, "no line joins images that do not follow from each other"


def test_a_shared_baseline_is_on_every_strip(
    make_policy: MakePolicy, scorer: Callable[[], RewardScorer]
) -> None:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=4))
    # In the inspection rewards have their full weight, whatever the iteration.
    rising = Reward(model=f"{__name__}:brightness", schedule=((5.0, 0.0), (9.0, 1.0)))
    reward_scorer = RewardScorer([rising])
    reward_scorer.iteration = 5
    algorithm = TPGRPO(group_size=3, steps=STEPS, shared_noise=True, turning_points="plain")
    strips = inspect(policy, algorithm, reward_scorer, PROMPTS[:1])
    reward_scorer.close()
    assert reward_scorer.iteration == 5
    for frame in strips[0].frames:
        assert frame.reward == pytest.approx(float(frame.media.mean()), abs=1e-6)
    assert len(strips) == 3
    assert len({s.frames[0].reward for s in strips}) == 1
    for strip in strips:
        # The image is what the last stochastic step made; no column is without a picture.
        assert [f.step for f in strip.frames] == [-1, 0, 1]
        assert list(strip.differences) == [0, 1] == list(strip.advantages)


def test_the_page_escapes_prompts_and_shows_credit(
    make_policy: MakePolicy, scorer: Callable[[], RewardScorer], tmp_path: Path
) -> None:
    algorithm = TPGRPO(group_size=3, transition=CPS(), steps=STEPS, turning_points="plain")
    reward_scorer = scorer()
    strips = inspect(make_policy("sd3"), algorithm, reward_scorer, PROMPTS)
    reward_scorer.close()
    page = fragment(strips)
    assert "two &lt;dogs&gt;" in page
    assert page.count("<h4>sample") == 6
    assert page.count('src="data:image/png;base64,') == 6 * 3
    assert page.count("◆") == any(s.turning for s in strips) + sum(
        len(set(s.turning) & set(s.advantages)) for s in strips
    )
    assert any(s.turning for s in strips)
    assert write_fragment(strips, tmp_path).read_text() == page


def test_nothing_to_inspect(make_policy: MakePolicy, scorer: Callable[[], RewardScorer]) -> None:
    reward_scorer = scorer()
    with pytest.raises(ValueError, match="at least one prompt"):
        inspect(make_policy("sd3"), FlowGRPO(group_size=2, transition=CPS()), reward_scorer, [])
    assert not reward_scorer.keeps_media
    assert torch.is_grad_enabled()
    reward_scorer.close()


def strip_of(frames: Sequence[Frame], sample: int = 0, prompt: str = "a cat", **changes: object) -> Strip:  # fmt: skip
    settings: dict[str, object] = {
        "advantages": {0: 1.0, 1: -0.5, 2: 0.0}, "turning": [1], "differences": {0: [0.25], 1: [-0.5, 0.0]},
        "is_path": True, "are_branches": False,
    } | changes  # fmt: skip
    return Strip(prompt=prompt, sample=sample, frames=frames, **settings)  # type: ignore[arg-type]


def rows_of(page: str) -> list[list[str]]:
    """The cells of all tables, row by row, without pictures."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", re.sub(r"<img[^>]*>", "@", r)) for r in rows]


def test_a_strip_is_a_table_of_steps() -> None:
    image = torch.zeros(3, 200, 100)
    frames = [Frame(-1, 1, 0.5, image), Frame(0, 1, 0.75, image), Frame(1, 1, 0.25, image), Frame(1, 2, 0.125, image)]  # fmt: skip
    page = fragment([strip_of(frames), strip_of(frames[:1], 3, turning=[], advantages={})])
    first, second = rows_of(page)[:5], rows_of(page)[5:]
    assert first == [
        ["", "noise", "step 0", "step 1", "step 2"],
        ["candidate", "@", "@", "@@", ""],
        ["reward", "0.5", "0.75", "0.25<br>0.125", "·"],
        ["change", "", "+0.25", "−0.5<br>0", ""],
        ["advantage", "", "+1", "−0.5 ◆", "0"],
    ]
    assert [r[:2] for r in second] == [["", "noise"], ["candidate", "@"], ["reward", "0.5"], ["change", ""], ["advantage", ""]]  # fmt: skip
    # The darkest shade is that of the largest advantage.
    shades = re.findall(r'<td style="([^"]*)">', page)
    assert shades == ["background: rgba(46, 160, 67, 0.60)", "background: rgba(218, 54, 51, 0.30)", ""]  # fmt: skip
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["sample 0", "sample 3"]
    # Only a trajectory with several steps has a curve; its number is its colour.
    assert re.findall(r'<i class="s(\d)"></i>(sample \d)', page) == [("0", "sample 0")]
    assert "sample 0, step −1: 0.5" in page
    assert page.count("Reward after each step") == 1
    # A prompt whose strips are apart has one card; cards are in the order of the prompts.
    mixed = [strip_of(frames, 0, "b"), strip_of(frames, 0, "a"), strip_of(frames, 1, "b")]
    assert re.findall(r"<h3>(.*?)</h3>", fragment(mixed)) == ["b", "a"]
    assert re.findall(r"<h4>(.*?)</h4>", fragment(mixed)) == ["sample 0", "sample 1", "sample 0"]


@pytest.mark.parametrize(
    ("granularities", "changes", "says", "says_not"),
    [
        ((1,), {}, ["is the completion", "<b>change</b>", "◆ marks"], ["vs. others", "below each other", "prediction"]),
        ((1,), {"turning": []}, ["is the completion"], ["◆ marks"]),
        ((0,), {}, ["model's prediction from the state", "<b>change</b>"], ["is the completion"]),
        ((1, 2), {"is_path": False}, ["is the final one", "<b>vs. others</b>", "below each other"], ["<b>change</b>", "Reward after"]),
        ((1,), {"are_branches": True, "is_path": False}, ["a separate branch", "<b>vs. others</b>"], ["is the final one"]),
    ],
)  # fmt: skip
def test_the_notes_say_what_is_shown(granularities: Sequence[int], changes: dict[str, object], says: list[str], says_not: list[str]) -> None:  # fmt: skip
    frames = [Frame(step, g, 0.5, torch.zeros(3, 4, 4)) for step in (0, 1) for g in granularities]
    page = fragment([strip_of(frames, **changes)])
    assert [text for text in says if text not in page] == []
    assert [text for text in says_not if text in page] == []


def test_pictures_are_small_and_videos_show_their_middle() -> None:
    colors = torch.tensor([0.0, 0.25, 0.5, 2.0]).view(4, 1, 1, 1).expand(4, 3, 96, 192)
    frames = [Frame(0, 2, 0.5, colors[3]), Frame(1, 0, 0.5, colors), Frame(2, 1, 0.5, colors[:3])]
    page = fragment([strip_of(frames)])
    pictures = re.findall(r'<img alt="([^"]*)" title="([^"]*)" src="data:image/png;base64,([^"]*)"', page)  # fmt: skip
    assert [p[0] for p in pictures] == [p[1] for p in pictures]
    assert [p[0] for p in pictures] == ["completion in steps of 2", "projection", "completion in steps of 1"]  # fmt: skip
    opened = [Image.open(io.BytesIO(base64.b64decode(p[2]))) for p in pictures]
    assert [o.size for o in opened] == [(96, 48)] * 3
    assert [o.getpixel((5, 5))[0] for o in opened] == [255, 128, 64]


def numbered(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Each image of a group is better than the one before; the third cannot be scored."""
    scores = torch.arange(float(len(prompts)))
    scores[2] = float("nan")
    return scores


def test_samples_are_shown_from_the_best_to_the_worst_at_equal_distances(make_policy: MakePolicy) -> None:  # fmt: skip
    policy = make_policy("sd3")
    reward_scorer = RewardScorer([Reward(model=f"{__name__}:numbered")], Failures(retries=0, max_rate=1.0))  # fmt: skip
    # Of the first iteration.
    steps = SlidingWindow(size=1, every=1, skip_last=1)
    algorithm = FlowGRPO(group_size=5, transition=CPS(), steps=steps)
    shown = {}
    for number in (1, 3, 9):
        strips = inspect(policy, algorithm, reward_scorer, PROMPTS[:1], samples=number)
        shown[number] = [s.sample for s in strips]
    # By reward: 4, 3, 1, 0, and at last the one without.
    assert shown == {1: [4], 3: [4, 1, 2], 9: [4, 3, 1, 0, 2]}
    assert [list(s.advantages) for s in strips] == [[0]] * 5
    with pytest.raises(ValueError, match="at least one prompt and one sample"):
        inspect(policy, algorithm, reward_scorer, PROMPTS, samples=0)
    reward_scorer.close()
