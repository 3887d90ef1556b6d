"""Losses in the learner: each with actions that a real policy took."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flowgrpo.algorithms import FlowGRPO
from flowgrpo.config import Config, Model, Prompts, Run, Train
from flowgrpo.core.random import Random
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS, DDIM, FlowSDE
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.losses import ClippedLoss, Loss, guard_weight, guarded_log_ratio
from flowgrpo.rewards.scorer import Reward, RewardScorer
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_objectives"
T, G = 4, 2
ITERATION = 4
RANDOM = Random(1).at("train", ITERATION)
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]
FLOW = FlowGRPO(group_size=G, transition=FlowSDE())
FAST = FlowGRPO(group_size=G, transition=CPS(), steps=Window(start=1, size=2), shared_noise=True)
DIFFUSION = FlowGRPO(group_size=G, transition=DDIM())


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


Learn = Callable[..., tuple[Learner, Experience]]


@pytest.fixture
def learn(make_policy: MakePolicy, accelerator: Accelerator) -> Learn:
    """A learner on a fresh policy, and what the policy collected for it."""

    def make(name: str, algorithm: FlowGRPO, loss: Loss, **train: object) -> tuple[Learner, Experience]:  # fmt: skip
        settings = {"iterations": 10, "groups": 2, "lr": 1e-3, "max_grad_norm": 1e9} | train
        config = Config(
            model=Model(path=""),
            algorithm=algorithm,
            loss=loss,
            rewards=(Reward(model=f"{HERE}:brightness"),),
            prompts=Prompts(train="", held_out=""),
            train=Train(**settings),  # type: ignore[arg-type]
            run=Run(folder=""),
        )
        policy = make_policy(name, sampling=sampling_of(name, num_steps=T), with_reference=True)
        learner = Learner(policy, config, accelerator)
        scorer = RewardScorer(config.rewards)
        experience = algorithm.collect(policy, GROUPS, scorer, RANDOM, ITERATION)
        scorer.close()
        return learner, experience

    return make


def gradients_of(learner: Learner) -> list[list[Tensor]]:
    """Filled with the gradients of each optimizer step as it happens."""
    taken: list[list[Tensor]] = []
    learner.adam.register_step_pre_hook(
        lambda *_: taken.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    )
    return taken


CASES = [("sd3", FLOW), ("sd3", FAST), ("sd15", DIFFUSION)]
GUARD = ClippedLoss(ratio="guard", clip_range=0.1)


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_means_are_kept_only_for_a_loss_that_will_need_them(name, algorithm, learn: Learn):
    _, plain = learn(name, algorithm, ClippedLoss(), updates=2)
    _, on_policy = learn(name, algorithm, GUARD)
    _, kept = learn(name, algorithm, GUARD, updates=2)
    assert plain.actions.old_mean is None
    assert on_policy.actions.old_mean is None
    a = kept.actions
    assert a.old_mean is not None
    # The means are those of the steps: x_next is standard normal around them.
    for row in range(len(a)):
        one = a.select(torch.tensor([row]))
        assert one.old_mean is not None
        assert torch.equal(one.old_mean[0], a.old_mean[row])
        noise = (a.x_next[row] - a.old_mean[row]).flatten()
        assert 0.5 < float(noise.std() / (a.x_next - a.old_mean)[a.step == a.step[row]].std()) < 2
    with pytest.raises(ValueError, match="only some of these actions have old_mean"):
        Actions.concatenate([a, replace(a, old_mean=None)])


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_guard_gradient_is_that_of_every_action_alone(name, algorithm, learn: Learn):
    learner, experience = learn(name, algorithm, GUARD)
    advantages = algorithm.advantages(experience)
    a, loss = experience.actions, torch.zeros(())
    for i in range(len(a)):
        prompt = GROUPS[int(a.group[i])].prompt
        record = learner.policy.replay(
            [prompt], a.states[a.state[i]][None], int(a.step[i]), experience.transition
        )
        old = record.gaussian.mean.detach()
        change = guarded_log_ratio(
            record.gaussian.mean, old, a.x_next[i][None], record.gaussian.std
        )
        weight = guard_weight(experience.transition, record.interval)
        loss = loss - advantages[i] * torch.exp(change[0]) * weight / len(a)
    expected = torch.autograd.grad(loss, learner.parameters, allow_unused=True)
    taken = gradients_of(learner)
    metrics = learner.update(experience, advantages, RANDOM)
    assert metrics["ratio/deviation"] == 0
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    assert scale > 0
    for got, want in zip(taken[0], expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, atol=1e-3 * scale, rtol=0)


@pytest.mark.parametrize("loss", [GUARD, ClippedLoss(clip="kl", clip_range=1e-12)])
def test_kept_means_serve_the_second_update(loss, learn: Learn):
    learner, experience = learn("sd3", FLOW, loss, updates=2)
    metrics = learner.update(experience, FLOW.advantages(experience), RANDOM)
    # The first update is on-policy; the second is not, and its ratios are of the kept means.
    assert metrics["log_prob/noise"] < 1e-5 < metrics["ratio/deviation"]
    assert (metrics["ratio/clip_fraction"] > 0) is (loss.clip == "kl")


def test_an_algorithm_that_keeps_no_means_is_named(learn: Learn):
    learner, experience = learn("sd3", FLOW, GUARD, updates=2)
    bare = replace(experience, actions=replace(experience.actions, old_mean=None))
    with pytest.raises(ValueError, match="algorithm FlowGRPO keeps no means of its steps"):
        learner.update(bare, FLOW.advantages(experience), RANDOM)
