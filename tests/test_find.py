"""The initial noise as the policy: its density, its gradient, its way into pipelines and out of them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import flowgrpo
from flowgrpo.algorithms import FIND
from flowgrpo.cli import main
from flowgrpo.config import Config, ConfigError, Model, Prompts, Run, Train
from flowgrpo.core.multi_reward_advantages import GDPO, LogTamed, PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage, VirtualBest
from flowgrpo.core.transitions import Gaussian, gaussian_kl
from flowgrpo.data.experience import INITIAL, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation.card import model_card
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import InitialNoise, Noise, PipelinePolicy
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.probe import fit_noise
from flowgrpo.policy.weights import LOG_STD, MEAN, NOISE_FILE
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, noise_of, sampling_of
from tests.test_train import reward_settings, small

PROMPTS = [Prompt("a red cube"), Prompt("two dogs")]
# Latents as an image, as a packed sequence, as a video, with noise that the pipeline scales.
LAYOUTS = ["sd15", "flux", "wan_t2v", "prx_pixel"]


def shifted(policy: PipelinePolicy) -> PipelinePolicy:
    """The policy with a distribution that is far from standard."""
    assert isinstance(policy.trainable, InitialNoise)
    generator = Random(5).generator()
    with torch.no_grad():
        for parameter in policy.trainable.parameters.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture
def noisy(make_policy: MakePolicy) -> Callable[..., PipelinePolicy]:
    def make(name: str) -> PipelinePolicy:
        policy = make_policy(name, weights=Noise())
        fit_noise(policy, PROMPTS)
        return policy

    return make


def test_density_and_kl_are_those_of_independent_normals() -> None:
    generator = Random(1).generator()
    mean, x = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    std = torch.rand(1, 3, 4, generator=generator) + 0.1
    ours, plain = Gaussian(mean, std), Normal(mean, std.expand_as(mean))
    torch.testing.assert_close(ours.log_prob(x), plain.log_prob(x).flatten(1).mean(1))
    standard = Gaussian(torch.zeros_like(mean), torch.ones(1, 3, 4))
    expected = kl_divergence(plain, Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(ours, standard), expected)
    # The closed form of the reference: 1/2 sum(s^2 + m^2 - 1 - log s^2).
    closed = (std**2 + mean**2 - 1 - (std**2).log()).flatten(1).mean(1) / 2
    torch.testing.assert_close(gaussian_kl(ours, standard), closed)


def test_steps_of_one_deviation_keep_their_kl() -> None:
    mean, other = torch.randn(2, 5), torch.randn(2, 5)
    expected = (mean - other).square().mean(1) / (2 * 0.3**2)
    torch.testing.assert_close(gaussian_kl(Gaussian(mean, 0.3), Gaussian(other, 0.3)), expected)
    with pytest.raises(ValueError, match=r"0\.3 and 0\.2"):
        gaussian_kl(Gaussian(mean, 0.3), Gaussian(other, 0.2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_before_training_the_images_are_the_pipelines_own(
    name: str, noisy: Callable[..., PipelinePolicy], make_policy: MakePolicy
) -> None:
    own = make_policy(name, weights=None).images(PROMPTS, noise_of(0, 1))
    policy = noisy(name)
    assert torch.equal(policy.images(PROMPTS, noise_of(0, 1)), own)
    shifted(policy)
    assert (policy.images(PROMPTS, noise_of(0, 1)) - own).abs().max() > 1e-3
    with policy.reference():
        assert torch.equal(policy.images(PROMPTS, noise_of(0, 1)), own)


@pytest.mark.parametrize("name", LAYOUTS)
def test_samples_start_where_the_distribution_says(
    name: str, noisy: Callable[..., PipelinePolicy]
) -> None:
    policy = noisy(name)
    one = {"nodes": [0, 1], "record": [0], "decode": False}
    (before,) = policy.run(PROMPTS, noise_of(0, 1), **one)
    shifted(policy)
    (after,) = policy.run(PROMPTS, noise_of(0, 1), **one)
    assert isinstance(policy.trainable, InitialNoise)
    scale = policy.scheduler.initial_std
    gaussian = policy.trainable.gaussian(scale)
    standard = before.records[0].x / scale
    torch.testing.assert_close(after.records[0].x, gaussian.sample(standard))
    assert before.records[0].x.std() == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_exported_noise_gives_the_same_images_in_diffusers(
    name: str,
    noisy: Callable[..., PipelinePolicy],
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    policy = shifted(noisy(name))
    images = policy.images(PROMPTS, noise_of(0, 1))
    with policy.reference():
        (first,) = policy.run(PROMPTS, noise_of(0, 1), nodes=[0, 1], record=[0], decode=False)
    assert isinstance(policy.trainable, InitialNoise)
    exported = load_file(policy.trainable.export(tmp_path) / NOISE_FILE)
    latents = exported["mean"] + exported["std"] * first.records[0].x
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        [p.text for p in PROMPTS],
        latents=latents,
        output_type="pt",
        **sampling_of(name).arguments(),
    )
    torch.testing.assert_close(output.images, images, atol=1e-5, rtol=0)


def config(**train: object) -> Config:
    options: dict[str, object] = {"iterations": 2, "groups": 2, "lr": 0.05, "max_grad_norm": 1e9}
    return Config(
        model=Model(path="tiny", weights=Noise()),
        algorithm=FIND(group_size=6),
        loss=ClippedLoss(clip_range=0.2),
        rewards=(Reward(model="tests.test_train:darkness_of_any"),),
        prompts=Prompts(train="a", held_out="b"),
        train=Train(**(options | train)),  # type: ignore[arg-type]
        run=Run(folder="nowhere"),
    )


ITERATION = 0
RANDOM = Random(0).at("train", ITERATION)


def collected(policy: PipelinePolicy, settings: Config, prompts: int = 2) -> Experience:
    scorer = RewardScorer(settings.rewards, Failures())
    groups = [Group(i, p) for i, p in enumerate(PROMPTS[:prompts])]
    experience = settings.algorithm.collect(policy, groups, scorer, RANDOM, ITERATION)
    scorer.close()
    return experience


def test_gradient_is_the_closed_form(
    noisy: Callable[..., PipelinePolicy], accelerator: Accelerator
) -> None:
    policy, settings = shifted(noisy("sd3")), config()
    settings.check()
    policy.batch_size = 5
    learner = Learner(policy, settings.train, settings.loss, accelerator)
    experience = collected(policy, settings)
    advantages = settings.algorithm.advantages(experience)
    assert set(experience.actions.step.tolist()) == {INITIAL}
    steps = policy.num_steps()
    expected_cost = settings.algorithm.cost(steps, 0, RANDOM)
    assert experience.cost == expected_cost

    assert isinstance(policy.trainable, InitialNoise)
    mean, log_std = (policy.trainable.parameters[n].detach().clone() for n in (MEAN, LOG_STD))
    size, number = mean.numel(), len(advantages)
    z = (experience.actions.x_next - mean) / log_std.exp()
    weight = advantages.view(-1, *[1] * (z.ndim - 1))
    by_mean = -(weight * z / log_std.exp()).sum(0, keepdim=True) / size / number
    by_log_std = -(weight * (z.square() - 1)).sum(0, keepdim=True) / size / number

    found: dict[str, torch.Tensor] = {}
    step = learner.optimizer.prepared.step

    def spy() -> None:
        found.update({n: p.grad.clone() for n, p in learner.named.items() if p.grad is not None})
        step()

    learner.optimizer.prepared.step = spy  # type: ignore[method-assign]
    metrics = learner.update(experience, advantages, RANDOM)
    assert metrics["log_prob/noise"] == 0.0
    torch.testing.assert_close(found[MEAN], by_mean, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found[LOG_STD], by_log_std, rtol=1e-4, atol=1e-9)


def test_a_run_learns_where_to_start_and_its_model_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "algorithm={kind='find', group_size=16}", "model.weights={kind='noise'}",
        "loss={clip_range=0.2}", "train.updates=1", "train.groups=4", "train.rollout_batch=64",
        "train.lr=0.1", "train.warmup=0", "train.iterations=8", "evaluation.every=0",
        "evaluation.images=48", *reward_settings("darkness"),
    ]  # fmt: skip
    result = flowgrpo.train(small(tmp_path / "run", *settings))
    first, last = result.evaluations[0], result.evaluations[-1]
    gain = last["reward"] - first["reward"]
    assert gain > 4 * first["errors"]["darkness"], (gain, first["errors"])
    assert [p.name for p in (tmp_path / "run" / "export").iterdir()] == [NOISE_FILE]
    assert "initial_noise" in str(model_card(tmp_path / "run", "somebody/noise"))

    # The weights can be read again: samples are those of the trained distribution.
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--weights", "last", "--out", str(out)]) == 0
    again = load_file(out / NOISE_FILE)
    assert all(
        torch.equal(v, again[k]) for k, v in load_file(tmp_path / "run/export" / NOISE_FILE).items()
    )
    assert main(["export", str(tmp_path / "run"), "--format", "kohya", "--out", str(tmp_path / "k")]) == 2  # fmt: skip
    assert "trained the initial noise" in capsys.readouterr().err


def test_the_learned_baseline_expects_the_rewards_of_its_prompts(
    noisy: Callable[..., PipelinePolicy], accelerator: Accelerator
) -> None:
    policy = noisy("sd3")
    algorithm = FIND(group_size=3, baseline="learned")
    settings = replace(config(), algorithm=algorithm)
    settings.check()
    plain = collected(policy, settings)
    low_and_high = torch.where(plain.candidates.group == 0, 1.0, 3.0)
    low_and_high[0] = math.nan
    scores = replace(plain.candidates.scores, reward=low_and_high)
    experience = replace(plain, candidates=replace(plain.candidates, scores=scores))

    def learner() -> Learner:
        return Learner(policy, settings.train, settings.loss, accelerator, with_baseline=True)

    one, alone = learner(), lambda pairs: pairs
    first = one.with_expected(experience, alone).expected
    for _ in range(60):
        found = one.with_expected(experience, alone)
    assert first is not None
    assert found.expected is not None
    by_prompt = found.expected.view(2, 3)
    assert (by_prompt.std(1) < 1e-5).all()
    torch.testing.assert_close(by_prompt.mean(1), torch.tensor([1.0, 3.0]), atol=0.1, rtol=0)
    assert (first - found.expected).abs().max() > 0.5
    advantages = algorithm.advantages(found)
    assert advantages[0] == 0, "a failed reward is no advantage"
    torch.testing.assert_close(advantages[1:], (low_and_high - found.expected)[1:])

    # A checkpoint continues the same, and all processes learn from all rewards.
    again = learner()
    again.restore(*one.state())
    a, b = (x.with_expected(experience, alone).expected for x in (one, again))
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="only clip has an effect"):
        replace(settings, algorithm=replace(algorithm, advantage=PerReward())).check()


def test_what_does_not_belong_together_is_refused() -> None:
    good = config()
    good.check()
    with pytest.raises(ConfigError, match="belong together"):
        replace(good, model=Model(path="tiny")).check()
    with pytest.raises(ConfigError, match="belong together"):
        replace(good, algorithm=flowgrpo.algorithms.FlowGRPO()).check()
    for loss in (ClippedLoss(ratio="guard"), ClippedLoss(clip="kl"), ClippedLoss(kl="flow_grpo", kl_coef=1.0)):  # fmt: skip
        with pytest.raises(ConfigError, match="no denoising step"):
            replace(good, loss=loss).check()
    with pytest.raises(ConfigError, match=r"group_size must be at least 2"):
        replace(good, algorithm=FIND(group_size=1)).check()


def test_one_distribution_needs_one_size(
    make_policy: MakePolicy, noisy: Callable[..., PipelinePolicy]
) -> None:
    large = replace(PROMPTS[0], height=64, width=64)
    small_one = replace(PROMPTS[0], height=32, width=32)
    with pytest.raises(ValueError, match="give all prompts one size"):
        fit_noise(make_policy("sd15", weights=Noise()), [large, small_one])
    policy = make_policy("sd15", weights=Noise())
    fit_noise(policy, [small_one])
    with pytest.raises(ValueError, match="all prompts must have one size"):
        policy.images([large], noise_of(0))
    without = make_policy("sd15", weights=Noise())
    del without.pipeline.prepare_latents
    type_without = type("NoLatents", (type(without.pipeline),), {"prepare_latents": property()})
    without.pipeline.__class__ = type_without
    with pytest.raises(UnsupportedPipelineError, match="no prepare_latents"):
        fit_noise(without, PROMPTS)


def test_kl_to_the_standard_normal_holds_it_back(
    noisy: Callable[..., PipelinePolicy], accelerator: Accelerator
) -> None:
    """With a KL alone (no advantage), updates lead back to the standard normal."""
    policy = shifted(noisy("sd3"))
    settings = replace(config(lr=0.02), loss=ClippedLoss(clip_range=0.2, kl_coef=1.0))
    learner = Learner(policy, settings.train, settings.loss, accelerator)
    experience = collected(policy, settings)
    nothing = torch.zeros(len(experience.actions))
    kls = [learner.update(experience, nothing, RANDOM)["loss/kl"] for _ in range(15)]
    assert kls[-1] < 0.5 * kls[0]
    assert math.isfinite(kls[0])


@pytest.mark.parametrize("advantage", [GroupAdvantage(std="batch"), VirtualBest(best=3.0), PerReward(), GDPO(), LogTamed()], ids=lambda a: a.kind)  # fmt: skip
def test_noise_is_credited_by_any_kind_of_advantage(
    advantage: Any, noisy: Callable[..., PipelinePolicy]
) -> None:
    algorithm = FIND(group_size=4, advantage=advantage)
    settings = replace(config(), algorithm=algorithm)
    settings.check()
    experience = collected(noisy("sd3"), settings, prompts=1)
    found = algorithm.advantages(experience)
    order = experience.candidates.reward.argsort()
    assert (found[order].diff() >= 0).all(), "what is rewarded more has the larger advantage"
    assert found.abs().max() > 0.1
