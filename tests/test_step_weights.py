"""Losses that treat denoising steps together: Flash-GRPO's weights and Chunk-GRPO's ratios."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.calibrate_noise import adjusted, first_levels, gains_of
from flowgrpo.algorithms import TPGRPO, BranchGRPO, FlowGRPO, TempFlowGRPO
from flowgrpo.config import Config, ConfigError, Model, Prompts, Run, Train
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.steps import AllSteps, RandomSteps, RandomWindow, SlidingWindow
from flowgrpo.core.transitions import CPS, DDIM, CalibratedSDE, DanceSDE, FlowSDE, Prediction, Step
from flowgrpo.data.experience import Actions
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import LossNeeds
from flowgrpo.losses.clipped import ClippedLoss, clipped_surrogate, rectified_weight
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from flowgrpo.training.weighting import action_weights, chunk_log_ratios
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_step_weights"
RANDOM = Random(5).at("train", 1)
GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(["a red cube", "two dogs", "a tree"])]
PER_GROUP = FlowGRPO(
    group_size=2, steps=RandomWindow(size=1, first=0, last=4), steps_per="group", transition=CPS()
)
FLASH = {
    999: 7.4770, 982: 7.0414, 963: 6.6112, 944: 6.1867, 922: 5.7682,
    899: 5.3559, 874: 4.9502, 847: 4.5513, 817: 4.1596, 785: 3.7754,
}  # fmt: skip
"""The table in Flash-GRPO's script (Shredded-Pork/Flash-GRPO 8cfc973, scripts/train_wanx2_1_flash.py):
1 / c by timestep, on Wan's grid of 20 steps with shift 3."""


def brightness(media: Tensor, prompts: Any) -> Tensor:
    return media.flatten(1).mean(1)


# The weight.


def test_the_weight_is_flash_grpos_table():
    first = 0.9999  # where diffusers' UniPC grid begins
    times = [first * (1 - i / 20) for i in range(21)]
    sigma = [3 * t / (1 + 2 * t) for t in times]
    transition = FlowSDE(noise_level=1.0, schedule="linear")
    for k, (time, published) in enumerate(FLASH.items()):
        assert int(1000 * sigma[k]) == pytest.approx(time, abs=1)
        step = Step.flow(sigma[k], sigma[k + 1], sigma[1])
        assert rectified_weight(transition, step) == pytest.approx(published, rel=2e-3)


def test_the_weight_of_the_reference_vector():
    step = Step.flow(0.8, 0.6)
    assert rectified_weight(FlowSDE(noise_level=0.7), step) == pytest.approx(2.5144539506, rel=1e-9)


@pytest.mark.parametrize(
    ("transition", "step"),
    [
        (FlowSDE(), Step.flow(0.7, 0.5)),
        (DanceSDE(), Step.flow(0.3, 0.1)),
        (CPS(), Step.flow(0.9, 0.4)),
        (DDIM(), Step.diffusion(0.3, 0.6)),
        (DDIM(eta=0.5), Step.diffusion(0.3, 0.6, "v")),
    ],
)
def test_the_weight_is_one_over_the_gradient_of_the_log_probability(transition, step):
    x, output = torch.tensor([[0.3]]), torch.tensor([[0.5]], requires_grad=True)
    gaussian = transition(x, Prediction.from_output(x, output, step), step)
    x_next = (gaussian.mean + gaussian.std).detach()  # one unit of noise
    (gradient,) = torch.autograd.grad(gaussian.log_prob(x_next).sum(), output)
    weight = rectified_weight(transition, step)
    assert weight * abs(gradient.item()) == pytest.approx(1, rel=1e-4)


def some_actions(keys: list[tuple[int, int, int]]) -> Actions:
    group, sample, step = (torch.tensor(column) for column in zip(*keys, strict=True))
    number = len(keys)
    x = torch.zeros(number, 1)
    rows = torch.arange(number)
    return Actions.between(x, rows, x, step, torch.zeros(number), group, sample)


