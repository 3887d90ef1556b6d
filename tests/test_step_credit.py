"""Step-level credit from rewards alone: against worked examples and slow, obvious versions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgrpo.algorithms import G2RPO, TPGRPO, VGPO, Algorithm, BranchGRPO, TempFlowGRPO
from flowgrpo.algorithms.branches import BranchPlan
from flowgrpo.algorithms.collection import subgrids
from flowgrpo.algorithms.tempflow_grpo import noise_weights
from flowgrpo.algorithms.tp_grpo import balance, differences, turning_points
from flowgrpo.algorithms.vgpo import temporal_weights, values
from flowgrpo.config.reader import read
from flowgrpo.config.reference import to_table
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.random import Random
from flowgrpo.core.scores import Scores
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, RandomSteps, SlidingWindow, Window
from flowgrpo.core.transitions import CPS, ODE, CalibratedSDE, FlowSDE, StepwiseSDE
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group, Prompt

T = 6
Key = tuple[int, ...]
"""Group, sample and step; of candidates also the granularity."""
EXACT = GroupAdvantage(epsilon=0.0, clip=100.0)


def made(
    actions: Sequence[Key],
    rewards: dict[Key, float],
    log_probs: Sequence[float] | None = None,
    **fields: Any,
) -> Experience:
    """An experience of tiny latents with these actions and rewards, in shuffled order."""
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0)).tolist()
    keys = [list(rewards)[i] for i in order]
    group, sample, step, granularity = torch.tensor(keys).unbind(1)
    reward = torch.tensor([rewards[k] for k in keys])
    a = torch.tensor(actions)
    empty = torch.zeros(len(a), 1)
    return Experience(
        groups=[Group(int(g), Prompt("x")) for g in a[:, 0].unique()],
        transition=FlowSDE(),
        actions=Actions.between(
            empty,
            torch.arange(len(a)),
            empty,
            a[:, 2],
            torch.tensor(log_probs if log_probs is not None else [0.0] * len(a)),
            a[:, 0],
            a[:, 1],
        ),
        candidates=Candidates(
            group, sample, step, granularity, Scores({"one": reward}, reward, {"one": 1.0})
        ),
        cost=Cost(0.0, 0.0, 0.0),
        diversity=torch.zeros(1),
        duplicates=torch.zeros(1),
        step_std=fields.get("step_std", {}),
    )


def random_rewards(keys: Sequence[Key], *, failed: float = 0.0, seed: int = 0) -> dict[Key, float]:
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(keys), 2, generator=rng).tolist()
    return {k: math.nan if f < failed else v for k, (v, f) in zip(keys, drawn, strict=True)}


def score(value: float, rivals: Sequence[float], ddof: int = 0) -> float:
    """Deviations from the mean; 0 for a failed one, or without two different rivals."""
    rivals = [r for r in rivals if not math.isnan(r)]
    if math.isnan(value) or len(set(rivals)) < 2:
        return 0.0
    return (value - fmean(rivals)) / (stdev if ddof else pstdev)(rivals)


def expect(found: Tensor, keys: Sequence[Key], wanted: dict[Key, float]) -> None:
    torch.testing.assert_close(found, torch.tensor([wanted[k] for k in keys]), atol=2e-5, rtol=1e-4)
    assert [v == 0 for v in found.tolist()] == [wanted[k] == 0 for k in keys]


# TempFlow-GRPO and G2RPO.


@pytest.mark.parametrize("failed", [0.0, 0.2])
@pytest.mark.parametrize(("ddof", "integration"), [(0, "sum"), (1, "mean")])
def test_g2rpo_adds_a_score_per_granularity(ddof, integration, failed):
    granularities = (1, 3)
    actions = list(product(range(2), range(4), (1, 2)))
    rewards = random_rewards([(*a, j) for a in actions for j in granularities], failed=failed)
    algorithm = G2RPO(
        group_size=4,
        granularities=granularities,
        integration=integration,
        advantage=replace(EXACT, ddof=ddof),
    )
    wanted = {}
    for g, i, k in actions:
        parts = [
            score(rewards[g, i, k, j], [rewards[g, n, k, j] for n in range(4)], ddof)
            for j in granularities
        ]
        wanted[g, i, k] = sum(parts) if integration == "sum" else sum(parts) / 2
    expect(algorithm.advantages(made(actions, rewards)), actions, wanted)


def test_g2rpo_cuts_the_sum():
    rewards = {(0, i, 0, j): float(i == 3) for i in range(12) for j in (1, 2)}
    actions = [(0, i, 0) for i in range(12)]
    # One of 12 stands out by 11 / sqrt(12) = 3.18 deviations (ddof 1), at both granularities.
    (alone,) = {round(v, 3) for v in made_advantages(G2RPO(granularities=(1, 2)), actions, rewards)[3:4]}  # fmt: skip
    assert alone == 5.0
    mean = G2RPO(granularities=(1, 2), integration="mean")
    assert made_advantages(mean, actions, rewards)[3] == pytest.approx(11 / math.sqrt(12), abs=1e-3)


def made_advantages(algorithm: Any, actions: Sequence[Key], rewards: dict[Key, float]) -> Any:
    return algorithm.advantages(made(actions, rewards)).tolist()


@pytest.mark.parametrize("weighted", [True, False])
def test_tempflow_compares_within_a_seed_and_weighs_by_noise(weighted):
    actions = list(product(range(2), range(6), (0, 1, 3)))
    rewards = random_rewards([(*a, 1) for a in actions], failed=0.1)
    algorithm = TempFlowGRPO(group_size=6, seeds=2, noise_weights=weighted, advantage=EXACT)
    std = {0: 0.1, 1: 0.2, 3: 0.6}
    wanted = {}
    for g, i, k in actions:
        rivals = [rewards[g, n, k, 1] for n in range(6) if n // 3 == i // 3]
        weight = std[k] / 0.3 if weighted else 1.0
        wanted[g, i, k] = weight * score(rewards[g, i, k, 1], rivals)
    expect(algorithm.advantages(made(actions, rewards, step_std=std)), actions, wanted)


def test_noise_weights_have_mean_one():
    # reference/algorithms.md section 11: SD3.5 at T = 10, flow_sde with 0.7, without the last step.
    std = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]
    weights = noise_weights(std)
    assert weights.mean() == pytest.approx(1)
    assert weights[1] / weights[8] == pytest.approx(0.743 / 0.225)


def test_subgrids_end_at_the_data_and_are_not_repeated():
    assert subgrids(1, 6, [1, 2, 3]) == {
        (1, 2, 3, 4, 5, 6): [1],
        (1, 3, 5, 6): [2],
        (1, 4, 6): [3],
    }
    assert subgrids(4, 6, [1, 2, 3]) == {(4, 5, 6): [1], (4, 6): [2, 3]}
    assert subgrids(5, 6, [3, 1]) == {(5, 6): [3, 1]}
    assert subgrids(6, 6, [1]) == {(6,): [1]}


def test_released_subgrids_are_those_of_the_code():
    # Its grid is cat(sched[:k + 2], sched[k + 2 :: g]), and what the last step predicts is decoded.
    sched = list(range(17))
    for k, granularity in product(range(15), (1, 2, 3)):
        grid = [*sched[: k + 2], *sched[k + 2 :: granularity]]
        taken = (*grid[k + 1 : -1], 16)
        assert subgrids(k + 1, 16, [granularity], "released") == {taken: [granularity]}
    # reference/algorithms.md section 6: for an odd k the last jump spans three intervals.
    assert next(iter(subgrids(2, 16, [2], "released")))[-2:] == (13, 16)
    assert next(iter(subgrids(3, 16, [2], "released")))[-2:] == (14, 16)


# TP-GRPO.

EXAMPLE = torch.tensor([[0.5, 0.4, 0.6, 0.3, 0.2, 0.35]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("none", [-0.1, 0.2, -0.3, -0.1, 0.15]),
        ("plain", [-0.15, 0.2, -0.25, -0.1, 0.15]),
        ("consistent", [-0.15, 0.2, -0.3, -0.1, 0.15]),
    ],
)
def test_the_worked_example_of_tp_grpo(kind, wanted):
    # reference/algorithms.md section 5.
    algorithm = TPGRPO(turning_points=kind, balance="none")
    found = algorithm.step_rewards(EXAMPLE, torch.tensor([0]))
    torch.testing.assert_close(found, torch.tensor([wanted], dtype=torch.float64))


def slow_turns(r: Sequence[float], consistent: bool) -> list[bool]:
    sign = [(b > a) - (b < a) for a, b in pairwise(r)]
    trend = (r[-1] > r[0]) - (r[-1] < r[0])
    turns = []
    for k in range(len(sign)):
        turn = sign[k] * trend > 0 and (k == 0 or sign[k - 1] * trend < 0)
        left = (r[-1] > r[k + 1]) - (r[-1] < r[k + 1])
        turns.append(turn and (not consistent or sign[k] * left > 0))
    return turns


@pytest.mark.parametrize("consistent", [True, False])
def test_turning_points_of_random_walks(consistent):
    # Few levels, so that ties occur.
    rewards = torch.randint(0, 5, (300, 7), generator=torch.Generator().manual_seed(1)).double() / 4
    found = turning_points(rewards, consistent)
    assert found.tolist() == [slow_turns(r, consistent) for r in rewards.tolist()]
    assert found.any(0).tolist() == [True] * 5 + [not consistent]
    if consistent:
        increment, aggregate = differences(rewards)
        assert (aggregate.abs() > increment.abs())[found].all()


def test_balance_keeps_the_largest_of_each_kind():
    turning = torch.tensor([[True, True, True], [True, False, True]])
    aggregate = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.9, -0.4]])
    together = balance(turning, aggregate, torch.tensor([0, 0]))
    assert together.tolist() == [[True, True, False], [True, False, True]]
    apart = balance(turning, aggregate, torch.tensor([0, 1]))
    assert apart.tolist() == [[True, True, False], [True, False, True]]
    one_kind = balance(turning, aggregate.abs(), torch.tensor([0, 0]))
    assert torch.equal(one_kind, turning)
    assert not balance(turning, torch.zeros(2, 3), torch.tensor([0, 0])).any()


@pytest.mark.parametrize("failed", [0.0, 0.15])
@pytest.mark.parametrize(
    ("kind", "rivals"),
    [("none", "step"), ("none", "group"), ("plain", "step"), ("consistent", "step")],
)
def test_tp_grpo_is_a_score_per_step(kind, rivals, failed):
    steps = [0, 2, 3]
    actions = list(product(range(2), range(5), steps))
    states = [-1, 1, 2, T - 1]
    keys = [(g, i, k, 1) for g, i, k in product(range(2), range(5), states)]
    rewards = random_rewards(keys, failed=failed, seed=3)
    algorithm = TPGRPO(turning_points=kind, balance="none", rivals=rivals, advantage=EXACT)
    worth: dict[Key, float] = {}
    for g, i in product(range(2), range(5)):
        r = [rewards[g, i, k, 1] for k in states]
        turns = slow_turns(r, kind == "consistent") if kind != "none" else [False] * 3
        for n, k in enumerate(steps):
            worth[g, i, k] = (r[-1] if turns[n] else r[n + 1]) - r[n]
    wanted = {
        (g, i, k): score(
            worth[g, i, k],
            [worth[g, n, j] for n in range(5) for j in (steps if rivals == "group" else [k])],
        )
        for g, i, k in actions
    }
    expect(algorithm.advantages(made(actions, rewards)), actions, wanted)


def test_a_shared_baseline_serves_the_group():
    actions = list(product([0], range(3), [1, 2]))
    keys = [(0, 0, 0, 1), *((0, i, k, 1) for i in range(3) for k in (1, T - 1))]
    rewards = random_rewards(keys)
    own = rewards | {(0, i, 0, 1): rewards[0, 0, 0, 1] for i in range(3)}
    shared = TPGRPO(shared_noise=True).advantages(made(actions, rewards))
    assert torch.equal(shared, TPGRPO().advantages(made(actions, own)))
    assert (shared != 0).all()


# VGPO.


def test_values_and_weights():
    q = values(torch.tensor([[1.0, 2.0, 4.0]]), 0.5)
    torch.testing.assert_close(q, torch.tensor([[3.0, 4.0, 4.0]]))
    # reference/algorithms.md section 7: constant rewards give the ramp 2 t / (T + 1).
    ramp = temporal_weights(values(torch.full((1, 10), 0.3), 1.0))
    torch.testing.assert_close(ramp[0], torch.arange(10, 0, -1) * 2 / 11)
    assert ramp[0, 0] == pytest.approx(1.82, abs=0.005)
    assert ramp[0, -1] == pytest.approx(0.18, abs=0.005)
    assert torch.equal(temporal_weights(torch.zeros(1, 3)), torch.ones(1, 3))


@pytest.mark.parametrize("lowest", [0.0, -0.4])
@pytest.mark.parametrize("ends_in_noise", [True, False])
def test_vgpo_is_weight_times_anchored_score(ends_in_noise, lowest):
    first, steps = 1, [1, 2, 4]
    actions = list(product(range(2), range(4), steps))
    judged = [s for s in range(first, T) if ends_in_noise or s != T - 2]
    keys = [(g, i, s, s != T - 1) for g, i, s in product(range(2), range(4), judged)]
    rewards = {k: v + lowest for k, v in random_rewards([tuple(map(int, k)) for k in keys]).items()}
    failing = next(k for k in rewards if k[:3] == (1, 2, 3))
    rewards[failing] = math.nan
    algorithm = VGPO(discount=0.9, anchor=0.2, anchor_steps=3, advantage=EXACT)

    by_step = {k[:3]: v for k, v in rewards.items()}
    floor = min(0.0, min(v for v in rewards.values() if not math.isnan(v)))
    value: dict[Key, float] = {}
    for g, i in product(range(2), range(4)):
        for s in range(first, T):
            later = [by_step.get((g, i, n), by_step[g, i, T - 1]) for n in range(s, T)]
            value[g, i, s] = sum(0.9**n * (r - floor) for n, r in enumerate(later))
    for s in range(first, T):
        value[1, 2, s] = math.nan
    wanted = {}
    for g, i, k in actions:
        mean = fmean(value[g, i, s] for s in range(first, T))
        relative = score(value[g, i, k], [value[g, n, k] for n in range(4)])
        anchored = 0.2 * value[g, i, k] if k < 3 else 0.0
        wanted[g, i, k] = value[g, i, k] / mean * (relative + anchored)
        if math.isnan(value[g, i, k]):
            wanted[g, i, k] = 0.0
    expect(algorithm.advantages(made(actions, rewards)), actions, wanted)


def test_the_anchor_is_all_that_is_left_without_variance():
    actions = list(product([0], range(3), range(T - 1)))
    rewards = {(0, i, s, int(s == T - 1)): 0.5 for i, s in product(range(3), range(T))}
    algorithm = VGPO(discount=1.0, anchor=0.1, anchor_steps=2)
    found = algorithm.advantages(made(actions, rewards)).view(3, T - 1)
    ramp = torch.arange(T, 1, -1) * 2 / (T + 1)
    left = 0.1 * ramp * 0.5 * torch.arange(T, 1, -1) * torch.tensor([1, 1, 0, 0, 0])
    torch.testing.assert_close(found, left.expand(3, -1))
    assert (replace(algorithm, anchor=0.0).advantages(made(actions, rewards)) == 0).all()
    # The lowest reward of the iteration is worth nothing, and rounding does not make it something.
    rng = torch.Generator().manual_seed(0)
    noise = (6e-8 * torch.randint(0, 3, (len(rewards),), generator=rng)).tolist()
    below = {k: -0.7 + n for k, n in zip(rewards, noise, strict=True)}
    assert (algorithm.advantages(made(actions, below)) == 0).all()


def test_an_anchor_that_saturates_is_told(recwarn):
    """PickScore's scale, 18 to 26, puts most anchored steps at the clip; 1/26 of it does not."""
    actions = list(product([0], range(4), range(T - 1)))
    keys = list(product([0], range(4), range(T)))
    rewards = {(0, i, s, int(s == T - 1)): 20.0 + i + 0.1 * s for _, i, s in keys}
    with pytest.warns(UserWarning, match="VGPO's anchor saturates"):
        found = VGPO(anchor=0.1).advantages(made(actions, rewards))
    assert (found.view(4, T - 1)[:, 0] == 5).all()
    recwarn.clear()
    VGPO(anchor=0.1).advantages(made(actions, {k: r / 26 for k, r in rewards.items()}))
    VGPO(anchor=0.0).advantages(made(actions, rewards))
    assert not recwarn.list


