"""Collecting experience with Flow-GRPO and DanceGRPO, and learning from it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flowgrpo.algorithms import DanceGRPO, FlowGRPO
from flowgrpo.algorithms.credit import extremes
from flowgrpo.config import Config, Model, Prompts, Run, Train
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.steps import AllSteps, Window
from flowgrpo.core.transitions import CPS, DDIM, DanceSDE, FlowSDE
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import Loss
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.settings import Weights
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_collect"
T, G = 5, 3
ITERATION = 4
RANDOM = Random(1).at("train", ITERATION)
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]

CLOSE = {"atol": 2e-4, "rtol": 1e-4}
"""Of states: a model rounds differently in another batch shape, and steps amplify it."""
Algorithm = FlowGRPO | DanceGRPO
MakeJudge = Callable[..., RewardScorer]
seen: list[Tensor] = []


# Reward models, as a user would write them.
def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    seen.append(media)
    return media.flatten(1).mean(1)


def equal(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Equal up to rounding."""
    return 0.7 + 6e-8 * (torch.arange(len(media)) % 3)


def failing_for_the_first(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    scores = brightness(media, prompts)
    scores[0] = torch.nan
    return scores


@pytest.fixture
def scorer() -> Iterator[MakeJudge]:
    judges: list[RewardScorer] = []
    seen.clear()

    def make(reward: str = "brightness") -> RewardScorer:
        judges.append(RewardScorer([Reward(model=f"{HERE}:{reward}")], Failures(retries=0)))
        return judges[-1]

    yield make
    for made in judges:
        made.close()


@pytest.fixture(scope="module")
def policies(make_policy: MakePolicy) -> Callable[[str], PipelinePolicy]:
    """One policy per family; tests leave its weights alone."""
    made: dict[str, PipelinePolicy] = {}

    def policy(name: str) -> PipelinePolicy:
        if name not in made:
            made[name] = make_policy(name, sampling=sampling_of(name, num_steps=T))
        made[name].batch_size = 64
        return made[name]

    return policy


FLOW = FlowGRPO(group_size=G, transition=FlowSDE())
FAST = FlowGRPO(group_size=G, transition=CPS(), steps=Window(start=1, size=2), shared_noise=True)
DANCE = DanceGRPO(group_size=G, transition=DanceSDE(), timestep_fraction=1.0)
DANCE_DDIM = replace(DANCE, transition=DDIM())
CASES = {
    "flow": ("sd3", FLOW),
    "fast": ("sd3", FAST),
    "dance": ("sd3", DANCE),
    "flow-ddim": ("sd15", replace(FLOW, transition=DDIM())),
    "fast-ddim": ("sd15", replace(FAST, transition=DDIM())),
    "dance-ddim": ("sd15", DANCE_DDIM),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Algorithm]:
    name, algorithm = CASES[request.param]
    algorithm.check(T)
    return name, algorithm


def stochastic_steps(algorithm: Algorithm) -> list[int]:
    return [1, 2] if isinstance(algorithm.steps, Window) else list(range(T - 1))


def by_owner(experience: Experience) -> dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]]:
    """State, next state and log-probability by group, sample and step."""
    a = experience.actions
    keys = zip(a.group.tolist(), a.sample.tolist(), a.step.tolist(), strict=True)
    rows = zip(a.states[a.state], a.x_next, a.old_log_prob, strict=True)
    return dict(zip(keys, rows, strict=True))


