"""Any kind of advantage with any step-level algorithm: against slow, obvious versions, over ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgrpo.algorithms import G2RPO, TPGRPO, VGPO, BranchGRPO, TempFlowGRPO
from flowgrpo.core.multi_reward_advantages import GDPO, LogTamed, PerLoss, PerReward
from flowgrpo.core.scores import Scores
from flowgrpo.core.single_reward_advantages import BetaAdvantage, GroupAdvantage, VirtualBest
from flowgrpo.core.steps import AllSteps
from flowgrpo.core.transitions import FlowSDE
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group, Prompt

T, GROUPS, G = 5, 3, 4
Key = tuple[int, ...]
"""Group, sample and step; of candidates also the granularity."""
Numbers = Mapping[Key, float]
WEIGHTS = {"a": 0.5, "b": 2.0, "measured": 0.0}
STD = {0: 0.2, 1: 0.3, 2: 0.5, 3: 0.6}

STEPS = [(g, i, k) for g, i, k in product(range(GROUPS), range(G), range(T - 1))]
TREE = [(g, i, k) for g in range(GROUPS) for k, w in ((0, 2), (1, 2), (2, 1), (3, 1)) for i in range(0, G, w)]  # fmt: skip
PERTURBED = [(*a, j) for a in STEPS for j in (1, 2)]
STATES = [(g, i, k, 1) for g, i, k in product(range(GROUPS), range(G), (-1, 0, 1, 2, T - 1))]
PROJECTED = [(g, i, k, 0) for g, i, k in product(range(GROUPS), range(G), (0, 1, 2, T - 1))]
LEAVES = [(g, i, T - 1, 1) for g, i in product(range(GROUPS), range(G))]

EXACT: dict[str, Any] = {"epsilon": 0.0, "clip": 50.0}
KINDS = {
    "group": GroupAdvantage(**EXACT),
    "per_reward": PerReward(ddof=0, **EXACT),
    "gdpo": GDPO(ddof=0, **EXACT),
    "log_tamed": LogTamed(**EXACT),
    "virtual_best": VirtualBest(best=4.0, **EXACT),
}


def experience_of(
    actions: Sequence[Key], scores: Mapping[str, Numbers], rank: Sequence[int] | None = None
) -> Experience:
    """The experience of the rank that has these groups; of the only one by default."""
    keys = list(scores["a"])

    def candidates(own: Sequence[Key]) -> Candidates:
        group, sample, step, granularity = torch.tensor(own).unbind(1)
        values = {n: torch.tensor([s[k] for k in own]) for n, s in scores.items()}
        reward = sum((WEIGHTS[n] * v for n, v in values.items() if WEIGHTS[n]), torch.zeros(()))
        return Candidates(group, sample, step, granularity, Scores(values, reward, WEIGHTS))

    mine = range(GROUPS) if rank is None else rank
    a = torch.tensor([k for k in actions if k[0] in mine])
    empty = torch.zeros(len(a), 1)
    return Experience(
        groups=[Group(g, Prompt("x")) for g in mine],
        transition=FlowSDE(),
        actions=Actions.between(
            empty, torch.arange(len(a)), empty, a[:, 2], torch.zeros(len(a)), a[:, 0], a[:, 1]
        ),
        candidates=candidates([k for k in keys if k[0] in mine]),
        cost=Cost(0.0, 0.0, 0.0),
        diversity=torch.zeros(1),
        duplicates=torch.zeros(1),
        step_std=STD,
        gathered=None if rank is None else candidates(keys),
    )


def with_reward(experience: Experience, name: str) -> Experience:
    """The experience with one score, of weight 1, as its reward."""
    c = experience.candidates
    scores = Scores(c.scores.raw, c.scores.raw[name], {name: 1.0})
    return replace(experience, candidates=replace(c, scores=scores))


def drawn(keys: Sequence[Key], flat: bool = False) -> dict[str, dict[Key, float]]:
    """Scores of two rewards, and of one that is only measured. Some fail; group 1 may be flat."""
    rng = torch.Generator().manual_seed(4)
    scores: dict[str, dict[Key, float]] = {}
    for name, scale in (("a", 1.0), ("b", 0.1), ("measured", 9.0)):
        values = torch.rand(len(keys), generator=rng).pow(3).mul(scale).tolist()
        scores[name] = dict(zip(keys, values, strict=True))
        if flat:
            scores[name] |= {k: 0.5 for k in keys if k[0] == 1}
    for name, place in (("a", 3), ("b", len(keys) - 2)):
        scores[name][keys[place]] = math.nan
    scores["measured"][keys[5]] = math.nan
    return scores


# The slow versions: from a number of each candidate to a number of each cell that is compared.


def branches(numbers: Numbers) -> Numbers:
    return numbers


def increments(numbers: Numbers) -> Numbers:
    found = {}
    for g, i in product(range(GROUPS), range(G)):
        states = [numbers[g, i, k, 1] for k in (-1, 0, 1, 2, T - 1)]
        found |= {(g, i, k): b - a for k, (a, b) in enumerate(pairwise(states))}
    return found


def discounted(numbers: Numbers) -> Numbers:
    found = {}
    for g, i in product(range(GROUPS), range(G)):
        rewards = [numbers[g, i, min(k, T - 1) if k != T - 2 else T - 1, 0] for k in range(T)]
        for k in range(T):
            found[g, i, k] = sum(0.9 ** (n - k) * rewards[n] for n in range(k, T))
            if any(map(math.isnan, rewards)):
                found[g, i, k] = math.nan
    return found


def leaves_below(numbers: Numbers) -> Numbers:
    found = {}
    for g, i, k in TREE:
        below = [numbers[g, n, T - 1, 1] for n in range(i, i + (2 if k < 2 else 1))]
        known = [v for v in below if not math.isnan(v)]
        found[g, i, k] = fmean(known) if known else math.nan
    return found


def standing(kind: str, scores: Mapping[str, Numbers], derive: Callable[[Numbers], Numbers], rivals: Callable[[Key], Key]) -> Numbers:  # fmt: skip
    """The kind's advantage of each cell among its rivals; 0 where it has no number."""
    failed = {k for k in scores["a"] if math.isnan(scores["a"][k] + scores["b"][k])}
    whole = {n: {k: math.nan if k in failed else v for k, v in scores[n].items()} for n in "ab"}

    def summed(parts: Mapping[str, Numbers]) -> Numbers:
        return {k: sum(WEIGHTS[n] * parts[n][k] for n in "ab") for k in parts["a"]}

    def compared(cells: Numbers) -> Numbers:
        groups: dict[Key, list[float]] = {}
        for k, v in cells.items():
            groups.setdefault(rivals(k), []).extend([] if math.isnan(v) else [v])
        found = {}
        for k, v in cells.items():
            known = groups[rivals(k)]
            if kind == "virtual_best":
                known = [*known, 4.0] if len(known) > 1 else known
            flat = len(known) < 2 or max(known) - min(known) < 1e-9
            found[k] = 0.0 if flat or math.isnan(v) else (v - fmean(known)) / pstdev(known)
        return found

    if kind in ("group", "virtual_best"):
        return compared(derive(summed(whole)))
    if kind == "log_tamed":
        known = {n: [v for v in whole[n].values() if not math.isnan(v)] for n in "ab"}
        ratio = {n: pstdev(v) / (fmean(v) + 1e-6) for n, v in known.items()}
        tamed = {
            n: {k: math.log1p(v) if ratio[n] > fmean(ratio.values()) else v for k, v in r.items()}
            for n, r in whole.items()
        }
        return compared(derive(summed(tamed)))
    cells = {n: derive(r) for n, r in whole.items()}
    total = summed({n: compared(c) for n, c in cells.items()})
    if kind == "gdpo":
        known = [v for k, v in total.items() if not math.isnan(cells["a"][k])]
        middle, size = fmean(known), pstdev(known)
        total = {k: 0.0 if v == 0 else (v - middle) / size for k, v in total.items()}
    return total


