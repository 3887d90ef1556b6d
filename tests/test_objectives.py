"""Losses in the learner: each with actions that a real policy took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

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
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossMetric,
    LossNeeds,
    LossOutputs,
    PolicyOutputs,
    velocity_kl,
)
from flowgrpo.losses.clipped import ClippedLoss, guard_weight, guarded_log_ratio
from flowgrpo.policy.weights import swapped
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.learner import Learner
from flowgrpo.training.optimizer import sum_gradients
from flowgrpo.training.replay import Batch
from flowgrpo.training.split import (
    has_advantage,
    split_actions,
    split_groups,
    split_samples,
    split_steps,
)
from tests.conftest import MakePolicy, sampling_of
from tests.processes import ranks

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


@dataclass(frozen=True, kw_only=True)
class Distances(Loss):
    """Needs every input there is, and keeps the batches that it receives."""

    kind: str = "distances"
    power: float = 1.0
    kl_coef: float = 0.0
    metrics: ClassVar[Sequence[LossMetric]] = (
        LossMetric("distance/old", by_step="distance"),
        LossMetric("distance/largest", reduce="max"),
    )
    received: ClassVar[list[LossInputs]] = []

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(
            old_mean=True,
            old_policy=lambda num_updates: 0.75,
            average=True,
            reference=True,
            whole_groups=True,
        )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        Distances.received.append(inputs)
        others = (inputs.old_policy, inputs.average, inputs.reference)
        kls = [velocity_kl(inputs.policy, other) for other in others if other is not None]
        assert inputs.old_mean is not None
        moved = (inputs.gaussian.mean - inputs.old_mean).square().flatten(1).mean(1)
        loss = moved - inputs.advantage * inputs.gaussian.log_prob(inputs.x_next)
        metrics = {"distance/old": kls[0].detach(), "distance/largest": kls[1].detach()}
        return LossOutputs(loss, inputs.per_action(kls[2]), metrics)


@dataclass(frozen=True, kw_only=True)
class Undeclared(Distances):
    metrics: ClassVar[Sequence[LossMetric]] = (LossMetric("distance/largest", reduce="max"),)


@dataclass(frozen=True, kw_only=True)
class Summed(Distances):
    """Returns a sum in place of one value per action."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        return LossOutputs(super().__call__(inputs).loss.sum().reshape(1))


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
        learner = Learner(policy, config.train, config.loss, accelerator)
        scorer = RewardScorer(config.rewards)
        experience = algorithm.collect(policy, GROUPS, scorer, RANDOM, ITERATION)
        scorer.close()
        return learner, experience

    return make


