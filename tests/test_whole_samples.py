"""MixGRPO, Pref-GRPO and DiffusionNFT on tiny pipelines, and advantages over several ranks."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import Algorithm, DanceGRPO, DiffusionNFT, FlowGRPO, MixGRPO, PrefGRPO
from flowgrpo.config import Config, ConfigError, Model, Prompts, Run, Train
from flowgrpo.core.multi_reward_advantages import GDPO, LogTamed, PerReward
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.single_reward_advantages import BetaAdvantage, GroupAdvantage
from flowgrpo.core.steps import SlidingWindow, Window
from flowgrpo.core.transitions import CPS, DDIM, DanceSDE, FlowSDE
from flowgrpo.data.experience import Candidates, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import Loss
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.pairs import PairwisePreference, PointwisePreference
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward, RewardError
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_whole_samples"
T, G = 5, 3
ITERATION = 4
RANDOM = Random(1).at("train", ITERATION)
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def redness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media[:, 0].flatten(1).mean(1) * 100


class Brighter:
    """Prefers the brighter one, and says nothing of one prompt if told so."""

    def __init__(self, silent_on: str = ""):
        self.silent_on = silent_on

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        verdicts = (first.flatten(1).mean(1) > second.flatten(1).mean(1)).float()
        verdicts[[p.text == self.silent_on for p in prompts]] = math.nan
        return verdicts


@pytest.fixture(scope="module")
def policies(make_policy: MakePolicy) -> Callable[[str], PipelinePolicy]:
    """One policy per family; tests leave its weights alone."""
    made: dict[str, PipelinePolicy] = {}

    def policy(name: str) -> PipelinePolicy:
        if name not in made:
            made[name] = make_policy(name, sampling=sampling_of(name, num_steps=T))
        return made[name]

    return policy


@pytest.fixture
def scorer() -> Iterator[Callable[..., RewardScorer]]:
    judges: list[RewardScorer] = []

    def make(*rewards: Reward, **failures: object) -> RewardScorer:
        settings = {"retries": 0, "wait": 0.0} | failures
        judges.append(
            RewardScorer(rewards or [Reward(model=f"{HERE}:brightness")], Failures(**settings))
        )  # type: ignore[arg-type]
        return judges[-1]

    yield make
    for made in judges:
        made.close()


BOTH = (
    Reward(model=f"{HERE}:brightness", weight=0.0),
    Reward(model=f"{HERE}:redness", weight=0.3),
)
MIX = MixGRPO(group_size=G, steps=Window(start=1, size=1), flash=0.7, solver="dpm_2m")
JUDGED = PrefGRPO(group_size=G, preference=PairwisePreference(model=f"{HERE}:Brighter", weight=0.7))
NFT = DiffusionNFT(group_size=G)


# MixGRPO.


def test_flash_takes_fewer_larger_steps_to_the_data(policies, scorer):
    policy = policies("sd3")
    flash = MIX.collect(policy, GROUPS, scorer(), RANDOM, ITERATION)
    whole = replace(MIX, flash=1.0, solver="euler").collect(
        policy, GROUPS, scorer(), RANDOM, ITERATION
    )
    # Shared: steps 0 and 1 once. Then 3 steps, or int(3 * 0.7) = 2 of them.
    assert (flash.cost.nfe, whole.cost.nfe) == (2 + 2 * G, 2 + 3 * G)
    assert flash.cost == MIX.cost(T, ITERATION, RANDOM)
    for experience in (flash, whole):
        assert experience.actions.step.unique().tolist() == [1]
        assert len(experience.actions.state.unique()) == len(GROUPS)
    assert torch.equal(flash.actions.x_next, whole.actions.x_next)
    # The slow version: each sample alone, over the nodes that are left.
    start = RANDOM.at("group", 1)
    (alone,) = policy.run(
        [GROUPS[1].prompt], SampleNoise([start.at(2)], [start]), nodes=[0, 1, 2, 4, 5],
        stochastic=[1], transition=MIX.transition, solver="dpm_2m",
    )  # fmt: skip
    assert alone.media is not None
    torch.testing.assert_close(
        flash.candidates.reward[-1], brightness(alone.media, [])[0], atol=1e-5, rtol=0
    )


def test_flash_as_released_has_one_step_fewer_and_no_first_order_step(policies, scorer):
    # sampling_utils.py of the release: int(max((25 - last) * 0.4, 1)) nodes after a window that ends
    # with step ``last``, the first of which is the window's end.
    for last in range(3, 23):
        plan = replace(MIX, flash=0.4, flash_counts="nodes", steps=Window(start=last - 3, size=4)).plan(25, 0, RANDOM)  # fmt: skip
        released = int(max((25 - last) * 0.4, 1)) - 1
        assert len(plan.nodes(25)) - 1 == last + 1 + max(1, released)
    policy = policies("sd3")
    window = replace(MIX, steps=Window(start=0, size=2), flash=0.8, flash_counts="nodes")
    continued = replace(window, solver="dpm_2m_continued")
    continued.check(T)
    first, second = (a.collect(policy, GROUPS, scorer(), RANDOM, ITERATION) for a in (window, continued))  # fmt: skip
    assert torch.equal(first.actions.x_next, second.actions.x_next)
    assert first.cost.nfe == second.cost.nfe == 1 + 3 * G
    assert (first.candidates.reward - second.candidates.reward).abs().min() > 1e-6
    with pytest.raises(ValueError, match="use a window of at least 2"):
        replace(MIX, solver="dpm_2m_continued").check(T)
    with pytest.raises(ValueError, match="has no effect with algorithm"):
        replace(MIX, flash=1.0, flash_counts="nodes").check(T)


@pytest.mark.parametrize(("flash", "after"), [(0.4, [5, 8]), (0.01, [8]), (1.0, [4, 5, 6, 7, 8])])
def test_after_the_window_steps_are_about_equal(flash, after):
    plan = replace(MIX, flash=flash, steps=Window(start=1)).plan(8, 0, RANDOM)
    assert plan.nodes(8) == [0, 1, 2, 3, *after]


def test_mixes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"flash must be in \(0, 1\], got 0"):
        replace(MIX, flash=0.0).check(T)
    with pytest.raises(ValueError, match="window of 4 does not fit into 5 steps"):
        MixGRPO().check(T)
    MixGRPO().check(25)


# Pref-GRPO.


def test_win_rates_are_judged_over_whole_groups_whatever_the_batches(policies, scorer):
    policy = policies("sd3")
    for policy.batch_size in (64, 2):
        experience = JUDGED.collect(policy, GROUPS, scorer(*BOTH), RANDOM, ITERATION)
        c, raw = experience.candidates, experience.candidates.scores.raw
        bright = raw["brightness"].view(2, G)
        ranks = bright.argsort(1).argsort(1) / (G - 1)
        assert torch.equal(raw["win_rate"].view(2, G), ranks)
        torch.testing.assert_close(c.reward, 0.7 * ranks.flatten() + 0.3 * raw["redness"])
        assert c.scores.weights == {"redness": 0.3, "win_rate": 0.7}
        torch.testing.assert_close(sum(c.scores.parts().values()), c.reward)
    policy.batch_size = 64
    z = [
        (v.view(2, G) - v.view(2, G).mean(1, keepdim=True)) / v.view(2, G).std(1, keepdim=True)
        for v in (raw["win_rate"], raw["redness"])
    ]
    wanted = 0.7 * z[0] + 0.3 * z[1]
    a = experience.actions
    torch.testing.assert_close(
        JUDGED.advantages(experience), wanted[a.group, a.sample], atol=1e-3, rtol=1e-3
    )


def test_comparing_scores_is_judging_by_them(policies, scorer):
    policy = policies("sd3")
    judged = JUDGED.collect(policy, GROUPS, scorer(*BOTH), RANDOM, ITERATION)
    compared = replace(JUDGED, preference=PointwisePreference(reward="brightness", weight=0.7))
    other = compared.collect(policy, GROUPS, scorer(*BOTH), RANDOM, ITERATION)
    torch.testing.assert_close(other.candidates.reward, judged.candidates.reward)


def test_a_group_without_verdicts_teaches_nothing_and_too_many_stop_the_run(policies, scorer):
    silent = replace(
        JUDGED, preference=replace(JUDGED.preference, options={"silent_on": "two dogs"})
    )
    with pytest.raises(RewardError, match="3 of 6 comparisons got no verdict"):
        silent.collect(policies("sd3"), GROUPS, scorer(*BOTH), RANDOM, ITERATION)
    experience = silent.collect(
        policies("sd3"), GROUPS, scorer(*BOTH, max_rate=0.5), RANDOM, ITERATION
    )
    assert experience.candidates.valid.tolist() == [True] * G + [False] * G
    advantages = silent.advantages(experience)
    assert (advantages[experience.actions.group == 1] == 0).all()
    assert (advantages[experience.actions.group == 0] != 0).any()


# DiffusionNFT.


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_nft_actions_are_noised_samples(name, policies, scorer):
    policy = policies(name)
    experience = NFT.collect(policy, GROUPS, scorer(), RANDOM, ITERATION)
    a = experience.actions
    assert experience.cost == NFT.cost(T, ITERATION, RANDOM)
    # int(5 * .99) of 5 times each, not the same for all.
    times = {
        (g, s): a.step[(a.group == g) & (a.sample == s)].tolist()
        for g in range(2)
        for s in range(G)
    }
    assert {len(set(chosen)) for chosen in times.values()} == {4}
    assert len({tuple(sorted(chosen)) for chosen in times.values()}) > 1
    images = policy.decode([GROUPS[int(g)].prompt for g in a.group], a.x_next)
    owner = a.group * G + a.sample
    torch.testing.assert_close(brightness(images, []), experience.candidates.reward[owner], atol=1e-4, rtol=0)  # fmt: skip
    for step in a.step.unique().tolist():
        rows, interval = a.step == step, policy.scheduler.interval(step, step + 1)
        noise = (a.states[a.state[rows]] - interval.signal * a.x_next[rows]) / interval.noise
        assert float(noise.mean()) == pytest.approx(0, abs=0.2)
        assert float(noise.std()) == pytest.approx(1, abs=0.2)
    assert len(a.states[a.state].flatten(1).unique(dim=0)) == len(a)


def config(algorithm: Algorithm, loss: Loss, **train: object) -> Config:
    settings = {"iterations": 10, "groups": 2, "lr": 1e-3, "max_grad_norm": 1e9} | train
    return Config(
        model=Model(path=""),
        algorithm=algorithm,  # type: ignore[arg-type]
        loss=loss,
        rewards=(Reward(model=f"{HERE}:brightness"),),
        prompts=Prompts(train="", held_out=""),
        train=Train(**settings),  # type: ignore[arg-type]
        run=Run(folder=""),
    )


Learn = Callable[..., Learner]


@pytest.fixture
def learn(make_policy: MakePolicy, accelerator: Accelerator) -> Learn:
    def make(name: str, algorithm: Algorithm, loss: Loss, **train: object) -> Learner:
        policy = make_policy(name, sampling=sampling_of(name, num_steps=T), with_reference=True)
        return Learner(policy, config(algorithm, loss, **train).train, loss, accelerator)

    return make


def test_the_policy_that_samples_trails_and_is_saved(learn: Learn, scorer):
    learner = learn("sd3", NFT, NFTLoss(trail="late"), weight_decay=0.0)
    assert learner.behaviour is not None
    before = [p.detach().clone() for p in learner.parameters]
    learner.optimizer.num_updates = 175  # 1 - 0.75 of the way from now on
    with learner.behaviour_policy():
        experience = NFT.collect(learner.policy, GROUPS, scorer(), RANDOM, ITERATION)
    metrics = learner.update(experience, NFT.advantages(experience), RANDOM)
    assert metrics["loss/kl"] == 0
    assert not [k for k in metrics if k.startswith(("ratio", "log_prob", "step"))]
    kept = 0.0075 * 101
    for old, start, now in zip(learner.behaviour, before, learner.parameters, strict=True):
        torch.testing.assert_close(old, kept * start + (1 - kept) * now, atol=1e-7, rtol=1e-4)
    moved = [not torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True)]
    assert any(moved)
    # What acts is the sampler, and afterwards the trained weights are back.
    with learner.behaviour_policy():
        assert all(
            torch.equal(p, s) for p, s in zip(learner.parameters, learner.behaviour, strict=True)
        )
    assert moved == [not torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True)]
    parts, state = learner.state()
    again = learn("sd3", NFT, NFTLoss(trail="late"))
    again.restore(parts, state)
    assert again.behaviour is not None
    assert all(torch.equal(a, b) for a, b in zip(again.behaviour, learner.behaviour, strict=True))
    # The second update differs between the two policies only in what the checkpoint holds.
    follow = [x.update(experience, NFT.advantages(experience), RANDOM) for x in (learner, again)]
    assert follow[0]["loss/policy"] == pytest.approx(follow[1]["loss/policy"], rel=1e-6)


def test_nft_gradient_is_that_of_every_sample_alone(learn: Learn, scorer):
    loss = NFTLoss(kl_coef=0.0, beta=0.5)
    learner = learn("sd15", NFT, loss)
    experience = NFT.collect(learner.policy, GROUPS, scorer(), RANDOM, ITERATION)
    advantages, a = NFT.advantages(experience), experience.actions
    total = torch.zeros(())
    for i in range(len(a)):
        record = learner.policy.replay([GROUPS[int(a.group[i])].prompt], a.states[a.state[i]][None], int(a.step[i]), NFT.transition)  # fmt: skip
        x0, sample = record.prediction.x0, a.x_next[i][None]
        old = x0.detach()
        r = (advantages[i] / 10 + 0.5).clamp(0, 1)
        for weight, implicit in ((r, 0.5 * x0 + 0.5 * old), (1 - r, 1.5 * old - 0.5 * x0)):
            size = (implicit - sample).detach().abs().mean()
            total = total + 5 * weight * (implicit - sample).square().mean() / size / 0.5 / len(a)
    expected = torch.autograd.grad(total, learner.parameters, allow_unused=True)
    taken: list[list[Tensor]] = []
    learner.optimizer.adam.register_step_pre_hook(
        lambda *_: taken.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    )
    learner.update(experience, advantages, RANDOM)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for got, want in zip(taken[0], expected, strict=True):
        want = torch.zeros_like(got) if want is None else want
        torch.testing.assert_close(got, want, atol=1e-3 * scale, rtol=0)


def test_nft_goes_where_the_reward_is(learn: Learn, scorer):
    prompts = [g.prompt for g in GROUPS] * 4
    noise = SampleNoise([Random(9).at(i) for i in range(8)])
    change = {}
    for sign in (1.0, -1.0):
        learner = learn("sd3", NFT, NFTLoss(trail="none", kl_coef=0.0), lr=2e-2)
        reward = Reward(model=f"{HERE}:brightness", weight=sign)
        before = brightness(learner.policy.images(prompts, noise), []).mean()
        for iteration in range(4):
            random = Random(1).at("train", iteration)
            with learner.behaviour_policy():
                experience = NFT.collect(learner.policy, GROUPS, scorer(reward), random, iteration)
            learner.update(experience, NFT.advantages(experience), random)
        change[sign] = float(brightness(learner.policy.images(prompts, noise), []).mean() - before)
    assert change[1.0] > 0 > change[-1.0]
    assert change[1.0] - change[-1.0] > 0.002


@pytest.mark.parametrize(
    ("algorithm", "loss"), [(FlowGRPO(), NFTLoss()), (DiffusionNFT(), ClippedLoss())]
)
def test_nft_and_its_loss_belong_together(algorithm, loss):
    with pytest.raises(ConfigError, match="belong together"):
        config(algorithm, loss).check()


# Configurations and ranks.


def test_defaults_are_the_published_settings():
    flow, dance, mix, pref, nft = FlowGRPO(), DanceGRPO(), MixGRPO(), PrefGRPO(), DiffusionNFT()
    assert [a.group_size for a in (flow, dance, mix, pref, nft)] == [24, 12, 12, 8, 24]
    assert [a.transition for a in (flow, dance, mix, pref)] == [
        FlowSDE(noise_level=0.7), DanceSDE(noise_level=0.3), FlowSDE(noise_level=0.7), FlowSDE(noise_level=0.7),
    ]  # fmt: skip
    flow_grpo = GroupAdvantage(std="batch", ddof=0, epsilon=1e-4, clip=5.0)
    assert flow.advantage == nft.advantage == flow_grpo
    assert dance.advantage == GroupAdvantage(std="group", ddof=1, epsilon=1e-8, clip=5.0)
    assert mix.advantage == pref.advantage == PerReward(std="group", ddof=1, epsilon=1e-8, clip=5.0)
    assert [a.shared_noise for a in (flow, dance, mix, pref)] == [False, True, True, True]
    assert (dance.timestep_fraction, dance.best_of, nft.timestep_fraction) == (0.6, 0, 0.99)
    assert pref.timestep_fraction == 0.6
    assert mix.steps == SlidingWindow(size=4, stride=1, every=25, skip_last=2)
    assert (ClippedLoss().clip_range, ClippedLoss().kl_coef) == (1e-4, 0.0)
    loss = NFTLoss()
    assert (loss.beta, loss.advantage_scale, loss.kl_coef) == (1.0, 5.0, 1e-4)


def test_preferences_and_rewards_must_go_together():
    one = config(PrefGRPO(), ClippedLoss())
    one.check()
    zero = replace(one, rewards=(Reward(model=f"{HERE}:brightness", weight=0.0),))
    zero.check()
    with pytest.raises(ConfigError, match="must be the name of one of the rewards"):
        replace(one, rewards=BOTH).check()
    with pytest.raises(ConfigError, match="a reward is called 'win_rate'"):
        replace(one, rewards=(Reward(model=f"{HERE}:brightness", name="win_rate"),)).check()


@pytest.mark.parametrize(
    "advantage",
    [GroupAdvantage(std="batch"), PerReward(std="batch"), GDPO(), LogTamed(std="batch"), BetaAdvantage()],
)  # fmt: skip
def test_ranks_change_no_advantage(advantage, policies, scorer):
    algorithm = FlowGRPO(group_size=G, transition=CPS(), advantage=advantage)
    rewards = (Reward(model=f"{HERE}:brightness"), Reward(model=f"{HERE}:redness", weight=0.1))
    whole = algorithm.collect(policies("sd3"), GROUPS, scorer(*rewards), RANDOM, ITERATION)
    if isinstance(advantage, BetaAdvantage):
        binary = torch.tensor([1.0, 0, 0, 1, 0, 1])
        scores = replace(whole.candidates.scores, reward=binary)
        whole = replace(whole, candidates=replace(whole.candidates, scores=scores))
    wanted = algorithm.advantages(whole)

    def rank(group: int) -> Experience:
        c = whole.candidates
        mine = c.select(c.group == group)
        actions = whole.actions.select((whole.actions.group == group).nonzero().squeeze(1))
        return replace(whole, candidates=mine, actions=actions)

    ranks = [rank(1), rank(0)]
    everyone = Candidates.concatenate([r.candidates for r in ranks])
    for part in ranks:
        found = algorithm.advantages(replace(part, gathered=everyone))
        mine = whole.actions.group == part.actions.group[0]
        torch.testing.assert_close(found, wanted[mine], atol=1e-5, rtol=1e-5)
        assert (found != 0).any()


def test_decaying_windows_stay_shorter_late():
    window = SlidingWindow(size=1, every=4, decay=0.5, decay_from=1, skip_last=1)
    starts = [window.select(5, i, RANDOM)[0] for i in range(14)]
    # ceil(4 exp(-.5 max(0, l - 1))) = 4, 4, 3, 2
    assert starts == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2 + [0]
    staying = replace(window, at_end="stay")
    assert [staying.select(5, i, RANDOM)[0] for i in (12, 13, 99)] == [3, 3, 3]
    with pytest.raises(ValueError, match="decay must be at least 0"):
        replace(window, decay=-1.0).select(5, 0, RANDOM)


def test_mix_windows_are_those_of_the_iteration_alone(policies, scorer):
    algorithm = MixGRPO(group_size=2, transition=DDIM(), steps=SlidingWindow(size=2, every=1))
    for iteration, wanted in ((0, [0, 1]), (1, [1, 2]), (2, [0, 1])):
        random = Random(3).at("train", iteration)
        experience = algorithm.collect(policies("sd15"), GROUPS[:1], scorer(), random, iteration)
        assert experience.actions.step.unique().tolist() == wanted


# Whole runs.


class Novelty:
    """How far an image is from the mean of all that it has seen: it learns, at first alone."""

    def __init__(self) -> None:
        self.mean, self.largest = torch.zeros(()), 0

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.largest = max(self.largest, len(media))
        assert self.largest <= 2
        return (media.flatten(1).mean(1) - self.mean).abs()

    def update(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
        assert len(media) == len(prompts) == 6
        self.mean = 0.5 * self.mean + 0.5 * media.mean()
        return {"mean": float(self.mean)}

    def trains(self, iteration: int) -> str:
        return "reward" if iteration == 0 else "both"

    def state(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.mean = state["mean"]


RUN = [
    "train.iterations=2", "train.groups=2", "train.updates=2", "train.lr=1e-3", "sampling.num_steps=4",
    "prompts.balance=''", f"rewards=[{{model='{HERE}:brightness'}}]", "evaluation.images=2",
    "evaluation.every=0", "evaluation.metrics=[]", "evaluation.grid_prompts=1", "evaluation.grid_samples=2", "run.checkpoint_every=1",
    "run.threads=1", "run.device=cpu", "run.trackers=[]", "failures.probe=off",
]  # fmt: skip
RUNS = {
    "mix": [
        "algorithm={kind='mix_grpo', group_size=3, flash=0.5, solver='dpm_2m'}",
        "algorithm.steps={kind='random_window', size=1, first=0, last=2}", "loss={clip='kl', clip_range=1e-3}",
    ],
    "pref": [
        "algorithm={kind='pref_grpo', group_size=3, advantage={kind='gdpo'}, transition={kind='cps'}}",
        f"algorithm.preference={{kind='judged', model='{HERE}:Brighter', swap=true}}",
        "loss={ratio='guard', clip_range=1e-3}",
    ],
    "nft": ["algorithm={kind='diffusion_nft', group_size=3}", "loss={kind='nft', trail='half'}"],
    "own_loss": [
        "algorithm={kind='flow_grpo', group_size=3}", "train.ema_decay=0.5",
        "loss={kind='tests.test_objectives:Distances', power=2.0, kl_coef=0.1}",
    ],
    "draft": [
        "algorithm={kind='draft', group_size=3, last=2, truncation='random'}", "loss={kind='reward_gradient'}",
        "rewards=[{model='tests.test_reward_gradients:Contrast'}]",
    ],
    "learning": [
        f"rewards=[{{model='{HERE}:Novelty'}}]", "memory.score_batch=2", "algorithm={kind='flow_grpo', group_size=3}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_same_numbers(name: str, tmp_path: Path):
    """From files alone: what it was configured as, what it did, and what it would have done."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    config = flowgrpo.load("quickstart_flow_grpo", [*RUN, *RUNS[name], f"run.folder={straight}"])
    assert flowgrpo.train(config).finished
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "000002")
    (stopped / "finished.json").unlink()
    again = flowgrpo.load(str(straight / "config.toml"), [f"run.folder={stopped}"])
    assert again.algorithm == config.algorithm
    assert again.loss == config.loss
    assert flowgrpo.train(again).finished
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert (stopped / file).read_text() == (straight / file).read_text()
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    updated = metrics[1:] if name == "learning" else metrics
    assert all(m["grad_norm"] > 0 for m in updated)
    if name == "learning":
        # The reward learns alone in the first iteration.
        assert "grad_norm" not in metrics[0]
        states = [straight / "checkpoints" / f"00000{i}" / "state.json" for i in (1, 2)]
        assert [json.loads(s.read_text())["learner"]["num_updates"] for s in states] == [0, 2]
        assert metrics[0]["learning/Novelty/mean"] != metrics[1]["learning/Novelty/mean"] > 0
    if name == "pref":
        assert [m["score/win_rate"] for m in metrics] == pytest.approx([0.5, 0.5])
    assert (stopped / "checkpoints" / "000002" / "behaviour.safetensors").exists() is (
        name in ("nft", "own_loss")
    )
