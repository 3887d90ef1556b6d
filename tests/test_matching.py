"""Losses on noised samples against published numbers and naive versions, and their collector."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import Matching
from flowgrpo.config import ConfigError, Train
from flowgrpo.core.matching import squared_error
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import BestAdvantage
from flowgrpo.core.transitions import ODE, Gaussian, Prediction, Step
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import (
    Loss,
    LossInputs,
    LossNeeds,
    LossOutputs,
    PolicyOutputs,
    remaining_share,
)
from flowgrpo.losses.group_matching import CRDLoss, DGPOLoss, dgpo_weight
from flowgrpo.losses.matching import MatchingLoss, log_likelihood
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

FLOW = Step.flow(0.6, 0.4)
SAMPLE, NOISE = (torch.tensor([v]) for v in ([0.5, -1.0], [-0.3, 0.8]))
X = 0.4 * SAMPLE + 0.6 * NOISE
NEW, OLD, REFERENCE = (torch.tensor([v]) for v in ([-0.5, 1.5], [-0.6, 1.4], [-0.4, 1.2]))
"""One sample, its noise, and three velocities: squared errors .09, .10 and .26."""


def outputs(velocity: Tensor, x: Tensor = X) -> PolicyOutputs:
    return PolicyOutputs(Prediction.from_velocity(x, velocity, 0.6), Gaussian(x, 0.0))


def inputs(
    new: Tensor, old: Tensor, advantage: list[float], reference: Tensor | None = None, **more: Any
) -> LossInputs:
    """Noised samples at t = .6, each with a state of its own, that all belong to one group."""
    number = len(advantage)
    x, data = X.expand(number, -1), SAMPLE.expand(number, -1)
    return LossInputs(
        policy=outputs(new, x), x=x, state=torch.arange(number), x_next=data,
        old_log_prob=torch.zeros(number), advantage=torch.tensor(advantage),
        group=more.pop("group", torch.zeros(number, dtype=torch.long)), sample=torch.arange(number),
        step=0, interval=FLOW, transition=ODE(), old_policy=outputs(old, x),
        reference=None if reference is None else outputs(reference, x), **more,
    )  # fmt: skip


VECTORS = {  # The term now, the old policy's, and the loss at A = .16, computed in float64.
    "uniform": (-0.09, -0.10, -0.1616080267),
    "t": (-0.054, -0.06, -0.1609628858),
    "t_squared": (-0.0324, -0.036, -0.1605770380),
    "huber": (-0.1799940001, -0.1897306597, -0.1615654744),
    "ghuber": (-1.306944672, -1.3420297144, -0.1657132455),
    "adaptive": (-0.18, -0.20, -0.16 * math.exp(0.02)),
}


@pytest.mark.parametrize("weight", VECTORS)
def test_terms_and_losses_equal_the_vectors(weight: Any) -> None:
    new, old, loss = VECTORS[weight]
    for velocity, wanted in ((NEW, new), (OLD, old)):
        found = log_likelihood(outputs(velocity).prediction, SAMPLE, FLOW, weight)
        assert float(found) == pytest.approx(wanted, rel=1e-5)
    found = MatchingLoss(weight=weight)(inputs(NEW, OLD, [0.16])).loss
    assert float(found) == pytest.approx(loss, rel=1e-5)


def test_on_a_diffusion_path_the_error_is_that_of_the_noise() -> None:
    step, data, noise = Step.diffusion(0.3, 0.6), torch.randn(3, 8), torch.randn(3, 8)
    x, output = step.signal * data + step.noise * noise, torch.randn(3, 8)
    found = squared_error(Prediction.from_output(x, output, step), data, step)
    torch.testing.assert_close(found, (output - noise).square().mean(1))


def test_clip_penalties_and_soft_bound_equal_the_vectors() -> None:
    awm = MatchingLoss(weight="ghuber", proximal_coef=1.0, kl_coef=1e-3)
    found = awm(inputs(NEW, OLD, [0.16], REFERENCE))
    assert found.kl is not None
    assert float(found.loss + awm.kl_coef * found.kl) == pytest.approx(-0.1556632455, rel=1e-5)
    narrow = MatchingLoss(weight="ghuber", clip_range=1e-3)
    both = [float(narrow(inputs(NEW, OLD, [a])).loss) for a in (0.16, -0.16)]
    assert both == pytest.approx([-0.16016, 0.1657132455], rel=1e-5)
    v_grpo = MatchingLoss(soft_clip=3.0)
    assert v_grpo.bounded(torch.tensor([1.2])).item() == pytest.approx(1.1398468868)
    assert float(v_grpo(inputs(NEW, OLD, [1.2])).loss) == pytest.approx(-1.1628733213, rel=1e-5)
    clipped = replace(v_grpo, clip_range=6e-3)
    assert float(clipped(inputs(NEW, OLD, [1.2])).loss) == pytest.approx(-1.1466859681, rel=1e-5)
    near = MatchingLoss(proximal_coef=1.0, proximal="data")
    assert float(near(inputs(NEW, OLD, [0.0])).loss) == pytest.approx(0.0036, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "advantage", "gradient"),
    [
        (MatchingLoss(weight="ghuber"), 0.16, 0.1752712183),
        (MatchingLoss(soft_clip=3.0), 1.2, 0.6839081321),
    ],
)
def test_on_policy_gradients_equal_the_vectors(loss: Loss, advantage: float, gradient: float) -> None:  # fmt: skip
    velocity = NEW.clone().requires_grad_()
    loss(inputs(velocity, NEW, [advantage])).loss.sum().backward()
    assert velocity.grad is not None
    assert velocity.grad[0].tolist() == pytest.approx([gradient, -gradient], rel=1e-5)


@pytest.mark.parametrize(
    ("surrogate", "value", "share"),
    [("ratio", -0.4 * math.exp(0.02), 0.4080805360), ("pepg", 0.0697817717, 0.3876765092)],
)
def test_elbo_policy_gradients_equal_the_vectors(surrogate: Any, value: float, share: float) -> None:  # fmt: skip
    """``share`` is the factor of minus the term's gradient: EPG's, and that of both PEPG and PAR."""
    velocity = NEW.clone().requires_grad_()
    found = MatchingLoss(surrogate=surrogate)(inputs(velocity, OLD, [0.4])).loss
    assert found.item() == pytest.approx(value, rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), velocity)
    term = log_likelihood(outputs(velocity).prediction, SAMPLE, FLOW, "adaptive").sum()
    torch.testing.assert_close(gradient, -share * torch.autograd.grad(term, velocity)[0])


def test_with_chosen_samples_the_gradient_is_that_of_supervised_training() -> None:
    """RAFT: the mean squared error of the velocity on the best of three samples, over their number."""
    advantage = BestAdvantage()(torch.tensor([0.2, 0.9, 0.5]), torch.zeros(3, dtype=torch.long))
    new = of_errors(0.3, 0.5, 0.4).requires_grad_()
    loss = MatchingLoss(weight="uniform")(inputs(new, new.detach(), advantage.tolist())).loss
    (found,) = torch.autograd.grad(loss.sum() / 3, new)
    (wanted,) = torch.autograd.grad((new[1] - (NOISE - SAMPLE)[0]).square().mean() / 3, new)
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(found, wanted)


def test_a_centre_that_does_not_sample_leaves_the_ratio_alone() -> None:
    loss = MatchingLoss(weight="uniform", trail="third", sampler="trained", proximal_coef=1.0)
    assert float(loss(inputs(NEW, OLD, [2.0])).loss) == pytest.approx(-2 + 0.01, rel=1e-5)
    assert (loss.needs.single_update, loss.needs.old_policy_samples_from) == (True, math.inf)


def of_errors(*errors: float) -> Tensor:
    """Velocities whose squared errors are these."""
    target = NOISE - SAMPLE
    return torch.stack([(target + e**0.5)[0] for e in errors])


def test_dgpo_equals_the_vectors() -> None:
    errors = of_errors(0.30, 0.50, 0.40).requires_grad_()
    given = inputs(errors, of_errors(0.3005, 0.49, 0.41), [1.2, -1.0, -0.2], of_errors(0.32, 0.45, 0.40))  # fmt: skip
    found = DGPOLoss(clip_range=0.0)(given)
    assert float(found.loss.mean()) == pytest.approx(-0.0057367390, rel=1e-4)
    # The gradient for the errors: that of each error is 2 / D times the gap, in D equal elements.
    gap = errors.detach() - (NOISE - SAMPLE)

    def gradient(clip: float) -> list[float]:
        loss = DGPOLoss(clip_range=clip)(given).loss.mean()
        (g,) = torch.autograd.grad(loss, errors, retain_graph=True)
        return (g / gap).mean(1).tolist()

    whole = [0.0312913038, -0.0260760865, -0.0052152173]
    assert gradient(0.0) == pytest.approx(whole, rel=1e-4)
    assert gradient(0.005) == pytest.approx([whole[0], 0, whole[2]], rel=1e-4, abs=1e-9)
    assert gradient(0.0101) == pytest.approx(whole, rel=1e-4)


def test_dgpo_on_pairs_is_dpo() -> None:
    """The gradient of -log sigmoid(-b/2 [(m_w - m_w,ref) - (m_l - m_l,ref)]), over b/2 times G."""
    d, base = torch.tensor([0.30, 0.50], requires_grad=True), torch.tensor([0.32, 0.45])
    dpo = -torch.nn.functional.logsigmoid(-5.0 * ((d[0] - base[0]) - (d[1] - base[1])))
    assert float(dpo) == pytest.approx(0.5333821554)
    advantage, pair = torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.long)
    weight = dgpo_weight(d, base, advantage, pair, torch.ones(2, dtype=torch.bool), 10.0)
    (wanted,) = torch.autograd.grad(dpo, d)
    torch.testing.assert_close(weight * advantage, wanted / 5)


def test_groups_do_not_see_each_other_and_failures_leave_them() -> None:
    """Two groups in one batch equal each alone, and a failed sample equals one that is not there."""
    now, old, base = of_errors(0.3, 0.5, 0.4, 0.2, 0.6), of_errors(0.31, 0.5, 0.41, 0.2, 0.6), of_errors(0.32, 0.45, 0.4, 0.3, 0.5)  # fmt: skip
    advantage, group = [1.2, -1.0, 0.0, 0.7, -0.7], torch.tensor([4, 4, 4, 9, 9])
    known = torch.tensor([True, True, False, True, True])
    for loss in (DGPOLoss(), CRDLoss()):
        whole = loss(inputs(now, old, advantage, base, group=group, has_reward=known))
        first = loss(inputs(now[:2], old[:2], advantage[:2], base[:2]))
        second = loss(inputs(now[3:], old[3:], advantage[3:], base[3:]))
        wanted = torch.cat([first.loss, torch.zeros(1), second.loss])
        torch.testing.assert_close(whole.loss, wanted)
        # A group without any known reward gives no loss, and spoils none.
        lost = torch.tensor([True, True, True, False, False])
        found = loss(inputs(now, old, [*advantage[:3], 0, 0], base, group=group, has_reward=lost))
        alone = loss(inputs(now[:3], old[:3], advantage[:3], base[:3]))
        torch.testing.assert_close(found.loss, torch.cat([alone.loss, torch.zeros(2)]))


@pytest.mark.parametrize(("beta", "square", "factor"), [(1.0, 0.00846875, 5.0), (10.0, 0.025625, 0.5)])  # fmt: skip
def test_crd_equals_the_vectors(beta: float, square: float, factor: float) -> None:
    now, old = of_errors(0.30, 0.50, 0.40, 0.45), of_errors(0.32, 0.45, 0.41, 0.44)
    loss = CRDLoss(beta=beta, normalised=False)
    found = loss(inputs(now, old, [1.0, -2.0, 0.5, 0.5], now + 1.0))
    assert float(found.loss.mean()) == pytest.approx(square * factor, rel=1e-4)
    assert found.kl is not None
    weights = (loss.kl_coef * found.kl).tolist()
    assert weights == pytest.approx([0.06004, 0.03007, 0.055045, 0.055045], rel=1e-4)


def test_crd_divides_each_error_by_its_size() -> None:
    """For the common sample: .1 / (1/5)... by hand, mse / mean |error| of velocities, now and old."""
    loss = CRDLoss()
    now, old = (loss._relative(inputs(NEW, OLD, [0.0]), outputs(v)) for v in (NEW, OLD))
    assert float(old - now) == pytest.approx(0.0333333333, rel=1e-4)


def test_trails() -> None:
    assert [remaining_share("third", n) for n in (0, 100, 900)] == [0, 0.1, 0.3]
    assert [remaining_share("rising", n) for n in (0, 50, 999)] == pytest.approx([0.25, 0.5, 0.999])
    assert remaining_share("none", 999) == 0


# The collector.


def test_times_are_one_of_each_part_and_stay_in_their_range() -> None:
    algorithm = Matching(num_times=6, time_range=(0.05, 0.9))
    seen = [algorithm.drawn_times(14, Random(i)) for i in range(200)]
    parts = [{times[k] for times in seen} for k in range(6)]
    # 12 of the 14 nodes, two in each part.
    assert parts == [{2 * k + 1, 2 * k + 2} for k in range(6)]
    randomly = replace(algorithm, times="random")
    drawn = [randomly.drawn_times(14, Random(i)) for i in range(200)]
    assert all(len(set(t)) == 6 and t == sorted(t) for t in drawn)
    assert {n for t in drawn for n in t} == set(range(1, 13))
    assert any(t[1] - t[0] > 3 for t in drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_times": 7, "time_range": (0.0, 0.5)}, "num_times must be from 1 to 5"),
        ({"time_range": (0.5, 0.5)}, "time_range must be two numbers"),
    ],
)
def test_times_that_cannot_be_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matching(**settings).check(10)


def quickstart(*settings: str) -> flowgrpo.Config:
    return flowgrpo.load(
        "quickstart_flow_grpo", ["algorithm={kind='matching', group_size=4}", *settings]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss={kind='crd'}", "train.split='samples'", "train.updates=2"], "compares the samples of a group"),
        (["loss={kind='matching', trail='third', sampler='trained'}", "train.updates=2"], "first update of an iteration only"),
        (["loss={kind='clipped'}"], "do not belong together"),
        (["algorithm.advantage={kind='best', keep=4}", "loss={kind='matching'}"], "keep must be below algorithm.group_size = 4"),
        (["loss={kind='matching', power=2.0}"], "loss.power must be at most 1"),
        (["algorithm.advantage={kind='best', keep=1}", "loss={kind='dpo'}"], "needs a rejected sample"),
        (["loss={kind='supervised'}"], "train away from samples of negative advantage"),
    ],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quickstart(*settings).check()


# On a pipeline.

GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(["a cube", "a red cat"])]
ALGORITHM = Matching(group_size=3, num_times=2)


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


@pytest.fixture(scope="module", params=["sd3", "sd15"])
def collected(request: pytest.FixtureRequest, make_policy: MakePolicy) -> tuple[PipelinePolicy, Experience]:  # fmt: skip
    policy = make_policy(request.param, sampling=sampling_of(request.param, num_steps=4), with_reference=True)  # fmt: skip
    scorer = RewardScorer([Reward(model=f"{__name__}:brightness")], Failures())
    experience = ALGORITHM.collect(policy, GROUPS, scorer, Random(3), 0)
    scorer.close()
    return policy, experience


def test_a_group_shares_times_and_noise(collected: tuple[PipelinePolicy, Experience]) -> None:
    policy, experience = collected
    a, times = experience.actions, ALGORITHM.drawn_times(4, Random(3))
    assert experience.cost == ALGORITHM.cost(4, 0, Random(3))
    assert a.step.unique().tolist() == times
    assert torch.bincount(a.group * 3 + a.sample).tolist() == [2] * 6
    for step in times:
        interval = policy.scheduler.interval(step, step + 1)
        rows = a.step == step
        noise = (a.states[a.state[rows]] - interval.signal * a.x_next[rows]) / interval.noise
        first, other = (noise[a.group[rows] == g] for g in (0, 1))
        torch.testing.assert_close(first, first[:1].expand_as(first), atol=1e-4, rtol=0)
        assert (first[0] - other[0]).abs().mean() > 0.5
        assert float(noise.std()) == pytest.approx(1, abs=0.3)


def test_the_noise_has_the_deviation_of_the_path(make_policy: MakePolicy) -> None:
    """PRX in pixel space starts from noise of standard deviation 2 (diffusers' ``noise_scale``)."""
    policy = make_policy("prx_pixel", weights=None, sampling=sampling_of("prx_pixel", num_steps=4))
    scorer = RewardScorer([Reward(model=f"{__name__}:brightness")], Failures())
    a = replace(ALGORITHM, num_times=1).collect(policy, GROUPS, scorer, Random(3), 0).actions
    scorer.close()
    interval = policy.scheduler.interval(int(a.step[0]), int(a.step[0]) + 1)
    noise = (a.states[a.state] - interval.signal * a.x_next) / interval.noise
    assert float(noise.std()) == pytest.approx(policy.pipeline.config.noise_scale, rel=0.1)


@pytest.mark.parametrize("loss", [MatchingLoss(weight="ghuber", proximal_coef=0.5), DGPOLoss(), CRDLoss()])  # fmt: skip
def test_the_learner_takes_the_gradient_of_the_loss_on_the_whole_batch(
    loss: Loss, collected: tuple[PipelinePolicy, Experience], accelerator: Accelerator
) -> None:
    """In batches of one group, and the first forward pass in place of the copied policy's own."""
    policy, experience = collected
    a, advantages = experience.actions, ALGORITHM.advantages(experience)
    learner = Learner(policy, Train(iterations=1, groups=2, train_batch=3, lr=0.0, max_grad_norm=1e9), loss, accelerator)  # fmt: skip
    taken: list[Tensor] = []
    learner.optimizer.adam.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in learner.parameters))  # fmt: skip
    learner.update(experience, advantages, Random(0))

    total = torch.zeros(())
    for step in a.step.unique().tolist():
        rows = a.step == step
        owners = [GROUPS[int(g)].prompt for g in a.group[rows]]
        record = policy.replay(owners, a.states[a.state[rows]], step, ALGORITHM.transition)
        one = PolicyOutputs(record.prediction, record.gaussian)
        p = record.prediction
        same = PolicyOutputs(Prediction(p.x0.detach(), p.x1.detach(), p.output.detach()), Gaussian(record.gaussian.mean.detach(), 0.0))  # fmt: skip
        batch = LossInputs(
            policy=one, x=a.states[a.state[rows]], state=torch.arange(int(rows.sum())), x_next=a.x_next[rows],
            old_log_prob=a.old_log_prob[rows], advantage=advantages[rows], group=a.group[rows],
            sample=a.sample[rows], step=step, interval=record.interval, transition=ALGORITHM.transition,
            old_policy=same, reference=same,
        )  # fmt: skip
        total = total + loss(batch).loss.sum() / len(a)
    expected = torch.autograd.grad(total, learner.parameters, allow_unused=True)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    assert scale > 0
    for got, want in zip(taken, expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, atol=2e-3 * scale, rtol=0)