def gradients_of(learner: Learner) -> list[list[Tensor]]:
    """Filled with the gradients of each optimizer step as it happens."""
    taken: list[list[Tensor]] = []
    learner.optimizer.adam.register_step_pre_hook(
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
    weighted = replace(a, kl_weight=torch.arange(float(len(a))))
    assert Actions.concatenate([weighted, weighted]).kl_weight.tolist() == 2 * [*range(len(a))]


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


def slow_gradient(learner: Learner, experience: Experience, advantages: Tensor, rows: Sequence[int]) -> list[Tensor]:  # fmt: skip
    """The gradient of one optimizer step on some actions, by plain formulas and one action at a time.

    ``-min(A r, A clip(r))`` for each kind of ratio, or ``-A r`` with a stop beyond the KL bound, plus
    ``kl_coef`` times the KL of normals of one standard deviation.
    """
    loss, a, terms = learner.loss, experience.actions, []
    assert isinstance(loss, ClippedLoss)
    for i in rows:
        prompt, step = [GROUPS[int(a.group[i])].prompt], int(a.step[i])
        x, x_next = a.states[a.state[i]][None], a.x_next[i][None]
        record = learner.policy.replay(prompt, x, step, experience.transition)
        with torch.no_grad(), learner.policy.reference():
            reference = learner.policy.replay(prompt, x, step, experience.transition).gaussian
        mean, std = record.gaussian.mean, record.gaussian.std
        assert isinstance(std, float)
        weight, moved = 1.0, 0.0
        ratio = (record.gaussian.log_prob(x_next)[0] - a.old_log_prob[i]).exp()
        if a.old_mean is not None:
            gap = mean - a.old_mean[i]
            moved = float(gap.detach().square().mean()) / (2 * std**2)
        if loss.ratio == "guard":
            assert a.old_mean is not None
            ratio = (gap * (x_next - a.old_mean[i]) / std).mean().exp()
            weight = guard_weight(experience.transition, record.interval)
        advantage = float(advantages[i])
        inside = ratio.clamp(1 - loss.clip_range, 1 + loss.clip_range)
        term = -torch.minimum(ratio * advantage, inside * advantage) * weight
        if loss.clip == "kl":
            stops = moved > loss.clip_range and advantage * (float(ratio.detach()) - 1) > 0
            term = -advantage * ratio * (0.0 if stops else 1.0)
        terms.append(term + loss.kl_coef * (mean - reference.mean).square().mean() / (2 * std**2))
    total = torch.stack(terms).mean()
    found = torch.autograd.grad(total, learner.parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(learner.parameters, found, strict=True)
    ]


@pytest.mark.parametrize(
    "loss",
    [
        ClippedLoss(clip_range=1e-3, kl_coef=0.05),
        ClippedLoss(ratio="guard", clip_range=1e-4, kl_coef=0.05),
        ClippedLoss(clip="kl", clip_range=1e-5, kl_coef=0.05),
    ],
    ids=["clipped", "guard", "kl_bound"],
)
def test_every_optimizer_step_follows_the_gradient_of_the_plain_formulas(loss, learn: Learn):
    """The second step of an iteration is off-policy, so that ratios, bounds and KLs matter."""
    learner, experience = learn("sd3", FAST, loss, updates=2)
    advantages = FAST.advantages(experience)
    # Each of the two steps trains on one of the two groups.
    order = torch.randperm(2, generator=RANDOM.generator("updates")).tolist()
    taken, expected = gradients_of(learner), []

    def compute(*_: object) -> None:
        with torch.enable_grad():
            rows = (experience.actions.group == order[len(expected)]).nonzero().flatten().tolist()
            expected.append(slow_gradient(learner, experience, advantages, rows))

    learner.optimizer.adam.register_step_pre_hook(compute)
    metrics = learner.update(experience, advantages, RANDOM)
    assert metrics["ratio/clip_fraction"] > 0
    assert len(taken) == len(expected) == 2
    for got, want in zip(taken, expected, strict=True):
        scale = max(float(w.abs().max()) for w in want)
        assert scale > 0
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-3 * scale, rtol=0)


@pytest.mark.parametrize("loss", [GUARD, ClippedLoss(clip="kl", clip_range=1e-12)])
def test_kept_means_serve_the_second_update(loss, learn: Learn):
    learner, experience = learn("sd3", FLOW, loss, updates=2)
    metrics = learner.update(experience, FLOW.advantages(experience), RANDOM)
    # The first update is on-policy; the second is not, and its ratios are of the kept means.
    assert metrics["log_prob/noise"] < 1e-5 < metrics["ratio/deviation"]
    assert (metrics["ratio/clip_fraction"] > 0) is (loss.clip == "kl")


