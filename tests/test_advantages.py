"""Rewards to advantages, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowgrpo.core.advantages import Advantage, candidate_advantages
from flowgrpo.core.group_statistics import has_no_variance, zero_variance_groups
from flowgrpo.core.multi_reward_advantages import GDPO, LogTamed, PerLoss, PerReward
from flowgrpo.core.scores import Scores
from flowgrpo.core.single_reward_advantages import (
    BestAdvantage,
    BetaAdvantage,
    GroupAdvantage,
    VirtualBest,
    beta_parameters,
)

SingleReward = GroupAdvantage | BetaAdvantage | VirtualBest
HPS = [0.3457, 0.3530, 0.3496, 0.3494]


def advantages(kind: SingleReward, *groups: list[float]) -> list[list[float]]:
    """The advantages of groups of rewards."""
    rewards = torch.tensor([r for g in groups for r in g])
    index = torch.tensor([i for i, g in enumerate(groups) for _ in g])
    found = kind(rewards, index)
    return [found[index == i].tolist() for i in range(len(groups))]


def test_hps_example_of_pref_grpo():
    # reference/algorithms.md section 8: std .0026, ddof 0.
    (found,) = advantages(GroupAdvantage(ddof=0, epsilon=0.0), HPS)
    assert found == pytest.approx([-1.44, 1.38, 0.07, -0.01], abs=0.005)


@pytest.mark.parametrize(
    ("ddof", "wanted"), [(0, [-1.34, 0.45, 1.34, -0.45]), (1, [-1.16, 0.39, 1.16, -0.39])]
)
def test_win_rates_of_pref_grpo_with_both_conventions(ddof, wanted):
    (found,) = advantages(GroupAdvantage(ddof=ddof, epsilon=0.0), [0.0, 2 / 3, 1.0, 1 / 3])
    assert found == pytest.approx(wanted, abs=0.005)


def test_epsilon_is_added_to_the_standard_deviation():
    # Mean 2, deviations -1, 0, 1; std sqrt(2/3) with ddof 0 and 1 with ddof 1.
    (zero,) = advantages(GroupAdvantage(ddof=0, epsilon=0.5), [1.0, 2.0, 3.0])
    (one,) = advantages(GroupAdvantage(ddof=1, epsilon=0.5), [1.0, 2.0, 3.0])
    assert zero == pytest.approx([-1 / (math.sqrt(2 / 3) + 0.5), 0, 1 / (math.sqrt(2 / 3) + 0.5)])
    assert one == pytest.approx([-1 / 1.5, 0, 1 / 1.5])


def test_batch_std_divides_by_the_spread_of_all_groups_but_centres_per_group():
    rewards = torch.tensor([0.0, 2.0, 10.0, 14.0, 100.0, math.nan])
    found = GroupAdvantage(std="batch", epsilon=0.0)(rewards, torch.tensor([0, 0, 1, 1, 2, 2]))
    std = torch.tensor([0.0, 2, 10, 14, 100]).std(correction=0)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1, -2, 2, 0, 0]) / std)


def test_no_std_only_centres():
    assert advantages(GroupAdvantage(std="none"), [1.0, 2.0, 4.5]) == [[-1.5, -0.5, 2.0]]


def test_group_std_divides_by_the_groups_own():
    one, two = advantages(GroupAdvantage(epsilon=0.0), [1.0, 2.0, 3.0], [10.0, 30.0, 50.0])
    assert one == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert two == pytest.approx(one)


@pytest.mark.parametrize("sign", [1, -1])
def test_outliers_are_clipped(sign):
    group = [0.0] * 99 + [1.0 * sign]
    (found,) = advantages(GroupAdvantage(clip=5.0), group)
    assert found[-1] == 5.0 * sign  # (1 - .01) / sqrt(.01 * .99) = 9.95 before
    (wide,) = advantages(GroupAdvantage(clip=50.0, epsilon=0.0), group)
    assert wide[-1] == pytest.approx(9.95 * sign, abs=0.01)


@pytest.mark.parametrize("std", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6, 1e-9])
def test_a_group_without_variance_is_exactly_zero(std, value):
    flat, other = advantages(GroupAdvantage(std=std, epsilon=1e-8), [value] * 7, [0.0, 1.0])
    assert flat == [0.0] * 7
    assert other[0] < 0 < other[1]


def test_rounding_is_no_variance():
    value = 26.123
    group = [value, value * (1 + 2e-7), value, value]
    assert len(set(torch.tensor(group).tolist())) == 2
    assert advantages(GroupAdvantage(ddof=1, epsilon=1e-8), group) == [[0.0] * 4]


def test_failed_rewards_are_ignored():
    with_failures, fewer = [1.0, math.nan, 3.0, 2.5, math.nan], [1.0, 3.0, 2.5]
    for kind in (GroupAdvantage(), GroupAdvantage(std="batch"), GroupAdvantage(ddof=1)):
        (found,), (wanted,) = advantages(kind, with_failures), advantages(kind, fewer)
        assert found == pytest.approx([wanted[0], 0.0, wanted[1], wanted[2], 0.0])
    assert advantages(GroupAdvantage(), [math.nan, 1.0, math.nan]) == [[0.0] * 3]
    assert advantages(GroupAdvantage(), [math.nan] * 3) == [[0.0] * 3]


rewards = st.lists(st.integers(-50, 50), min_size=2, max_size=9).filter(lambda r: len(set(r)) > 1)


def tensor(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(rewards, st.integers(-1000, 1000), st.sampled_from([0.01, 0.5, 7.0, 300.0]))
@settings(deadline=None)
def test_shift_and_scale_change_nothing(group, shift, scale):
    kind, index = GroupAdvantage(epsilon=0.0), torch.zeros(len(group), dtype=torch.long)
    values = tensor(group)
    moved = values * scale + shift
    assert torch.allclose(kind(values, index), kind(moved, index), rtol=1e-6, atol=1e-9)


@given(rewards, rewards, st.sampled_from(["group", "batch", "none"]), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_a_group_sums_to_zero_and_keeps_its_order(one, two, std, ddof):
    values = tensor(one + two)
    index = torch.tensor([3] * len(one) + [1] * len(two))
    found = GroupAdvantage(std=std, ddof=ddof, clip=1e9)(values, index)
    for group in (1, 3):
        inside, order = found[index == group], values[index == group].argsort(stable=True)
        assert abs(float(inside.sum())) < 1e-6
        assert (inside[order].diff() >= 0).all()


@given(rewards, rewards, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_groups_need_not_be_contiguous(one, two, random):
    values, index = tensor(one + two), torch.tensor([0] * len(one) + [1] * len(two))
    order = list(range(len(values)))
    random.shuffle(order)
    kind = GroupAdvantage()
    shuffled = kind(values[order], index[order])
    assert torch.allclose(shuffled, kind(values, index)[order])


def test_zero_variance_groups_are_found():
    values = torch.tensor([1.0, 1.0, 0.0, 1.0, math.nan, 2.0, 5.0])
    groups = torch.tensor([4, 4, 2, 2, 7, 7, 9])
    # In ascending order: 2 varies, 4 is flat, of 7 one is left, 9 is alone.
    assert zero_variance_groups(values, groups).tolist() == [False, True, True, True]


def test_small_but_real_differences_are_variance():
    assert not has_no_variance(torch.tensor([0.3494, 0.3496]))
    assert has_no_variance(torch.tensor([0.0, 0.0]))
    assert has_no_variance(torch.tensor([3.0]))


# Binary rewards.


def test_beta_is_the_reward_over_a_beta_density():
    groups = [[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    found = advantages(BetaAdvantage(), *groups)
    p = torch.tensor([0.25, 0.5, 0.75, 0.0], dtype=torch.float64)
    m, v = p.mean(), p.var(correction=0)
    a, b = m * (m * (1 - m) / v - 1), (1 - m) * (m * (1 - m) / v - 1)
    f = torch.distributions.Beta(1 + a / 3, 1 + b / 3).log_prob(p[:3]).exp()
    for row, (group, density) in enumerate(zip(groups[:3], f.tolist(), strict=True)):
        mean = sum(group) / 4
        assert found[row] == pytest.approx([(r - mean) / density for r in group])
    assert found[3] == [0.0] * 4


def test_beta_is_grpo_where_no_distribution_fits_and_reinforce_where_all_is_decided():
    (one,) = advantages(BetaAdvantage(), [1.0, 0, 0, 0])
    (grpo,) = advantages(GroupAdvantage(epsilon=0.0), [1.0, 0, 0, 0])
    # Beta(3/2, 3/2) is sqrt(p (1 - p)) over its integral, pi / 8.
    assert one == pytest.approx([a * math.pi / 8 for a in grpo])
    assert beta_parameters(torch.tensor([0.0, 1.0, 1.0])) == pytest.approx((1.0, 1.0))


def test_beta_refuses_rewards_that_are_not_binary():
    with pytest.raises(ValueError, match=r"needs rewards of 0 and 1, but one is 0\.5"):
        advantages(BetaAdvantage(), [0.0, 0.5])
    (found,) = advantages(BetaAdvantage(), [0.0, math.nan, 1.0])
    assert found[1] == 0


@pytest.mark.parametrize("size", [2, 5, 24])
def test_a_group_in_which_all_fail_moves_away(size):
    fail, win = advantages(VirtualBest(epsilon=0.0), [0.0] * size, [1.0] * size)
    assert fail == pytest.approx([-1 / math.sqrt(size)] * size)
    assert win == [0.0] * size


def test_virtual_best_is_a_member_more():
    (found,) = advantages(VirtualBest(epsilon=0.0), [0.0, 1.0, math.nan, 0.0])
    (wanted,) = advantages(GroupAdvantage(epsilon=0.0), [0.0, 1.0, 0.0, 1.0])
    assert found == pytest.approx([wanted[0], wanted[1], 0.0, wanted[2]])
    with pytest.raises(
        ValueError, match=r"best = 1 must be the largest possible reward, but one is 1\.2"
    ):
        advantages(VirtualBest(), [0.0, 1.2])


def test_best_chooses_the_top_of_each_group():
    groups = [0.1, 0.9, 0.5, 0.7], [1.0, 0.0, 1.0, 0.0], [0.0] * 4, [math.nan, 0.2, math.nan, 0.3]
    assert advantages(BestAdvantage(), *groups) == [
        [0, 1, 0, 0],
        [1, 0, 1, 0],  # ties are all chosen
        [0] * 4,
        [0, 0, 0, 1],
    ]
    three = advantages(BestAdvantage(keep=3), *groups)
    # With two rewards left of four, three cannot be chosen; and zeros tie in the second group.
    assert three == [[0, 1, 1, 1], [1, 1, 1, 1], [0] * 4, [0, 0, 0, 1]]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        BestAdvantage(keep=0).check()


# Multi-reward advantages.


def multi(kind: Advantage, scores: Scores) -> Tensor:
    """Advantages in groups of three."""
    return candidate_advantages(kind, scores, torch.arange(len(scores)) // 3)


def scored(*rewards: list[float], weights: list[float]) -> Scores:
    """Scores of rewards called a, b, ..."""
    scores = {n: torch.tensor(r) for n, r in zip("abc", rewards, strict=False)}
    total = sum(w * r for w, r in zip(weights, scores.values(), strict=True))
    return Scores(scores, total, dict(zip("abc", weights, strict=False)))


A, B = [0.0, 1.0, 2.0, 1.0, 1.0, 4.0], [100.0, 300.0, 200.0, 50.0, 0.0, 100.0]


def z(values: list[float], ddof: int) -> Tensor:
    """Standardised in two groups of three."""
    v = torch.tensor(values, dtype=torch.float64).view(2, 3)
    return ((v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True, correction=ddof)).flatten()


def test_per_reward_sums_standardised_rewards_by_weight():
    found = multi(PerReward(clip=9.0), scored(A, B, weights=[0.7, 0.3]))
    torch.testing.assert_close(found.double(), 0.7 * z(A, 1) + 0.3 * z(B, 1), atol=1e-5, rtol=0)
    only = multi(PerReward(), scored(A, B, weights=[1.0, 0.0]))
    torch.testing.assert_close(only.double(), z(A, 1), atol=1e-5, rtol=0)


def test_the_scale_of_a_reward_changes_nothing_unless_it_is_summed():
    one, other = (
        scored(A, B, weights=[1.0, 1.0]),
        scored(A, [b * 50 for b in B], weights=[1.0, 1.0]),
    )
    for kind in (PerReward(), GDPO(epsilon=1e-9)):
        torch.testing.assert_close(multi(kind, one), multi(kind, other))
    assert not torch.allclose(multi(GroupAdvantage(), one), z(A, 0).float() + z(B, 0).float())


def test_gdpo_tells_apart_what_sums_to_the_same():
    # In the paper's example (0, 2) and (1, 1) sum alike.
    rewards = scored([0.0, 1.0, 0.0], [2.0, 1.0, 0.0], weights=[1.0, 1.0])
    summed = multi(GroupAdvantage(), rewards)
    assert float(summed[0]) == float(summed[1])
    apart = multi(GDPO(), rewards)
    assert abs(float(apart[0] - apart[1])) > 0.1


def test_gdpo_normalises_the_batch():
    found = multi(GDPO(epsilon=0.0), scored(A, B, weights=[2.0, 1.0])).double()
    total = 2 * z(A, 1) + z(B, 1)
    torch.testing.assert_close(found, total / total.std(), atol=1e-5, rtol=0)
    twice = multi(GDPO(epsilon=0.0), scored(A, B, A, weights=[1.0, 1.0, 1.0]))
    assert float(twice.std()) == pytest.approx(1.0, abs=1e-4)
    flat = multi(GDPO(), scored([1.0] * 3 + A[3:], [2.0] * 3 + B[3:], weights=[1.0, 1.0]))
    assert flat[:3].tolist() == [0, 0, 0]
    assert (flat[3:] != 0).any()


def test_log_tamed_tames_what_varies_most():
    rewards = scored(A, B, weights=[1.0, 0.01])
    spread = [torch.tensor(r).std(correction=0) / torch.tensor(r).mean() for r in (A, B)]
    assert spread[0] > spread[1]
    found = multi(LogTamed(epsilon=0.0), rewards)
    total = torch.log1p(torch.tensor(A)) + 0.01 * torch.tensor(B)
    torch.testing.assert_close(found, z(total.tolist(), 0).float(), atol=1e-5, rtol=0)
    never = multi(LogTamed(threshold="fixed", above=9.0), rewards)
    torch.testing.assert_close(never, multi(GroupAdvantage(), rewards), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="needs scores above -1, but one is -2"):
        multi(LogTamed(), scored([-2.0, 8.0, 0.0], [1.0, 1, 1], weights=[1.0, 1.0]))


@pytest.mark.parametrize(
    ("threshold", "weights", "wanted"),
    [
        # What the released log_tame_aggregate_fn returns (PaCo-GRPO/config/grpo.py, 08caac6) for two
        # prompts with these scores, clipped to 5 as its training scripts do.
        ("mean", [1.0, 0.01], [1, 3.6931471805599454, 3.09861228866811, 1.1931471805599454, 0.6931471805599453, 2.6094379124341005]),
        ("median", [3.0, 0.02], [2, 5, 5, 3.0794415416798357, 2.0794415416798357, 5]),
    ],
)  # fmt: skip
def test_uncentred_log_tamed_is_the_released_advantage(threshold, weights, wanted):
    kind = LogTamed(threshold=threshold, centre="none", std="none")
    torch.testing.assert_close(multi(kind, scored(A, B, weights=weights)), torch.tensor(wanted))
    scaled = replace(kind, std="batch", epsilon=0.0, clip=9.0)
    if threshold == "mean":
        total = torch.tensor(wanted, dtype=torch.float64)
        found = multi(scaled, scored(A, B, weights=weights))
        torch.testing.assert_close(found, (total / total.std(correction=0)).float())
    failed = multi(kind, scored([math.nan, *A[1:]], B, weights=weights))
    assert failed[0] == 0
    with pytest.raises(ValueError, match="which std = 'group' would divide by 0"):
        LogTamed(centre="none").check()


def test_per_loss_keeps_the_summands_of_per_reward_apart():
    rewards = scored(A, B, weights=[0.7, 0.3])
    found = multi(PerLoss(), rewards)
    assert found.shape == (6, 2)
    torch.testing.assert_close(found[:, 0], 0.7 * z(A, 1).float())
    torch.testing.assert_close(found.sum(1), multi(PerReward(), rewards))
    clipped = multi(PerLoss(clip=0.5), rewards)
    torch.testing.assert_close(clipped[:, 1], 0.3 * z(B, 1).float().clamp(-0.5, 0.5))
    failed = multi(PerLoss(), scored([math.nan, *A[1:]], B, weights=[0.7, 0.3]))
    assert failed[0].tolist() == [0, 0]
    assert PerLoss(std="batch").over_batch


@pytest.mark.parametrize("kind", [PerReward(), GDPO(), LogTamed()])
def test_a_candidate_without_one_of_its_rewards_is_out_of_all(kind):
    failed = scored([*A[:2], math.nan, *A[3:]], B, weights=[1.0, 1.0])
    found = multi(kind, failed)
    assert found[2] == 0
    assert (found[:2] != 0).all()
    both = scored([*A[:2], math.nan, *A[3:]], [*B[:2], math.nan, *B[3:]], weights=[1.0, 1.0])
    torch.testing.assert_close(found, multi(kind, both))
    with pytest.raises(ValueError, match="need the weight of each"):
        multi(kind, Scores(failed.raw, failed.reward))


# Scores.


def shaped_scores() -> Scores:
    """Two rewards with a weight, one of them shaped, and one that is only measured."""
    raw = {"a": torch.tensor(A), "b": torch.tensor(B), "measured": torch.tensor(B) - 7}
    shaping = {"b": lambda values: values / 100 + 1}
    return Scores(raw, raw["a"] * 0.5 + shaping["b"](raw["b"]) * 2, {"a": 0.5, "b": 2.0}, shaping)


def test_the_parts_of_scores_add_up_to_the_reward():
    scores = shaped_scores()
    assert list(scores.parts()) == ["a", "b"]
    torch.testing.assert_close(sum(scores.parts().values()), scores.reward)
    torch.testing.assert_close(scores.trained()["b"], torch.tensor(B).double() / 100 + 1)
    more = scores.with_score("win_rate", torch.tensor(A), 3.0)
    torch.testing.assert_close(more.reward, scores.reward + 3 * torch.tensor(A))
    torch.testing.assert_close(sum(more.parts().values()), more.reward)


def test_scores_are_selected_and_joined_row_by_row():
    scores = shaped_scores()
    first, last = scores.select(torch.arange(6) < 2), scores.select(torch.arange(2, 6))
    joined = Scores.concatenate([first, last])
    assert torch.equal(joined.reward, scores.reward)
    assert all(torch.equal(joined.raw[n], values) for n, values in scores.raw.items())
    torch.testing.assert_close(joined.parts(), scores.parts())
    assert scores.map(lambda v: v.new_full(v.shape, math.nan)).valid.sum() == 0


def test_features_follow_their_candidates():
    scores = replace(shaped_scores(), features=torch.arange(12.0).view(6, 2))
    joined = Scores.concatenate([scores.select(torch.arange(2, 6)), scores.select(torch.arange(2))])
    assert joined.features[:, 0].tolist() == [4, 6, 8, 10, 0, 2]
    more = scores.with_score("win_rate", torch.tensor(A), 3.0)
    assert torch.equal(more.features, scores.features)
    assert more.weights == {"a": 0.5, "b": 2.0, "win_rate": 3.0}
    torch.testing.assert_close(more.parts()["b"], scores.parts()["b"])
    assert Scores.concatenate([shaped_scores()] * 2).features is None
    assert len(joined) == 6
    unweighted = replace(scores, weights={"a": 0.0, "b": 1.0})
    assert list(unweighted.trained()) == ["b"]
    with pytest.raises(ValueError, match="need the weight of each"):
        replace(scores, weights={"a": 0.0}).trained()
    with pytest.raises(ValueError, match="need the weight of each"):
        replace(scores, weights={"a": 1.0, "absent": 1.0}).trained()


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (GroupAdvantage(clip=0.0), "clip must be above 0, got 0"),
        (GroupAdvantage(epsilon=-1e-9), "epsilon must be at least 0"),
        (GroupAdvantage(clip=1e-9, epsilon=0.0), ""),
        (BetaAdvantage(clip=-1.0), "clip must be above 0"),
        (VirtualBest(clip=0.0), "clip must be above 0"),
        (VirtualBest(epsilon=-1.0), "epsilon must be at least 0"),
        (PerReward(clip=math.nan), "clip must be above 0"),
        (PerReward(epsilon=math.nan), "epsilon must be at least 0"),
        (PerLoss(epsilon=-1.0), "epsilon must be at least 0"),
        (GDPO(clip=0.0), "clip must be above 0"),
        (LogTamed(epsilon=-1.0), "epsilon must be at least 0"),
        (BestAdvantage(keep=1), ""),
    ],
)
def test_settings_that_train_nothing_are_refused(kind, problem):
    if not problem:
        kind.check()
        return
    with pytest.raises(ValueError, match=problem):
        kind.check()


def test_which_advantages_have_statistics_over_the_batch():
    assert {std: LogTamed(std=std).over_batch for std in ("group", "batch", "none")} == {"group": False, "batch": True, "none": False}  # fmt: skip
