"""Rewards to advantages, against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowgrpo.core.advantages import GroupAdvantage, has_no_variance, zero_variance_groups

HPS = [0.3457, 0.3530, 0.3496, 0.3494]


def advantages(kind: GroupAdvantage, *groups: list[float]) -> list[list[float]]:
    """The advantages of groups of rewards, with nothing on other ranks."""
    rewards = torch.tensor([r for g in groups for r in g])
    index = torch.tensor([i for i, g in enumerate(groups) for _ in g])
    found = kind(rewards, index, rewards)
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


def test_batch_std_divides_by_the_spread_of_all_ranks_but_centres_per_group():
    rewards, groups = torch.tensor([0.0, 2.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    everyone = torch.cat([rewards, torch.tensor([100.0, math.nan])])
    found = GroupAdvantage(std="batch", epsilon=0.0)(rewards, groups, everyone)
    std = torch.tensor([0.0, 2, 10, 14, 100]).std(correction=0)
    assert torch.allclose(found, torch.tensor([-1.0, 1, -2, 2]) / std)


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
    assert torch.allclose(
        kind(values, index, values), kind(moved, index, moved), rtol=1e-6, atol=1e-9
    )


@given(rewards, rewards, st.sampled_from(["group", "batch", "none"]), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_a_group_sums_to_zero_and_keeps_its_order(one, two, std, ddof):
    values = tensor(one + two)
    index = torch.tensor([3] * len(one) + [1] * len(two))
    found = GroupAdvantage(std=std, ddof=ddof, clip=1e9)(values, index, values)
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
    shuffled = kind(values[order], index[order], values[order])
    assert torch.allclose(shuffled, kind(values, index, values)[order])


def test_zero_variance_groups_are_found():
    values = torch.tensor([1.0, 1.0, 0.0, 1.0, math.nan, 2.0, 5.0])
    groups = torch.tensor([4, 4, 2, 2, 7, 7, 9])
    # In ascending order: 2 varies, 4 is flat, of 7 one is left, 9 is alone.
    assert zero_variance_groups(values, groups).tolist() == [False, True, True, True]


def test_small_but_real_differences_are_variance():
    assert not has_no_variance(torch.tensor([0.3494, 0.3496]))
    assert has_no_variance(torch.tensor([0.0, 0.0]))
    assert has_no_variance(torch.tensor([3.0]))