def test_vgpo_refuses_negative_rewards_if_told_to():
    actions = list(product([0], range(2), range(T - 1)))
    rewards = {(0, i, s, 0): i - 0.25 for i, s in product(range(2), range(T))}
    with pytest.raises(ValueError, match=r"lowest reward of this iteration is -0\.25"):
        VGPO(negative="refuse").advantages(made(actions, rewards))


# BranchGRPO: two splits into two, at steps 0 and 2; step 1 is stochastic on two branches.

TREE = BranchGRPO(group_size=4, splits=(0, 2), advantage=replace(EXACT, ddof=1))
BRANCHES = [(0, s, k) for k, width in ((0, 2), (1, 2), (2, 1), (3, 1)) for s in range(0, 4, width)]
LEAVES = [(0, i, T - 1, 1) for i in range(4)]


def leaf_rewards(*values: float) -> dict[Key, float]:
    return dict(zip(LEAVES, values, strict=True))


def test_a_branch_is_worth_the_mean_of_its_leaves():
    found = TREE.advantages(made(BRANCHES, leaf_rewards(1.0, 2.0, 4.0, 6.0)))
    high = math.sqrt(0.5)  # two numbers, ddof 1
    leaves = [score(v, [1.0, 2.0, 4.0, 6.0], ddof=1) for v in (1.0, 2.0, 4.0, 6.0)]
    wanted = [-high, high] * 2 + leaves * 2
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)


