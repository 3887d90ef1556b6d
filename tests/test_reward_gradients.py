"""Rewards with a gradient: against samplers written straight, on real pipelines, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import SRPO, DRaFT, ReFL
from flowgrpo.config import Config, ConfigError, Train, find
from flowgrpo.core.endings import JudgedText
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import ODE, Gaussian, Prediction, Step
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import LossInputs, PolicyOutputs
from flowgrpo.losses.reward_gradient import RewardGradientLoss
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.media_replay import check_differentiable
from flowgrpo.policy.settings import Memory
from flowgrpo.rewards.differentiable import WITH_GRADIENT, DifferentiableRewards
from flowgrpo.rewards.loading import FOLDER, available_rewards
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward, RewardError
from flowgrpo.shapes.captions import scene_for
from flowgrpo.shapes.denoiser_reward import DenoiserReward
from flowgrpo.shapes.world import draw
from flowgrpo.training.learner import Learner
from flowgrpo.training.reward_replay import RewardReplay
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_reward_gradients"
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]
RANDOM = Random(3).at("train", 0)
STEPS = 4


class Contrast:
    """The spread of the red channel, times the length of the prompt; NaN for long prompts."""

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.scores_with_gradient(media, prompts)

    def scores_with_gradient(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        length = torch.tensor([float(len(p.text)) for p in prompts])
        return media[:, 0].flatten(1).var(1) * length.where(length < 99, torch.nan)


def cut_off(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Scores from pixels without their graph."""
    return media.detach().flatten(1).mean(1)


cut_off.scores_with_gradient = cut_off  # type: ignore[attr-defined]


def blind(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A reward without a gradient."""
    return media.flatten(1).mean(1)


def rewards_of(*models: str, **more: Any) -> list[Reward]:
    return [Reward(model=f"{HERE}:{m}", **more) for m in models]


def train_settings(**changes: Any) -> Train:
    options: dict[str, Any] = {"iterations": 1, "groups": 2, "lr": 1e-3, "monitor_states": 0}
    return Train(**options | {"train_batch": 8, "rollout_batch": 8} | changes)


def collected(policy: PipelinePolicy, algorithm: Any, groups: Sequence[Group] = GROUPS, iteration: int = 0) -> Experience:  # fmt: skip
    scorer = RewardScorer(rewards_of("Contrast"), Failures(retries=0, max_rate=1.0))
    try:
        return algorithm.collect(policy, groups, scorer, RANDOM, iteration)
    finally:
        scorer.close()


def gradients(
    policy: PipelinePolicy,
    algorithm: Any,
    accelerator: Accelerator,
    loss: RewardGradientLoss | None = None,
    groups: Sequence[Group] = GROUPS,
    **train: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of an update by the learner, and its metrics."""
    scorer = RewardScorer(rewards_of("Contrast"))
    rewards = DifferentiableRewards(scorer.rewards, scorer.models)
    scorer.close()
    rewarded = RewardReplay(policy, rewards)
    learner = Learner(
        policy, train_settings(max_grad_norm=1e9, **train), loss or RewardGradientLoss(), accelerator,
        rewarded=rewarded,
    )  # fmt: skip
    experience = collected(policy, algorithm, groups)
    kept: dict[str, Tensor] = {}
    learner.optimizer.prepared.step = lambda: kept.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in learner.named.items() if p.grad is not None}
    )
    metrics = learner.update(experience, algorithm.advantages(experience), RANDOM)
    return kept, metrics


