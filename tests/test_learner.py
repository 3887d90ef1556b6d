"""Optimizer steps against plain arithmetic: groups, norms, spikes, rates, averages, checkpoints."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flowgrpo.algorithms import FlowGRPO
from flowgrpo.config import Train
from flowgrpo.core.errors import DivergenceError
from flowgrpo.core.random import Random
from flowgrpo.core.scores import Scores
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS, Prediction, Step
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import Loss, LossInputs, LossMetric, LossNeeds, LossOutputs
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.divergence import check_drift
from flowgrpo.training.learner import Learner
from flowgrpo.training.metrics import UpdateStatistics, rollout_metrics
from flowgrpo.training.optimizer import restore_moments
from flowgrpo.training.replay import Batch, Replay
from flowgrpo.training.shares import Shares
from flowgrpo.training.stored_outputs import StoredOutputs
from tests.conftest import MakePolicy, sampling_of

RANDOM = Random(3).at("train", 2)
TEXTS = ("a red cube", "two dogs", "a cat", "a bus", "a tree", "one hat")
GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(TEXTS)]
# One stochastic step, so that an optimizer step is one batch.
ALGORITHM = FlowGRPO(group_size=2, transition=CPS(), steps=Window(start=1, size=1))


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Scripted(Loss):
    """Gradients of given norms, one per optimizer step; keeps what it receives and the gradients."""

    kind: str = "scripted"
    all_actions: bool = True
    with_old: bool = False
    norms: ClassVar[list[float]] = []
    received: ClassVar[list[LossInputs]] = []
    gradients: ClassVar[list[list[Tensor]]] = []
    followed: ClassVar[list[int]] = []
    parameters: ClassVar[list[Tensor]] = []

    @property
    def needs(self) -> LossNeeds:
        old = self.remaining if self.with_old else None
        return LossNeeds(all_actions=self.all_actions, old_policy=old)

    def remaining(self, num_updates: int) -> float:
        Scripted.followed.append(num_updates)
        return 0.25

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        step = len(Scripted.received)
        Scripted.received.append(inputs)
        loss = inputs.per_action(inputs.policy.prediction.output.flatten(1).mean(1))
        found = torch.autograd.grad(
            loss.mean(), Scripted.parameters, retain_graph=True, allow_unused=True
        )
        plain = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(Scripted.parameters, found, strict=True)
        ]
        size = torch.cat([g.flatten() for g in plain]).norm()
        factor = Scripted.norms[step] / float(size)
        Scripted.gradients.append([factor * g for g in plain])
        return LossOutputs(factor * loss)


@pytest.fixture(autouse=True)
def _anew() -> None:
    for kept in (Scripted.received, Scripted.gradients, Scripted.followed):
        kept.clear()


@pytest.fixture(scope="module")
def shared_policy(make_policy: MakePolicy) -> tuple[PipelinePolicy, Experience]:
    """A policy and what it collected. Its weights are set back before each test."""
    sampling = sampling_of("sd3", num_steps=3)
    policy = make_policy("sd3", sampling=sampling, with_reference=True)
    scorer = RewardScorer([Reward(model="tests.test_learner:brightness")])
    experience = ALGORITHM.collect(policy, GROUPS, scorer, RANDOM, 2)
    scorer.close()
    return policy, experience


Make = Callable[..., Learner]


@pytest.fixture
def make(shared_policy: tuple[PipelinePolicy, Experience], accelerator: Accelerator) -> Iterator[Make]:  # fmt: skip
    policy, _ = shared_policy
    assert policy.trainable is not None
    start = {k: p.detach().clone() for k, p in policy.trainable.parameters.items()}

    def learner(loss: Loss | None = None, *, norms: Sequence[float] = (1.0,) * 9, **train: object) -> Learner:  # fmt: skip
        Scripted.norms[:] = norms
        settings = {"iterations": 10, "groups": 6, "lr": 1e-2, "monitor_states": 0} | train
        found = Learner(policy, Train(**settings), loss or Scripted(), accelerator)  # type: ignore[arg-type]
        Scripted.parameters[:] = found.parameters
        return found

    yield learner
    policy.trainable.load(start)
    for parameter in policy.trainable.parameters.values():
        parameter.grad = None


@pytest.fixture
def experience(shared_policy: tuple[PipelinePolicy, Experience]) -> Experience:
    return shared_policy[1]


def ones(experience: Experience) -> Tensor:
    return torch.ones(len(experience.actions))


# Which actions an optimizer step trains on.


def test_each_optimizer_step_trains_on_its_own_groups(make: Make, experience: Experience) -> None:
    learner = make(updates=3)
    learner.update(experience, ones(experience), RANDOM)
    generator = RANDOM.generator("updates")
    first, second = (torch.randperm(3, generator=generator).tolist() for _ in range(2))
    assert first != second
    # One of each three consecutive groups.
    expected = [[first.index(i), 3 + second.index(i)] for i in range(3)]
    groups = [sorted(set(inputs.group.tolist())) for inputs in Scripted.received]
    assert groups == expected
    assert [inputs.first_update for inputs in Scripted.received] == [True, False, False]
    for inputs in Scripted.received:
        pairs = sorted(zip(inputs.group.tolist(), inputs.sample.tolist(), strict=True))
        assert pairs == [(g, s) for g in sorted(set(inputs.group.tolist())) for s in (0, 1)]
    other = RANDOM.at("another iteration")
    learner = make(updates=3)
    Scripted.received.clear()
    learner.update(experience, ones(experience), other)
    assert groups != [sorted(set(inputs.group.tolist())) for inputs in Scripted.received]


def test_each_epoch_trains_on_everything_against_the_policy_that_sampled(
    make: Make, experience: Experience
) -> None:
    make(updates=3, epochs=2).update(experience, ones(experience), RANDOM)
    groups = [set(inputs.group.tolist()) for inputs in Scripted.received]
    assert set().union(*groups[:3]) == set().union(*groups[3:]) == set(range(6))
    assert groups[:3] != groups[3:], "each epoch divides the groups anew"
    assert [inputs.first_update for inputs in Scripted.received] == [True, *[False] * 5]
    make(updates=3).update(experience, ones(experience), RANDOM)
    assert [set(inputs.group.tolist()) for inputs in Scripted.received[6:]] == groups[:3]

    old = {(int(g), int(s)): float(p) for g, s, p in zip(experience.actions.group, experience.actions.sample, experience.actions.old_log_prob, strict=True)}  # fmt: skip
    for number, inputs in enumerate(Scripted.received[:6]):
        keys = zip(inputs.group.tolist(), inputs.sample.tolist(), strict=True)
        assert inputs.old_log_prob.tolist() == [old[key] for key in keys]
        change = inputs.gaussian.log_prob(inputs.x_next) - inputs.old_log_prob
        assert (change.abs().max() > 1e-4) == (number > 0)
    # The rate falls to a tenth over all optimizer steps.
    assert make(updates=3, epochs=2, schedule="linear").optimizer.learning_rate(
        30
    ) == pytest.approx(0.55e-2)


@pytest.mark.parametrize("all_actions", [True, False])
def test_actions_without_advantage_count_in_the_mean(all_actions: bool, make: Make, experience: Experience) -> None:  # fmt: skip
    """Half of the actions are left out, unless the loss needs them; the mean stays one over all."""
    advantages = ones(experience)
    advantages[experience.actions.group < 3] = 0
    learner = make(Scripted(all_actions=all_actions), norms=[1.0], max_grad_norm=1e9)
    taken: list[list[Tensor]] = []
    learner.optimizer.adam.register_step_pre_hook(
        lambda *_: taken.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    )
    metrics = learner.update(experience, advantages, RANDOM)
    (inputs,) = Scripted.received
    assert len(inputs.advantage) == (12 if all_actions else 6)
    assert set(inputs.group.tolist()) == ({*range(6)} if all_actions else {3, 4, 5})
    expected = 1.0 if all_actions else 0.5
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-4)
    for got, want in zip(taken[0], Scripted.gradients[0], strict=True):
        torch.testing.assert_close(got, expected * want, atol=1e-6, rtol=1e-4)


# Several advantages of one action.


def test_an_action_with_two_advantages_has_two_losses(make: Make, experience: Experience) -> None:
    loss = ClippedLoss(clip_range=1e-3)
    learner = make(loss, lr=5e-2)
    learner.update(experience, ones(experience), RANDOM)  # ratios leave the clip range
    actions = experience.actions
    both = torch.stack(
        [torch.linspace(-1, 2, len(actions)), torch.linspace(2, -3, len(actions))], 1
    )
    inputs = learner.replay.inputs(experience, Batch(actions, both), False)
    ratio = (inputs.gaussian.log_prob(inputs.x_next) - inputs.old_log_prob).exp()[:, None]
    each = torch.maximum(-both * ratio, -both * ratio.clamp(1 - 1e-3, 1 + 1e-3))
    statistics = UpdateStatistics(loss.metrics)
    found = learner._loss(inputs, [both[:, 1]], statistics)
    torch.testing.assert_close(found, each.sum())
    torch.testing.assert_close(statistics.losses[0], each.sum(1).detach())
    total = both.sum(1, keepdim=True)
    one = torch.maximum(-total * ratio, -total * ratio.clamp(1 - 1e-3, 1 + 1e-3)).sum()
    assert (found - one).abs() > 1e-4, "the loss of the sum is another one"

    # Two advantages of opposite signs are no reason to leave an action out.
    opposed = torch.stack([ones(experience), -ones(experience)], 1)
    received = make(Scripted(all_actions=False))
    received.update(experience, opposed, RANDOM)
    assert {g for i in Scripted.received for g in i.group.tolist()} == set(range(6))
    assert sorted({float(i.advantage[0]) for i in Scripted.received}) == [-1.0, 1.0]


# The step.


class PlainAdamW:
    """AdamW as in arXiv:1711.05101, on a gradient of at most a given norm."""

    def __init__(self, weights: Sequence[Tensor], decay: float, betas: tuple[float, float], limit: float):  # fmt: skip
        self.weights = [w.detach().double().clone() for w in weights]
        self.first = [torch.zeros_like(w) for w in self.weights]
        self.second = [torch.zeros_like(w) for w in self.weights]
        self.decay, self.betas, self.limit, self.steps = decay, betas, limit, 0

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        scale = min(1.0, self.limit / norm)
        self.steps += 1
        a, b = self.betas
        for i, raw in enumerate(gradients):
            g = scale * raw.double()
            self.first[i] = a * self.first[i] + (1 - a) * g
            self.second[i] = b * self.second[i] + (1 - b) * g * g
            m, v = self.first[i] / (1 - a**self.steps), self.second[i] / (1 - b**self.steps)
            self.weights[i] = self.weights[i] * (1 - lr * self.decay) - lr * m / (v.sqrt() + 1e-8)


def test_steps_are_adamw_on_limited_gradients_at_the_scheduled_rate(make: Make, experience: Experience) -> None:  # fmt: skip
    """Two iterations of three steps; the third gradient is NaN and the fifth has no limit to its size."""
    norms = [0.5, 4.0, math.nan, 0.3, math.inf, 7.0]
    learner = make(
        norms=norms, updates=3, iterations=2, lr=0.02, warmup=3, schedule="linear",
        weight_decay=0.1, betas=(0.8, 0.95), max_grad_norm=2.0, ema_decay=0.15,
    )  # fmt: skip
    plain = PlainAdamW(learner.parameters, 0.1, (0.8, 0.95), 2.0)
    average = [w.clone() for w in plain.weights]
    # lr * warm-up in quarters * a fall by 0.15 each step.
    rates = [0.02 * w * f for w, f in zip((0.25, 0.5, 0.75, 1, 1, 1), (1, 0.85, 0.7, 0.55, 0.4, 0.25), strict=True)]  # fmt: skip
    for iteration in (0, 1):
        metrics = learner.update(experience, ones(experience), RANDOM)
        for step in range(3 * iteration, 3 * iteration + 3):
            if not math.isfinite(norms[step]):
                continue
            plain.step(Scripted.gradients[step], rates[step])
            decay = min(0.15, (1 + plain.steps) / (10 + plain.steps))
            average = [decay * a + (1 - decay) * w for a, w in zip(average, plain.weights, strict=True)]  # fmt: skip
        for parameter, slow, mine, expected in zip(
            learner.parameters, learner.ema.average, average, plain.weights, strict=True  # type: ignore[union-attr]
        ):  # fmt: skip
            # A step moves a weight by up to 0.02; where a gradient is all but 0, rounding shows.
            torch.testing.assert_close(parameter.detach().double(), expected, atol=3e-5, rtol=1e-4)
            torch.testing.assert_close(slow.double(), mine, atol=3e-5, rtol=1e-4)
        assert metrics["skipped_updates"] == 1
        assert metrics["lr"] == pytest.approx(rates[3 * iteration + 2])
        assert learner.optimizer.num_updates == 3 * iteration + 3
    assert learner.optimizer.gradient_norms == pytest.approx([0.5, 4.0, 0.3, 7.0], rel=1e-4)
    assert learner.ema is not None
    assert learner.ema.updates == 4


@pytest.mark.parametrize(
    ("known", "factor", "norm", "skipped"),
    [
        ([1.0] * 9, 20.0, 1e6, False),  # too few to tell
        ([1.0] * 10, 20.0, 19.9, False),
        ([1.0] * 10, 20.0, 20.1, True),
        ([1.0] * 10, 0.0, 1e6, False),  # switched off
        ([1.0] * 8 + [1000.0] * 3, 20.0, 21.0, True),  # the median, not the mean
        ([1000.0, 1000.0, 1000.0] + [1.0] * 8, 20.0, 21.0, True),
        ([0.001] * 5 + [1.0] * 6, 20.0, 19.0, False),
        ([1.0] * 10, 3.0, 3.1, True),
        ([], 20.0, math.nan, True),
        ([], 0.0, math.inf, True),
        ([float(i) for i in range(1, 51)], 20.0, 5.0, False),
        ([1.0] * 10, 20.0, 0.0, False),
    ],
)
def test_spikes_are_skipped_and_forgotten(known: list[float], factor: float, norm: float, skipped: bool, make: Make, experience: Experience) -> None:  # fmt: skip
    learner = make(norms=[norm, 0.5], spike_factor=factor, max_grad_norm=1e9, ema_decay=0.9)
    assert learner.ema is not None
    learner.optimizer.gradient_norms = list(known)
    before = [p.detach().clone() for p in learner.parameters]
    metrics = learner.update(experience, ones(experience), RANDOM)
    same = all(torch.equal(p, b) for p, b in zip(learner.parameters, before, strict=True))
    assert (metrics["skipped_updates"], learner.optimizer.num_updates) == (float(skipped), 1)
    if math.isfinite(norm):
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert learner.ema.updates == (0 if skipped else 1)
    if skipped:
        assert same
        assert not learner.optimizer.adam.state
        assert learner.optimizer.gradient_norms == known
    elif norm == 0:
        assert learner.optimizer.gradient_norms == known
    else:
        assert not same
        assert learner.optimizer.gradient_norms == pytest.approx([*known, norm][-50:], rel=1e-4)
    # Nothing of the skipped gradient is left for the next step.
    kept = learner.optimizer.gradient_norms
    after = learner.update(experience, ones(experience), RANDOM)
    assert after["grad_norm"] == pytest.approx(0.5, rel=1e-4)
    assert learner.optimizer.gradient_norms[:-1] == kept[-49:]
    assert not all(torch.equal(p, b) for p, b in zip(learner.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        ({}, {0: 1, 5: 1, 99: 1}),
        ({"warmup": 1}, {0: 0.5, 1: 1, 2: 1}),
        ({"warmup": 4}, {0: 0.2, 1: 0.4, 3: 0.8, 4: 1, 5: 1}),
        ({"schedule": "linear"}, {0: 1, 5: 0.775, 10: 0.55, 20: 0.1}),
        ({"schedule": "cosine"}, {0: 1, 5: 0.55 + 0.45 / math.sqrt(2), 10: 0.55, 20: 0.1}),
        ({"schedule": "linear", "warmup": 10}, {0: 1 / 11, 9: 10 / 11 * 0.595, 10: 0.55}),
    ],
)
def test_learning_rates_by_hand(settings: dict[str, object], table: dict[int, float], make: Make) -> None:  # fmt: skip
    """20 optimizer steps, at a peak of 0.01."""
    learner = make(iterations=10, updates=2, **settings)
    found = {step: learner.optimizer.learning_rate(step) for step in table}
    assert found == pytest.approx({step: 0.01 * share for step, share in table.items()})


# The behaviour policy.


def test_behaviour_weights_follow_once_an_iteration(make: Make, experience: Experience) -> None:
    learner = make(Scripted(with_old=True), updates=3)
    first = [p.detach().clone() for p in learner.parameters]
    learner.update(experience, ones(experience), RANDOM)
    # All steps of an iteration were sampled by, and are compared with, the same old policy.
    for inputs in Scripted.received[1:]:
        assert inputs.old_policy is not None
        gap = inputs.policy.prediction.output - inputs.old_policy.prediction.output
        assert float(gap.detach().abs().max()) > 1e-4
    assert Scripted.followed == [3]
    assert learner.behaviour is not None
    expected = [0.25 * b + 0.75 * p.detach() for b, p in zip(first, learner.parameters, strict=True)]  # fmt: skip
    trained = [p.detach().clone() for p in learner.parameters]
    for now, want in zip(learner.behaviour, expected, strict=True):
        torch.testing.assert_close(now, want, atol=1e-7, rtol=1e-5)
    with learner.behaviour_policy():
        assert all(torch.equal(p, w) for p, w in zip(learner.parameters, learner.behaviour, strict=True))  # fmt: skip
    assert all(torch.equal(p, t) for p, t in zip(learner.parameters, trained, strict=True))


def test_nft_compares_with_the_behaviour_weights(make: Make, experience: Experience) -> None:
    """The same loss by hand, with the old prediction of a model that was moved by hand."""
    loss = NFTLoss(beta=0.5, kl_coef=0.0)
    learner = make(loss, max_grad_norm=1e9)
    assert learner.behaviour is not None
    random = torch.Generator().manual_seed(5)
    for weight in learner.behaviour:
        weight += 0.05 * torch.randn(weight.shape, generator=random)
    trained = [p.detach().clone() for p in learner.parameters]
    moved = [b.clone() for b in learner.behaviour]
    a, terms = experience.actions, []
    advantages = torch.linspace(-6, 6, len(a))

    def predict(weights: Sequence[Tensor], row: int) -> Tensor:
        with torch.no_grad():
            for parameter, weight in zip(learner.parameters, weights, strict=True):
                parameter.copy_(weight)
            prompt = GROUPS[int(a.group[row])].prompt
            record = learner.policy.replay([prompt], a.states[a.state[row]][None], 1, experience.transition)  # fmt: skip
        return record.prediction.x0[0].double()

    for row in range(len(a)):
        new, old, sample = predict(trained, row), predict(moved, row), a.x_next[row].double()
        good = min(1.0, max(0.0, float(advantages[row]) / 10 + 0.5))
        plus, minus = 0.5 * new + 0.5 * old - sample, 1.5 * old - 0.5 * new - sample
        parts = [float(e.square().mean() / e.abs().mean()) for e in (plus, minus)]
        terms.append(5 * (good * parts[0] + (1 - good) * parts[1]) / 0.5)
    predict(trained, 0)
    metrics = learner.update(experience, advantages, RANDOM)
    assert metrics["loss/policy"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)


# Checkpoints.


def test_a_restored_learner_continues_like_the_saved_one(make: Make, experience: Experience) -> None:  # fmt: skip
    settings = {"updates": 3, "ema_decay": 0.5, "schedule": "linear", "warmup": 8}
    loss = Scripted(with_old=True)
    learner = make(loss, norms=[1.0, 2.0, 30.0, 4.0, 0.5, 3.0], **settings)
    first = [p.detach().clone() for p in learner.parameters]
    learner.update(experience, ones(experience), RANDOM)
    parts, state = learner.state()
    saved = {part: {k: v.detach().clone() for k, v in tensors.items()} for part, tensors in parts.items()}  # fmt: skip
    assert state["num_updates"] == 3
    assert state["gradient_norms"] == pytest.approx([1, 2, 30], rel=1e-4)
    assert state["ema_updates"] == 3
    last = learner.update(experience, ones(experience), RANDOM)
    final = [p.detach().clone() for p in learner.parameters]
    slow, old = [[t.clone() for t in found] for found in (learner.ema.average, learner.behaviour)]  # type: ignore[union-attr]

    with torch.no_grad():
        for parameter, weight in zip(learner.parameters, first, strict=True):
            parameter.copy_(weight)
    Scripted.received.clear()
    again = make(loss, norms=[4.0, 0.5, 3.0], **settings)
    again.restore(saved, state)
    assert (again.optimizer.num_updates, again.optimizer.gradient_norms) == (
        3,
        state["gradient_norms"],
    )
    resumed = again.update(experience, ones(experience), RANDOM)
    assert resumed == last
    for found, wanted in (
        (again.parameters, final),
        (again.ema.average, slow),
        (again.behaviour, old),
    ):  # type: ignore[union-attr]
        assert found is not None
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert again.optimizer.gradient_norms == learner.optimizer.gradient_norms
    assert again.ema is not None
    assert again.ema.updates == 6


# Metrics.


def test_the_distance_to_the_reference_by_hand(make: Make, experience: Experience) -> None:
    """Of three states of the first step of the prompts that share a call."""
    learner = make(norms=[1.0], monitor_states=3, lr=0.1)
    metrics = learner.update(experience, ones(experience), RANDOM)
    a, squares = experience.actions, []
    for state in sorted(set(a.state.tolist()))[:3]:
        row = a.state.tolist().index(state)
        prompt = [GROUPS[int(a.group[row])].prompt]
        arguments = (prompt, a.states[state][None], 1, experience.transition)
        with torch.no_grad():
            trained = learner.policy.replay(*arguments).prediction.output
            with learner.policy.reference():
                reference = learner.policy.replay(*arguments).prediction.output
        squares.append(float((trained - reference).square().mean()))
    assert metrics["kl/velocity"] == pytest.approx(sum(squares) / 3, rel=1e-3)
    assert metrics["kl/velocity"] > 0


def test_update_metrics_by_hand(accelerator: Accelerator) -> None:
    declared = (
        LossMetric("a", by_step="a"), LossMetric("b", reduce="max"), LossMetric("c"),
    )  # fmt: skip
    found = UpdateStatistics(declared)
    zeros = torch.zeros(2)
    found.add(4, torch.tensor([1.0, 3.0]), zeros, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])})  # fmt: skip
    found.add(1, torch.tensor([8.0]), torch.tensor([0.5]), {"a": torch.tensor([6.0])})
    found.add(1, torch.tensor([4.0]), torch.tensor([1.5]), {"a": torch.tensor([7.0]), "b": torch.tensor([-1.0])})  # fmt: skip
    found.stepped(2.0, 0.1, True)
    found.stepped(4.0, 0.3, False)
    found.stepped(9.0, 0.2, True)
    assert found.summary(Shares(accelerator)) == pytest.approx(
        {
            "loss/policy": 4.0, "loss/kl": 0.5, "grad_norm": 5.0, "lr": 0.2, "skipped_updates": 2.0,
            "a": 4.0, "b": 5.0, "c": 0.0, "step/1/a": 6.5, "step/4/a": 1.5,
        }
    )  # fmt: skip


def test_rollout_metrics_by_hand(experience: Experience) -> None:
    """Three groups of two: one without variance, one with a failure."""
    group, sample = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1] * 3)
    nan = math.nan
    raw = {"x": torch.tensor([1.0, 3.0, 2.0, 2.0, nan, 7.0]), "y": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, nan])}  # fmt: skip
    scores = Scores(raw, 2 * raw["x"], {"x": 2.0})
    candidates = Candidates(group, sample, torch.full((6,), 2), torch.ones(6, dtype=torch.long), scores)  # fmt: skip
    some = replace(
        experience, candidates=candidates, gathered=None, cost=Cost(12.0, 4.0, 2.0),
        diversity=torch.tensor([0.1, 0.2, 0.6]), duplicates=torch.tensor([0.0, 1.0, 2.0]),
    )  # fmt: skip
    found = rollout_metrics(some, lambda tensor: tensor)
    rewards = [2, 6, 4, 4, 14]
    spread = math.sqrt(sum((r - 6) ** 2 for r in rewards) / 5)
    assert found == pytest.approx(
        {
            "reward": 6.0, "reward_std": spread, "score/x": 3.0, "score/y": 3.0, "part/x": 6.0,
            "group/zero_variance": found["group/zero_variance"], "group/diversity": 0.3,
            "group/duplicates": 3.0, "failures": 1.0, "nfe_per_prompt": 12.0, "decodes_per_prompt": 4.0,
        }
    )  # fmt: skip
    # The group with one reward left has nothing to compare either.
    assert found["group/zero_variance"] == pytest.approx(2 / 3)


# Batches.


def test_batches_by_hand(shared_policy: tuple[PipelinePolicy, Experience]) -> None:
    """Groups 0 and 2 have one size and group 1 another; three actions share a state."""
    policy, experience = shared_policy
    groups = [
        Group(0, Prompt("a")), Group(1, Prompt("b", height=64, width=32)), Group(2, Prompt("c")),
    ]  # fmt: skip
    state = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    step = torch.tensor([5, 5, 5, 5, 5, 2, 5, 5, 5])
    number = len(step)
    actions = Actions.between(
        torch.arange(7.0).view(7, 1), state=state, x_next=10 + torch.arange(9.0).view(9, 1),
        step=step, old_log_prob=torch.zeros(number), group=group, sample=torch.arange(number),
    )  # fmt: skip
    some = replace(experience, groups=groups, actions=actions)
    trained = torch.ones(number, dtype=torch.bool)
    trained[7] = False

    def batches(limit: int, loss: Loss) -> list[list[int]]:
        replay = Replay(policy, loss, train_batch=limit, has_own_means=True, behaviour=nullcontext, average=None)  # fmt: skip
        found = []
        for part, advantage in replay.batches(some, torch.arange(9.0), trained):
            assert part.x_next.flatten().tolist() == (10 + advantage).tolist()
            assert part.states[part.state].flatten().tolist() == state[advantage.long()].tolist()
            found.append(advantage.long().tolist())
        return found

    assert batches(2, Scripted()) == [[5], [0, 1, 2, 3], [6, 8], [4]]
    assert batches(3, Scripted()) == [[5], [0, 1, 2, 3, 6], [8], [4]]
    assert batches(100, Scripted()) == [[5], [0, 1, 2, 3, 6, 8], [4]]

    class Whole(Scripted):
        @property
        def needs(self) -> LossNeeds:
            return LossNeeds(whole_groups=True)

    assert batches(3, Whole()) == [[5], [0, 1, 2, 3], [6, 8], [4]]
    assert batches(4, Whole()) == [[5], [0, 1, 2, 3, 6, 8], [4]]
    assert batches(2, Whole()) == [[5], [0, 1, 2, 3], [6, 8], [4]]
    with pytest.raises(ValueError, match=r"a group has 2 states and train.train_batch is 1; set it to at least 2"):  # fmt: skip
        batches(1, Whole())
    trained[:] = False
    assert batches(2, Whole()) == batches(2, Scripted()) == []
    replay = Replay(policy, Scripted(), train_batch=1, has_own_means=True, behaviour=nullcontext, average=None)  # fmt: skip
    assert list(replay.references(some, [])) == []


def test_a_reference_that_moves_no_weights_is_evaluated_batch_by_batch(shared_policy: tuple[PipelinePolicy, Experience], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    policy, experience = shared_policy
    replay = Replay(policy, Scripted(), train_batch=2, has_own_means=True, behaviour=nullcontext, average=None)  # fmt: skip
    number = len(experience.actions)
    trained = torch.ones(number, dtype=torch.bool)
    batches = [b for b, _ in replay.batches(experience, torch.ones(number), trained)][:3]
    seen: list[Actions] = []
    record, inside = replay.record, [False]

    @contextmanager
    def reference() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def recorded(experience: Experience, actions: Actions, sampling: None) -> StepRecord:
        assert inside[0]
        assert not torch.is_grad_enabled()
        seen.append(actions)
        return record(experience, actions, sampling)

    monkeypatch.setattr(replay, "record", recorded)
    monkeypatch.setattr(policy, "reference", reference)
    found = replay.references(experience, batches)
    outputs = []
    for done, one in enumerate(found, 1):
        assert len(seen) == done
        assert torch.is_grad_enabled()
        assert not inside[0]
        outputs.append(one.output)
    monkeypatch.setattr(type(policy.trainable), "reference_is_at_hand", False)
    seen.clear()
    at_once = list(replay.references(experience, batches)[:3])  # type: ignore[index]
    assert len(seen) == 3
    assert all(torch.equal(a, b.output) for a, b in zip(outputs, at_once, strict=True))


@pytest.mark.parametrize("changed", ["", "x0", "x1", "std"])
def test_stored_outputs_come_back_whole(changed: str) -> None:
    """Also where a scheduler clamps the predicted data or noise, so that it does not follow from the output."""
    random = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, generator=random), torch.randn(2, 3, generator=random)
    interval = Step.flow(0.75, 0.5)
    prediction = Prediction.from_output(x, output, interval)
    if changed in ("x0", "x1"):
        prediction = replace(prediction, **{changed: getattr(prediction, changed).clamp(-0.1, 0.1)})
    gaussian = CPS(log_prob="unnormalised")(x, prediction, interval)
    if changed == "std":
        gaussian = replace(gaussian, std=torch.tensor([[0.5, 0.5, 0.5], [0.25, 0.25, 1.0]]))
    record = StepRecord(1, interval, x, x, prediction, gaussian)
    stored = StoredOutputs.of(record).in_main_memory()
    assert (stored.prediction is None) is (changed in ("", "std"))
    restored = stored.restored(record)
    for name in ("x0", "x1", "output"):
        assert torch.equal(getattr(restored.prediction, name), getattr(prediction, name))
    assert torch.equal(restored.gaussian.mean, gaussian.mean)
    assert torch.equal(torch.as_tensor(restored.gaussian.std), torch.as_tensor(gaussian.std))
    assert restored.gaussian.normalised is gaussian.normalised is False


@pytest.mark.parametrize(
    ("distance", "square", "diverged"),
    [(1e-6, 0.0, False), (4.0, 0.0, False), (4.1, 1.0, True), (7.9, 2.0, False), (8.1, 2.0, True), (float("nan"), 1.0, True)],
)  # fmt: skip
def test_drift_is_measured_against_the_reference_or_unit_noise(distance: float, square: float, diverged: bool) -> None:  # fmt: skip
    with pytest.raises(DivergenceError, match="diverged") if diverged else nullcontext():
        check_drift(distance, square)


# Divergence, half precision and what the optimizer is.


def test_gradients_that_are_never_finite_end_a_run_after_three_iterations(make: Make, experience: Experience) -> None:  # fmt: skip
    nan = math.nan
    learner = make(norms=[nan, nan, nan, 1.0, *[nan] * 6], updates=2)

    def update() -> None:
        learner.update(experience, ones(experience), RANDOM)

    for _ in range(4):  # the second has a good step, so that two in a row are lost
        update()
    with pytest.raises(DivergenceError, match="in all updates of 3 iterations in a row"):
        update()
    # The scaler of half precision looks for its scale by such gradients.
    learner = make(norms=[nan] * 12, updates=2)
    scaler = Scaler()
    Scripted.received.clear()
    learner.accelerator.scaler = scaler
    try:
        for _ in range(4):
            update()
        assert scaler.updates == 8
        parts, state = learner.state()
        assert state["scaler"] == {"scale": 8.0}
        scaler.updates = 0
        learner.restore(parts, {**state, "scaler": {"scale": 5.0}})
        assert scaler.updates == 5
        learner.restore(parts, {**state, "scaler": None})
        assert scaler.updates == 5
    finally:
        learner.accelerator.scaler = None
    assert learner.state()[1]["scaler"] is None


class Scaler:
    """The part of a gradient scaler that the learner uses."""

    updates = 0

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def update(self) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, float]:
        return {"scale": float(self.updates)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.updates = int(state["scale"])


def test_weights_that_are_not_finite_end_a_run(make: Make, experience: Experience) -> None:
    learner = make()
    step = learner.optimizer.prepared.step

    def destroy() -> None:
        step()
        learner.parameters[-1].data.view(-1)[-1] = math.inf

    learner.optimizer.prepared.step = destroy  # type: ignore[method-assign]
    with pytest.raises(DivergenceError, match="its weights contain NaN or infinity"):
        learner.update(experience, ones(experience), RANDOM)


def test_moments_in_8_bits_are_for_accelerators(make: Make) -> None:
    with pytest.raises(ValueError, match="'adamw8bit' runs on an accelerator only"):
        make(optimizer="adamw8bit")
    options = make(lr=0.03, betas=(0.7, 0.8), weight_decay=0.2).optimizer.adam.param_groups[0]
    assert (options["lr"], options["betas"], options["weight_decay"]) == (0.03, (0.7, 0.8), 0.2)


def test_every_epoch_has_a_stream_of_its_own(make: Make, experience: Experience) -> None:
    make(updates=3, epochs=3).update(experience, ones(experience), RANDOM)
    groups = [sorted(set(inputs.group.tolist())) for inputs in Scripted.received]
    for epoch, random in enumerate((RANDOM, RANDOM.at("epoch", 1), RANDOM.at("epoch", 2))):
        generator = random.generator("updates")
        update_of = [u for _ in range(2) for u in torch.randperm(3, generator=generator).tolist()]
        assert groups[3 * epoch : 3 * epoch + 3] == [[g for g in range(6) if update_of[g] == u] for u in range(3)]  # fmt: skip


def test_the_distance_is_measured_in_one_batch_of_one_step_and_call(shared_policy: tuple[PipelinePolicy, Experience], make: Make, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    _, experience = shared_policy
    groups = [Group(0, Prompt("a")), Group(1, Prompt("b", height=64, width=32)), Group(2, Prompt("c"))]  # fmt: skip
    state, step = torch.tensor([0, 1, 2, 2, 3, 4]), torch.tensor([1, 1, 1, 1, 2, 1])
    group = torch.tensor([0, 1, 2, 2, 2, 2])
    actions = Actions.between(
        torch.zeros(5, 1), state=state, x_next=torch.arange(6.0).view(6, 1), step=step,
        old_log_prob=torch.zeros(6), group=group, sample=torch.arange(6),
    )  # fmt: skip
    some, seen = replace(experience, groups=groups, actions=actions), list[list[float]]()

    def references(experience: Experience, batches: Sequence[Actions]) -> list[object]:
        seen.extend(b.x_next.flatten().tolist() for b in batches)
        return [SimpleNamespace(output=torch.ones(2, 3))]

    for states, batch, rows in ((16, 64, [0.0, 2.0, 3.0, 5.0]), (2, 64, [0.0, 2.0, 3.0]), (16, 1, [0.0])):  # fmt: skip
        learner = make(monitor_states=states, train_batch=batch)
        monkeypatch.setattr(learner.replay, "references", references)
        output = SimpleNamespace(prediction=SimpleNamespace(output=torch.full((2, 3), 3.0)))
        monkeypatch.setattr(learner.replay, "record", lambda *_, output=output: output)
        assert learner._drift(some) == {"kl/velocity": 4.0}
        assert seen.pop() == rows
    assert make(monitor_states=0)._drift(some) == {}


def test_the_moving_average_and_weights_of_the_kl_reach_the_loss(make: Make, experience: Experience) -> None:  # fmt: skip
    @dataclass(frozen=True, kw_only=True)
    class Pulled(Scripted):
        kl_coef: float = 3.0  # type: ignore[misc]

        @property
        def needs(self) -> LossNeeds:
            return LossNeeds(all_actions=True, average=True)

        def __call__(self, inputs: LossInputs) -> LossOutputs:
            Scripted.received.append(inputs)
            zero = 0 * inputs.policy.prediction.output.sum()
            return LossOutputs(zero + torch.ones_like(inputs.advantage), zero + 2 * torch.ones_like(inputs.advantage))  # fmt: skip

    learner = make(Pulled(), ema_decay=0.5)
    assert learner.ema is not None
    for average in learner.ema.average:
        average += 0.05
    number = len(experience.actions)
    weights = torch.arange(float(number))
    some = replace(experience, actions=replace(experience.actions, kl_weight=weights))
    inputs = learner.replay.inputs(some, Batch(some.actions, ones(some)), True)
    assert inputs.average is not None
    gap = inputs.average.prediction.output - inputs.policy.prediction.output.detach()
    assert float(gap.abs().max()) > 1e-4
    assert not inputs.average.prediction.output.requires_grad
    statistics = UpdateStatistics(())
    assert learner._loss(inputs, [], statistics).item() == number + 3 * 2 * float(weights.sum())
    assert [float(k.mean()) for k in statistics.kls] == [2.0], "the metric is not weighted"
    plain = learner.replay.inputs(experience, Batch(experience.actions, ones(some)), True)
    assert learner._loss(plain, [], UpdateStatistics(())).item() == number + 3 * 2 * number


def test_old_means_are_kept_for_a_second_step_and_one_action_is_a_batch(make: Make, experience: Experience) -> None:  # fmt: skip
    kept = {
        (clip, updates): make(ClippedLoss(clip=clip), updates=updates).policy.keeps_means  # type: ignore[arg-type]
        for clip in ("ratio", "kl")
        for updates in (1, 3)
    }
    assert kept == {("ratio", 1): False, ("ratio", 3): False, ("kl", 1): False, ("kl", 3): True}
    # Actions of an older policy need its means in the first step, too.
    assert make(ClippedLoss(clip="kl"), staleness=1).policy.keeps_means
    learner = make()
    assert learner.policy.keeps_means is False
    one = experience.actions.select(torch.tensor([3]))
    assert learner.replay.record(experience, one).step == 1


def test_the_weights_before_an_update_sample_and_are_in_the_checkpoint(make: Make, experience: Experience) -> None:  # fmt: skip
    learner = make(staleness=1, updates=3)
    first = [p.detach().clone() for p in learner.parameters]
    with learner.weights_before():
        assert all(torch.equal(p, w) for p, w in zip(learner.parameters, first, strict=True))
    assert "earlier" not in learner.state()[0]
    learner.update(experience, ones(experience), RANDOM, stale=True)
    assert [inputs.first_update for inputs in Scripted.received] == [False] * 3
    assert not torch.equal(learner.parameters[0], first[0])
    with learner.weights_before():
        assert all(torch.equal(p, w) for p, w in zip(learner.parameters, first, strict=True))
    parts, state = learner.state()
    assert {"ema", "behaviour", "baseline", "reference"}.isdisjoint(parts)
    assert (state["ema_updates"], state["guard"]) == (0, None)
    again = make(staleness=1)
    again.restore(parts, state)
    with again.weights_before():
        assert all(torch.equal(p, w) for p, w in zip(again.parameters, first, strict=True))
    plain = make()
    plain.update(experience, ones(experience), RANDOM)
    assert plain.earlier is None


def test_the_old_policy_samples_from_its_step_on(make: Make) -> None:
    class Late(Scripted):
        @property
        def needs(self) -> LossNeeds:
            return LossNeeds(old_policy=self.remaining, old_policy_samples_from=2)

    learner = make(Late())
    assert learner.behaviour is not None
    learner.behaviour[0] += 1.0
    trained = learner.parameters[0].detach().clone()
    for updates, samples in ((0, False), (1, False), (2, True), (3, True)):
        learner.optimizer.num_updates = updates
        with learner.behaviour_policy():
            assert torch.equal(learner.parameters[0], trained) is not samples


def test_an_old_policy_that_is_copied_is_the_policy_itself_at_first(make: Make, experience: Experience) -> None:  # fmt: skip
    class Copied(Scripted):
        @property
        def needs(self) -> LossNeeds:
            return LossNeeds(old_policy=self.remaining, old_policy_is_copied=True)

    learner = make(Copied())
    assert learner.behaviour is not None
    for weight in learner.behaviour:
        weight += 0.05  # to tell the two apart
    for first in (True, False):
        inputs = learner.replay.inputs(experience, Batch(experience.actions, ones(experience)), first)  # fmt: skip
        assert inputs.old_policy is not None
        old, own = inputs.old_policy, inputs.policy
        for name in ("x0", "x1", "output"):
            mine, other = getattr(own.prediction, name), getattr(old.prediction, name)
            assert not other.requires_grad
            assert torch.equal(mine, other) is first
        assert torch.equal(own.gaussian.mean, old.gaussian.mean) is first
        assert own.gaussian.std == old.gaussian.std
        assert own.gaussian.normalised is old.gaussian.normalised


def test_the_baseline_is_trained_and_saved(make: Make, experience: Experience) -> None:
    policy, accelerator = (learner := make()).policy, learner.accelerator
    assert learner.baseline is None
    assert learner.with_expected(experience, list) is experience
    settings = learner.train

    def anew() -> Learner:
        return Learner(policy, settings, Scripted(), accelerator, with_baseline=True)

    one = anew()
    found = one.with_expected(experience, list)
    assert found.expected is not None
    again = anew()
    again.restore(*one.state())
    texts = [found.groups[int(g)].prompt.text for g in found.candidates.group]
    assert again.baseline is not None
    expected = again.baseline.network(again.baseline._inputs(texts)).squeeze(1)
    torch.testing.assert_close(expected.detach(), found.expected)


def test_moments_are_restored_for_their_own_parameters(make: Make, experience: Experience) -> None:
    learner = make()
    learner.update(experience, ones(experience), RANDOM)
    moments = learner.state()[0]["optimizer"]
    names = list(learner.named)
    assert len({k.rsplit("/", 1)[0] for k in moments}) == len(names)
    # Optimizers other than AdamW, such as the 8-bit one, count their steps with a number.
    other = torch.optim.Adam(learner.parameters)
    some = {k: v for k, v in moments.items() if k.startswith(f"{names[1]}/")}
    restore_moments(other, learner.named, some)
    assert list(other.state) == [learner.named[names[1]]]
    (restored,) = other.state.values()
    assert restored["step"] == 1
    assert isinstance(restored["step"], int)
    assert torch.equal(restored["exp_avg"], moments[f"{names[1]}/exp_avg"])


def test_a_divided_model_is_clipped_and_judged_with_the_others(make: Make, experience: Experience, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    learner = make(max_grad_norm=0.75)
    assert not learner.is_sharded
    assert learner._is_everywhere(True)
    assert not learner._is_everywhere(False)
    name, parameter = next(iter(learner.named.items()))
    shape = parameter.shape
    assert learner.division("weights", name, shape) is None
    learner.is_sharded = learner.optimizer.is_sharded = True
    clipped = list[float]()

    def clip(parameters: Sequence[Tensor], limit: float) -> float:
        clipped.append(limit)
        return 0.5

    monkeypatch.setattr("flowgrpo.training.optimizer.clip_gradients", clip)
    assert learner.update(experience, ones(experience), RANDOM)["grad_norm"] == 0.5
    assert clipped == [0.75]
    accelerator = learner.accelerator
    other = SimpleNamespace(gather=lambda own: torch.cat([own, torch.tensor([False])]))
    learner.accelerator = other  # type: ignore[assignment]
    assert not learner._is_everywhere(True)
    learner.accelerator = accelerator
    # In place of a divided tensor, which needs a process group.
    monkeypatch.setattr("flowgrpo.training.learner.DTensor", torch.nn.Parameter)
    assert learner.division("weights", name, shape) is parameter
    assert learner.division("optimizer", f"{name}/exp_avg", shape) is parameter
    assert learner.division("optimizer", f"{name}/step", torch.Size()) is None
    assert learner.division("weights", f"{name}/exp_avg", shape) is None
    assert learner.division("baseline", name, shape) is None


def test_values_of_two_processes_are_weighted_by_their_number(make: Make, monkeypatch: pytest.MonkeyPatch, experience: Experience) -> None:  # fmt: skip
    """The other process has other numbers, which a gather appends."""
    two = Mock(spec=Accelerator, num_processes=2, process_index=0, device=torch.device("cpu"))
    two.reduce = lambda t, _: t + torch.tensor([10.0, 3.0])
    two.gather = lambda t: torch.cat([t, torch.tensor([6.5])])
    monkeypatch.setattr(
        "flowgrpo.training.shares.gather_object",
        lambda own: [*own, {(1, "a"): (4.0, 1), (3, "a"): (2.0, 5)}],
    )
    found = UpdateStatistics((LossMetric("a", by_step="a"), LossMetric("b", reduce="max")))
    found.add(1, torch.tensor([1.0, 3.0]), torch.zeros(2), {"a": torch.tensor([1.0, 2.0, 6.0]), "b": torch.tensor([5.0])})  # fmt: skip
    found.stepped(2.0, 0.1, False)
    metrics = found.summary(Shares(two))
    assert metrics["loss/policy"] == pytest.approx(14 / 5)
    assert metrics["a"] == pytest.approx(19 / 6)
    assert metrics["b"] == 6.5
    assert {k: v for k, v in metrics.items() if k.startswith("step/")} == {"step/1/a": 13 / 4, "step/3/a": 2.0}  # fmt: skip

    rewards = rollout_metrics(experience, lambda t: torch.cat([t, torch.zeros_like(t)]))
    own = rollout_metrics(experience, lambda t: t)
    for name in ("group/diversity", "nfe_per_prompt", "decodes_per_prompt"):
        assert rewards[name] == pytest.approx(own[name] / 2)
    assert own["nfe_per_prompt"] > 0
    assert rewards["group/duplicates"] == own["group/duplicates"]
    assert rewards["reward"] == own["reward"]

    learner = make(monitor_states=4)
    monkeypatch.setattr("flowgrpo.training.shares.gather_object", lambda own: [*own, "other"])
    assert learner.shares.gather_objects(["own"]) == ["own"]
    assert Shares(two).gather_objects(["own"]) == ["own", "other"]
    monkeypatch.setattr("flowgrpo.training.learner.monitored", lambda *_: [])
    monkeypatch.setattr(learner.shares, "gather_objects", lambda _: [(3, 1.0, 2.0), (1, 5.0, 6.0)])
    seen = list[tuple[float, float]]()
    monkeypatch.setattr("flowgrpo.training.learner.check_drift", lambda *both: seen.append(both))
    assert learner._drift(experience) == {"kl/velocity": 2.0}
    assert seen == [(2.0, 3.0)]


def test_one_of_two_advantages_is_enough_to_train_an_action(make: Make, experience: Experience) -> None:  # fmt: skip
    group = experience.actions.group
    two = torch.stack([torch.where(group < 2, 2.0, 0.0), torch.where(group == 4, 3.0, 0.0)], 1)
    learner = make(Scripted(all_actions=False))
    learner.update(experience, two, RANDOM)
    assert {g for i in Scripted.received for g in i.group.tolist()} == {0, 1, 4}
    assert [i.advantage.tolist() for i in Scripted.received] == [
        [2.0, 2.0, 2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0, 3.0],
    ]  # fmt: skip
    first, second = Scripted.received
    both, statistics = make(ClippedLoss()), UpdateStatistics(ClippedLoss.metrics)
    found = both._loss(first, [second.advantage], statistics)
    # The ratios are 1, so that the loss of an action is the sum of its advantages, with their sign.
    assert found.item() == pytest.approx(-(2.0 * 4 + 3.0 * 2), rel=1e-3)
    assert statistics.losses[0].tolist() == pytest.approx([-2.0] * 4 + [-3.0] * 2, rel=1e-3)


def test_a_step_is_on_the_gradients_of_all_processes(make: Make, experience: Experience, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def doubled(parameters: Sequence[torch.nn.Parameter], accelerator: Accelerator) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= 2

    monkeypatch.setattr("flowgrpo.training.optimizer.sum_gradients", doubled)
    learner = make(norms=[0.75])
    assert learner.update(experience, ones(experience), RANDOM)["grad_norm"] == pytest.approx(1.5)