def test_branches_by_path_probability():
    log_probs = [0.3, -0.1, 9.0, 9.0, 0.5, 0.0, -0.2, 1.0, 9.0, 9.0, 9.0, 9.0]
    algorithm = replace(TREE, fusion="path_probability", advantage=replace(EXACT, std="none"))
    reward = (1.0, 2.0, 4.0, 8.0)
    found = algorithm.advantages(made(BRANCHES, leaf_rewards(*reward), log_probs))
    one = math.exp(0.5) / (math.exp(0.5) + 1)
    two = math.exp(-0.2) / (math.exp(-0.2) + math.exp(1.0))
    left, right = one * 1 + (1 - one) * 2, two * 4 + (1 - two) * 8
    half = (right - left) / 2
    leaves = [v - fmean(reward) for v in reward]
    torch.testing.assert_close(found, torch.tensor([-half, half] * 2 + leaves * 2))


@pytest.mark.parametrize("fusion", ["mean", "path_probability"])
@pytest.mark.parametrize("failed", [None, 1])
def test_treegrpo_fuses_the_advantages_of_leaves(fusion, failed):
    log_probs = [0.3, -0.1, 9.0, 9.0, 0.5, 0.0, -0.2, 1.0, 9.0, 9.0, 9.0, 9.0]
    reward = [1.0, 2.0, 4.0, 8.0]
    if failed is not None:
        reward[failed] = math.nan
    algorithm = replace(TREE, rivals="leaves", fusion=fusion, advantage=EXACT)
    found = algorithm.advantages(made(BRANCHES, leaf_rewards(*reward), log_probs))
    leaf = [score(r, reward) for r in reward]
    at_split = dict(zip(range(4), log_probs[4:8], strict=True))  # the leaves' own steps, at step 2
    wanted = []
    for _, s, k in BRANCHES:
        below = [s, s + 1] if k < 2 else [s]
        known = [i for i in below if i != failed]
        weight = [math.exp(at_split[i]) if fusion != "mean" else 1.0 for i in known]
        total = sum(w * leaf[i] for w, i in zip(weight, known, strict=True))
        wanted.append(total / sum(weight) if known else 0.0)
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    # Nothing is standardised again on the way up.
    assert all(abs(abs(w) - 1) > 0.02 for w in wanted[:2])