def test_collected_is_what_each_sample_alone_would_do(
    case: tuple[str, Algorithm], policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    name, algorithm = case
    policy, steps = policies(name), stochastic_steps(algorithm)
    before = (policy.num_evaluations, policy.num_decodes)
    experience = algorithm.collect(policy, GROUPS, scorer(), RANDOM, ITERATION)
    images = torch.cat(seen)

    # Cost, by formula and by what was really done.
    shared, first = algorithm.shared_noise, steps[0]
    nfe = (first + 1) + G * (T - first - 1) if shared else G * T
    assert experience.cost.nfe == nfe
    assert experience.cost.decodes == G
    spent = (policy.num_evaluations - before[0], policy.num_decodes - before[1])
    assert spent == (nfe * len(GROUPS), G * len(GROUPS))

    # Shapes.
    actions, candidates = experience.actions, experience.candidates
    number = len(GROUPS) * G
    assert len(actions) == number * len(steps)
    assert len(candidates) == len(images) == number
    assert candidates.group.tolist() == [0] * G + [1] * G
    assert candidates.sample.tolist() == [0, 1, 2] * 2
    assert candidates.step.tolist() == [T - 1] * number
    assert len(actions.state.unique()) == number * len(steps) - (number - len(GROUPS)) * shared
    if not shared:
        # The state after a step is the one before the next, and is stored once.
        latent = actions.states[0].numel()
        held = sum(b.untyped_storage().nbytes() for b in actions.states.blocks)
        assert held == 4 * latent * number * (len(steps) + 1)
    assert actions.states[0].dtype == actions.x_next.dtype == torch.float32
    assert len(experience.diversity) == len(experience.duplicates) == len(GROUPS)
    assert experience.diversity.min() > 0
    assert experience.duplicates.sum() == 0

    # The slow version: every sample alone, from its noise to its image.
    collected = by_owner(experience)
    assert set(collected) == set(itertools.product(range(2), range(G), steps))
    for row, (group, sample) in enumerate(itertools.product(GROUPS, range(G))):
        start = RANDOM.at("group", group.index)
        own = start.at(sample)
        (alone,) = policy.run(
            [group.prompt],
            SampleNoise([own], [start] if shared else None),
            stochastic=steps,
            transition=algorithm.transition,
            record=steps,
        )
        assert alone.media is not None
        torch.testing.assert_close(images[row], alone.media[0], atol=2e-5, rtol=0)
        for record in alone.records:
            x, x_next, log_prob = collected[group.index, sample, record.step]
            torch.testing.assert_close(x, record.x[0], **CLOSE)
            torch.testing.assert_close(x_next, record.x_next[0], **CLOSE)
            old = record.gaussian.log_prob(record.x_next)[0]
            torch.testing.assert_close(log_prob, old, atol=1e-4, rtol=0)
    torch.testing.assert_close(candidates.reward, images.flatten(1).mean(1))


def test_batches_and_ranks_change_nothing(
    case: tuple[str, Algorithm], policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    name, algorithm = case
    policy = policies(name)
    whole = algorithm.collect(policy, GROUPS, scorer(), RANDOM, ITERATION)
    policy.batch_size = 2
    parts = [algorithm.collect(policy, [g], scorer(), RANDOM, ITERATION) for g in reversed(GROUPS)]
    apart = by_owner(parts[0]) | by_owner(parts[1])
    together = by_owner(whole)
    assert apart.keys() == together.keys()
    for key, values in together.items():
        torch.testing.assert_close(values[1], apart[key][1], **CLOSE)
    other = algorithm.collect(policy, GROUPS, scorer(), Random(1).at("train", 5), 5)
    assert (other.candidates.reward - whole.candidates.reward).abs().min() > 0


def test_groups_with_equal_prompts_differ(
    policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    groups = [Group(0, Prompt("a red cube")), Group(1, Prompt("a red cube"))]
    reward = FLOW.collect(policies("sd3"), groups, scorer(), RANDOM, ITERATION).candidates.reward
    assert reward.unique().numel() == 2 * G


@pytest.mark.parametrize(("fraction", "kept"), [(0.6, 2), (0.1, 1), (0.75, 3), (1.0, 4)])
@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_dance_keeps_a_fraction_of_the_steps(
    name: str,
    fraction: float,
    kept: int,
    policies: Callable[[str], PipelinePolicy],
    scorer: MakeJudge,
) -> None:
    base = DANCE if name == "sd3" else DANCE_DDIM
    all_of_it = by_owner(base.collect(policies(name), GROUPS, scorer(), RANDOM, ITERATION))
    algorithm = replace(base, timestep_fraction=fraction)
    part = by_owner(algorithm.collect(policies(name), GROUPS, scorer(), RANDOM, ITERATION))
    steps = {
        (g, s): tuple(step for a, b, step in part if (a, b) == (g, s))
        for g, s in itertools.product(range(2), range(G))
    }
    assert {len(chosen) for chosen in steps.values()} == {kept}
    if kept < T - 1:
        assert len(set(steps.values())) > 1
    for key, values in part.items():
        assert all(torch.equal(a, b) for a, b in zip(values, all_of_it[key], strict=True))


def test_advantages_are_of_the_group(
    policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    experience = DANCE.collect(policies("sd3"), GROUPS, scorer(), RANDOM, ITERATION)
    advantages = DANCE.advantages(experience)
    reward = experience.candidates.reward.view(2, G)
    expected = (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)
    a = experience.actions
    torch.testing.assert_close(advantages, expected[a.group, a.sample], atol=1e-4, rtol=1e-4)


def test_best_of_keeps_the_extremes(
    policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    algorithm = replace(DANCE, best_of=2)
    algorithm.check(T)
    experience = algorithm.collect(policies("sd3"), GROUPS, scorer(), RANDOM, ITERATION)
    a, reward = experience.actions, experience.candidates.reward.view(2, G)
    best = algorithm.advantages(experience)
    every = DANCE.advantages(experience)
    middle = reward.median(1).indices
    between = a.sample == middle[a.group]
    assert (best[between] == 0).all()
    assert torch.equal(best[~between], every[~between])
    assert (every[between] != 0).all()
    with pytest.raises(ValueError, match="best_of must be even and at most group_size = 3"):
        replace(DANCE, best_of=4).check(T)

    advantage = torch.tensor([0.5, -2.0, 0.1, 1.4, 3.0, 1.0, -1.0, -3.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert extremes(advantage, group, 2).tolist() == [0, -2.0, 0, pytest.approx(1.4), 3, 0, 0, -3]
    assert torch.equal(extremes(advantage, group, 4), advantage)


def test_equal_rewards_teach_nothing(
    case: tuple[str, Algorithm], policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    name, algorithm = case
    experience = algorithm.collect(policies(name), GROUPS, scorer("equal"), RANDOM, ITERATION)
    assert (algorithm.advantages(experience) == 0).all()


@pytest.mark.parametrize("algorithm", [FLOW, DANCE])
def test_a_failed_reward_drops_its_sample_alone(
    algorithm: Algorithm, policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    sound = algorithm.collect(policies("sd3"), GROUPS, scorer(), RANDOM, ITERATION)
    broken = algorithm.collect(
        policies("sd3"), GROUPS, scorer("failing_for_the_first"), RANDOM, ITERATION
    )
    assert broken.candidates.valid.tolist() == [False] + [True] * (2 * G - 1)
    assert broken.candidates.reward[1:].tolist() == sound.candidates.reward[1:].tolist()
    advantages, a = algorithm.advantages(broken), broken.actions
    failed = (a.group == 0) & (a.sample == 0)
    assert advantages.isfinite().all()
    assert (advantages[failed] == 0).all()
    assert (advantages[~failed] != 0).all()
    # The two that are left in the group are compared with each other.
    rest = advantages[(a.group == 0) & ~failed]
    torch.testing.assert_close(rest.sum(), torch.tensor(0.0), atol=1e-4, rtol=0)
    if isinstance(algorithm, DanceGRPO):
        other = a.group == 1
        assert torch.equal(advantages[other], algorithm.advantages(sound)[other])


# Learning.


def config(algorithm: Algorithm, *, loss: Loss | None = None, **train: object) -> Config:
    settings = {"iterations": 10, "groups": 2, "lr": 1e-3, "max_grad_norm": 1e9} | train
    return Config(
        model=Model(path=""),
        algorithm=algorithm,
        loss=loss or ClippedLoss(clip_range=0.1),
        rewards=(Reward(model=f"{HERE}:brightness"),),
        prompts=Prompts(train="", held_out=""),
        train=Train(**settings),  # type: ignore[arg-type]
        run=Run(folder=""),
    )


@pytest.fixture
def learn(
    make_policy: MakePolicy, scorer: MakeJudge, accelerator: Accelerator
) -> Callable[..., tuple[Learner, Experience]]:
    """A learner on a fresh policy, and what the policy collected."""

    def make(
        name: str, algorithm: Algorithm, weights: Weights | None = None, **options: object
    ) -> tuple[Learner, Experience]:
        policy = make_policy(
            name,
            sampling=sampling_of(name, num_steps=T),
            weights=weights or LoRA(rank=4, alpha=8),
            with_reference=True,
        )
        experience = algorithm.collect(policy, GROUPS, scorer(), RANDOM, ITERATION)
        settings = config(algorithm, **options)
        return Learner(policy, settings.train, settings.loss, accelerator), experience

    return make


def gradients_of(learner: Learner) -> list[list[Tensor]]:
    """Filled with the gradients of each optimizer step as it happens."""
    taken: list[list[Tensor]] = []
    learner.optimizer.adam.register_step_pre_hook(
        lambda *_: taken.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    )
    return taken


def weights_of(learner: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learner.parameters]


def test_the_first_ratio_is_one(
    case: tuple[str, Algorithm], learn: Callable[..., tuple[Learner, Experience]]
) -> None:
    name, algorithm = case
    learner, experience = learn(name, algorithm)
    before = weights_of(learner)
    metrics = learner.update(experience, algorithm.advantages(experience), RANDOM)
    # Forward passes have the rollout's batch shape here, and so there is no noise either.
    assert metrics["log_prob/noise"] == 0
    assert metrics["ratio/deviation"] == 0
    assert metrics["ratio/clip_fraction"] == 0
    assert metrics["grad_norm"] > 0
    assert metrics["skipped_updates"] == 0
    assert learner.optimizer.num_updates == 1
    after = weights_of(learner)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    # The second pass over the same actions is off-policy.
    assert (
        learner.update(experience, algorithm.advantages(experience), RANDOM)["ratio/deviation"] > 0
    )


@pytest.mark.parametrize(
    "algorithm", [FLOW, FAST, replace(DANCE, best_of=2, timestep_fraction=0.6)]
)
@pytest.mark.parametrize("train_batch", [64, 2])
def test_the_gradient_is_that_of_every_action_alone(
    algorithm: Algorithm, train_batch: int, learn: Callable[..., tuple[Learner, Experience]]
) -> None:
    """Zero advantages included: leaving them out, and sharing forward passes, changes nothing."""
    learner, experience = learn("sd3", algorithm, train_batch=train_batch)
    advantages = algorithm.advantages(experience)
    advantages[::5] = 0
    a, policy = experience.actions, learner.policy
    loss = torch.zeros(())
    for i in range(len(a)):
        record = policy.replay(
            [GROUPS[int(a.group[i])].prompt],
            a.states[a.state[i]][None],
            int(a.step[i]),
            experience.transition,
        )
        ratio = torch.exp(record.gaussian.log_prob(a.x_next[i][None])[0] - a.old_log_prob[i])
        loss = loss - advantages[i] * ratio / len(a)
    expected = torch.autograd.grad(loss, learner.parameters, allow_unused=True)
    taken = gradients_of(learner)
    learner.update(experience, advantages, RANDOM)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    assert scale > 0
    for got, want in zip(taken[0], expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, atol=1e-4 * scale, rtol=0)


def test_updates_divide_the_groups(learn: Callable[..., tuple[Learner, Experience]]) -> None:
    learner, experience = learn("sd3", FLOW, updates=2)
    advantages = FLOW.advantages(experience)
    order = torch.randperm(2, generator=RANDOM.generator("updates"))
    only, _ = learn("sd3", FLOW)
    taken, alone = gradients_of(learner), gradients_of(only)
    metrics = learner.update(experience, advantages, RANDOM)
    assert len(taken) == learner.optimizer.num_updates == 2
    # The second step sees other weights than those that acted.
    assert metrics["log_prob/noise"] < 1e-5 < metrics["ratio/deviation"]
    first = experience.actions.group == order[0]
    only.update(experience, torch.where(first, 2 * advantages, 0), RANDOM)
    scale = max(float(g.abs().max()) for g in alone[0])
    for got, want in zip(taken[0], alone[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("weights", [LoRA(rank=4, alpha=8), Full()])
@pytest.mark.parametrize("kl", ["exact", "flow_grpo", "velocity"])
def test_kl_begins_at_zero(
    kl: str, weights: Weights, learn: Callable[..., tuple[Learner, Experience]]
) -> None:
    loss = ClippedLoss(clip_range=0.1, kl_coef=0.1, kl=kl)  # type: ignore[arg-type]
    learner, experience = learn("sd3", FAST, weights, loss=loss)
    advantages = FAST.advantages(experience)
    assert learner.update(experience, advantages, RANDOM)["loss/kl"] == 0
    assert learner.update(experience, advantages, RANDOM)["loss/kl"] > 0


@pytest.mark.parametrize("kl", ["exact", "flow_grpo", "velocity"])
def test_kl_pulls_back(kl: str, learn: Callable[..., tuple[Learner, Experience]]) -> None:
    """With nothing to gain, only the distance to the reference is left, and it falls."""
    loss = ClippedLoss(clip_range=0.1, kl_coef=1.0, kl=kl)  # type: ignore[arg-type]
    learner, experience = learn("sd3", FAST, loss=loss, betas=(0.0, 0.999))
    learner.update(experience, FAST.advantages(experience), RANDOM)
    nothing = torch.zeros(len(experience.actions))
    distances = [learner.update(experience, nothing, RANDOM)["loss/kl"] for _ in range(4)]
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("weights", [LoRA(rank=4, alpha=8), Full()])
def test_the_distance_to_the_reference_is_watched(
    weights: Weights, learn: Callable[..., tuple[Learner, Experience]]
) -> None:
    learner, experience = learn("sd3", FAST, weights, weight_decay=0.0)
    nothing = torch.zeros(len(experience.actions))
    assert learner.update(experience, nothing, RANDOM)["kl/velocity"] == 0
    metrics = learner.update(experience, FAST.advantages(experience), RANDOM)
    assert metrics["kl/velocity"] > 0
    assert metrics["loss/kl"] == 0, "it is watched without being in the loss"


def test_nothing_to_learn_changes_nothing(
    learn: Callable[..., tuple[Learner, Experience]],
) -> None:
    learner, experience = learn("sd3", FLOW, weight_decay=0.0, monitor_states=0)
    before, evaluations = weights_of(learner), learner.policy.num_evaluations
    metrics = learner.update(experience, torch.zeros(len(experience.actions)), RANDOM)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(learner), before, strict=True))
    assert learner.policy.num_evaluations == evaluations
    assert metrics["grad_norm"] == 0


def test_learning_raises_the_likelihood_of_the_better(
    learn: Callable[..., tuple[Learner, Experience]],
) -> None:
    learner, experience = learn("sd15", CASES["flow-ddim"][1], loss=ClippedLoss(clip_range=10.0))
    algorithm = CASES["flow-ddim"][1]
    advantages, a = algorithm.advantages(experience), experience.actions
    for _ in range(3):
        learner.update(experience, advantages, RANDOM)
    rows = a.step == 1
    with torch.no_grad():
        prompts = [GROUPS[int(g)].prompt for g in a.group[rows]]
        record = learner.policy.replay(prompts, a.states[a.state[rows]], 1, experience.transition)
    change = record.gaussian.log_prob(a.x_next[rows]) - a.old_log_prob[rows]
    assert (change * advantages[rows]).sum() > 0


def test_all_steps_end_before_the_last() -> None:
    with pytest.raises(ValueError, match="only steps 0 to 3 can be stochastic"):
        replace(FAST, steps=Window(start=3, size=2)).check(T)
    FlowGRPO(steps=AllSteps()).check(2)


def test_noise_in_the_last_step_stays_in_the_image(
    policies: Callable[[str], PipelinePolicy], scorer: MakeJudge
) -> None:
    """The actions are the same; the image has the noise of the last step, which is not an action."""
    policy = policies("sd3")
    plain, noisy = (
        replace(FLOW, noise_last=last).collect(policy, GROUPS[:1], scorer(), RANDOM, ITERATION)
        for last in (False, True)
    )
    assert torch.equal(plain.actions.x_next, noisy.actions.x_next)
    assert set(noisy.actions.step.tolist()) == set(range(T - 1))
    half = len(seen) // 2
    assert not torch.equal(torch.cat(seen[:half]), torch.cat(seen[half:]))