CASES: dict[str, tuple[Any, list[Key], list[Key], Any]] = {
    "g2rpo": (
        G2RPO(group_size=G, granularities=(1, 2), steps=AllSteps()),
        STEPS,
        PERTURBED,
        branches,
    ),
    "tempflow": (TempFlowGRPO(group_size=G, seeds=2), STEPS, PERTURBED[::2], branches),
    "tp": (TPGRPO(group_size=G, turning_points="none"), STEPS, STATES, increments),
    "vgpo": (VGPO(group_size=G, discount=0.9, anchor=0.0), STEPS, PROJECTED, discounted),
    "branch": (BranchGRPO(group_size=G, splits=(0, 2)), TREE, LEAVES, leaves_below),
}
ALLOWED = [(c, k) for c, k in product(CASES, KINDS) if (c, k) != ("tp", "virtual_best")]


def wanted_of(name: str, kind: str, scores: Mapping[str, Numbers]) -> Numbers:
    _, actions, _, derive = CASES[name]
    if name in ("g2rpo", "tempflow"):
        seeds = 2 if name == "tempflow" else 1
        cells = standing(kind, scores, derive, lambda k: (k[0], k[1] * seeds // G, *k[2:]))
        mean = fmean(STD.values())
        weight = {k: STD[k] / mean if name == "tempflow" else 1.0 for k in STD}
        return {a: weight[a[2]] * sum(cells.get((*a, j), 0.0) for j in (1, 2)) for a in actions}
    if name == "vgpo" and kind == "virtual_best":
        # On the scale of rewards: a perfect trajectory has the best one after every step.
        length = [sum(0.9 ** (n - k) for n in range(k, T)) for k in range(T)]
        cells = standing(kind, scores, lambda n: {k: v / length[k[2]] for k, v in discounted(n).items()}, lambda k: (k[0], k[2]))  # fmt: skip
    else:
        cells = standing(kind, scores, derive, lambda k: (k[0], k[2]))
    if name != "vgpo":
        return {a: cells[a] for a in actions}
    total = {k: 0.5 * scores["a"][k] + 2 * scores["b"][k] for k in scores["a"]}
    if kind == "log_tamed":
        total = {k: 0.5 * math.log1p(scores["a"][k]) + 2 * scores["b"][k] for k in total}
        other = {k: 0.5 * scores["a"][k] + 2 * math.log1p(scores["b"][k]) for k in total}
        spread = {n: torch.tensor([v for k, v in scores[n].items() if not math.isnan(total[k])]) for n in "ab"}  # fmt: skip
        ratio = {n: float(v.std(correction=0) / v.mean()) for n, v in spread.items()}
        total = total if ratio["a"] > ratio["b"] else other
    value = discounted(total)
    found = {}
    for g, i, k in actions:
        own = [value[g, i, n] for n in range(T)]
        found[g, i, k] = 0.0 if math.isnan(own[0]) else own[k] / fmean(own) * cells[g, i, k]
    return found


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("name", "kind"), ALLOWED)
def test_each_kind_compares_what_the_algorithm_makes_of_scores(
    name: str, kind: str, flat: bool
) -> None:
    algorithm, actions, keys, _ = CASES[name]
    algorithm = replace(algorithm, advantage=KINDS[kind])
    algorithm.check(T)
    scores = drawn(keys, flat)
    found = algorithm.advantages(experience_of(actions, scores))
    wanted = wanted_of(name, kind, scores)
    torch.testing.assert_close(
        found, torch.tensor([wanted[a] for a in actions]), atol=2e-4, rtol=1e-4
    )
    assert found.abs().max() > 0.5


@pytest.mark.parametrize(("name", "kind"), ALLOWED)
def test_the_number_of_ranks_changes_nothing(name: str, kind: str) -> None:
    algorithm, actions, keys, _ = CASES[name]
    algorithm = replace(algorithm, advantage=KINDS[kind])
    scores = drawn(keys)
    whole = algorithm.advantages(experience_of(actions, scores))
    for rank in ([0, 1], [2]):
        own = torch.tensor([a[0] in rank for a in actions])
        part = algorithm.advantages(experience_of(actions, scores, rank))
        torch.testing.assert_close(part, whole[own], atol=1e-6, rtol=1e-6)


def test_balancing_counts_the_turning_points_of_all_ranks() -> None:
    scores = drawn(STATES)
    plain = TPGRPO(group_size=G, turning_points="plain", advantage=replace(KINDS["group"], std="none"))  # type: ignore[type-var] # fmt: skip
    balanced, free = (
        replace(plain, balance=b).advantages(experience_of(STEPS, scores))
        for b in ("batch", "none")
    )
    assert not torch.equal(balanced, free)
    for rank in ([0], [1, 2]):
        own = torch.tensor([a[0] in rank for a in STEPS])
        part = plain.advantages(experience_of(STEPS, scores, rank))
        assert torch.equal(part, balanced[own])


def test_turns_are_those_that_are_credited() -> None:
    scores = drawn(STATES)
    algorithm = TPGRPO(group_size=G, turning_points="plain", balance="group")
    experience = experience_of(STEPS, scores)
    unbalanced = replace(algorithm, balance="none").turns(experience)
    turns = algorithm.turns(experience)
    assert 0 < turns.values.sum() < unbalanced.values.sum()
    assert replace(algorithm, turning_points="none").turns(experience).values.sum() == 0
    # Each reward by itself turns at other places.
    each = replace(algorithm, advantage=PerReward(), balance="none").turns(experience)
    assert not torch.equal(each.values, unbalanced.values)


def test_beta_compares_branches_of_binary_rewards() -> None:
    keys = [(*a, 1) for a in STEPS]
    binary = {k: float(torch.rand(1, generator=torch.Generator().manual_seed(i)) > 0.5) for i, k in enumerate(keys)}  # fmt: skip
    experience = experience_of(STEPS, {"a": binary})
    experience = with_reward(experience, "a")
    for algorithm in (G2RPO(group_size=G, granularities=(1,)), TempFlowGRPO(group_size=G, seeds=2)):
        found = replace(algorithm, advantage=BetaAdvantage()).advantages(experience)  # type: ignore[type-var]
        assert (found != 0).any()
        won = torch.tensor([binary[k] for k in keys]) == 1
        assert bool((found[won] >= 0).all())
        assert bool((found[~won] <= 0).all())


SENSELESS: dict[str, tuple[Any, Any, str]] = {
    "tp beta": (TPGRPO(), BetaAdvantage(), "differences of rewards are compared"),
    "vgpo beta": (VGPO(), BetaAdvantage(), "values are compared"),
    "branch beta": (CASES["branch"][0], BetaAdvantage(), "rewards of branches are compared"),
    "tp best": (TPGRPO(), VirtualBest(), "of which there is no largest"),
    "tp batch": (TPGRPO(), PerReward(std="batch"), "use 'group' or 'none'"),
    "tp per loss": (TPGRPO(), PerLoss(), "use 'per_reward'"),
    "g2rpo per loss": (G2RPO(steps=TPGRPO().steps), PerLoss(), "but here branches from one state"),
    "vgpo uncentred": (VGPO(), LogTamed(centre="none", std="none"), "uncentred rewards"),
    "vgpo batch": (VGPO(), LogTamed(std="batch"), "use 'group' or 'none'"),
    "branch gdpo by paths": (
        replace(CASES["branch"][0], fusion="path_probability"),
        GDPO(),
        "knows the branches of one process only",
    ),
    "negative epsilon": (G2RPO(steps=TPGRPO().steps), PerReward(epsilon=-1.0), "epsilon must be at least 0"),
    "no clip": (VGPO(), GDPO(clip=math.nan), "clip must be above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SENSELESS)
def test_senseless_kinds_are_refused_with_the_reason(name: str) -> None:
    algorithm, kind, message = SENSELESS[name]
    with pytest.raises(ValueError, match=message):
        replace(algorithm, advantage=kind).check(10)


def test_every_kind_refuses_a_clip_of_0_and_a_negative_epsilon() -> None:
    for kind in (*KINDS.values(), BetaAdvantage(), PerLoss()):
        for clip in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=r"advantage\.clip must be above 0"):
                replace(kind, clip=clip).check()  # type: ignore[type-var]
        if hasattr(kind, "epsilon"):
            replace(kind, epsilon=0.0).check()  # type: ignore[type-var]
            with pytest.raises(ValueError, match=r"advantage\.epsilon must be at least 0"):
                replace(kind, epsilon=-1e-9).check()  # type: ignore[type-var]


def test_a_perfect_group_and_a_hopeless_one() -> None:
    """With a virtual best, a state from which every branch fails is left."""
    keys = [(*a, 1) for a in STEPS]
    scores = {k: 0.0 if k[2] == 0 else 1.0 for k in keys}
    experience = with_reward(experience_of(STEPS, {"a": scores}), "a")
    algorithm = G2RPO(group_size=G, granularities=(1,), advantage=VirtualBest(epsilon=0.0))
    found: Tensor = algorithm.advantages(experience)
    first = torch.tensor([a[2] == 0 for a in STEPS])
    torch.testing.assert_close(found[first], torch.full((12,), -0.5))
    assert (found[~first] == 0).all()