def test_splits_begin_early_by_a_geometric_distribution():
    algorithm = BranchGRPO(
        group_size=8, splits=(0, 1, 2), between="ode", shift_ratio=0.5, rivals="leaves"
    )
    algorithm.check(6)
    firsts = [algorithm.trained_steps(6, i, Random(0).at(i))[0] for i in range(2000)]
    # i from 0 to 2: the last split is at most step 4.
    for i, share in enumerate((4 / 7, 2 / 7, 1 / 7)):
        assert firsts.count(i) / 2000 == pytest.approx(share, abs=0.04)
    moved = next(Random(0).at(i) for i in range(20) if firsts[i] == 2)
    assert list(algorithm.trained_steps(6, 0, moved)) == [2, 3, 4]
    assert counts(algorithm, 6)[0] in (1 + 2 + 4 + 8 * 3, 2 + 2 + 4 + 8 * 2, 3 + 2 + 4 + 8)
    assert algorithm.cost(6, 0, moved).nfe == 3 + 2 + 4 + 8


def test_a_failed_leaf_leaves_its_branches_to_the_others():
    plain = replace(TREE, advantage=replace(EXACT, std="none"))
    found = plain.advantages(made(BRANCHES, leaf_rewards(math.nan, 2.0, 4.0, 6.0)))
    assert found.tolist() == pytest.approx([-1.5, 1.5] * 2 + [0, -2, 0, 2] * 2)
    nothing = plain.advantages(made(BRANCHES, leaf_rewards(math.nan, math.nan, 4.0, 6.0)))
    assert nothing.tolist() == pytest.approx([0] * 4 + [0, 0, -1, 1] * 2)


