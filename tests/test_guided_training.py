"""Samples that are drawn with one guidance scale, and training at others."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import Matching
from flowgrpo.config import ConfigError, Train
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.group_matching import CRDLoss, DGPOLoss
from flowgrpo.losses.matching import MatchingLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.group_terms import whole_groups
from flowgrpo.training.learner import Learner
from flowgrpo.training.replay import Batch
from tests.conftest import MakePolicy, sampling_of

GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(["a cube", "a red cat"])]
ALGORITHM = Matching(
    group_size=3, num_times=1, rollout_guidance=3.0, trained_guidance=(1.0, 2.0, 3.0)
)


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture(scope="module")
def collected(make_policy: MakePolicy) -> tuple[PipelinePolicy, Experience]:
    sampling = replace(sampling_of("sd3", num_steps=4), guidance_scale=1.0)
    policy = make_policy("sd3", sampling=sampling, with_reference=True)
    scorer = RewardScorer([Reward(model=f"{__name__}:brightness")], Failures())
    experience = ALGORITHM.collect(policy, GROUPS, scorer, Random(3), 0)
    scorer.close()
    return policy, experience


def rows_of(actions: Actions, scale: float) -> Actions:
    assert actions.guidance is not None
    return actions.select((actions.guidance == scale).nonzero().squeeze(1))


def test_samples_have_the_guidance_of_rollouts(collected: tuple[PipelinePolicy, Experience]) -> None:  # fmt: skip
    policy, experience = collected
    a = rows_of(experience.actions, 1.0)
    prompts = [GROUPS[int(g)].prompt for g in a.group]
    noise = SampleNoise([Random(3).at("group", int(g), int(s)) for g, s in zip(a.group, a.sample, strict=True)])  # fmt: skip
    for scale, agrees in ((3.0, True), (1.0, False)):
        sampling = replace(policy.sampling, guidance_scale=scale)
        drawn = [r.x for r in policy.run(prompts, noise, decode=False, sampling=sampling, solver="dpm_2m")]  # fmt: skip
        assert drawn[0] is not None
        assert torch.allclose(a.x_next, drawn[0], atol=1e-5) == agrees


def test_each_noised_sample_is_trained_at_each_scale(
    collected: tuple[PipelinePolicy, Experience], accelerator: Accelerator
) -> None:
    """A prediction with guidance g is ``u + g (c - u)``, so those of three scales are on a line."""
    policy, experience = collected
    a = experience.actions
    assert torch.bincount(a.group * 3 + a.sample).tolist() == [3] * 6
    # The states before and after the three actions of a sample are stored once.
    assert len(a.states) == 12
    train = Train(iterations=1, groups=2, train_batch=4, lr=0.0)
    learner = Learner(policy, train, MatchingLoss(kl_coef=0.5), accelerator)
    everything = torch.ones(len(a), dtype=torch.bool)
    found: dict[float, list[Tensor]] = {}
    for batch, _ in learner.replay.batches(experience, torch.ones(len(a)), everything):
        assert batch.guidance is not None
        (scale,) = batch.guidance.unique().tolist()
        with torch.no_grad():
            found.setdefault(scale, []).append(learner.replay.record(experience, batch).prediction.output)  # fmt: skip
    one, two, three = (torch.cat(found[scale]) for scale in (1.0, 2.0, 3.0))
    assert len(one) == 6
    assert (two - one).abs().max() > 1e-3
    torch.testing.assert_close(three - one, 2 * (two - one), atol=1e-5, rtol=1e-4)
    # The whole update, with the drift on states that three actions share.
    assert learner.update(experience, ALGORITHM.advantages(experience), Random(0))["kl/velocity"] == 0  # fmt: skip


@pytest.mark.parametrize("kind", [MatchingLoss, CRDLoss])
def test_the_reference_has_its_own_guidance(kind: type[MatchingLoss | CRDLoss], collected: tuple[PipelinePolicy, Experience], accelerator: Accelerator) -> None:  # fmt: skip
    """Without guidance in training, the loss's KL at the start is the distance to the guided model."""
    policy, experience = collected
    plain = replace(experience, actions=rows_of(experience.actions, 1.0))
    # CRD weighs the KL by how good a sample is; with this weight all samples count alike.
    loss = kind(kl_coef=1.0 if kind is MatchingLoss else 1e-4, reference_guidance=3.0)
    train = Train(iterations=1, groups=2, train_batch=6, lr=0.0)
    learner = Learner(policy, train, loss, accelerator)
    metrics = learner.update(plain, ALGORITHM.advantages(plain), Random(0))
    one, three = (
        learner.replay.record(experience, rows_of(experience.actions, scale)).prediction.output
        for scale in (1.0, 3.0)
    )
    assert metrics["loss/kl"] == pytest.approx(
        float((three - one).detach().square().mean()), rel=1e-4
    )
    assert metrics["loss/kl"] > 1e-5
    # The metric of drift compares with the model before training, at the guidance of training.
    assert metrics["kl/velocity"] == 0


def test_groups_are_compared_at_one_guidance_scale(
    collected: tuple[PipelinePolicy, Experience], accelerator: Accelerator
) -> None:
    """A group is whole in a batch of one scale; a divided one is joined with its parts of that scale."""
    policy, experience = collected
    loss, advantages = DGPOLoss(compare_with="old", kl_coef=0.0), ALGORITHM.advantages(experience)
    everything = torch.ones(len(experience.actions), dtype=torch.bool)
    for train_batch, number in ((6, 3), (2, 12)):
        train = Train(iterations=1, groups=2, train_batch=train_batch, lr=0.0)
        replay = Learner(policy, train, loss, accelerator).replay
        batches = [Batch(*b) for b in replay.batches(experience, advantages, everything)]
        found = whole_groups(replay, experience, batches, True)
        assert len(found) == number
        assert all(w is None if train_batch == 6 else len(w.term) == 3 for w in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.trained_guidance=[1.0, 3.0, 1.0]"], "names a scale twice"),
        (["algorithm.rollout_guidance=1e9"], "must be a number from"),
        (["loss.reference_guidance=3.0", "loss.kl_coef=0.0"], "needs loss.kl_coef above 0"),
        (["loss.reference_guidance=1e9", "loss.kl_coef=1.0"], "reference_guidance must be from"),
        (
            ["loss.kind=crd", "loss.reference_guidance=3.0", "loss.kl_coef=0.0"],
            "needs loss.kl_coef above 0",
        ),
    ],
)
def test_settings_that_cannot_train_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        flowgrpo.load("quickstart", settings).check()
