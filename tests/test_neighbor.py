"""Neighbor GRPO: what is collected, its loss, and that an update moves towards good neighbours."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flowgrpo.algorithms import FlowGRPO, NeighborGRPO
from flowgrpo.algorithms.neighbor_grpo import quasi_normed
from flowgrpo.config import Config, ConfigError, Model, Prompts, Run, Train
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.steps import Window
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss, clipped_surrogate
from flowgrpo.losses.neighbor import NeighborLoss, neighbor_log_prob
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_neighbor"
T, G, B, Q = 5, 4, 2, 0.3
RANDOM = Random(3).at("train", 0)
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]
ALGORITHM = NeighborGRPO(group_size=G, anchors=B, perturbation=Q, steps=Window(start=1, size=2))


def brightness(media: Tensor, prompts: Any) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture(scope="module")
def scorer() -> Iterator[RewardScorer]:
    made = RewardScorer([Reward(model=f"{HERE}:brightness")], Failures(retries=0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def policy_of(make_policy: MakePolicy) -> Callable[[str], PipelinePolicy]:
    made: dict[str, PipelinePolicy] = {}

    def policy(name: str) -> PipelinePolicy:
        if name not in made:
            made[name] = make_policy(name, sampling=sampling_of(name, num_steps=T))
        return made[name]

    return policy


def test_log_probabilities_are_those_of_a_categorical():
    torch.manual_seed(0)
    end, candidates = torch.randn(2, 3, 2), torch.randn(7, 3, 2)
    anchor = torch.tensor([0, 1, 0, 0, 1, 1, 1])
    found = neighbor_log_prob(end, candidates, anchor)
    for a in (0, 1):
        rows = anchor == a
        distance = torch.stack([((c - end[a]) ** 2).mean() for c in candidates[rows]])
        wanted = torch.distributions.Categorical(logits=-distance).logits
        torch.testing.assert_close(found[rows], wanted)
    # Distances far beyond the range of exp are no trouble.
    far = neighbor_log_prob(end, candidates + 100, anchor)
    assert far.isfinite().all()


def test_at_ratio_1_the_gradient_draws_to_the_advantage_weighted_candidates():
    """-sum A log pi has the gradient -2/D sum A_i x_i, as advantages sum to 0."""
    torch.manual_seed(1)
    end = torch.randn(1, 6, requires_grad=True)
    candidates, advantage = torch.randn(4, 6), torch.tensor([0.7, -0.2, 0.4, -0.9])
    log_prob = neighbor_log_prob(end, candidates, torch.zeros(4, dtype=torch.long))
    clipped_surrogate(log_prob - log_prob.detach(), advantage, 1e-4).sum().backward()
    torch.testing.assert_close(end.grad[0], -2 / 6 * (advantage[:, None] * candidates).sum(0))


def test_quasi_norm_by_hand():
    advantage = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.0, -2.0])
    group = torch.tensor([0, 0, 1, 1, 1, 0])
    found = quasi_normed(advantage, group, 0.8)
    one = (1 + 1 + 2**0.8) ** (1 / 0.8)
    torch.testing.assert_close(found, torch.tensor([1 / one, -1 / one, 0, 1, 0, -2 / one]))
    assert (quasi_normed(torch.zeros(2), group[:2], 0.8) == 0).all()
    # p = 2 is the Euclidean norm.
    torch.testing.assert_close(
        quasi_normed(advantage[:2], group[:2], 2.0).norm(), torch.tensor(1.0)
    )


@pytest.mark.parametrize("name", ["sd3", "sd15"])
@pytest.mark.parametrize("solver", ["euler", "dpm_2m"])
@pytest.mark.parametrize("batch", [64, 3])
def test_collected_is_what_each_sample_alone_would_do(
    name: str, solver: Solver, batch: int, policy_of: Callable[[str], PipelinePolicy], scorer: RewardScorer
) -> None:  # fmt: skip
    policy = policy_of(name)
    policy.batch_size = batch
    algorithm = NeighborGRPO(
        group_size=G, anchors=B, perturbation=Q, steps=Window(start=1, size=2), solver=solver
    )
    algorithm.check(T)
    experience = algorithm.collect(policy, GROUPS, scorer, RANDOM, 0)
    assert experience.cost == algorithm.cost(T, 0, RANDOM)
    a, group = experience.actions, GROUPS[1]
    assert len(a) == len(GROUPS) * 2 * B * G
    assert sorted(a.step.unique().tolist()) == [1, 2] == list(algorithm.trained_steps(T, 0, RANDOM))

    def run(x: Tensor | None, noise: SampleNoise, **options: Any) -> Any:
        (rollout,) = policy.run([group.prompt], noise, x=x, **options)
        return rollout

    base = run(None, SampleNoise([RANDOM.at("group", 1)]), nodes=[0], decode=False).x
    paths = []
    for i in range(G):
        noise = SampleNoise([RANDOM.at("group", 1, i)])
        own = run(None, noise, nodes=[0], decode=False).x
        x = math.sqrt(1 - Q**2) * base + Q * own
        rollout = run(x, noise, nodes=range(T + 1), record=[1, 2], solver=solver)
        paths.append(rollout.records)
        mine = (experience.candidates.group == 1) & (experience.candidates.sample == i)
        reward = brightness(rollout.media, []).item()
        assert experience.candidates.reward[mine].item() == pytest.approx(reward, abs=2e-5)
    for n, step in enumerate((1, 2)):
        rows = ((a.group == 1) & (a.step == step)).nonzero().flatten()
        assert a.sample[rows].tolist() == [*range(G)] * B
        starts = a.states[a.state[rows]].view(B, G, -1)
        assert torch.equal(starts, starts[:, :1].expand_as(starts)), "an anchor's state is shared"
        for i in range(G):
            x_next = a.states[a.next_state[rows[i]]]
            torch.testing.assert_close(x_next, paths[i][n].x_next[0], atol=2e-4, rtol=1e-4)
        for start, log_probs in zip(starts[:, 0], a.old_log_prob[rows].view(B, G), strict=True):
            (own,) = [p for p in paths if torch.allclose(p[n].x.flatten(), start, atol=2e-4)]
            record = own[n]
            x0, x1, interval = record.prediction.x0, record.prediction.x1, record.interval
            end = interval.signal_next * x0 + interval.noise_next * x1  # the deterministic step
            logits = torch.stack([-((p[n].x_next - end) ** 2).mean() for p in paths])
            torch.testing.assert_close(log_probs, logits.log_softmax(0), atol=2e-4, rtol=1e-4)
    advantages = algorithm.advantages(experience)
    for g in (0, 1):
        mine = (a.group == g) & (a.step == 1)
        assert advantages[mine][:G].double().abs().pow(0.8).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("train_batch", [64, 2])
def test_an_update_is_the_gradient_of_the_published_objective(
    train_batch: int, make_policy: MakePolicy, scorer: RewardScorer, accelerator: Accelerator
) -> None:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=T))
    experience = ALGORITHM.collect(policy, GROUPS, scorer, RANDOM, 0)
    advantages, a = ALGORITHM.advantages(experience), experience.actions
    settings = Train(iterations=2, groups=2, lr=3e-2, monitor_states=0, max_grad_norm=1e9, train_batch=train_batch)  # fmt: skip
    learner = Learner(policy, settings, NeighborLoss(clip_range=1.0), accelerator)
    first = learner.update(experience, advantages, RANDOM)
    assert first["log_prob/noise"] < 1e-6
    assert first["grad_norm"] > 0
    # Now that the weights have moved: naively, anchor by anchor.
    terms = []
    for state in a.state.unique().tolist():
        rows = (a.state == state).nonzero().flatten()
        owner = GROUPS[int(a.group[rows[0]])].prompt
        record = policy.replay([owner], a.states[a.state[rows[:1]]], int(a.step[rows[0]]), ALGORITHM.transition)  # fmt: skip
        distance = ((a.states[a.next_state[rows]] - record.gaussian.mean) ** 2).flatten(1).mean(1)
        log_ratio = (-distance).log_softmax(0) - a.old_log_prob[rows]
        terms.append(-advantages[rows] * log_ratio.exp())
    wanted = torch.autograd.grad(
        torch.cat(terms).mean(), learner.parameters, allow_unused=True, materialize_grads=True
    )
    taken: list[Tensor] = []
    learner.optimizer.adam.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.clone() for p in learner.parameters if p.grad is not None)
    )
    learner.update(experience, advantages, RANDOM, stale=True)
    size = float(torch.cat([w.flatten() for w in wanted]).norm())
    for got, want in zip(taken, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * size, rtol=1e-3)


def config(algorithm: Any, loss: Any, **train: Any) -> Config:
    return Config(
        model=Model(path=""),
        algorithm=algorithm,
        loss=loss,
        rewards=(Reward(model=f"{HERE}:brightness"),),
        prompts=Prompts(train="", held_out=""),
        train=Train(iterations=1, groups=2, **train),
        run=Run(folder=""),
    )


@pytest.mark.parametrize(
    ("algorithm", "loss", "train", "message"),
    [
        (NeighborGRPO(), ClippedLoss(), {}, "'step' or 'initial_noise', and the algorithm collects 'neighbor'"),
        (FlowGRPO(), NeighborLoss(), {}, "'neighbor', and the algorithm collects 'step'"),
        (NeighborGRPO(), NeighborLoss(), {"train_batch": 3}, "at least algorithm.anchors = 4"),
        (NeighborGRPO(), NeighborLoss(), {"without_advantage": "drop"}, "set it to 'count'"),
        (NeighborGRPO(), NeighborLoss(), {"updates": 2, "split": "samples"}, "use 'groups' or 'steps'"),
        (NeighborGRPO(perturbation=0.0), NeighborLoss(), {}, r"perturbation must be in \(0, 1\], got 0.0"),
        (NeighborGRPO(quasi_norm=2.5), NeighborLoss(), {}, r"quasi_norm must be in \(0, 2\], got 2.5"),
        (NeighborGRPO(anchors=13), NeighborLoss(), {}, "anchors must be from 1 to group_size = 12, got 13"),
        (NeighborGRPO(), NeighborLoss(clip_range=0.0), {}, "clip_range must be at least"),
    ],
)  # fmt: skip
def test_refused(algorithm, loss, train, message):
    with pytest.raises(ConfigError, match=message):
        config(algorithm, loss, **train).check()


def test_the_defaults_are_sound():
    config(NeighborGRPO(), NeighborLoss()).check()