@pytest.mark.parametrize(
    ("width", "extremes", "kept"),
    [("best_of_siblings", 0, [0, 1, 1, 0]), ("extremes", 2, [1, 0, 1, 0])],
)
def test_width_pruning_silences_paths(width, extremes, kept):
    algorithm = replace(TREE, width=width, extremes=extremes)
    rewards = leaf_rewards(1.0, 2.0, 6.0, 4.0)
    found, full = (a.advantages(made(BRANCHES, rewards)) for a in (algorithm, TREE))
    silenced = torch.tensor([1, 1, 1, 1, *kept, *kept]) == 0
    assert (full != 0).all()
    assert torch.equal(found, torch.where(silenced, 0.0, full))


def test_released_pruning():
    """Depths are dropped while their window moves to the noise; halves are kept after the last split."""
    tree = BranchGRPO(pruned=(14, 15, 16, 17), pruned_every=30, pruned_until=8)
    tree.check(20)
    every = set(range(19))
    for iteration, first in ((0, 14), (29, 14), (30, 13), (180, 8), (999, 8)):
        pruned = every - set(tree.trained_steps(20, iteration, Random(0)))
        assert pruned == set(range(first, first + 4))
    # Step 2 is the last split, so only step 3 is halved: there every branch has one action.
    rewards = leaf_rewards(1.0, 2.0, 6.0, 4.0)
    full = TREE.advantages(made(BRANCHES, rewards))
    one_each = replace(TREE, width="half_of_branch").advantages(made(BRANCHES, rewards))
    assert torch.equal(one_each, full)
    half = replace(TREE, width="half_of_tree").advantages(made(BRANCHES, rewards))
    kept = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0])
    assert torch.equal(half, full * kept)
    # With splits at steps 0 and 1, steps 2 and 3 are halved: of equal advantages, the first is kept.
    early = replace(TREE, splits=(0, 1), width="half_of_branch")
    branches = [(0, s, k) for k, width in ((0, 2), (1, 1), (2, 1), (3, 1)) for s in range(0, 4, width)]  # fmt: skip
    found = early.advantages(made(branches, rewards))
    assert (found != 0).tolist() == [True] * 10 + [False] * 4