@pytest.mark.parametrize("split", ["samples", "steps", "actions"])
def test_an_optimizer_step_trains_on_its_part_of_every_group(split, learn: Learn):
    learner, experience = learn(
        "sd3", FAST, ClippedLoss(clip_range=1e-3, kl_coef=0.05), updates=2, split=split
    )
    advantages, a = FAST.advantages(experience), experience.actions
    seen: list[set[tuple[int, ...]]] = [set()]
    inputs_of = learner.replay.inputs

    def noted(experience: Experience, batch: Batch, *rest: object) -> LossInputs:
        b = batch.actions
        seen[-1].update(zip(b.group.tolist(), b.sample.tolist(), b.step.tolist(), strict=True))
        return inputs_of(experience, batch, *rest)  # type: ignore[arg-type]

    learner.replay.inputs = noted  # type: ignore[method-assign]
    all_keys = list(zip(a.group.tolist(), a.sample.tolist(), a.step.tolist(), strict=True))
    taken, expected = gradients_of(learner), []

    def compute(*_: object) -> None:
        with torch.enable_grad():
            rows = [i for i, key in enumerate(all_keys) if key in seen[-1]]
            expected.append(slow_gradient(learner, experience, advantages, rows))
        seen.append(set())

    learner.optimizer.adam.register_step_pre_hook(compute)
    learner.update(experience, advantages, RANDOM)
    first, second = seen[:2]
    assert first.isdisjoint(second)
    assert first | second == set(all_keys)
    assert len(first) == len(second)
    if split == "samples":
        assert {(g, s) for g, s, _ in first}.isdisjoint({(g, s) for g, s, _ in second})
        assert {g for g, _, _ in first} == {0, 1}
    if split == "steps":
        assert ({k for *_, k in first}, {k for *_, k in second}) == ({1}, {2})
    for got, want in zip(taken, expected, strict=True):
        scale = max(float(w.abs().max()) for w in want)
        assert scale > 0
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-3 * scale, rtol=0)


def test_the_division_does_not_depend_on_order_or_processes():
    keys = torch.cartesian_prod(torch.arange(4), torch.arange(6), torch.arange(5))
    shuffled = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))]

    def divide(keys: Tensor, function: Callable[..., Tensor]) -> dict[tuple[int, ...], int]:
        group, sample, step = keys.unbind(1)
        empty = torch.zeros(len(keys), 1)
        number = torch.arange(len(keys))
        actions = Actions.between(empty, number, empty, step, empty[:, 0], group, sample)
        found = function(actions, 4, RANDOM).tolist()
        return dict(zip(map(tuple, keys.tolist()), found, strict=True))

    def groups(actions: Actions, updates: int, random: Random) -> Tensor:
        return split_groups(actions, updates, 4, random)

    for function, size in ((groups, 30), (split_samples, None), (split_actions, 30)):
        whole = divide(keys, function)
        assert divide(shuffled, function) == whole
        assert divide(keys[keys[:, 0] == 2], function) == {k: v for k, v in whole.items() if k[0] == 2}  # fmt: skip
        if size:  # 4 groups, or 30 actions of a group among 4 updates: 30 of 120 in each
            assert [list(whole.values()).count(u) for u in range(4)] == [size] * 4
    uneven = divide(keys, lambda a, n, _: split_steps(a, n, torch.arange(5)))
    assert [uneven[0, 0, step] for step in range(5)] == [0, 0, 1, 2, 3]


def rows_of(groups: int, samples: int, steps: int = 1) -> Actions:
    """Actions of every step of every sample, whose states are not used."""
    keys = torch.cartesian_prod(torch.arange(groups), torch.arange(samples), torch.arange(steps))
    group, sample, step = keys.unbind(1)
    empty = torch.zeros(len(keys), 1)
    rows = torch.arange(len(keys))
    return Actions.between(empty, rows, empty, step, empty[:, 0], group, sample)


def waiting(update_of: Tensor, group: Tensor, num_ranks: int) -> float:
    """The time of training on ranks that wait for each other, over the time if none waits."""
    size = (int(group.max()) + 1) // num_ranks
    counts = torch.bincount(
        update_of * num_ranks + group // size, minlength=(int(update_of.max()) + 1) * num_ranks
    ).view(-1, num_ranks)
    return float(counts.amax(1).sum() / counts.float().mean(1).sum())