@dataclass(frozen=True, kw_only=True)
class Coupled(Loss):
    """A loss of one's own that couples a group in other ways than by one number per action."""

    kind: str = "coupled"

    @property
    def needs(self) -> LossNeeds:
        return LossNeeds(action_kinds=("noised_sample",), whole_groups=True)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        return LossOutputs(inputs.advantage)


@pytest.mark.parametrize("loss", [DGPOLoss(beta=1e4, clip_range=0.0), DGPOLoss(beta=1e4, compare_with="old"), CRDLoss(beta=3.0)])  # fmt: skip
def test_two_passes_over_a_divided_group_equal_one(
    loss: Loss, collected: tuple[PipelinePolicy, Experience], accelerator: Accelerator
) -> None:
    """With weights that differ from the old policy's and the reference's; and a part alone is not enough."""
    policy, experience = collected
    advantages = ALGORITHM.advantages(experience)

    def gradient(batch: int, divided: bool = False) -> Tensor:
        train = Train(iterations=1, groups=2, train_batch=batch, lr=1e-12, max_grad_norm=1e9)
        learner = Learner(policy, train, loss, accelerator)
        before = [p.detach().clone() for p in learner.parameters]
        generator, taken = torch.Generator().manual_seed(0), []
        learner.optimizer.adam.register_step_pre_hook(lambda *_: taken.extend(p.grad.flatten().clone() for p in learner.parameters))  # fmt: skip
        with torch.no_grad():
            for p in learner.parameters:
                p += 0.1 * torch.randn(p.shape, generator=generator)
        with pytest.MonkeyPatch.context() as patch:
            if divided:
                patch.setattr(
                    "flowgrpo.training.learner.whole_groups",
                    lambda _, __, batches, ___: [None] * len(batches),
                )
            learner.update(experience, advantages, Random(0))
        with torch.no_grad():
            for p, old in zip(learner.parameters, before, strict=True):
                p.copy_(old)
        return torch.cat(taken)

    one, two, wrong = gradient(6), gradient(2), gradient(2, divided=True)
    size = float(one.norm())
    assert float((two - one).norm()) < 1e-3 * size
    assert float((wrong - one).norm()) > 1e-2 * size


def test_the_old_policy_samples_after_a_number_of_optimizer_steps(
    collected: tuple[PipelinePolicy, Experience], accelerator: Accelerator
) -> None:
    learner = Learner(collected[0], Train(iterations=1, groups=2, train_batch=3), DGPOLoss(sample_old_after=5), accelerator)  # fmt: skip
    assert learner.behaviour is not None
    for old in learner.behaviour:
        old += 1.0
    trained = [p.detach().clone() for p in learner.parameters]
    for updates, gap in ((4, 0.0), (5, 1.0)):
        learner.optimizer.num_updates = updates
        with learner.behaviour_policy():
            differences = [float((p - t).mean()) for p, t in zip(learner.parameters, trained, strict=True)]  # fmt: skip
        assert differences == pytest.approx([gap] * len(differences), abs=1e-5)
