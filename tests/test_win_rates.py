"""Pairs, verdicts and win rates, with judges as a user would write them."""

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from flowgrpo.algorithms.pref_grpo import rates_by_score
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.win_rates import pairs_of, verdicts_by_score, win_rates
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.pairs import PairwisePreference, PairwiseScorer, PointwisePreference
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward, RewardError

HERE = "tests.test_win_rates"
PROMPT = Prompt("a red cube")
calls: list[int] = []


def ladder(size: int) -> Tensor:
    """Images from dark to bright."""
    return torch.linspace(0, 1, size).view(size, 1, 1, 1).expand(size, 3, 4, 4).clone()


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


class Brighter:
    """Prefers the brighter one; ``bias`` is how much brighter the first looks for being first."""

    def __init__(self, bias: float = 0.0, silent: int = 0, broken: int = 0):
        self.bias, self.silent, self.broken = bias, silent, broken

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(len(prompts))
        if self.broken > 0:
            self.broken -= 1
            raise ConnectionError("no route")
        gap = first.flatten(1).mean(1) - second.flatten(1).mean(1) + self.bias
        verdicts = torch.where(gap == 0, 0.5, (gap > 0).float())
        if self.silent:
            # On pairs with the darkest image.
            silent = torch.minimum(first.flatten(1).mean(1), second.flatten(1).mean(1)) == 0
            verdicts[silent] = math.nan
        return verdicts


class Overconfident:
    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        return [2.0] * len(prompts)


MakeScorer = Callable[..., PairwiseScorer]


@pytest.fixture
def pairwise() -> Iterator[MakeScorer]:
    judges: list[RewardScorer] = []
    calls.clear()

    def make(failures: Failures | None = None, model: str = "Brighter", **settings: object) -> PairwiseScorer:  # fmt: skip
        kind = PairwisePreference(model=f"{HERE}:{model}", **settings)  # type: ignore[arg-type]
        rewards = [Reward(model=f"{HERE}:brightness")]
        judges.append(
            RewardScorer(rewards, failures or Failures(retries=0, wait=0.0, max_rate=1.0))
        )
        return PairwiseScorer(judges[-1], kind)

    yield make
    for scorer in judges:
        scorer.close()