def test_no_rank_waits_for_another_because_of_the_division():
    def at_random(actions: Actions, updates: int, num_groups: int, random: Random) -> Tensor:
        order = torch.randperm(num_groups, generator=random.generator("updates"))
        return order.argsort()[actions.group] % updates

    actions = rows_of(48, 2)
    assert waiting(at_random(actions, 2, 48, RANDOM), actions.group, 8) > 1.1
    for groups, updates in ((48, 2), (48, 1), (48, 3), (64, 4), (32, 2)):
        actions, divided = rows_of(groups, 2), []
        for iteration in range(100):
            found = split_groups(actions, updates, groups, RANDOM.at(iteration))
            divided.append(found[::2])
            # Whole groups, equally many in each update, for every allowed number of ranks.
            assert torch.equal(found[::2], found[1::2])
            allowed = [n for n in (1, 2, 3, 4, 8, 16) if groups % (n * updates) == 0]
            assert [waiting(found, actions.group, n) for n in allowed] == [1.0] * len(allowed)
        # Any two groups meet in an update sooner or later, unless one of them is drawn for another.
        together = torch.stack([d[:, None] == d for d in divided]).any(0)
        block = torch.arange(groups) // updates
        assert torch.equal(together, torch.eye(groups).bool() | (block[:, None] != block))
    # DanceGRPO's recipe for FLUX on 8 ranks: 3 updates of 4 samples of each of 16 groups.
    actions = rows_of(16, 12, steps=8)
    for divide in (split_samples, split_actions):
        assert waiting(divide(actions, 3, RANDOM), actions.group, 8) == 1.0


def test_dropped_samples_are_in_neither_mean(learn: Learn):
    """With 1 of 2 groups flat, the policy term doubles, and the KL is that of the other group."""
    loss = ClippedLoss(clip_range=1e-3, kl_coef=0.05)
    taken = {}
    for kept in ("count", "drop"):
        learner, experience = learn("sd3", FAST, loss, without_advantage=kept)
        with torch.no_grad():  # away from the reference, where the KL has a gradient
            for p in learner.parameters:
                p.add_(0.02)
        advantages = FAST.advantages(experience) * (experience.actions.group == 0)
        rows = list(range(len(advantages)))
        if kept == "drop":
            rows = (experience.actions.group == 0).nonzero().flatten().tolist()
        want = slow_gradient(learner, experience, advantages, rows)
        got = gradients_of(learner)
        learner.update(experience, advantages, RANDOM)
        scale = max(float(w.abs().max()) for w in want)
        for g, w in zip(got[0], want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-3 * scale, rtol=0)
        taken[kept] = torch.cat([g.flatten() for g in got[0]])
    # An action without advantage stays if another one of its sample has some.
    a = experience.actions
    one = torch.zeros(len(a))
    one[0] = 1.0
    same = (a.group == a.group[0]) & (a.sample == a.sample[0])
    assert torch.equal(has_advantage(a, one), same)
    assert same.sum() == 2
    cosine = torch.cosine_similarity(taken["count"], taken["drop"], dim=0)
    assert cosine < 0.999


def test_missing_old_means_are_refused(learn: Learn):
    learner, experience = learn("sd3", FLOW, GUARD, updates=2)
    bare = replace(experience, actions=replace(experience.actions, old_mean=None))
    with pytest.raises(ValueError, match="the loss ClippedLoss needs the old means of the steps"):
        learner.update(bare, FLOW.advantages(experience), RANDOM)


# A loss of one's own.