class Straight:
    """Stable Diffusion 3's sampler, written out: guidance, Euler steps and the decoder, with autograd."""

    def __init__(self, policy: PipelinePolicy):
        pipe = policy.pipeline
        assert isinstance(pipe, StableDiffusion3Pipeline)
        self.pipe, self.policy = pipe, policy
        texts = [g.prompt.text for g in GROUPS]
        with torch.no_grad():
            parts = [pipe.encode_prompt([t], None, None, max_sequence_length=16) for t in texts]
        even, none, pooled, pooled_none = (torch.cat(p) for p in zip(*parts, strict=True))
        self.hidden, self.pooled = torch.cat([none, even]), torch.cat([pooled_none, pooled])
        u = torch.linspace(1, 1 / 1000, STEPS)
        base = policy.shipped_scheduler
        base.set_timesteps(STEPS)
        self.sigmas = [float(s) for s in base.sigmas]
        assert len(self.sigmas) == STEPS + 1
        assert len(u) == STEPS

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((2 * len(x),), 1000 * sigma)
        both = self.pipe.transformer(
            hidden_states=torch.cat([x, x]), timestep=timestep, encoder_hidden_states=self.hidden,
            pooled_projections=self.pooled, return_dict=False,
        )[0]  # fmt: skip
        none, even = both.chunk(2)
        return none + 4.5 * (even - none)

    def steps(self, x: Tensor, first: int, last: int) -> Tensor:
        for i in range(first, last):
            x = x - (self.sigmas[i] - self.sigmas[i + 1]) * self.velocity(x, self.sigmas[i])
        return x

    def images(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        z = x / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(z, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def reward(self, x: Tensor, prefix: str = "") -> Tensor:
        shown = [Prompt(JudgedText(prefix=prefix).of(g.prompt.text)) for g in GROUPS]
        return Contrast()(self.images(x), shown)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        assert self.policy.trainable is not None
        named = self.policy.trainable.parameters
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {n: g for n, g in zip(named, found, strict=True) if g is not None}


@pytest.fixture(scope="module")
def sd3(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("sd3", weights=Full(), sampling=sampling_of("sd3", num_steps=STEPS))


@pytest.fixture(scope="module")
def noise(sd3: PipelinePolicy) -> Tensor:
    """The noise that the samples of all algorithms begin with."""
    return collected(sd3, DRaFT(last=STEPS)).actions.starts()[0]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert any(bool(g.abs().max() > 1e-6) for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("last", [1, 3, STEPS])
def test_draft_has_the_gradient_through_its_last_steps(
    last: int, sd3: PipelinePolicy, noise: Tensor, accelerator: Accelerator
) -> None:
    found, metrics = gradients(sd3, DRaFT(last=last), accelerator)
    straight = Straight(sd3)
    with torch.no_grad():
        x = straight.steps(noise, 0, STEPS - last)
    reward = straight.reward(straight.steps(x, STEPS - last, STEPS))
    assert metrics["reward/differentiated"] == pytest.approx(
        float(reward.detach().mean()), rel=1e-4
    )
    assert metrics["loss/policy"] == pytest.approx(-float(reward.detach().mean()), rel=1e-4)
    assert_same(found, straight.gradients(-reward.mean()))


def test_refl_has_the_gradient_of_the_data_predicted_at_its_stop(
    sd3: PipelinePolicy, noise: Tensor, accelerator: Accelerator
) -> None:
    algorithm = ReFL(stop_range=(0.25, 0.75))
    stop = algorithm.drawn_stop(STEPS, RANDOM)
    assert stop in (1, 2)
    loss = RewardGradientLoss(form="hinge", target=2.0, scale=1e-3)
    found, _ = gradients(sd3, algorithm, accelerator, loss)
    straight = Straight(sd3)
    with torch.no_grad():
        x = straight.steps(noise, 0, stop)
    data = x - straight.sigmas[stop] * straight.velocity(x, straight.sigmas[stop])
    objective = 1e-3 * (2.0 - straight.reward(data)).clamp(min=0).mean()
    assert_same({n: 1e3 * g for n, g in found.items()}, straight.gradients(1e3 * objective))


def test_srpo_steps_to_a_node_from_both_sides_and_swaps_its_words(
    sd3: PipelinePolicy, noise: Tensor, accelerator: Accelerator
) -> None:
    """Against the formulas of the released code, with its words and their weights."""
    algorithm = SRPO(step_range=(0.0, 0.8))
    landing = algorithm.drawn_landing(STEPS, RANDOM)
    assert algorithm.steps_to(landing) == [landing - 1, landing + 1]
    loss = RewardGradientLoss(form="hinge", target=0.7)
    found, _ = gradients(sd3, algorithm, accelerator, loss)
    straight, s = Straight(sd3), Straight(sd3).sigmas
    with torch.no_grad():
        data = straight.steps(noise, 0, STEPS)
    total = torch.zeros(())
    for start, words in ((landing - 1, ("Natural-lighting", "Concept art")), (landing + 1, ("Concept art", "Natural-lighting"))):  # fmt: skip
        x = s[start] * noise + (1 - s[start]) * data
        x = x + (s[landing] - s[start]) * straight.velocity(x, s[start])
        x = (x - s[landing] * noise) / (1 - s[landing])
        # k rises with the noise where samples are denoised, and falls where they are inverted.
        share = (0.8 - (landing if start < landing else start) / STEPS) / 0.8
        k = 0.1 + share * 0.15 if start < landing else 0.3 + share * (0.01 - 0.3)
        reward = (1 + k) * straight.reward(x, words[0]) - straight.reward(x, words[1])
        total = total + (0.7 - reward).clamp(min=0).mean() / 2
    assert_same(found, straight.gradients(total))


def test_draft_lv_averages_over_noises_of_the_last_step(
    sd3: PipelinePolicy, noise: Tensor, accelerator: Accelerator
) -> None:
    algorithm = DRaFT(renoised=3)
    experience = collected(sd3, algorithm)
    assert len(experience.actions) == 6
    found, _ = gradients(sd3, algorithm, accelerator)
    straight = Straight(sd3)
    sigma = straight.sigmas[STEPS - 1]
    with torch.no_grad():
        data = straight.steps(noise, 0, STEPS)
    loss = torch.zeros(())
    for number in range(3):
        streams = [RANDOM.at("group", g, 0, "renoised", number) for g in range(2)]
        eps = torch.stack(
            [torch.randn(data.shape[1:], generator=r.generator("step", STEPS - 1)) for r in streams]
        )
        x = (1 - sigma) * data + sigma * eps
        loss = loss - straight.reward(straight.steps(x, STEPS - 1, STEPS)).mean() / 3
    assert_same(found, straight.gradients(loss))


def test_recomputed_and_divided_decoders_give_the_same_gradient(
    make_policy: MakePolicy, accelerator: Accelerator
) -> None:
    plain, saving = (
        make_policy(
            "sd15", weights=Full(), sampling=sampling_of("sd15", num_steps=STEPS), memory=memory
        )
        for memory in (Memory(), Memory(gradient_checkpointing=True, decode_batch=1))
    )
    calls: list[int] = []
    saving.pipeline.vae.decoder.register_forward_pre_hook(lambda _, z: calls.append(len(z[0])))
    (wanted, _), (found, _) = (
        gradients(p, DRaFT(last=2), accelerator, train_batch=n)
        for p, n in ((plain, 8), (saving, 1))
    )
    assert_same(found, wanted)
    # Both samples in the rollout; in the update once forwards and once more in the backward pass.
    assert calls == [1] * 6


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan_t2v", "prx_pixel"])
def test_media_are_those_of_the_rollout_and_reach_the_weights(
    name: str, make_policy: MakePolicy, accelerator: Accelerator
) -> None:
    """Packed latents, a diffusion path, a video decoder with a cache, and no decoder at all."""
    policy = make_policy(name, weights=Full())
    experience = collected_media(policy, DRaFT(last=2))
    replayed = RewardReplay(policy, DifferentiableRewards(rewards_of("Contrast"), [MeanOfFrames()]))
    _, reward = replayed(experience, experience.actions, [g.prompt for g in GROUPS])
    torch.testing.assert_close(reward.detach(), experience.candidates.reward, rtol=1e-4, atol=1e-6)
    reward.sum().backward()
    assert policy.trainable is not None
    norms = [float(p.grad.norm()) for p in policy.trainable.parameters.values() if p.grad is not None]  # fmt: skip
    assert max(norms) > 0
    frozen = [m for k, m in policy.models.items() if k not in policy.denoisers]
    assert all(p.grad is None for m in frozen for p in m.parameters())


class MeanOfFrames:
    """The spread of all pixels of an image or a video."""

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return media.flatten(1).var(1)

    scores_with_gradient = __call__


def collected_media(policy: PipelinePolicy, algorithm: DRaFT) -> Experience:
    scorer = RewardScorer(rewards_of("MeanOfFrames"))
    try:
        return algorithm.collect(policy, GROUPS, scorer, RANDOM, 0)
    finally:
        scorer.close()


def test_samples_without_a_reward_are_not_trained_on(
    sd3: PipelinePolicy, noise: Tensor, accelerator: Accelerator
) -> None:
    groups = [GROUPS[0], Group(1, Prompt("x" * 120))]
    algorithm = DRaFT()
    experience = collected(sd3, algorithm, groups)
    assert algorithm.advantages(experience).tolist() == [1.0, 0.0]
    found, _ = gradients(sd3, algorithm, accelerator, groups=groups)
    straight = Straight(sd3)
    with torch.no_grad():
        x = straight.steps(noise, 0, STEPS - 1)
    reward = straight.reward(straight.steps(x, STEPS - 1, STEPS))
    assert_same(found, straight.gradients(-reward[0] / 2))


def test_the_pull_to_the_reference_starts_from_zero_and_grows(
    make_policy: MakePolicy, accelerator: Accelerator
) -> None:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=STEPS), with_reference=True)
    loss = RewardGradientLoss(kl_coef=1.0)
    _, first = gradients(policy, DRaFT(), accelerator, loss)
    assert first["loss/kl"] == pytest.approx(0.0, abs=1e-10)
    assert policy.trainable is not None
    with torch.no_grad():
        for parameter in policy.trainable.parameters.values():
            parameter.add_(0.05)
    _, second = gradients(policy, DRaFT(), accelerator, loss)
    assert second["loss/kl"] > 1e-6


@pytest.mark.parametrize(
    ("loss", "wanted", "slope"),
    [
        (RewardGradientLoss(), [-1.5, -3.0], [-1.0, -1.0]),
        (RewardGradientLoss(form="hinge", target=2.0, scale=1e-3), [5e-4, 0.0], [-1e-3, 0.0]),
        (RewardGradientLoss(form="distance", target=2.0, scale=0.01), [5e-3, 0.01], [-0.01, 0.01]),
    ],
)
def test_forms_of_the_loss(
    loss: RewardGradientLoss, wanted: list[float], slope: list[float]
) -> None:
    """The numbers of DRaFT, ReFL's ``1e-3 relu(2 - r)``, and AlignProp's ``0.01 |r - target|``."""
    reward, x = torch.tensor([1.5, 3.0], requires_grad=True), torch.zeros(2, 3)
    outputs = PolicyOutputs(Prediction(x, x, x), Gaussian(x, 0.0))
    rows = torch.arange(2)
    inputs = LossInputs(
        policy=outputs, x=x, state=rows, x_next=x, old_log_prob=torch.zeros(2), advantage=torch.ones(2),
        group=rows, sample=rows, step=0, interval=Step.flow(0.5, 0.0), transition=ODE(), reward=reward,
    )  # fmt: skip
    found = loss(inputs).loss
    assert found.tolist() == pytest.approx(wanted)
    (gradient,) = torch.autograd.grad(found.sum(), reward)
    assert gradient.tolist() == pytest.approx(slope)
    # The advantage is the weight of an action, and 0 where the reward failed.
    weighted = loss(replace(inputs, advantage=torch.tensor([0.5, 0.0]))).loss
    assert weighted.tolist() == pytest.approx([wanted[0] / 2, 0.0])


@pytest.mark.parametrize("algorithm", [DRaFT(last=2, group_size=2), ReFL(group_size=3), SRPO()])
def test_the_cost_is_counted_as_computed(algorithm: Any, make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", sampling=sampling_of("sd3", num_steps=8))
    algorithm.check(8)
    assert collected(policy, algorithm).cost == algorithm.cost(8, 0, RANDOM)
    assert algorithm.trained_steps(8, 0, RANDOM) == []


def test_draws_are_those_of_the_iteration_and_cover_their_range() -> None:
    every = [Random(0).at("train", i) for i in range(200)]
    lasts = {DRaFT(last=5, truncation="random").drawn_last(r) for r in every}
    assert lasts == {1, 2, 3, 4, 5}
    assert {ReFL().drawn_stop(40, r) for r in every} == set(range(30, 40))
    landings = {SRPO(span=2).drawn_landing(50, r) for r in every}
    assert landings == set(range(7, 24))
    first, second = (SRPO().ending(5, 25, i).texts(4)[0].prefix for i in (0, 1))
    assert (first, second) == ("Natural-lighting", "Detail")


def config(*more: str) -> Config:
    settings = [
        "algorithm={kind='draft'}", "loss={kind='reward_gradient'}", f"rewards=[{{model='{HERE}:Contrast'}}]",
        "train.updates=1", *more,
    ]  # fmt: skip
    loaded = flowgrpo.load("quickstart_flow_grpo", settings)
    loaded.check()
    return loaded


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("algorithm.group_size=0", "at least 1"),
        ("algorithm.last=9", "algorithm.last must be from 1 to sampling.num_steps = 8"),
        ("algorithm={kind='draft', last=2, renoised=2}", "needs algorithm.last = 1"),
        ("algorithm={kind='draft', truncation='random'}", "raise algorithm.last"),
        ("algorithm={kind='refl', stop_range=[0.9, 0.95]}", "no step of a grid of 8 steps"),
        ("algorithm={kind='srpo', step_range=[0.1, 0.3]}", "raise sampling.num_steps"),
        ("algorithm={kind='srpo', wanted=[]}", "at least one word"),
        ("algorithm={kind='flow_grpo'}", "loss.kind and algorithm.kind do not belong together"),
        ("loss={kind='clipped'}", "loss.kind and algorithm.kind do not belong together"),
        ("loss.target=2", "loss.form to 'hinge' or 'distance'"),
        ("loss.scale=0", "loss.scale"),
        ("memory.offload_vae=true", "after it has left the device"),
        ("train.refill=1", "set it to 0"),
        ("train.staleness=1", "set it to 0"),
        ("train.split='steps'", "trains none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(setting)


def test_divided_denoisers_are_refused() -> None:
    loaded = flowgrpo.load(
        "quickstart_flow_grpo",
        ["algorithm={kind='draft'}", "loss={kind='reward_gradient'}", "parallel.shard='denoiser'"],
    )
    with pytest.raises(ConfigError, match=r"parallel\.shard.*set it to 'off'"):
        loaded.check(2)


def test_groups_of_one_sample_are_for_reward_gradients_alone() -> None:
    assert config("algorithm.group_size=1").algorithm.group_size == 1
    with pytest.raises(ConfigError, match="at least 2"):
        flowgrpo.load("quickstart_flow_grpo", ["algorithm.group_size=1"]).check()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Reward(model=f"{HERE}:blind"), "has no method scores_with_gradient.*train on one of aesthetic"),
        (Reward(model="remote", options={"url": "http://127.0.0.1:9"}), "runs on a server"),
        (Reward(model=f"{HERE}:Contrast", threshold=0.5), "whose gradient is 0"),
    ],
)  # fmt: skip
def test_rewards_without_a_gradient_are_refused(reward: Reward, message: str) -> None:
    model = blind if reward.model != f"{HERE}:Contrast" else Contrast()
    with pytest.raises(ConfigError, match=message):
        DifferentiableRewards([reward], [model])
    # Logged only, it is not differentiated.
    kept = DifferentiableRewards(
        [Reward(model=f"{HERE}:Contrast"), Reward(model=f"{HERE}:blind", weight=0.0)],
        [Contrast(), blind],
    )
    assert [r.label for r in kept.rewards] == ["Contrast"]


def test_scores_that_lost_their_graph_are_named() -> None:
    rewards = DifferentiableRewards(rewards_of("cut_off"), [cut_off])
    with pytest.raises(RewardError, match=r"'cut_off'.*without a gradient"):
        rewards(torch.rand(1, 3, 8, 8, requires_grad=True), [Prompt("x")])


def test_the_names_in_the_refusal_are_the_rewards_that_have_a_gradient() -> None:
    texts = {name: (FOLDER / f"{name}.py").read_text() for name in available_rewards()}
    with_method = [name for name, text in texts.items() if "def scores_with_gradient(" in text]
    assert with_method == list(WITH_GRADIENT)


def test_an_untrained_denoiser_of_the_last_steps_is_named(make_policy: MakePolicy) -> None:
    """Wan 2.2 has a denoiser for early steps and one for late ones."""
    policy = make_policy("wan22", weights=LoRA(rank=4, models=("transformer",)))
    rewarded = RewardReplay(policy, DifferentiableRewards(rewards_of("Contrast"), [MeanOfFrames()]))
    with pytest.raises(UnsupportedPipelineError, match="denoiser of these steps is not trained"):
        rewarded.probe(GROUPS[0].prompt)


def test_a_quantised_decoder_is_refused(sd3: PipelinePolicy) -> None:
    vae = sd3.pipeline.vae
    vae.hf_quantizer = object()
    try:
        with pytest.raises(UnsupportedPipelineError, match="quantised"):
            check_differentiable(sd3)
    finally:
        del vae.hf_quantizer


def test_the_denoisers_reward_reads_prompts_and_rises_along_its_gradient() -> None:
    """On true scenes of the embedded world."""
    prompts = PromptSet.load(find("prompts/shapes_held_out.jsonl")).prompts
    prompts = [p for p in prompts if p.metadata["tag"] == "colors"][:4]
    rng = np.random.default_rng(0)
    scenes = [draw(scene_for(dict(p.metadata), rng)) for p in prompts]
    media = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 255
    reward = DenoiserReward()
    own, others = reward(media, prompts), reward(media, [*prompts[1:], prompts[0]])
    assert bool((own > others).all())
    assert float(own.mean()) > 0 > float(others.mean())
    media.requires_grad_()
    scores = reward.scores_with_gradient(media, prompts)
    assert torch.equal(scores.detach(), own)
    (slope,) = torch.autograd.grad(scores.sum(), media)
    step = 0.02 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert bool((reward((media.detach() + step).clamp(0, 1), prompts) > own).all())
    with pytest.raises(ValueError, match="64x64 pixels"):
        reward(torch.rand(1, 3, 32, 32), prompts[:1])