def test_width_pruning_passes_over_failed_leaves():
    algorithm = replace(TREE, width="extremes", extremes=2)
    found = algorithm.advantages(made(BRANCHES, leaf_rewards(math.nan, 2.0, 6.0, 4.0)))
    assert (found == 0).tolist() == [False] * 4 + [True, False, False, True] * 2


# What holds for all of them.

TRAJECTORY_STEPS = [(g, i, s) for g, i in product(range(2), range(4)) for s in range(T - 1)]
PROJECTED = [(g, i, s, int(s == T - 1)) for g, i in product(range(2), range(4)) for s in range(T)]
COMPLETED = [(g, i, s, 1) for g, i in product(range(2), range(4)) for s in (-1, 0, 1, 2, 3, T - 1)]
PERTURBED = [(*a, 1) for a in TRAJECTORY_STEPS]
CASES: dict[str, tuple[Any, list[Key], list[Key]]] = {
    "g2rpo": (G2RPO(group_size=4, granularities=(1,)), TRAJECTORY_STEPS, PERTURBED),
    "tempflow": (TempFlowGRPO(group_size=4, seeds=2), TRAJECTORY_STEPS, PERTURBED),
    "tp": (TPGRPO(group_size=4, balance="group"), TRAJECTORY_STEPS, COMPLETED),
    "vgpo": (VGPO(group_size=4, anchor=0.0), TRAJECTORY_STEPS, PROJECTED),
    "branch": (TREE, BRANCHES, LEAVES),
}
STD = {"step_std": dict.fromkeys(range(T - 1), 0.5)}