@pytest.mark.parametrize("chunks", [(), (1, 3), (2, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_are_one_on_average_over_all_processes(chunks, weighted):
    keys = [(g, s, k) for g in range(2) for s in range(2) for k in range(4) if (g, s, k) != (1, 1, 2)]  # fmt: skip
    chosen = torch.tensor([k[:2] != (0, 1) for k in keys])
    needs = LossNeeds(step_weight=(lambda _, s: s.noise) if weighted else None, chunks=chunks)
    other = torch.tensor([3.0, 10.0])  # the sums of another process

    def interval(node: int, end: int) -> Step:
        return Step.flow(1 - node / 8, 0.1)

    found = action_weights(
        some_actions(keys), chosen, needs, CPS(), interval, lambda sums: sums + other
    )
    if not weighted and not chunks:
        assert found is None
        return
    plain = []
    for (g, s, k), c in zip(keys, chosen, strict=True):
        value = 1 - k / 8 if weighted else 1.0
        if chunks:
            mine = range(chunks[0]) if k < chunks[0] else range(chunks[0], 4)
            value /= sum(a[:2] == (g, s) and a[2] in mine for a in keys) if c else 1
        plain.append(value)
    total = 3 + sum(w for w, c in zip(plain, chosen, strict=True) if c)
    number = 10 + int(chosen.sum())
    torch.testing.assert_close(found[chosen], torch.tensor(plain)[chosen] * number / total)


def test_a_chunk_has_the_mean_of_its_log_ratios_over_all_batches():
    batches = [
        some_actions([(0, 0, 0), (0, 1, 0)]),
        some_actions([(0, 0, 1), (0, 1, 1)]),
        some_actions([(0, 0, 2), (0, 0, 3)]),
    ]
    log_ratios = [torch.tensor(v) for v in ([1.0, 2.0], [3.0, 4.0], [5.0, 7.0])]
    found = chunk_log_ratios(batches, log_ratios, (1, 3))
    assert [f.tolist() for f in found] == [[1.0, 2.0], [5.0, 4.0], [5.0, 5.0]]


# Steps of each group.


@pytest.fixture(scope="module")
def scorer():
    made = RewardScorer([Reward(model=f"{HERE}:brightness")], Failures(retries=0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("sd3", sampling=sampling_of("sd3", num_steps=5))


def test_each_group_draws_its_own_step(policy: PipelinePolicy, scorer: RewardScorer) -> None:
    experience = PER_GROUP.collect(policy, GROUPS, scorer, RANDOM, 1)
    assert experience.cost == PER_GROUP.cost(5, 1, RANDOM)
    a, drawn = experience.actions, []
    for group in GROUPS:
        (step,) = a.step[a.group == group.index].unique().tolist()
        drawn.append(step)
        # The same as a run of this group alone with this step.
        alone = replace(PER_GROUP, steps_per="iteration", steps=RandomSteps(count=1, first=step, last=step + 1))  # fmt: skip
        one = alone.collect(policy, [group], scorer, RANDOM, 1)
        mine = experience.candidates.group == group.index
        torch.testing.assert_close(
            experience.candidates.reward[mine], one.candidates.reward, atol=2e-5, rtol=0
        )
    assert len(set(drawn)) > 1
    assert set(drawn) <= set(PER_GROUP.trained_steps(5, 1, RANDOM))
    assert (PER_GROUP.advantages(experience) != 0).all()


# Ratios of chunks.


def gradients(learner: Learner, run: Callable[[], Any]) -> list[Tensor]:
    taken: list[list[Tensor]] = []
    hook = learner.optimizer.adam.register_step_pre_hook(
        lambda *_: taken.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    )
    run()
    hook.remove()
    return taken[0]


@pytest.mark.parametrize("clip_range", [1e-9, 1.0])
def test_chunk_gradients_are_those_of_the_published_objective(
    clip_range: float, make_policy: MakePolicy, scorer: RewardScorer, accelerator: Accelerator
) -> None:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=5))
    algorithm = FlowGRPO(group_size=2, transition=CPS(noise_level=0.4), steps=AllSteps())
    experience = algorithm.collect(policy, GROUPS[:2], scorer, RANDOM, 1)
    actions = experience.actions
    advantage = torch.where(actions.sample == 0, 1.5, -0.5)
    settings = Train(iterations=2, groups=2, lr=3e-2, monitor_states=0, max_grad_norm=1e9)

    def learner(chunks: tuple[int, ...]) -> Learner:
        loss = ClippedLoss(clip_range=clip_range, chunks=chunks)
        return Learner(policy, settings, loss, accelerator)

    # In the first update all ratios are 1; chunks of one size then give the gradient of single steps.
    assert policy.trainable is not None
    start = {k: p.detach().clone() for k, p in policy.trainable.parameters.items()}
    first = []
    for chunks in ((), (2, 2)):
        one = learner(chunks)
        first.append(gradients(one, lambda: one.update(experience, advantage, RANDOM)))  # noqa: B023
        if not chunks:
            policy.trainable.load(start)
    for plain, chunked in zip(*first, strict=True):
        torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-4)

    # Now the weights have moved. The naive objective: a mean over samples and chunks.
    chunks, bounds = (1, 3), ((0, 1), (1, 4))
    terms, ratios = [], []
    for group in GROUPS[:2]:
        for sample in range(2):
            for low, high in bounds:
                log_ratios = []
                for step in range(low, high):
                    (row,) = ((actions.group == group.index) & (actions.sample == sample) & (actions.step == step)).nonzero().flatten().tolist()  # fmt: skip
                    one_action = actions.select(torch.tensor([row]))
                    record = policy.replay(
                        [group.prompt], one_action.starts()[0], step, algorithm.transition
                    )
                    new = record.gaussian.log_prob(one_action.x_next)
                    log_ratios.append(new - one_action.old_log_prob)
                mean = torch.cat(log_ratios).mean()[None]
                ratios.append(mean.item())
                terms.append(clipped_surrogate(mean, advantage[row][None], clip_range))
    chunked = learner(chunks)
    wanted = torch.autograd.grad(
        torch.cat(terms).mean(), chunked.parameters, allow_unused=True, materialize_grads=True
    )
    found = gradients(chunked, lambda: chunked.update(experience, advantage, RANDOM, stale=True))
    assert max(map(abs, ratios)) > 1e-4
    size = torch.cat([w.flatten() for w in wanted]).norm()
    assert (size > 0) == (clip_range == 1.0 or any(r * a < 0 for r, a in zip(ratios, [1.5, 1.5, -0.5, -0.5] * 2, strict=True)))  # fmt: skip
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5 * float(size), rtol=1e-3)


def config(algorithm: Any, loss: ClippedLoss, **train: Any) -> Config:
    return Config(
        model=Model(path=""),
        algorithm=algorithm,
        loss=loss,
        rewards=(Reward(model=f"{HERE}:brightness"),),
        prompts=Prompts(train="", held_out=""),
        train=Train(**{"iterations": 1, "groups": 2, **train}),
        run=Run(folder=""),
    )


@pytest.mark.parametrize(
    ("algorithm", "loss", "train", "message"),
    [
        (FlowGRPO(), ClippedLoss(chunks=(5, 5)), {"updates": 2, "split": "steps"}, "which train.split = 'steps' divides"),
        (FlowGRPO(), ClippedLoss(chunks=(2, 3)), {}, "covers steps 0 to 4, but with sampling.num_steps = 10 steps up to 8"),
        (FlowGRPO(), ClippedLoss(chunks=(0, 30)), {}, "chunks must be numbers of steps, each at least 1"),
        (TPGRPO(), ClippedLoss(chunks=(30,)), {}, "TPGRPO gives each step an advantage of its own"),
        (FlowGRPO(), ClippedLoss(chunks=(30,), clip="kl"), {}, "remove loss.chunks"),
        (FlowGRPO(), ClippedLoss(ratio="guard", step_weight="rectified"), {}, "remove loss.step_weight"),
        (TempFlowGRPO(), ClippedLoss(step_weight="rectified"), {}, "already weighs its steps"),
        (TPGRPO(transition=CalibratedSDE(levels=(0.5,) * 5)), ClippedLoss(), {}, "has 5 numbers, but steps up to 8 are stochastic; give 9"),
        (FlowGRPO(transition=CalibratedSDE(levels=(0.5,) * 9), noise_last=True), ClippedLoss(), {}, "has 9 numbers, but steps up to 9 are stochastic"),
        (FlowGRPO(transition=CalibratedSDE(levels=(0.5,) * 2), steps=SlidingWindow(size=2, every=1)), ClippedLoss(), {"iterations": 4}, "steps up to 4 are stochastic"),
        (BranchGRPO(group_size=4, splits=(0, 3), transition=CalibratedSDE(levels=(0.5,) * 8), pruned=(8,)), ClippedLoss(), {}, "steps up to 8 are stochastic"),
        (replace(PER_GROUP, steps=AllSteps()), ClippedLoss(), {}, "use 'random_window' or 'random_steps'"),
        (replace(PER_GROUP, shared_noise=True), ClippedLoss(), {}, "needs algorithm.shared_noise = false"),
    ],
)  # fmt: skip
def test_refused(algorithm, loss, train, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        config(algorithm, loss, **train).check()


# DenseGRPO's calibration.


def test_calibration_raises_balanced_levels_and_lowers_the_others():
    nan = float("nan")
    gains = torch.tensor([[1, 1, -1, 0.5], [1, -1, -1, nan], [1, 1, -1, 0.0], [1, -1, -1, -0.5]])
    found = adjusted([0.5, 0.5, 0.015, 0.2], gains, tolerance=2, change=0.01)
    assert found == pytest.approx([0.49, 0.51, 0.01, 0.21])


def test_calibration_measures_what_each_step_changes(policy: PipelinePolicy, scorer: RewardScorer) -> None:  # fmt: skip
    # The levels do not depend on the grid that an earlier call has left.
    list(
        policy.run(
            [GROUPS[0].prompt], SampleNoise([RANDOM]), sampling=policy.sampling.with_steps(2)
        )
    )
    levels = first_levels(policy, GROUPS[0].prompt)
    sigma = policy.scheduler.interval(1, 2).noise
    assert levels[1] == pytest.approx(0.7 * (sigma / (1 - sigma)) ** 0.5)
    gains = gains_of(policy, GROUPS, scorer, RANDOM, levels)
    assert gains.shape == (3, 4)
    # The gains of a trajectory add up to its image's reward less that of its noise.
    images = [float(r) for r in _rewards(policy, scorer, levels)]
    noise = SampleNoise([RANDOM.at("group", g.index, 0) for g in GROUPS])
    start = torch.cat([r.media for r in policy.run([g.prompt for g in GROUPS], noise)])
    wanted = torch.tensor(images) - brightness(start, [])
    torch.testing.assert_close(gains.sum(1).float(), wanted, atol=2e-5, rtol=0)


def _rewards(policy: PipelinePolicy, scorer: RewardScorer, levels: list[float]) -> Tensor:
    transition = CalibratedSDE(levels=tuple(levels))
    experience = FlowGRPO(group_size=1, transition=transition).collect(policy, GROUPS, scorer, RANDOM, 0)  # fmt: skip
    return experience.candidates.reward
