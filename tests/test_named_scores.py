"""Reward models that return several named scores, and what else a reward must not return or do."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.rewards import reward_sizes
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward, RewardError

MEDIA = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, 2, 2).clone()
PROMPTS = [Prompt("a")] * 4
HERE = "tests.test_named_scores:"
calls: list[int] = []


class Aspects:
    """Returns two scores; the first ``fails`` calls have no ``dark`` for the last sample."""

    ignores_prompt = True

    def __init__(self, fails: int = 0):
        self.fails = fails

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        calls.append(len(media))
        bright = media.flatten(1).mean(1)
        dark = 1 - bright
        if len(calls) <= self.fails:
            dark[-1] = math.nan
        return {"bright": bright, "dark": dark}


class WithMethod:
    """Has one score of its own, and named ones by its method."""

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.zeros(len(media))

    def named_scores(self, media: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, list[float]]:
        return {"ones": [1.0] * len(media)}


def pair(media: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, int]]:
    return media.flatten(1).mean(1), {}


def in_place(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    media[0].mul_(0.5)
    return media.flatten(1).mean(1)


@pytest.fixture(autouse=True)
def _anew() -> None:
    calls.clear()


def scorer(*rewards: Reward) -> RewardScorer:
    return RewardScorer(rewards, Failures(wait=0.0), batch=2)


def named(score: str, model: str = "Aspects", **options: int) -> Reward:
    return Reward(model=HERE + model, score=score, options=options)


def test_rewards_of_one_model_share_its_calls() -> None:
    both = scorer(named("dark"), named("bright"), Reward(model=HERE + "WithMethod"), named("ones", "WithMethod"))  # fmt: skip
    scores = both.submit(MEDIA, PROMPTS).result()
    both.close()
    assert calls == [2, 2], "one call for each part of the batch"
    assert list(scores.raw) == ["dark", "bright", "WithMethod", "ones"]
    assert torch.allclose(scores.raw["dark"] + scores.raw["bright"], torch.ones(4))
    assert scores.raw["bright"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert (scores.raw["WithMethod"].tolist(), scores.raw["ones"].tolist()) == ([0] * 4, [1] * 4)


def test_other_options_are_another_model_and_a_retry_is_another_call() -> None:
    both = scorer(named("dark", fails=1), named("bright", fails=1))
    scores = both.score(MEDIA, PROMPTS)
    assert calls == [2, 2, 2], "the first part, again for the missing score of both, and the second"
    assert all(bool(s.isfinite().all()) for s in scores.raw.values())
    both.close()
    calls.clear()
    apart = scorer(named("dark"), named("bright", fails=0))
    apart.score(MEDIA, PROMPTS)
    apart.close()
    assert calls == [2, 2, 2, 2]


def test_a_batch_is_not_mistaken_for_the_one_before() -> None:
    one = scorer(named("bright"), named("dark"))
    first = one.score(MEDIA, PROMPTS).raw["bright"]
    second = one.score(MEDIA / 2, PROMPTS).raw["bright"]
    one.close()
    assert torch.allclose(first, 2 * second)
    assert calls == [2, 2, 2, 2]


def test_a_shared_model_is_counted_once_in_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowgrpo.memory.rewards._size", lambda reward, device: 7)
    rewards = [named("dark"), named("bright"), named("dark", fails=1), Reward(model="x"), Reward(model="x", name="y")]  # fmt: skip
    rewards[2] = Reward(model=rewards[2].model, score="dark", name="other", options={"fails": 1})
    sizes = reward_sizes(rewards, "cpu")
    assert sizes == {"dark": 7, "bright": 0, "other": 7, "x": 7, "y": 7}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Reward(model=HERE + "Aspects"), r"'Aspects' returned several scores by name \(bright, dark\); choose one with the key 'score'"),
        (named("darc"), r"no score 'darc'; did you mean 'dark'\?; it returned bright, dark"),
        (named("x", "pair"), "'x' has score = 'x', and its model returned no named scores but tuple"),
        (Reward(model=HERE + "pair"), "'pair' returned a tuple of Tensor, dict; return the scores alone, 4 numbers"),
        (Reward(model=HERE + "in_place"), r"'in_place' changed the media .* in place.*work on media\.clone\(\)"),
        (named("score", "Learns"), "'score' learns during the run, and has no named scores"),
    ],
)  # fmt: skip
def test_what_a_reward_must_not_return_or_do(reward: Reward, message: str) -> None:
    with pytest.raises((RewardError, ValueError), match=message):
        RewardScorer([reward], Failures(retries=0)).score(MEDIA.clone(), PROMPTS)


class Learns(WithMethod):
    def update(self, media: Tensor, prompts: Sequence[Prompt]) -> Mapping[str, float]:
        return {}

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None: ...