@pytest.mark.parametrize("name", CASES)
def test_equal_rewards_teach_nothing(name):
    algorithm, actions, keys = CASES[name]
    rng = torch.Generator().manual_seed(0)
    rounding = (6e-8 * torch.randint(0, 3, (len(keys),), generator=rng)).tolist()
    rewards = {k: 0.7 + r for k, r in zip(keys, rounding, strict=True)}
    assert (algorithm.advantages(made(actions, rewards, **STD)) == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_a_constant_on_all_rewards_changes_nothing(name):
    algorithm, actions, keys = CASES[name]
    if name == "vgpo":  # Weights are shares of values, so this holds where the rule shifts.
        keys_low = {k: v - 1 for k, v in random_rewards(keys).items()}
        lower = {k: v - 3 for k, v in keys_low.items()}
    else:
        keys_low = random_rewards(keys)
        lower = {k: v + 3 for k, v in keys_low.items()}
    before = algorithm.advantages(made(actions, keys_low, **STD))
    after = algorithm.advantages(made(actions, lower, **STD))
    assert before.abs().max() > 0.5
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_groups_do_not_see_each_other(name):
    algorithm, actions, keys = CASES[name]
    rewards = random_rewards(keys)
    before = algorithm.advantages(made(actions, rewards, **STD))
    own = [i for i, a in enumerate(actions) if a[0] == 0]
    alone = made([actions[i] for i in own], {k: v for k, v in rewards.items() if k[0] == 0}, **STD)
    assert torch.equal(algorithm.advantages(alone), before[own])


@pytest.mark.parametrize("name", CASES)
def test_all_failed_is_zero(name):
    algorithm, actions, keys = CASES[name]
    found = algorithm.advantages(made(actions, dict.fromkeys(keys, math.nan), **STD))
    assert (found == 0).all()


# Configuration.


@pytest.mark.parametrize(
    "algorithm",
    [
        G2RPO(granularities=(1, 4), transition=CPS()),
        TempFlowGRPO(seeds=3),
        TPGRPO(turning_points="plain", steps=RandomSteps()),
        TPGRPO(rivals="group", completion_steps=5, transition=CalibratedSDE(levels=(0.5, 0.25))),
        VGPO(negative="refuse", anchor=0.5),
        BranchGRPO(splits=(1, 2), group_size=9, children=3, depths=SlidingWindow()),
    ],
)
def test_they_are_their_own_configuration(algorithm):
    assert read(type(algorithm), to_table(algorithm)) == algorithm
    with pytest.raises(ConfigError, match=r"unknown key 'algorithm\.granularity'"):
        read(type(algorithm), {"granularity": 2}, "algorithm")


BAD = {
    "one branch per seed": (TempFlowGRPO(group_size=4, seeds=4), "at least 2 branches"),
    "seeds that do not divide": (
        TempFlowGRPO(group_size=9, seeds=4),
        "multiple of algorithm.seeds",
    ),
    "no seed": (TempFlowGRPO(group_size=4, seeds=0), "algorithm.seeds = 0"),
    "no branching step": (TempFlowGRPO(steps=AllSteps(skip_last=10)), "selects no step"),
    "g2rpo past the last step": (G2RPO(steps=Window(start=6, size=4)), "only steps 0 to 8"),
    "g2rpo alone": (G2RPO(group_size=1), "group_size must be at least 2"),
    "no granularity": (G2RPO(granularities=()), "different numbers from 1 to 9"),
    "granularity 0": (G2RPO(granularities=(0, 1)), "different numbers from 1 to 9"),
    "granularity twice": (G2RPO(granularities=(2, 2)), "different numbers from 1 to 9"),
    "granularity too long": (G2RPO(granularities=(1, 10)), "different numbers from 1 to 9"),
    "no noise": (G2RPO(transition=ODE()), "injects no noise"),
    "tp alone": (TPGRPO(group_size=1), "group_size must be at least 2"),
    "tp empty window": (TPGRPO(steps=Window(start=0, size=0)), "selects no step"),
    "tp completions": (TPGRPO(completion_steps=-1), "completion_steps must be at least 0, got -1"),
    "no levels": (TPGRPO(transition=CalibratedSDE()), "calibrate_noise' finds them"),
    "a level of 0": (TPGRPO(transition=CalibratedSDE(levels=(0.3, 0.0))), r"got \[0.3, 0.0\]"),
    "eta": (TPGRPO(transition=StepwiseSDE(eta=1.5)), "transition.eta must be in"),
    "tp by the batch": (TPGRPO(advantage=GroupAdvantage(std="batch")), "use 'group' or 'none'"),
    "vgpo alone": (VGPO(group_size=1), "group_size must be at least 2"),
    "vgpo by the batch": (VGPO(advantage=GroupAdvantage(std="batch")), "use 'group' or 'none'"),
    "vgpo discount": (VGPO(discount=0.0), r"discount must be in \(0, 1\], got 0.0"),
    "vgpo anchor": (VGPO(anchor=-0.1), "anchor must be at least 0, got -0.1"),
    "leaves": (BranchGRPO(splits=(0, 1, 2, 3), group_size=12), r"2 \*\* 4 = 16"),
    "an only child": (BranchGRPO(splits=(0, 1), children=1, group_size=1), "at least 2 children"),
    "no split": (BranchGRPO(splits=(), group_size=1), "ascending steps from 0 to 8"),
    "split at the end": (BranchGRPO(splits=(0, 3, 6, 9)), "ascending steps from 0 to 8"),
    "splits in disorder": (BranchGRPO(splits=(0, 6, 3, 8)), "ascending steps from 0 to 8"),
    "odd extremes": (BranchGRPO(splits=(0, 1, 2, 3), width="extremes", extremes=3), "must be even"),
    "extremes of all": (BranchGRPO(splits=(0, 1, 2, 3), extremes=4), "needs algorithm.width"),
    "branch by the batch": (BranchGRPO(advantage=GroupAdvantage(std="batch")), "use 'group'"),
    "steps without effect": (
        BranchGRPO(group_size=4, splits=(0, 1), between="ode", steps=Window()),
        "algorithm.steps has no effect",
    ),
    "shift ratio": (BranchGRPO(group_size=4, splits=(0, 1), shift_ratio=1.0), "below 1, got 1.0"),
    "shifted depths": (
        BranchGRPO(group_size=4, splits=(0, 1), shift_ratio=0.5, pruned=(2,)),
        "moves the splits",
    ),
    "pruned probabilities": (
        BranchGRPO(splits=(0, 1, 2, 3), fusion="path_probability", depths=Window()),
        "needs the steps at all splits",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name):
    algorithm, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        algorithm.check(10)


def test_defaults_are_sound_at_the_papers_number_of_steps():
    TempFlowGRPO().check(10)
    G2RPO().check(16)
    TPGRPO().check(10)
    VGPO().check(10)
    BranchGRPO().check(20)


# Cost, worked out by hand.


def counts(algorithm: Algorithm, num_steps: int) -> tuple[float, float, float]:
    """NFE, decodes, reward calls of the first iteration."""
    cost = algorithm.cost(num_steps, 0, Random(0))
    return cost.nfe, cost.decodes, cost.rewards


def test_costs_at_the_papers_settings():
    # 4 seeds to step 8, then 24 branches per step with 9, 8, ... 1 steps left.
    assert counts(TempFlowGRPO(), 10) == (4 * 9 + 24 * 45, 216, 216)
    # Steps left: 15 ... 8, in all 92; in twos 48 and in threes 33, less the forward that is shared.
    assert counts(G2RPO(), 16) == (8 + 12 * (92 + 40 + 25), 288, 288)
    # The paper's code takes 64 a sample: 10, 44 for the completions and 10 for the baseline.
    assert counts(TPGRPO(), 10) == (24 * (10 + 45), 240, 240)
    # DenseGRPO: T + T (T - 1) / 2 and T + 1 rewards a sample, of which those of the last step are none here.
    assert counts(TPGRPO(turning_points="none"), 10) == (24 * (10 + 45), 240, 240)
    # Stepwise: five steps, one of which shares the trajectory's forward pass; fewer at the end.
    lengths = [min(5, 10 - k) - 1 for k in range(1, 9)]
    five = TPGRPO(completion_steps=5, shared_noise=True, steps=Window(start=1, size=8))
    nfe = 2 + 24 * 8 + lengths[0] + 24 * sum(lengths[1:])
    assert counts(five, 10) == (nfe, 1 + 24 * 8, 1 + 24 * 8)
    assert counts(VGPO(), 10) == (240, 216, 216)
    assert counts(BranchGRPO(), 20) == (1 + 6 + 12 + 24 + 160, 16, 16)


def test_costs_of_what_is_shared():
    # From step 1: 2 alone, then 3 samples for 4 steps; baseline of 4; two completions of 3.
    shared: dict[str, Any] = {"group_size": 3, "shared_noise": True, "steps": Window(start=1)}
    assert counts(TPGRPO(**shared), T) == (2 + 12 + 4 + 9, 3 + 1 + 3, 7)
    assert counts(VGPO(**shared), T) == (2 + 12, 12, 12)
    # At step 4 of 6 all granularities are one.
    plan = BranchPlan(3, 1, FlowSDE(), [2, 4], (1, 2, 3))
    assert plan.cost(T) == Cost(5.0 + 3 * (3 + 1 + 0) + 3 * 1, 9.0 + 3, 12.0)
