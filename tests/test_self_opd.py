"""Self-OPD: branches beside the image without noise, their weights, and the direction of an update."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flowgrpo.algorithms import SelfOPD
from flowgrpo.config import Train
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.scores import Scores
from flowgrpo.core.steps import RandomSteps, Window
from flowgrpo.core.transitions import FlowSDE, Prediction, Step
from flowgrpo.data.experience import Candidates
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import LossInputs, PolicyOutputs
from flowgrpo.losses.self_opd import SelfOPDLoss, repulsion
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

T, G, SEEDS = 5, 6, 2
RANDOM = Random(3).at("train", 0)
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]
WINDOW = Window(start=1, size=2)


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture(scope="module")
def scorer() -> Iterator[RewardScorer]:
    made = RewardScorer([Reward(model=f"{__name__}:brightness")], Failures(retries=0))
    yield made
    made.close()


def table(candidates: Candidates) -> dict[tuple[int, int, int], float]:
    c = candidates
    keys = zip(c.group.tolist(), c.sample.tolist(), c.step.tolist(), strict=True)
    return dict(zip(keys, c.reward.tolist(), strict=True))


@pytest.mark.parametrize("path", ["sde", "ode"])
def test_branches_are_compared_with_the_image_without_noise(path, make_policy: MakePolicy, scorer: RewardScorer) -> None:  # fmt: skip
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=T))
    algorithm = SelfOPD(group_size=G, seeds=SEEDS, path=path, steps=WINDOW)
    algorithm.check(T)
    experience = algorithm.collect(policy, GROUPS, scorer, RANDOM, 0)
    assert experience.cost == algorithm.cost(T, 0, RANDOM)
    a, rewards = experience.actions, table(experience.candidates)
    assert len(a) == len(GROUPS) * G * 2
    assert len(a.state.unique()) == len(GROUPS) * SEEDS * 2
    compared = {k[1:] for k in rewards if k[0] == 1 and k[1] >= G}
    steps = (1, 2) if path == "sde" else (1,)
    assert compared == {(G + seed, step) for seed in range(SEEDS) for step in steps}
    # One trajectory of the second group, by itself.
    noise = SampleNoise([RANDOM.at("paths").at("group", 1, 1)])
    (alone,) = policy.run(
        [GROUPS[1].prompt],
        noise,
        nodes=range(4),
        stochastic=() if path == "ode" else range(2),
        transition=algorithm.transition,
        record=[1, 2],
        decode=False,
    )
    for record in alone.records:
        mine = (a.group == 1) & (a.step == record.step) & (a.sample == G - 1)
        (row,) = mine.nonzero().flatten().tolist()
        torch.testing.assert_close(a.states[a.state[row : row + 1]], record.x, atol=2e-4, rtol=1e-4)
        (rest,) = policy.run([GROUPS[1].prompt], noise, nodes=range(record.step, T + 1), x=record.x)
        assert rest.media is not None
        # The ODE from a deterministic trajectory's states ends at one image.
        key = (1, G + 1, record.step if path == "sde" else 1)
        assert rewards[key] == pytest.approx(brightness(rest.media, []).item(), abs=2e-5)
    # The advantages, naively.
    size = G // SEEDS
    advantages = algorithm.advantages(experience)
    for i, value in enumerate(advantages.tolist()):
        group, sample, step = int(a.group[i]), int(a.sample[i]), int(a.step[i])
        seed = sample // size
        rivals = torch.tensor([rewards[group, seed * size + k, step] for k in range(size)]).double()
        own = rewards[group, G + seed, step if path == "sde" else 1]
        wanted = (rewards[group, sample, step] - own) / max(rivals.std().item(), 1e-4)
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_failed_rewards_give_no_advantage(make_policy: MakePolicy, scorer: RewardScorer) -> None:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=T))
    algorithm = SelfOPD(group_size=G, seeds=SEEDS, path="ode", steps=Window(start=1, size=1))
    experience = algorithm.collect(policy, GROUPS[:1], scorer, RANDOM, 0)
    c, a = experience.candidates, experience.actions
    reward = c.reward.clone()
    whole = algorithm.advantages(experience)
    reward[c.sample == 0] = math.nan  # a branch of the first seed
    reward[c.sample == G + 1] = math.nan  # the second seed's image without noise
    c.scores.raw["brightness"].copy_(reward)
    object.__setattr__(c, "scores", Scores(c.scores.raw, reward, c.scores.weights))
    found = algorithm.advantages(experience)
    assert found.isfinite().all()
    assert (found[(a.sample == 0) | (a.sample >= 3)] == 0).all()
    assert ((found != 0) == ((a.sample == 1) | (a.sample == 2))).all()
    assert (whole != 0).all()


def test_a_bad_branch_next_to_the_best_one_is_not_repelled() -> None:
    direction = torch.tensor([[1.0, 0], [2, 0], [0, 3], [-1, 0], [5, 0], [0, 1]])
    advantage = torch.tensor([2.0, -1, -1, -1, 1, -3])
    state = torch.tensor([0, 0, 0, 0, 1, 1])
    known = torch.ones(6, dtype=torch.bool)
    found = repulsion(direction, advantage, known, state)
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 0.5, 1, 1, 0.5]))
    # Without advantage, a branch whose reward failed is not the best, and one with a reward may be.
    advantage = torch.tensor([0.0, 0, -1, -1, 0, -3])
    known = torch.tensor([False, True, True, True, True, True])
    found = repulsion(direction.flip(1) * torch.tensor([[1.0], [1], [1], [1], [1], [1]]), advantage, known, state)  # fmt: skip
    torch.testing.assert_close(found[2:4], torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("aware", [True, False])
def test_the_loss_is_a_signed_regression(aware: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, output = (torch.randn(2, 8, generator=draw) for _ in range(2))
    output.requires_grad_()
    transition, step = FlowSDE(), Step.flow(0.8, 0.6)
    prediction = Prediction.from_output(x, output, step)
    gaussian = transition(x, prediction, step)
    state = torch.tensor([0, 0, 0, 1, 1, 1])
    noise = torch.randn(6, 8, generator=draw)
    x_next = (gaussian.mean[state] + gaussian.std * noise).detach()
    advantage = torch.tensor([0.4, -0.3, -5.0, 3.0, 0.0, -0.2])
    loss = SelfOPDLoss(weight_clip=1.0, direction_aware=aware)
    made = loss(
        LossInputs(
            policy=PolicyOutputs(prediction, gaussian),
            x=x,
            state=state,
            x_next=x_next,
            old_log_prob=torch.zeros(6),
            advantage=advantage,
            group=state,
            sample=torch.arange(6),
            step=1,
            interval=step,
            transition=transition,
        )
    )
    wanted = []
    for i in range(6):
        best = 0 if i < 3 else 3
        share = (1 - torch.cosine_similarity(noise[i], noise[best], dim=0)) / 2
        weight = advantage[i] * (share if aware and advantage[i] < 0 else 1.0)
        wanted.append(weight.clamp(-1, 1) * noise[i].square().mean() / 2)
    torch.testing.assert_close(made.loss, torch.stack(wanted), atol=1e-5, rtol=1e-4)
    assert made.metrics["branch/attraction"].tolist() == pytest.approx([0.4, 0, 0, 1, 0, 0])
    assert made.metrics["branch/repulsion"].max() <= 1
    # A good branch draws the mean to itself, and a bad one pushes it away.
    for i, sign in ((0, -1), (2, 1)):
        (slope,) = torch.autograd.grad(made.loss[i], gaussian.mean, retain_graph=True)
        assert sign * (slope[0] * noise[i]).sum() > 0


def test_an_update_moves_the_mean_to_good_branches(make_policy: MakePolicy, scorer: RewardScorer, accelerator: Accelerator) -> None:  # fmt: skip
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=T))
    algorithm = SelfOPD(group_size=G, seeds=SEEDS, steps=Window(start=1, size=1))
    experience = algorithm.collect(policy, GROUPS, scorer, RANDOM, 0)
    a, advantages = experience.actions, algorithm.advantages(experience)
    settings = Train(iterations=4, groups=2, lr=1e-3, monitor_states=0, max_grad_norm=1e9, train_batch=3)  # fmt: skip
    learner = Learner(policy, settings, SelfOPDLoss(direction_aware=False), accelerator)

    def total() -> float:
        """The weighted squared distances of the means from all branches."""
        found = 0.0
        for i, weight in enumerate(advantages.clamp(-1, 1).tolist()):
            x, x_next = a.states[a.state[i : i + 1]], a.states[a.next_state[i : i + 1]]
            owner = GROUPS[int(a.group[i])].prompt
            with torch.no_grad():
                mean = policy.replay([owner], x, 1, algorithm.transition).gaussian.mean
            found += weight * float((mean - x_next).square().mean())
        return found

    before = total()
    metrics = learner.update(experience, advantages, RANDOM)
    assert metrics["grad_norm"] > 0
    assert total() < before


def test_weights_of_random_steps() -> None:
    steps = RandomSteps(count=2, first=1, last=5, weights=(0.0, 1.0, 8.0, 1.0))
    drawn = [steps.select(10, i, Random(0).at(i)) for i in range(300)]
    assert all(s == sorted(set(s)) and len(s) == 2 for s in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=6).tolist()
    assert counts[0] == counts[1] == counts[5] == 0
    # 0.8 at the first draw, and 0.1 + 0.1 times 8/9 at the second.
    assert counts[3] / 300 == pytest.approx(0.8 + 0.2 * 8 / 9, abs=0.04)
    plain = RandomSteps(count=2, first=1, last=5)
    pool = torch.randperm(4, generator=Random(0).generator())[:2]
    assert plain.select(10, 0, Random(0)) == sorted((1 + pool).tolist())


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (SelfOPD(group_size=16), "with at least 2 branches for each seed"),
        (SelfOPD(group_size=9, seeds=4), "multiple of algorithm.seeds = 4"),
        (SelfOPD(steps=RandomSteps(weights=(1.0, 2.0))), "weights must be 6 numbers"),
        (SelfOPD(steps=RandomSteps(weights=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0))), "of at least 0"),
        (
            SelfOPD(steps=RandomSteps(weights=(1.0, 0.0, 0.0, 0.0, 0.0, 1.0))),
            "3 steps cannot be drawn with fewer",
        ),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused(algorithm: SelfOPD, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm.check(10)
