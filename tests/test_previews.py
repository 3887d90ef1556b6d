"""Previews that choose the samples of a group, against a naive version, and what they refuse."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import DiffusionNFT, FlowGRPO, Matching
from flowgrpo.algorithms.previews import Previews, extreme_rows
from flowgrpo.config import ConfigError
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.steps import RandomSteps, Window
from flowgrpo.core.transitions import FlowSDE
from flowgrpo.data.experience import INITIAL
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.metrics import rollout_metrics
from tests.conftest import MakePolicy, sampling_of

T, G = 4, 3
GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(["a cube", "a red cat"])]
PREVIEWS = Previews(number=7, num_steps=2)
NFT = DiffusionNFT(group_size=G, previews=PREVIEWS, solver="euler")


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("sd3", sampling=sampling_of("sd3", num_steps=T))


@pytest.fixture
def scorer() -> Any:
    scorer = RewardScorer([Reward(model=f"{__name__}:brightness")], Failures())
    yield scorer
    scorer.close()


def test_best_and_worst_rows() -> None:
    nan = torch.nan
    rewards = torch.tensor([0.3, nan, 0.9, 0.1, 0.5, 0.9, 0.2])
    assert extreme_rows(rewards, 3).tolist() == [3, 5, 6]
    assert extreme_rows(rewards, 4).tolist() == [2, 3, 5, 6]
    # Failed previews are chosen only where there are too few others.
    assert extreme_rows(torch.tensor([nan, 0.5, nan, 0.1]), 3).tolist() == [0, 1, 3]
    assert extreme_rows(torch.full((5,), 0.5), 2).tolist() == [0, 4]


@pytest.mark.parametrize(
    "algorithm",
    [
        NFT,
        Matching(group_size=G, previews=PREVIEWS, num_times=2, solver="euler"),
        FlowGRPO(
            group_size=G, previews=PREVIEWS, transition=FlowSDE(), steps=Window(start=0, size=2)
        ),
    ],
)
def test_the_chosen_noises_are_those_of_a_naive_version(
    algorithm: Any, policy: PipelinePolicy, scorer: RewardScorer
) -> None:
    """Each preview by itself, with the pipeline's own grid of two steps; then each chosen noise."""
    random = Random(3).at("train", 0)
    scorer.keeps_media = True
    experience = algorithm.collect(policy, GROUPS, scorer, random, 0)
    assert experience.cost == algorithm.cost(T, 0, random)
    assert (experience.cost.nfe, experience.cost.rewards) == (G * T + 7 * 2, G + 7)
    candidates, a = experience.candidates, experience.actions
    assert candidates.sample.tolist() == [0, 1, 2] * 2
    for group in GROUPS:
        streams = [random.at("group", group.index, i) for i in range(7)]
        short = replace(policy.sampling, num_steps=2)
        seen = policy.images([group.prompt] * 7, SampleNoise(streams), short)
        order = seen.flatten(1).mean(1).argsort().tolist()
        chosen = sorted([*order[:2], order[-1]])
        (start,) = policy.run([group.prompt] * G, SampleNoise([streams[i] for i in chosen]), nodes=[0], decode=False)  # fmt: skip
        assert start.x is not None
        if algorithm.action_kind == "step":
            rows = ((a.group == group.index) & (a.step == 0)).nonzero().squeeze(1)
            torch.testing.assert_close(a.states[a.state[rows]], start.x, atol=1e-5, rtol=0)
        else:
            wanted = policy.images([group.prompt] * G, SampleNoise([streams[i] for i in chosen]))
            assert experience.media is not None
            torch.testing.assert_close(experience.media[candidates.group == group.index], wanted, atol=2e-4, rtol=0)  # fmt: skip
    scorer.keeps_media = False


def test_how_well_previews_predict_is_logged(policy: PipelinePolicy, scorer: RewardScorer) -> None:
    """With as many steps as the samples, previews are the samples: they agree, and spread more."""
    algorithm = replace(NFT, previews=Previews(number=6, num_steps=T))
    experience = algorithm.collect(policy, GROUPS, scorer, Random(3), 0)
    found = rollout_metrics(experience, lambda values: values)
    assert found["previews/agreement"] == pytest.approx(1, abs=1e-3)
    every = replace(algorithm, group_size=6, previews=Previews()).collect(policy, GROUPS, scorer, Random(3), 0)  # fmt: skip
    c, e = experience.candidates, every.candidates
    assert set(c.reward.tolist()) <= set(e.reward.tolist()) or torch.isclose(c.reward[:, None], e.reward, atol=1e-5).any(1).all()  # fmt: skip
    deviations = [c.reward[c.group == g].std(correction=0) for g in (0, 1)]
    assert found["previews/spread"] == pytest.approx(float(sum(deviations)) / 2)
    assert all(d > e.reward[e.group == g].std(correction=0) for g, d in enumerate(deviations))
    assert "previews/spread" not in rollout_metrics(every, lambda values: values)
    assert INITIAL not in experience.actions.step


def test_previews_are_drawn_with_the_guidance_of_the_samples(policy: PipelinePolicy, scorer: RewardScorer) -> None:  # fmt: skip
    """With as many steps and the same guidance, a preview is the sample."""
    previews = Previews(number=4, num_steps=T)
    algorithm = Matching(group_size=2, num_times=1, rollout_guidance=9.0, previews=previews)
    experience = algorithm.collect(policy, GROUPS, scorer, Random(3), 0)
    every = replace(algorithm, group_size=4, previews=Previews()).collect(policy, GROUPS, scorer, Random(3), 0)  # fmt: skip
    for group in (0, 1):
        chosen, drawn = (e.candidates.reward[e.candidates.group == group] for e in (experience, every))  # fmt: skip
        wanted = torch.stack([drawn.min(), drawn.max()])
        torch.testing.assert_close(chosen.sort().values, wanted, atol=1e-5, rtol=0)


def test_groups_with_steps_of_their_own_have_previews(policy: PipelinePolicy, scorer: RewardScorer) -> None:  # fmt: skip
    groups = [Group(i, Prompt("a cube")) for i in range(3)]
    steps = RandomSteps(count=1, first=0, last=T - 1)
    algorithm = FlowGRPO(group_size=2, previews=Previews(number=3, num_steps=1), steps=steps, steps_per="group")  # fmt: skip
    experience = algorithm.collect(policy, groups, scorer, Random(3), 0)
    assert len(experience.actions.step.unique()) > 1
    assert experience.by_group["previews/spread"].isfinite().all()
    assert experience.cost == algorithm.cost(T, 0, Random(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm={kind='matching', previews={number=24}}"], "above algorithm.group_size = 24, got 24"),
        (["algorithm={kind='matching', previews={number=96, num_steps=9}}"], "from 1 to sampling.num_steps = 8, got 9"),
        (["algorithm={kind='flow_grpo', shared_noise=true, previews={number=96}}", "loss={kind='clipped'}"], "set shared_noise = false"),
        (["algorithm={kind='flow_grpo', previews={number=96}}", "loss={kind='clipped'}", "train.staleness=1"], "uses the scores while it samples"),
        (["algorithm={kind='matching', previews={number=96}}", "sampling.sigmas=[1.0,0.9,0.8,0.7,0.6,0.4,0.3,0.1]"], "sampling.sigmas gives the grid for 8 steps"),
        (["algorithm={kind='dance_grpo', previews={number=96}}", "loss={kind='clipped'}"], "previews"),
    ],
)  # fmt: skip
def test_previews_that_cannot_be_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flowgrpo.load("quickstart", settings).check()