def test_all_pairs_meet_once():
    assert pairs_of(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert len(pairs_of(8)) == 28


@pytest.mark.parametrize(("size", "opponents"), [(8, 1), (8, 2), (9, 3), (24, 4)])
def test_on_a_ring_all_meet_equally_many(size, opponents):
    pairs = pairs_of(size, opponents)
    counts = torch.bincount(torch.tensor(pairs).flatten(), minlength=size)
    assert counts.tolist() == [2 * opponents] * size
    assert len(set(pairs)) == len(pairs) == size * opponents
    assert pairs_of(5, 2) == pairs_of(5)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_a_transitive_judge_gives_a_ladder(size, pairwise: MakeScorer):
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    # In the background, as a rollout asks for them.
    rates = pairwise().submit(ladder(size)[order], PROMPT).result()
    assert rates.tolist() == pytest.approx([int(i) / (size - 1) for i in order])
    # Of decisive, transitive verdicts: |A| is at most sqrt(3 (G - 1) / (G + 1)).
    group = torch.zeros(size, dtype=torch.long)
    advantage = GroupAdvantage(epsilon=0.0)(rates, group)
    assert float(advantage.max()) == pytest.approx(math.sqrt(3 * (size - 1) / (size + 1)), rel=1e-4)


def test_the_papers_example():
    rates = win_rates(4, pairs_of(4), torch.tensor([0.0, 0, 0, 0, 1, 1]))
    assert rates.tolist() == pytest.approx([0, 2 / 3, 1, 1 / 3])
    group = torch.zeros(4, dtype=torch.long)
    found = GroupAdvantage(epsilon=0.0)(rates, group)
    assert found.tolist() == pytest.approx([-1.34, 0.45, 1.34, -0.45], abs=0.005)


def test_ties_are_half_a_win_and_all_ties_teach_nothing(pairwise: MakeScorer):
    media = ladder(3)[[0, 2, 2]]
    assert pairwise().rates(media, PROMPT).tolist() == pytest.approx([0, 0.75, 0.75])
    rates = pairwise().rates(media[[1, 1, 1, 1]], PROMPT)
    assert rates.tolist() == [0.5] * 4
    group = torch.zeros(4, dtype=torch.long)
    assert GroupAdvantage()(rates, group).tolist() == [0.0] * 4


def test_a_pair_without_verdict_counts_for_neither(pairwise: MakeScorer):
    verdicts = torch.tensor([math.nan, 1.0, 0.0])  # 0-1 none, 0 beats 2, 2 beats 1
    assert win_rates(3, pairs_of(3), verdicts).tolist() == [1.0, 0.0, 0.5]
    silent = pairwise(options={"silent": 1})
    rates = silent.rates(ladder(4), PROMPT)
    assert math.isnan(rates[0])  # the darkest met nobody
    assert rates[1:].tolist() == pytest.approx([0, 0.5, 1])
    assert (silent.asked, silent.missing) == (6, 3)


def test_a_judge_that_fails_too_often_stops_the_run_with_the_count(pairwise: MakeScorer):
    silent = pairwise(Failures(retries=0, wait=0.0, max_rate=0.4), options={"silent": 1})
    silent.rates(ladder(4), PROMPT)
    with pytest.raises(
        RewardError, match=r"3 of 6 comparisons got no verdict from .*max_rate = 0\.4"
    ):
        silent.check_rate()
    stopping = pairwise(Failures(retries=0, wait=0.0, then="stop"), options={"silent": 1})
    with pytest.raises(RewardError, match="gave no verdict on 3 of 6 pairs"):
        stopping.rates(ladder(4), PROMPT)


def test_only_what_is_missing_is_asked_again(pairwise: MakeScorer, monkeypatch: pytest.MonkeyPatch):
    silent = pairwise(Failures(retries=1, wait=0.0, max_rate=1.0), options={"silent": 1})
    silent.rates(ladder(4), PROMPT)
    assert calls == [6, 3]
    calls.clear()
    waits: list[float] = []
    monkeypatch.setattr("flowgrpo.rewards.pairs.time.sleep", waits.append)
    mended = pairwise(Failures(retries=3, wait=0.5), options={"broken": 2})
    assert mended.rates(ladder(4), PROMPT).isfinite().all()
    assert mended.missing == 0
    mended.check_rate()
    assert waits == [0.5, 1.0]  # before the retries only, and twice as long each time


def test_swapping_takes_away_the_advantage_of_a_place(pairwise: MakeScorer):
    media = ladder(5)[[3, 1, 4, 0, 2]]
    # So biased that the first always wins.
    biased = pairwise(options={"bias": 9.0}).rates(media, PROMPT)
    assert biased.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert pairwise(options={"bias": 9.0}, swap=True).rates(media, PROMPT).tolist() == [0.5] * 5
    # Biased a little: what is decided in both orders stays, the rest becomes a tie.
    mixed = pairwise(options={"bias": 0.3}, swap=True).rates(media, PROMPT)
    brightness_order = [3, 1, 4, 0, 2]
    wanted = [
        sum(1.0 if a - b > 1 else 0.5 if abs(a - b) <= 1 else 0.0 for b in brightness_order if b != a) / 4
        for a in brightness_order
    ]  # fmt: skip
    assert mixed.tolist() == pytest.approx(wanted)
    assert PairwisePreference(model="x", swap=True).comparisons(8) == 56
    assert PairwisePreference(model="x", opponents=2).comparisons(8) == 16


def test_nonsense_is_refused(pairwise: MakeScorer):
    with pytest.raises(RewardError, match=r"one number in \[0, 1\], or NaN, for each of 3 pairs"):
        pairwise(model="Overconfident").rates(ladder(3), PROMPT)
    with pytest.raises(ValueError, match="has no method 'compare'"):
        pairwise(model="brightness")
    with pytest.raises(ValueError, match=r"weight must be above 0, got 0\.0"):
        PairwisePreference(model="x", weight=0.0).check()
    with pytest.raises(ValueError, match="opponents must be at least 0"):
        PairwisePreference(model="x", opponents=-1).check()
    with pytest.raises(
        ValueError, match=r"unknown algorithm\.preference\.model 'pick_scor'; did you"
    ):
        PairwisePreference(model="pick_scor").check()
    with pytest.raises(ValueError, match="has no 'Brightr'"):
        PairwisePreference(model=f"{HERE}:Brightr").check()
    with pytest.raises(ValueError, match="tie_margin must be at least 0"):
        PointwisePreference(tie_margin=-1.0).check()
    with pytest.raises(ValueError, match="must be the name of one of the rewards: a, b"):
        PointwisePreference().chosen(["a", "b"])
    assert PointwisePreference().chosen(["a"]) == "a"


def test_scores_can_be_compared_with_a_margin():
    scores = torch.tensor([0.30, 0.34, 0.50, math.nan])
    assert verdicts_by_score(scores, [(0, 1), (1, 0), (2, 0)], 0.0).tolist() == [0, 1, 1]
    assert verdicts_by_score(scores, [(0, 1), (2, 0)], 0.05).tolist() == [0.5, 1]
    assert verdicts_by_score(scores, [(0, 3)], 0.0).isnan().all()
    groups = torch.tensor([7, 7, 7, 7, 2, 2])
    both = torch.cat([scores, torch.tensor([-5.0, -9.0])])
    rates = rates_by_score(both, groups, 0.05)
    assert rates.nan_to_num(-1).tolist() == pytest.approx([0.25, 0.25, 1, -1, 1, 0])
    # Only the order matters.
    torch.testing.assert_close(rates_by_score(both * 3 + 1, groups, 0.15), rates, equal_nan=True)


class Counted:
    """Prefers the first; notes the brightness of both, and its number of calls."""

    def __init__(self):
        self.pairs: list[list[tuple[float, float]]] = []

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        light = [m.flatten(1).mean(1).tolist() for m in (first, second)]
        self.pairs.append([(round(a, 3), round(b, 3)) for a, b in zip(*light, strict=True)])
        assert all(p is PROMPT for p in prompts)
        return [1.0] * len(prompts)


def test_a_judge_gets_the_pairs_in_parts_of_32_and_swapped(pairwise: MakeScorer) -> None:
    subject = pairwise(model="Counted", swap=True)
    found = subject.rates(ladder(9), PROMPT)
    assert found.tolist() == [0.5] * 9
    sizes = [len(p) for p in subject.model.pairs]  # type: ignore[attr-defined]
    assert sizes == [32, 4, 32, 4]
    first, _, swapped, _ = subject.model.pairs  # type: ignore[attr-defined]
    assert first[:2] == [(0.0, 0.125), (0.0, 0.25)]
    assert swapped == [(b, a) for a, b in first]
    assert subject.asked == 72
    assert 0 < subject.scorer.seconds < 60
    ring = pairwise(model="Counted", opponents=1)
    ring.rates(ladder(5), PROMPT)
    assert ring.model.pairs == [[(0.0, 0.25), (0.0, 1.0), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]]  # type: ignore[attr-defined]


class Wrong:
    """What a judge must not return."""

    def __init__(self, values: Sequence[float]):
        self.values = values

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(1)
        return torch.tensor(self.values)


@pytest.mark.parametrize("values", [[0.5, 1.01, 0.5], [0.5, -0.01, 0.5], [0.5, 0.5], [[0.5]] * 3])
def test_verdicts_of_a_wrong_kind_are_refused_at_once(values: list[float], pairwise: MakeScorer) -> None:  # fmt: skip
    subject = pairwise(Failures(retries=3, wait=0.0), model="Wrong", options={"values": values})
    with pytest.raises(RewardError, match=r"one number in \[0, 1\], or NaN, for each of 3 pairs"):
        subject.rates(ladder(3), PROMPT)
    assert calls == [1]
    fine = pairwise(model="Wrong", options={"values": [0.0, 1.0, math.nan]})
    assert fine.rates(ladder(3), PROMPT).tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize(("rate", "stops"), [(0.5, False), (0.49, True)])
def test_the_largest_rate_of_missing_verdicts_is_allowed(rate: float, stops: bool, pairwise: MakeScorer) -> None:  # fmt: skip
    silent = pairwise(Failures(retries=0, wait=0.0, max_rate=rate), options={"silent": 1})
    silent.rates(ladder(4), PROMPT)
    if not stops:
        return silent.check_rate()
    with pytest.raises(RewardError, match="3 of 6 comparisons"):
        silent.check_rate()


def test_settings_of_preferences_at_their_limits(pairwise: MakeScorer) -> None:
    PairwisePreference(model=f"{HERE}:Brighter", weight=1e-9, opponents=0).check()
    PointwisePreference(weight=1e-9, tie_margin=0.0).check()
    with pytest.raises(ValueError, match=r"weight must be above 0, got 0\.0"):
        PointwisePreference(weight=0.0).check()
    assert PointwisePreference(reward="b").chosen(["a", "b"]) == "b"
    with pytest.raises(ValueError, match="must be the name of one of the rewards: a"):
        PointwisePreference(reward="b").chosen(["a"])
    assert PairwisePreference(model="x").comparisons(4) == 6
    # Loaded once for each scorer, with its options.
    subject = pairwise(options={"bias": 0.25})
    again = PairwiseScorer(subject.scorer, subject.settings)
    assert again.model is subject.model
    assert subject.model.bias == 0.25  # type: ignore[attr-defined]