def same_outputs(outputs: PolicyOutputs | None, learner: Learner, inputs: LossInputs) -> None:
    """Assert that a policy's outputs equal a replay under the policy's present weights."""
    assert outputs is not None
    transition = inputs.transition
    owners = {int(row): int(g) for row, g in zip(inputs.state, inputs.group, strict=True)}
    prompts = [GROUPS[owners[row]].prompt for row in range(len(inputs.x))]
    with torch.no_grad():
        record = learner.policy.replay(prompts, inputs.x, inputs.step, transition)
    for found, wanted in (
        (outputs.prediction.x0, record.prediction.x0),
        (outputs.prediction.x1, record.prediction.x1),
        (outputs.prediction.output, record.prediction.output),
        (outputs.gaussian.mean, record.gaussian.mean),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert outputs.gaussian.std == record.gaussian.std


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_a_loss_receives_the_inputs_that_it_needs(name, algorithm, learn: Learn):
    Distances.received.clear()
    learner, experience = learn(
        name, algorithm, Distances(kl_coef=0.1), updates=2, train_batch=6, ema_decay=0.9
    )
    advantages = algorithm.advantages(experience)
    learner.update(experience, advantages, RANDOM)
    # After one iteration the trained, old, averaged and reference weights all differ.
    Distances.received.clear()
    before = [p.detach().clone() for p in learner.parameters]
    assert learner.behaviour is not None
    old = [b.clone() for b in learner.behaviour]
    assert learner.ema is not None
    average = [b.clone() for b in learner.ema.average]
    metrics = learner.update(experience, advantages, RANDOM)
    order = torch.randperm(2, generator=RANDOM.generator("updates"))
    first = [i for i in Distances.received if int(i.group[0]) == int(order[0])]
    for inputs in first:
        assert inputs.first_update
        for outputs, weights in ((inputs.policy, before), (inputs.old_policy, old), (inputs.average, average)):  # fmt: skip
            with swapped(learner.parameters, weights):
                same_outputs(outputs, learner, inputs)
        with learner.policy.reference():
            same_outputs(inputs.reference, learner, inputs)
        rows = (experience.actions.step == inputs.step) & (experience.actions.group == inputs.group[0])  # fmt: skip
        assert torch.equal(inputs.x_next.sort(0).values, experience.actions.x_next[rows].sort(0).values)  # fmt: skip
    assert metrics["distance/largest"] > 0
    assert metrics["distance/old"] > 0
    assert {k for k in metrics if k.endswith("/distance")} == {
        f"step/{step}/distance" for step in experience.actions.step.unique().tolist()
    }
    for now, then, trained in zip(learner.behaviour, old, learner.parameters, strict=True):
        torch.testing.assert_close(now, 0.75 * then + 0.25 * trained, atol=1e-7, rtol=1e-5)


def test_a_loss_receives_nothing_else(learn: Learn):
    """Inputs that cost a forward pass or a second set of weights are not computed unasked."""
    learner, experience = learn("sd3", FLOW, ClippedLoss(), monitor_states=0, ema_decay=0.9)
    before = learner.policy.num_evaluations
    learner.update(experience, FLOW.advantages(experience), RANDOM)
    distinct = len(experience.actions.state.unique())
    assert learner.policy.num_evaluations - before == distinct
    assert learner.behaviour is None


def test_whole_groups_share_a_batch(learn: Learn):
    """With one update for both groups and room for three states, batches hold one group of two."""
    Distances.received.clear()
    learner, experience = learn("sd3", FLOW, Distances(), train_batch=3, ema_decay=0.9)
    learner.update(experience, torch.zeros(len(experience.actions)), RANDOM)
    assert [sorted(i.sample.tolist()) for i in Distances.received] == [[0, 1]] * 2 * (T - 1)
    learner, experience = learn("sd3", FLOW, Distances(), train_batch=1, ema_decay=0.9)
    with pytest.raises(
        ValueError, match=r"2 states and train\.train_batch is 1; set it to at least 2"
    ):
        learner.update(experience, FLOW.advantages(experience), RANDOM)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Undeclared(), "the metric 'distance/old' without declaring it"),
        (Summed(), r"Summed returned loss of shape \(1,\)"),
    ],
)
def test_losses_that_break_the_protocol_are_refused(loss, message, learn: Learn):
    learner, experience = learn("sd3", FLOW, loss, ema_decay=0.9)
    with pytest.raises(ValueError, match=message):
        learner.update(experience, FLOW.advantages(experience), RANDOM)


def sum_on(rank: int) -> int:
    """One of two processes whose gradients are added."""
    accelerator = Accelerator(cpu=True)
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    parameters[0].grad = torch.full((2, 3), 1.0 + rank)
    if rank == 1:
        parameters[1].grad = torch.arange(4.0)
    sum_gradients(parameters, accelerator)
    first, second = (p.grad for p in parameters)
    assert first is not None
    assert first.tolist() == [[3.0] * 3] * 2
    assert second is not None
    assert second.tolist() == [0.0, 1.0, 2.0, 3.0]
    return 0 if accelerator.num_processes == 2 else 3


def test_gradients_of_two_processes_are_summed() -> None:
    """The loss is divided by the number of actions of all processes, so that an average is wrong."""
    for process in ranks(sum_on):
        output, _ = process.communicate()
        assert process.returncode == 0, output
