"""Guards against reward hacking: GARDO's measures against its numbers, and in the learner."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import FlowGRPO
from flowgrpo.algorithms.guard import (
    Guard,
    Suspicion,
    adapted,
    kl_weights,
    novelty_factors,
    of_actions,
)
from flowgrpo.config import ConfigError, Train
from flowgrpo.core.guards import (
    gated,
    nearest_distance,
    relative_to_group,
    share_beaten,
    thumbnail,
    uncertainty,
)
from flowgrpo.core.random import Random
from flowgrpo.core.scores import Scores
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.transitions import FlowSDE
from flowgrpo.data.experience import Candidates, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.features import Features
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.guard import Guarding
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

R = torch.tensor([0.9, 0.5, 0.7, 0.1]).double()
AESTHETIC, IMAGE_REWARD = torch.tensor([5.0, 6.2, 5.5, 5.9]), torch.tensor([0.1, 0.9, 0.8, 0.4])
FEATURES = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]]).double()
ONE = torch.zeros(4, dtype=torch.long)


def test_uncertainty_has_the_sign_of_its_equation() -> None:
    """The sample that the trained reward ranks first and the measured ones last is the one to hold back."""
    found = uncertainty(R, [AESTHETIC, IMAGE_REWARD])
    assert found.tolist() == [0.75, -0.5, 0.125, -0.375]
    assert gated(found, 0.1).tolist() == [True, False, False, False]
    assert gated(found, 1.0).tolist() == [True, False, True, False]


def test_equal_rewards_win_by_half_and_failures_are_out() -> None:
    nan = float("nan")
    assert share_beaten(torch.tensor([1.0, 0.0, 1.0, 1.0])).tolist() == [0.5, 0.0, 0.5, 0.5]
    found = uncertainty(torch.tensor([0.9, 0.5, nan, 0.1]), [torch.tensor([1.0, nan, 3.0, 2.0])])
    assert found[[0, 3]].tolist() == [0.5, -0.5]
    assert found[[1, 2]].isnan().all()
    assert gated(found, 0.1).tolist() == [True, False, False, False]
    # Rewards that agree leave nothing to gate.
    assert not gated(uncertainty(R, [R]), 1.0).any()
    assert not gated(torch.tensor([-0.1, nan]), 1.0).any()


def test_novelty_equals_the_vectors() -> None:
    distance = nearest_distance(FEATURES * torch.tensor([[1.0], [3.0], [0.1], [2.0]]), ONE)
    assert distance.tolist() == pytest.approx([0.2, 0.04, 0.2, 0.04])
    factor = relative_to_group(distance, ONE)
    assert factor.tolist() == pytest.approx([1 / 0.6, 1 / 3, 1 / 0.6, 1 / 3])
    two = nearest_distance(FEATURES, torch.tensor([0, 0, 0, 1]))
    assert two[:3].tolist() == pytest.approx([0.2, 0.2, 0.4])
    assert two[3].isnan()
    assert relative_to_group(torch.zeros(4), ONE).isnan().all()


def test_rows_without_features_and_groups_without_distances_are_left_out() -> None:
    nan = float("nan")
    features = torch.tensor([[1.0, 0.0], [nan, 0.0], [0.0, 2.0], [3.0, 0.0], [-1.0, 0.0]]).double()
    distance = nearest_distance(features, torch.tensor([1, 1, 1, 0, 0]))
    assert distance.nan_to_num(-1).tolist() == pytest.approx([1.0, -1, 1.0, 2.0, 2.0])
    values = torch.tensor([1.0, nan, 3.0, -1.0, 0.5, nan])
    factor = relative_to_group(values, torch.tensor([1, 1, 1, 0, 0, 2]))
    assert factor.nan_to_num(-1).tolist() == [0.5, -1, 1.5, -1, -1, -1]
    # From the quantile on: the highest two of five, the quantile itself included.
    uncertain = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0, -0.5, nan])
    assert gated(uncertain, 0.25).tolist() == [False, False, True, True, False, False, False]


def test_a_thumbnail_is_64_averages_of_an_image_or_of_a_videos_middle_frame() -> None:
    blocks = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = blocks.repeat_interleave(4, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(thumbnail(image), blocks.flatten(1))
    for frames, middle in ((1, 0), (2, 1), (4, 2), (5, 2)):
        video = torch.zeros(2, frames, 3, 32, 16)
        video[:, middle] = image
        torch.testing.assert_close(thumbnail(video), blocks.flatten(1))


def test_the_share_follows_the_uncertainty() -> None:
    assert adapted(0.1, 0.3, []) == 0.1
    assert adapted(0.1, 0.3, [0.1, 0.2]) == pytest.approx(0.11)
    assert adapted(0.1, 0.05, [0.1, 0.2]) == pytest.approx(0.09)
    assert adapted(0.1, 0.15, [0.1, 0.2]) == 0.1
    assert (adapted(0.19, 9.0, [1.0]), adapted(0.021, 0.0, [1.0])) == (0.2, 0.02)


# In the learner, with what a policy collected.

GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(["a cube", "a red cat"])]
ALGORITHM = FlowGRPO(group_size=4, transition=FlowSDE(), advantage=GroupAdvantage(std="none"))
Collected = tuple[PipelinePolicy, Experience]


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture(scope="module")
def collected(make_policy: MakePolicy) -> Collected:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=3), with_reference=True)
    scorer = RewardScorer([Reward(model=f"{__name__}:brightness")])
    scorer.features, scorer.iteration = Features(), 0
    experience = ALGORITHM.collect(policy, GROUPS, scorer, Random(3), 0)
    scorer.iteration = None
    assert scorer.score(torch.rand(1, 3, 8, 8), [Prompt("x")]).features is None  # an evaluation
    scorer.close()
    return policy, experience


@pytest.fixture
def experience(collected: Collected) -> Experience:
    """With the rewards and features of the vectors in both groups."""
    _, experience = collected
    c = experience.candidates
    raw = {"trained": R.repeat(2), "a": AESTHETIC.double().repeat(2), "b": IMAGE_REWARD.double().repeat(2)}  # fmt: skip
    scores = Scores(raw, raw["trained"], {"trained": 1.0}, features=FEATURES.repeat(2, 1))
    return replace(experience, candidates=replace(c, scores=scores))


@pytest.mark.parametrize(
    ("novelty", "wanted"),
    [("relative", [0.58333333, -0.05, 0.25, -0.45]), ("distance", [0.07, -0.05, 0.03, -0.45])],
)
def test_advantages_equal_the_vectors(novelty: Any, wanted: list[float], experience: Experience) -> None:  # fmt: skip
    advantages = ALGORITHM.advantages(experience)
    _, found, metrics = Guarding(Guard(novelty=novelty)).applied(experience, advantages)
    a = experience.actions
    assert found.tolist() == pytest.approx([wanted[int(s)] for s in a.sample], rel=1e-5)
    assert metrics == {"guard/novelty": pytest.approx(0.12)}
    columns = torch.stack([advantages, -advantages], 1)
    _, both, _ = Guarding(Guard(novelty=novelty)).applied(experience, columns)
    torch.testing.assert_close(both[:, 0], found)
    assert torch.equal(both[:, 1] < 0, advantages > 0)


def test_the_kl_is_that_of_the_gated_samples(experience: Experience) -> None:
    """In both groups the first of four samples is gated, and the weights sum to the number of actions."""
    guarded, _, metrics = Guarding(Guard(kl="uncertain")).applied(experience, ALGORITHM.advantages(experience))  # fmt: skip
    a = guarded.actions
    assert a.kl_weight is not None
    assert a.kl_weight.tolist() == [4.0 * (s == 0) for s in a.sample.tolist()]
    assert metrics == {"guard/uncertainty": 0.4375, "guard/share": 0.1, "guard/gated": 0.25}
    one = Guarding(Guard(kl="uncertain", measured=("a",), adapt=False, share=1.0))
    assert one.applied(experience, torch.zeros(len(a)))[2]["guard/uncertainty"] == pytest.approx(0.5)  # fmt: skip


def test_nothing_that_is_suspicious_has_no_kl(experience: Experience) -> None:
    number = len(experience.all_candidates.step)
    weights, part = kl_weights(experience, Suspicion(torch.full((number,), -0.1), 0.0), 0.1)
    assert part == 0
    assert weights.tolist() == [0.0] * len(experience.actions)


def test_an_action_is_judged_by_the_candidates_of_its_step_or_its_sample(experience: Experience) -> None:  # fmt: skip
    a, c = experience.actions, experience.candidates
    assert of_actions(experience, torch.arange(8.0)).tolist() == (4 * a.group + a.sample).tolist()
    after = replace(c, step=torch.zeros_like(c.step))
    each = replace(experience, candidates=Candidates.concatenate([after, c]))
    found = of_actions(each, torch.arange(16.0))
    number = 4 * a.group + a.sample
    assert torch.equal(found[a.step == 0], number[a.step == 0].double())
    # No candidate judges step 1: the mean of both of the sample.
    assert torch.equal(found[a.step == 1], number[a.step == 1] + 4.0)


def test_thumbnails_are_compared_with_their_own_step(experience: Experience) -> None:
    c = experience.candidates
    assert c.scores.features is not None
    twin = replace(c, step=c.step + 1)
    doubled = replace(experience, candidates=Candidates.concatenate([c, twin]))
    factors, mean = novelty_factors(doubled, relative=False)
    assert mean == pytest.approx(0.12)  # and not 0, the distance to the twin
    assert factors.max() == pytest.approx(0.2)


@pytest.fixture
def learner(collected: Collected, accelerator: Accelerator) -> Any:
    policy, _ = collected
    assert policy.trainable is not None
    start = {k: p.detach().clone() for k, p in policy.trainable.parameters.items()}

    def make(guard: Guard, **train: Any) -> Learner:
        settings = Train(iterations=9, groups=2, max_grad_norm=1e9, **train)
        return Learner(policy, settings, ClippedLoss(kl_coef=0.5), accelerator, guard=guard)

    yield make
    policy.trainable.load(start)
    policy.trainable._reference = None  # type: ignore[union-attr]


def gradient(learner: Learner, experience: Experience, advantages: Tensor) -> Tensor:
    """The gradient of one update, which changes nothing."""
    taken: list[Tensor] = []
    learner.optimizer.adam.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.flatten().clone() for p in learner.parameters if p.grad is not None)
    )  # fmt: skip
    learner.update(experience, advantages, Random(0))
    return torch.cat(taken)


def test_the_gradient_of_the_kl_is_that_of_the_gated_samples_alone(
    experience: Experience, learner: Any
) -> None:
    with torch.no_grad():
        for parameter in learner(Guard()).parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))  # fmt: skip
    guard, a = Guard(kl="uncertain"), experience.actions
    none = torch.zeros(len(a))
    found = gradient(learner(guard, lr=1e-12), experience, none)
    only = replace(experience, actions=a.select((a.sample == 0).nonzero().squeeze(1)))
    wanted = gradient(learner(Guard(), lr=1e-12), only, none[a.sample == 0])
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_the_reference_follows_and_is_in_the_checkpoint(
    experience: Experience, learner: Any
) -> None:
    """After two iterations the KL is to the weights of then; a run that resumes there goes on alike."""
    advantages, guard = ALGORITHM.advantages(experience), Guard(reset_every=2, novelty="relative")
    first = learner(guard, lr=1e-2)
    logged = [first.update(experience, advantages, Random(i)) for i in range(2)]
    assert [m["guard/resets"] for m in logged] == [0, 1]
    assert logged[1]["loss/kl"] > 0
    parts, state = first.state()
    parts = {k: {n: t.detach().clone() for n, t in part.items()} for k, part in parts.items()}
    assert all(torch.equal(parts["reference"][n], w) for n, w in parts["weights"].items())
    third = first.update(experience, advantages, Random(2))
    assert third["loss/kl"] == pytest.approx(0, abs=1e-9)
    assert third["guard/resets"] == 1
    first.policy.trainable._reference = None
    other = learner(guard, lr=1e-2)
    other.restore(parts, state)
    assert other.update(experience, advantages, Random(2)) == third
    fourth = other.update(experience, advantages, Random(3))
    assert (fourth["guard/resets"], fourth["loss/kl"] > 0) == (2, True)


def test_a_reset_by_kl(experience: Experience) -> None:
    guarding = Guarding(Guard(reset_above=3e-4, reset_every=3))
    due = [guarding.is_reset_due(kl) for kl in (1e-4, 4e-4, 0.0, 0.0, 0.0, 0.0)]
    assert due == [False, True, False, False, True, False]
    again = Guarding(guarding.settings)
    again.restore(guarding.state())
    assert (again.since_reset, again.resets) == (1, 2)


class Corner:
    """Features of one's own: the first pixel."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.tensor([i.getpixel((0, 0)) for i in images])


