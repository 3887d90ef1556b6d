"""Settings of algorithms, guards and losses at their limits: the last value that is allowed, and the next."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flowgrpo.algorithms import (
    FIND,
    G2RPO,
    TPGRPO,
    VGPO,
    BranchGRPO,
    DanceGRPO,
    DiffusionNFT,
    FlowGRPO,
    Matching,
    MixGRPO,
    PrefGRPO,
    TempFlowGRPO,
)
from flowgrpo.algorithms.base import AlgorithmBase, CreditView, check_interface
from flowgrpo.algorithms.dance_grpo import extremes
from flowgrpo.algorithms.guard import Guard
from flowgrpo.core.multi_reward_advantages import PerLoss
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, SlidingWindow, Window
from flowgrpo.core.transitions import CPS, DDIM, DanceSDE, FlowSDE
from flowgrpo.data.experience import Cost
from flowgrpo.losses.base import remaining_share
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.losses.group_matching import CRDLoss, DGPOLoss
from flowgrpo.losses.matching import MatchingLoss
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.rewards.pairs import PointwisePreference

RANDOM = Random(0)


def allowed(subject: Any, problem: str, *arguments: Any) -> None:
    if not problem:
        subject.check(*arguments)
        return
    with pytest.raises(ValueError, match=problem):
        subject.check(*arguments)


TREE: dict[str, Any] = {"splits": (0, 3), "group_size": 4}


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        (TempFlowGRPO(group_size=8, seeds=4), ""),
        (TempFlowGRPO(group_size=8, seeds=3), "multiple of algorithm.seeds = 3"),
        (G2RPO(group_size=2, granularities=(9,)), ""),
        (G2RPO(group_size=2, granularities=(1, 9)), ""),
        (VGPO(group_size=2, discount=1.0, anchor=0.0, anchor_steps=0), ""),
        (VGPO(discount=1.01), "discount must be in"),
        (VGPO(anchor_steps=-1), "anchor_steps must be at least 0, got -1"),
        (TPGRPO(group_size=2), ""),
        (FIND(group_size=2), ""),
        (FIND(group_size=1), "group_size must be at least 2, got 1"),
        (FIND(baseline="learned", advantage=GroupAdvantage(clip=2.0)), ""),
        (FIND(baseline="learned", advantage=GroupAdvantage(ddof=1)), "only clip has an effect"),
        (BranchGRPO(splits=(0, 3), group_size=4), ""),
        (BranchGRPO(splits=(3, 8), group_size=4), ""),
        (BranchGRPO(splits=(0, 9), group_size=4), "from 0 to 8"),
        (BranchGRPO(splits=(-1, 3), group_size=4), "from 0 to 8"),
        (BranchGRPO(splits=(3, 3), group_size=4), "ascending"),
        (BranchGRPO(splits=(1,), group_size=3, children=3), ""),
        (BranchGRPO(**TREE, width="extremes", extremes=2), ""),
        (BranchGRPO(**TREE, width="extremes", extremes=4), ""),
        (BranchGRPO(**TREE, width="extremes", extremes=6), "from 2 to group_size = 4"),
        (BranchGRPO(**TREE, width="extremes", extremes=0), "must be even, and from 2"),
        (BranchGRPO(**TREE, pruned=(0, 5)), ""),
        (BranchGRPO(**TREE, pruned=(5, 0)), "ascending steps from 0"),
        (BranchGRPO(**TREE, pruned=(5, 5)), "ascending steps from 0"),
        (BranchGRPO(**TREE, pruned=(-1, 5)), "ascending steps from 0"),
        (BranchGRPO(**TREE, pruned_every=-1), "must be at least 0"),
        (BranchGRPO(**TREE, pruned_until=-1), "must be at least 0"),
        (BranchGRPO(**TREE, fusion="path_probability"), ""),
        (BranchGRPO(**TREE, fusion="path_probability", pruned=(5,)), "may prune"),
        (DanceGRPO(group_size=4, best_of=4, timestep_fraction=1.0), ""),
        (DanceGRPO(group_size=4, best_of=-2), "best_of must be even"),
        (DanceGRPO(timestep_fraction=1.01), r"in \(0, 1\]"),
        (DiffusionNFT(timestep_fraction=1.0), ""),
        (DiffusionNFT(timestep_fraction=0.0), r"in \(0, 1\]"),
        (Matching(num_times=10), ""),
        (Matching(num_times=11), "num_times must be from 1 to 10"),
        (Matching(num_times=5, time_range=(0.5, 1.0)), ""),
        (Matching(num_times=6, time_range=(0.5, 1.0)), "num_times must be from 1 to 5"),
        (Matching(time_range=(0.5, 0.5)), "0 <= low < high <= 1"),
        (Matching(time_range=(-0.1, 0.5)), "0 <= low < high <= 1"),
        (Matching(time_range=(0.1, 1.1)), "0 <= low < high <= 1"),
        (MixGRPO(flash=1.0), ""),
        (MixGRPO(flash=0.0), r"flash must be in \(0, 1\]"),
        (MixGRPO(flash=1.1), r"flash must be in \(0, 1\]"),
        (MixGRPO(flash_counts="nodes"), "has no effect with algorithm.flash = 1"),
        (MixGRPO(flash_counts="nodes", flash=0.5), ""),
        (MixGRPO(solver="dpm_2m_continued", steps=SlidingWindow(size=1)), "use a window of at least 2"),
        (MixGRPO(solver="dpm_2m_continued", steps=SlidingWindow(size=2)), ""),
        (MixGRPO(solver="dpm_2m_continued", steps=SlidingWindow(size=1), shared_noise=False), ""),
        (PrefGRPO(preference=PointwisePreference(tie_margin=-0.1)), "tie_margin must be at least 0"),
        (PrefGRPO(preference=PointwisePreference(), timestep_fraction=0.0), r"in \(0, 1\]"),
        (PrefGRPO(preference=PointwisePreference()), ""),
        (FlowGRPO(transition=FlowSDE(noise_level=0.0)), "injects no noise"),
        (FlowGRPO(steps=AllSteps(skip_last=9)), ""),
        (FlowGRPO(steps=Window(start=8, size=1)), ""),
    ],
)  # fmt: skip
def test_algorithms_with_ten_steps(algorithm: Any, problem: str) -> None:
    allowed(algorithm, problem, 10)


def test_the_steps_after_a_window_and_the_steps_that_are_trained() -> None:
    """Ten steps, a window of 0 to 3: six are left, of which flash takes a share, at least one."""
    found = {
        (flash, counts): MixGRPO(flash=flash, flash_counts=counts).plan(10, 0, RANDOM).num_after  # type: ignore[arg-type]
        for flash in (1.0, 0.5, 0.2, 0.01)
        for counts in ("steps", "nodes")
        if flash < 1 or counts == "steps"
    }
    assert found == {
        (1.0, "steps"): None, (0.5, "steps"): 3, (0.5, "nodes"): 2, (0.2, "steps"): 1, (0.2, "nodes"): 1,
        (0.01, "steps"): 1, (0.01, "nodes"): 1,
    }  # fmt: skip
    tree = BranchGRPO(splits=(1, 4), group_size=4, steps=Window(start=0, size=4))
    assert tree.trained_steps(10, 0, RANDOM) == [1, 2, 3, 4]
    moving = replace(tree, pruned=(2, 4), pruned_every=5, pruned_until=1)
    assert [moving.trained_steps(10, i, RANDOM) for i in (0, 4, 5, 50)] == [[1, 3], [1, 3], [2, 4], [2, 4]]  # fmt: skip
    still = replace(tree, pruned=(2,))
    assert still.trained_steps(10, 50, RANDOM) == [1, 3, 4]
    # Two evaluations, then three with two branches, then five with four.
    assert tree.cost(10, 0, RANDOM) == Cost(2.0 + 2 * 3 + 4 * 5, 4.0, 4.0)
    assert [tree.branch_of(leaf, step) for leaf, step in ((3, 0), (3, 1), (3, 3), (3, 4), (1, 1))] == [0, 2, 2, 3, 0]  # fmt: skip
    late = DiffusionNFT()
    assert late.trained_steps(10, 0, RANDOM) == []


@pytest.mark.parametrize(
    ("number", "kept"), [(2, [0.0, 3.0, 0.0, -2.0, 0.0]), (4, [1.0, 3.0, 0.0, -2.0, -1.0])]
)
def test_only_the_best_and_the_worst_are_kept(number: int, kept: list[float]) -> None:
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    advantage = torch.tensor([1.0, 3.0, 0.0, -2.0, -1.0, 0.5, -0.5])
    assert extremes(advantage, group, number).tolist() == [*kept, 0.5, -0.5]
    both = torch.stack([advantage, torch.zeros(7)], 1)
    assert extremes(both, group, number)[:, 0].tolist() == [*kept, 0.5, -0.5]


def test_what_an_algorithm_says_of_itself_by_default() -> None:
    class Bare(AlgorithmBase):
        group_size = 5

    bare = Bare()
    assert (bare.needs_binary_rewards, bare.needs_baseline, bare.scales_steps) == (False, False, False)  # fmt: skip
    assert CreditView(rivals=5).action_sample(3, 7) == 3
    with pytest.raises(NotImplementedError, match="Bare defines no plan"):
        bare.plan(10, 0, RANDOM)
    with pytest.raises(ValueError, match="Bare has no transition, collect, advantages, check; inherit"):  # fmt: skip
        check_interface(bare)
    check_interface(FlowGRPO())
    for algorithm in (TempFlowGRPO(), G2RPO(), BranchGRPO()):
        with pytest.raises(ValueError, match="'per_loss' is for whole samples"):
            replace(algorithm, advantage=PerLoss()).check(20)
    assert TempFlowGRPO().scales_steps is True
    assert TempFlowGRPO(noise_weights=False).scales_steps is False
    assert FIND(baseline="learned").needs_baseline is True


WEIGHTS = {"trained": 1.0, "watched": 0.0}


@pytest.mark.parametrize(
    ("guard", "kl_coef", "problem"),
    [
        ({}, 0.0, ""),
        ({"kl": "uncertain"}, 0.1, ""),
        ({"kl": "uncertain"}, 0.0, "set loss.kl_coef above 0"),
        ({"kl": "uncertain", "measured": ("watched",)}, 0.1, ""),
        ({"kl": "uncertain", "measured": ("trained",)}, 0.1, r"'trained' is no reward with weight 0 \(known: watched\)"),
        ({"measured": ("watched",)}, 0.1, "needs guard.kl = 'uncertain'"),
        ({"share": 1.0}, 0.1, ""),
        ({"share": 0.0}, 0.1, "above 0 and at most 1"),
        ({"share": 1.01}, 0.1, "above 0 and at most 1"),
        ({"kl": "uncertain", "share": 0.2}, 0.1, ""),
        ({"kl": "uncertain", "share": 0.02}, 0.1, ""),
        ({"kl": "uncertain", "share": 0.21}, 0.1, "from 0.02 to 0.2 if it adapts"),
        ({"kl": "uncertain", "share": 0.019}, 0.1, "from 0.02 to 0.2 if it adapts"),
        ({"kl": "uncertain", "share": 0.5, "adapt": False}, 0.1, ""),
        ({"reset_every": 1}, 0.0, "set loss.kl_coef above 0"),
        ({"reset_above": 0.1}, 0.0, "set loss.kl_coef above 0"),
        ({"reset_every": 1, "reset_above": 0.1}, 0.1, ""),
        ({"reset_every": -1}, 0.1, "must be at least 0"),
        ({"reset_above": -0.1}, 0.1, "must be at least 0"),
        ({"features": "dino"}, 0.1, "guard.features needs guard.novelty"),
        ({"features": "dino", "novelty": "distance"}, 0.0, ""),
        ({"features_options": {"a": 1}, "novelty": "distance"}, 0.0, "needs guard.features"),
    ],
)  # fmt: skip
def test_guards(guard: dict[str, Any], kl_coef: float, problem: str) -> None:
    allowed(Guard(**guard), problem, WEIGHTS, kl_coef)
    if guard == {"kl": "uncertain"}:
        with pytest.raises(ValueError, match="there are none; add one with weight = 0"):
            Guard(**guard).check({"trained": 1.0}, 0.1)


def test_when_a_guard_does_something() -> None:
    on = [{"kl": "uncertain"}, {"novelty": "relative"}, {"reset_every": 1}, {"reset_above": 0.1}]
    assert [Guard(**g).is_active for g in ({}, *on)] == [False, True, True, True, True]  # type: ignore[arg-type]
    assert [Guard(**g).resets for g in ({}, *on)] == [False, False, False, True, True]  # type: ignore[arg-type]


# Losses.


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (ClippedLoss(clip_range=1e-12, clip_high=1e-12, kl_coef=0.0), ""),
        (ClippedLoss(clip_range=math.inf), "clip_range must be at least"),
        (ClippedLoss(kl="velocity", kl_coef=1e-9), ""),
        (ClippedLoss(clip="kl"), ""),
        (NFTLoss(beta=1e-12, advantage_scale=1e-12, kl_coef=0.0), ""),
        (NFTLoss(beta=math.nan), "beta must be at least"),
        (MatchingLoss(power=1.0, soft_clip=0.0, proximal_coef=0.0), ""),
        (MatchingLoss(power=1.01), "power must be at most 1"),
        (DGPOLoss(clip_range=0.0, kl_coef=0.0, sample_old_after=0), ""),
        (CRDLoss(beta=1e-12, kl_coef=0.0), ""),
    ],
)
def test_losses(loss: Any, problem: str) -> None:
    allowed(loss, problem)


def test_which_losses_belong_to_which_actions() -> None:
    sde = FlowSDE()
    ClippedLoss().check_algorithm("step", sde)
    ClippedLoss().check_algorithm("initial_noise", sde)
    for form in ({"ratio": "guard"}, {"clip": "kl"}, {"kl": "flow_grpo", "kl_coef": 0.1}):
        with pytest.raises(ValueError, match="has no denoising step"):
            ClippedLoss(**form).check_algorithm("initial_noise", sde)  # type: ignore[arg-type]
        ClippedLoss(**form).check_algorithm("step", sde)  # type: ignore[arg-type]
    for loss in (NFTLoss(), MatchingLoss(), DGPOLoss(), CRDLoss()):
        loss.check_algorithm("noised_sample", sde)
        for kind in ("step", "initial_noise"):
            with pytest.raises(ValueError, match="actions of the kind 'noised_sample'"):
                loss.check_algorithm(kind, sde)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'step' or 'initial_noise', and the algorithm collects 'noised"):  # fmt: skip
        ClippedLoss().check_algorithm("noised_sample", sde)
    for transition in (CPS(), DDIM()):
        with pytest.raises(ValueError, match=f"the variance of '{transition.kind}' has no such"):
            ClippedLoss(kl="flow_grpo", kl_coef=0.1).check_algorithm("step", transition)
        ClippedLoss(kl_coef=0.1).check_algorithm("step", transition)
    ClippedLoss(kl="flow_grpo", kl_coef=0.1).check_algorithm("step", DanceSDE())


def test_what_losses_on_noised_samples_need() -> None:
    def needs(loss: Any) -> dict[str, Any]:
        plain = type(loss.needs)()
        found = {k: v for k, v in vars(loss.needs).items() if v != getattr(plain, k)}
        assert found.pop("action_kinds") == ("noised_sample",)
        share = found.pop("old_policy")
        return found | {"share": round(share(100), 6)}

    assert needs(MatchingLoss()) == {"old_policy_is_copied": True, "share": 0}
    assert needs(MatchingLoss(trail="third", kl_coef=0.1)) == {"reference": True, "all_actions": True, "share": 0.1}  # fmt: skip
    assert needs(MatchingLoss(trail="half", sampler="trained", proximal_coef=1.0)) == {"old_policy_samples_from": math.inf, "single_update": True, "all_actions": True, "share": 0.1}  # fmt: skip
    assert needs(MatchingLoss(sampler="trained")) == {"old_policy_is_copied": True, "share": 0}
    assert needs(DGPOLoss()) == {"old_policy_samples_from": 200, "reference": True, "whole_groups": True, "group_term": True, "share": 0.1}  # fmt: skip
    assert needs(DGPOLoss(kl_coef=0.0)) == {"old_policy_samples_from": 200, "reference": True, "whole_groups": True, "group_term": True, "share": 0.1}  # fmt: skip
    assert needs(DGPOLoss(kl_coef=0.0, compare_with="old", sample_old_after=0)) == {"whole_groups": True, "group_term": True, "share": 0.1}  # fmt: skip
    assert needs(DGPOLoss(compare_with="old", sample_old_after=0)) == {"reference": True, "whole_groups": True, "group_term": True, "share": 0.1}  # fmt: skip
    assert needs(CRDLoss()) == {"old_policy_samples_from": math.inf, "reference": True, "whole_groups": True, "group_term": True, "share": 0.75}  # fmt: skip
    assert needs(CRDLoss(kl_coef=0.0, sampler="old")) == {
        "whole_groups": True,
        "group_term": True,
        "share": 0.75,
    }
    assert needs(NFTLoss(kl_coef=0.0)) == {"share": 0.1}
    assert needs(NFTLoss(kl_coef=0.0, zero_advantage="train")) == {"all_actions": True, "share": 0.1}  # fmt: skip


def test_shares_of_the_old_policy_by_hand() -> None:
    table = {
        "none": [0, 0, 0, 0], "third": [0, 0.1, 0.3, 0.3], "half": [0, 0.1, 0.5, 0.5], "late": [0, 0.1875, 0.999, 0.999],
        "rising": [0.25, 0.75, 0.999, 0.999],
    }  # fmt: skip
    for trail, shares in table.items():
        found = [remaining_share(trail, n) for n in (0, 100, 500, 9999)]  # type: ignore[arg-type]
        assert found == pytest.approx(shares)