def test_features_of_a_class_of_ones_own() -> None:
    media = torch.rand(3, 3, 8, 8)
    media[1, 0, 4, 4] = torch.nan
    features = Features(f"{__name__}:Corner")(media)
    torch.testing.assert_close(features[0], (media[0, :, 0, 0] * 255).round())
    assert features[1].isnan().all()
    video = torch.stack([media * 0, media, media * 0], 1)
    assert torch.equal(Features(f"{__name__}:Corner")(video)[2], features[2])
    assert Features()(media).shape == (3, 192)
    with pytest.raises(ValueError, match="has no method embed"):
        Features(f"{__name__}:brightness")


MEASURED = "rewards=[{model='flowgrpo.shapes.rewards:ShapesReward'}, {model='flowgrpo.shapes.rewards:ShapesReward', name='other', weight=0.0}]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["guard.kl='uncertain'", "loss.kl_coef=0.1"], "there are none; add one with weight = 0"),
        (["guard.kl='uncertain'", MEASURED], "set loss.kl_coef above 0"),
        (["guard.reset_every=15"], "set loss.kl_coef above 0"),
        (["guard.kl='uncertain'", "guard.measured=['ShapesReward']", MEASURED], "'ShapesReward' is no reward with weight 0 .known: other"),
        (["guard.kl='uncertain'", "guard.share=0.5", MEASURED], "guard.share must be from 0.02 to 0.2 if it adapts"),
        (["guard.share=0.0"], "guard.share must be above 0"),
        (["guard.features='dino'"], "guard.features needs guard.novelty"),
        (["guard.novelty='relative'", "algorithm={kind='draft'}", "loss={kind='reward_gradient'}"], "algorithm.group_size = 1; raise it"),
        (["guard.features_options={a=1}"], "guard.features_options needs guard.features"),
        (["guard.reset_every=-1", "loss.kl_coef=0.1"], "must be at least 0"),
    ],
)  # fmt: skip
def test_guards_without_effect_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flowgrpo.load("quickstart_flow_grpo", settings).check()
