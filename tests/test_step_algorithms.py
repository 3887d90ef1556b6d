"""Collecting with the step-level algorithms: what comes out, what it costs, what it credits."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import (
    G2RPO,
    TPGRPO,
    VGPO,
    Algorithm,
    BranchGRPO,
    DanceGRPO,
    FlowGRPO,
    TempFlowGRPO,
)
from flowgrpo.config import Config, Model, Prompts, Run, Train
from flowgrpo.config.geometry import geometry
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS, DDIM, StepwiseSDE
from flowgrpo.data.experience import Candidates, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import LoRA, PipelinePolicy, Sampling
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.shapes.rewards import Graded
from flowgrpo.training.learner import Learner
from scripts.cost_table import MARKER, SETTINGS, table
from scripts.page_tables import marked_text
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_step_algorithms"
T, G = 5, 4
ITERATION = 2
RANDOM = Random(3).at("train", ITERATION)
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
"""Of states: a model rounds differently in another batch shape, and steps amplify it."""


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


CASES: dict[str, tuple[str, Any]] = {
    "tempflow": ("sd3", TempFlowGRPO(group_size=G, seeds=2)),
    "g2rpo": ("sd3", G2RPO(group_size=G, steps=Window(start=1, size=3))),
    "g2rpo coarse": ("sd3", G2RPO(group_size=G, steps=Window(), granularities=(3, 2))),
    "g2rpo released": (
        "sd3",
        G2RPO(group_size=G, steps=Window(), granularities=(2, 1), strides="released"),
    ),
    "g2rpo diffusion": (
        "sd15",
        G2RPO(group_size=G, steps=Window(), transition=DDIM(), granularities=(1, 2)),
    ),
    "tp": ("sd3", TPGRPO(group_size=G)),
    "tp shared": ("sd3", TPGRPO(group_size=G, steps=Window(start=1, size=2), shared_noise=True)),
    "stepwise": (
        "sd3",
        TPGRPO(
            group_size=G,
            steps=Window(start=1, size=3),
            shared_noise=True,
            completion_steps=2,
            rivals="group",
            turning_points="none",
            transition=StepwiseSDE(),
        ),
    ),
    "vgpo": ("sd3", VGPO(group_size=G)),
    "vgpo shared": ("sd3", VGPO(group_size=G, steps=Window(start=1, size=2), shared_noise=True)),
    "branch": ("sd3", BranchGRPO(group_size=G, splits=(0, 2))),
    "tree": (
        "sd3",
        BranchGRPO(
            group_size=G,
            splits=(1, 2),
            between="ode",
            rivals="leaves",
            fusion="path_probability",
            advantage=GroupAdvantage(),
        ),
    ),
    "branch late": (
        "sd3",
        BranchGRPO(group_size=G, splits=(1,), children=4, steps=Window(start=2, size=2)),
    ),
}


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


@pytest.fixture(scope="module")
def scorer() -> Iterator[RewardScorer]:
    made = RewardScorer([Reward(model=f"{HERE}:brightness")], Failures(retries=0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def collected(
    policies: Callable[[str], PipelinePolicy], scorer: RewardScorer
) -> Callable[[str], Experience]:
    """What each case collects, once."""
    made: dict[str, Experience] = {}

    def collect(case: str) -> Experience:
        if case not in made:
            name, algorithm = CASES[case]
            algorithm.check(T)
            made[case] = algorithm.collect(policies(name), GROUPS, scorer, RANDOM, ITERATION)
        return made[case]

    return collect


def actions_of(experience: Experience) -> dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
    """State, next state and log-probability by group, sample and step."""
    a = experience.actions
    keys = zip(a.group.tolist(), a.sample.tolist(), a.step.tolist(), strict=True)
    rows = zip(a.states[a.state], a.x_next, a.old_log_prob, strict=True)
    return dict(zip(keys, rows, strict=True))


def rewards_of(c: Candidates) -> dict[tuple[int, ...], float]:
    """The reward by group, sample, step and granularity."""
    keys = torch.stack([c.group, c.sample, c.step, c.granularity], 1).tolist()
    assert len({tuple(k) for k in keys}) == len(keys)
    return dict(zip(map(tuple, keys), c.reward.tolist(), strict=True))


# The slow version: one sample at a time, one step at a time.


class Alone:
    """A sample's path by single steps, from its own noise and nothing shared."""

    def __init__(self, policy: PipelinePolicy, algorithm: Any, group: int):
        self.policy, self.transition, self.group = policy, algorithm.transition, group

    def _run(self, noise: SampleNoise, nodes: Sequence[int], **options: Any) -> Any:
        (rollout,) = self.policy.run([GROUPS[self.group].prompt], noise, nodes=nodes, **options)
        return rollout

    def start(self, *initial: int | str) -> Tensor:
        noise = SampleNoise([RANDOM.at("group", self.group, *initial)])
        return self._run(noise, [0], decode=False).x

    def step(self, x: Tensor, step: int, sample: int | None) -> Tensor:
        """One step, stochastic for a sample, deterministic for none."""
        noise = SampleNoise([RANDOM.at("group", self.group, sample or 0)])
        stochastic = [] if sample is None else [step]
        nodes, transition = [step, step + 1], self.transition
        return self._run(
            noise, nodes, x=x, decode=False, stochastic=stochastic, transition=transition
        ).x

    def reward(self, x: Tensor, nodes: Sequence[int]) -> float:
        noise = SampleNoise([RANDOM.at("group", self.group)])
        return float(brightness(self._run(noise, nodes, x=x).media, []))


def slow_branches(alone: Alone, algorithm: Any, steps: Sequence[int]) -> Iterator[Any]:
    seeds = getattr(algorithm, "seeds", 1)
    for i in range(G):
        x = alone.start() if seeds == 1 else alone.start("seed", i * seeds // G)
        for k in range(T - 1):
            if k in steps:
                x_next = alone.step(x, k, i)
                yield (i, k), (x, x_next)
                for j in getattr(algorithm, "granularities", (1,)):
                    nodes = sorted({*range(k + 1, T, j), T})
                    if getattr(algorithm, "strides", "even") == "released":
                        nodes = [k + 1, *range(k + 2, T + 1, j)[:-1], T]
                    yield (i, k, j), alone.reward(x_next, nodes)
            x = alone.step(x, k, None)


def slow_trajectories(alone: Alone, algorithm: Any, steps: Sequence[int]) -> Iterator[Any]:
    is_tp, shared = isinstance(algorithm, TPGRPO), algorithm.shared_noise
    for i in range(G):
        x = alone.start() if shared else alone.start(i)
        for k in range(T):
            if is_tp and k in steps and not (shared and k == steps[0] and i > 0):
                most = algorithm.completion_steps or T
                number = min(most, T - k)
                nodes = [k + round((T - k) * n / number) for n in range(number + 1)]
                yield (i, k - 1, 1), alone.reward(x, nodes)
            if not is_tp and steps[0] < k < T - 1:
                yield (i, k - 1, 0), alone.reward(x, [k, T])
            x_next = alone.step(x, k, i if k in steps else None)
            if k in steps:
                yield (i, k), (x, x_next)
            x = x_next
        yield (i, T - 1, 1), alone.reward(x, [T])


def slow_tree(alone: Alone, algorithm: BranchGRPO, steps: Sequence[int]) -> Iterator[Any]:
    for leaf in range(G):
        x, width = alone.start(), G
        for k in range(T):
            width = width // algorithm.children if k in algorithm.splits else width
            branch = leaf // width * width
            others = algorithm.between == "sde" and k in steps and k > algorithm.splits[0]
            stochastic = k in algorithm.splits or others
            x_next = alone.step(x, k, branch if stochastic else None)
            if stochastic:
                yield (branch, k), (x, x_next)
            x = x_next
        yield (leaf, T - 1, 1), alone.reward(x, [T])


@pytest.mark.parametrize("case", CASES)
def test_collected_is_what_each_sample_alone_would_do(
    case: str,
    policies: Callable[[str], PipelinePolicy],
    collected: Callable[[str], Experience],
) -> None:
    experience, (name, algorithm) = collected(case), CASES[case]
    slow = slow_trajectories
    if isinstance(algorithm, TempFlowGRPO | G2RPO):
        slow = slow_branches
    elif isinstance(algorithm, BranchGRPO):
        slow = slow_tree  # type: ignore[assignment]
    steps = algorithm.steps.select(T, ITERATION, RANDOM)
    found, rewards = actions_of(experience), rewards_of(experience.candidates)
    wanted = dict(slow(Alone(policies(name), algorithm, 1), algorithm, steps))
    own = {k[1:] for k in [*found, *rewards] if k[0] == 1}
    assert own == set(wanted)
    for key, value in wanted.items():
        if len(key) == 3:
            assert rewards[1, *key] == pytest.approx(value, abs=2e-5), key
        else:
            for got, want in zip(found[1, *key], value, strict=False):
                torch.testing.assert_close(got, want[0], **CLOSE)
    assert experience.diversity.min() > 0
    assert experience.duplicates.sum() == 0


@pytest.mark.parametrize("case", CASES)
def test_cost_is_the_formula(case: str, collected: Callable[[str], Experience]) -> None:
    experience, algorithm = collected(case), CASES[case][1]
    wanted = algorithm.cost(T, ITERATION, RANDOM)
    assert experience.cost == wanted
    # Distinct candidates: a judged one serves all granularities that lead to it.
    distinct = experience.candidates.reward.unique().numel()
    assert distinct <= wanted.rewards * len(GROUPS)


@pytest.mark.parametrize(
    "algorithm", [FlowGRPO(group_size=3), DanceGRPO(group_size=3, steps=Window(start=1))]
)
def test_cost_of_whole_trajectories(
    algorithm: Any,
    policies: Callable[[str], PipelinePolicy],
    scorer: RewardScorer,
) -> None:
    experience = algorithm.collect(policies("sd3"), GROUPS, scorer, RANDOM, ITERATION)
    assert experience.cost == algorithm.cost(T, ITERATION, RANDOM)
    trained = algorithm.trained_steps(T, ITERATION, RANDOM)
    assert set(experience.actions.step.tolist()) == set(trained)
    assert experience.cost.rewards == 3


def test_projections_on_a_grid_that_ends_in_noise_include_the_last(
    policies: Callable[[str], PipelinePolicy], scorer: RewardScorer
) -> None:
    algorithm = VGPO(group_size=2, transition=DDIM())
    experience = algorithm.collect(policies("sd15"), GROUPS[:1], scorer, RANDOM, ITERATION)
    assert sorted(experience.candidates.step.tolist()) == sorted(2 * list(range(T)))
    assert experience.cost.decodes == algorithm.cost(T, ITERATION, RANDOM).decodes + 2
    assert algorithm.advantages(experience).isfinite().all()


@pytest.mark.parametrize(
    "case", [c for c in CASES if c not in ("g2rpo coarse", "g2rpo released", "branch late")]
)
def test_batches_and_ranks_change_nothing(
    case: str,
    policies: Callable[[str], PipelinePolicy],
    scorer: RewardScorer,
    collected: Callable[[str], Experience],
) -> None:
    whole, (name, algorithm) = collected(case), CASES[case]
    policy = policies(name)
    policy.batch_size = 3
    apart = algorithm.collect(policy, [GROUPS[1]], scorer, RANDOM, ITERATION)
    together, alone = actions_of(whole), actions_of(apart)
    assert {k for k in together if k[0] == 1} == set(alone)
    for key, values in alone.items():
        torch.testing.assert_close(values[1], together[key][1], **CLOSE)
    rewards = rewards_of(whole.candidates)
    for key, reward in rewards_of(apart.candidates).items():
        assert rewards[key] == pytest.approx(reward, abs=2e-5)
    assert apart.cost == whole.cost


def test_g2rpo_at_one_step_and_granularity_is_flow_grpo_fast(
    policies: Callable[[str], PipelinePolicy], scorer: RewardScorer
) -> None:
    same: dict[str, Any] = {
        "group_size": 3,
        "transition": CPS(),
        "steps": Window(start=1, size=1),
        "advantage": GroupAdvantage(),
    }
    fast = FlowGRPO(**same, shared_noise=True)
    step = G2RPO(**same, granularities=(1,))
    one, two = (a.collect(policies("sd3"), GROUPS, scorer, RANDOM, ITERATION) for a in (fast, step))
    assert torch.equal(one.actions.x_next, two.actions.x_next)
    assert torch.equal(one.candidates.reward, two.candidates.reward)
    assert torch.equal(fast.advantages(one), step.advantages(two))
    assert one.cost == two.cost


def config(algorithm: Any) -> Config:
    return Config(
        model=Model(path=""),
        algorithm=algorithm,
        loss=ClippedLoss(clip_range=0.1),
        rewards=(Reward(model=f"{HERE}:brightness"),),
        prompts=Prompts(train="", held_out=""),
        train=Train(iterations=1, groups=2, lr=1e-3, monitor_states=0),
        run=Run(folder=""),
    )


@pytest.mark.parametrize("case", ["tempflow", "g2rpo", "g2rpo diffusion", "tp shared", "branch"])
def test_the_first_ratio_is_one_and_states_are_shared(
    case: str,
    make_policy: MakePolicy,
    scorer: RewardScorer,
    accelerator: Accelerator,
) -> None:
    name, algorithm = CASES[case]
    policy = make_policy(
        name, sampling=sampling_of(name, num_steps=T), weights=LoRA(rank=4, alpha=8)
    )
    experience = algorithm.collect(policy, GROUPS, scorer, RANDOM, ITERATION)
    settings = config(algorithm)
    learner = Learner(policy, settings.train, settings.loss, accelerator)
    before = policy.num_evaluations
    metrics = learner.update(experience, torch.ones(len(experience.actions)), RANDOM)
    # Forward passes have the rollout's batch shape here, and so there is no noise either.
    assert metrics["log_prob/noise"] == 0
    assert metrics["ratio/deviation"] == 0
    assert metrics["grad_norm"] > 0
    # One evaluation per distinct state: per step 2 seeds, 1 anchor, a prefix and 4 samples, branches.
    states = {"tempflow": 4 * 2, "g2rpo": 3, "g2rpo diffusion": 2, "tp shared": 1 + G, "branch": 9}
    assert policy.num_evaluations - before == states[case] * len(GROUPS)
    # Real advantages are there too, and finite.
    advantages = algorithm.advantages(experience)
    assert advantages.isfinite().all()
    assert (advantages != 0).any()


def test_depth_pruning_drops_the_steps(
    policies: Callable[[str], PipelinePolicy],
    scorer: RewardScorer,
    collected: Callable[[str], Experience],
) -> None:
    whole, algorithm = collected("branch"), CASES["branch"][1]
    pruned = replace(algorithm, depths=Window(start=1, size=2))
    experience = pruned.collect(policies("sd3"), GROUPS, scorer, RANDOM, ITERATION)
    kept = (whole.actions.step == 1) | (whole.actions.step == 2)
    assert experience.actions.step.unique().tolist() == [1, 2]
    assert torch.equal(experience.actions.x_next, whole.actions.x_next[kept])
    assert torch.equal(pruned.advantages(experience), algorithm.advantages(whole)[kept])
    nowhere = replace(
        CASES["branch late"][1], steps=Window(start=2, size=1), depths=Window(start=3, size=1)
    )
    with pytest.raises(
        ValueError, match=r"depths and algorithm.pruned leave steps \[3\], none of which"
    ):
        nowhere.collect(policies("sd3"), GROUPS, scorer, RANDOM, ITERATION)


def test_shifted_splits_are_those_of_a_tree_that_begins_later(
    policies: Callable[[str], PipelinePolicy], scorer: RewardScorer
) -> None:
    tree = replace(CASES["tree"][1], splits=(0, 1), shift_ratio=0.9)
    first = tree.trained_steps(T, 0, RANDOM)[0]
    assert first > 0, "take another seed"
    fixed = replace(tree, splits=(first, first + 1), shift_ratio=0.0)
    one, two = (a.collect(policies("sd3"), GROUPS, scorer, RANDOM, 0) for a in (tree, fixed))
    assert torch.equal(one.actions.x_next, two.actions.x_next)
    assert torch.equal(tree.advantages(one), fixed.advantages(two))
    assert one.cost == tree.cost(T, 0, RANDOM) == fixed.cost(T, 0, RANDOM)
    assert tree.credit_view(one).action_sample(3, first) == fixed.branch_of(3, first)


# Credit on the embedded model, where one can see what a step does.

SHAPES = Group(
    0,
    Prompt(
        "a photo of a circle",
        metadata={
            "tag": "single_object",
            "include": [{"class": "circle", "count": 1}],
        },
    ),
)
STEPS, RUINED, VICTIM = 6, 2, 1


@pytest.fixture(scope="module")
def shapes() -> PipelinePolicy:
    return PipelinePolicy.from_pretrained(
        "shapes", sampling=Sampling(num_steps=STEPS, guidance_scale=1.0)
    )


MILD = {"group_size": 4, "transition": CPS(noise_level=0.05)}
"""Noise that by itself leaves the image right from step 2 on."""
CREDIT: dict[str, Any] = {
    "tempflow": TempFlowGRPO(**MILD, seeds=1),
    "g2rpo": G2RPO(**MILD, steps=Window(size=4), granularities=(1, 2)),
    "tp": TPGRPO(**MILD, steps=Window(start=1, size=3), shared_noise=True),
    "vgpo": VGPO(**MILD, steps=Window(start=RUINED, size=2), shared_noise=True),
    "branch": BranchGRPO(**MILD, splits=(RUINED,), children=4, steps=Window(start=3, size=1)),
}


@pytest.fixture(scope="module")
def drawn_right(shapes: PipelinePolicy) -> Random:
    """An iteration whose undisturbed image is what the prompt says; the model often errs."""
    scorer = Graded()
    for seed in range(20):
        random = Random(seed).at("train", 0)
        image = shapes.images([SHAPES.prompt], SampleNoise([random.at("group", 0)]))
        if scorer(image, [SHAPES.prompt]).item() == 1:
            return random
    raise AssertionError("the embedded model draws no circle in 20 attempts")


@pytest.mark.parametrize("name", CREDIT)
def test_a_step_that_ruins_the_image_is_blamed(
    name: str, shapes: PipelinePolicy, drawn_right: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample's step 2 gets a hundred times the noise of the others."""
    honest = SampleNoise.at_step

    def at_step(self: SampleNoise, step: int, shape: Sequence[int]) -> Tensor:
        noise = honest(self, step, shape)
        for row, stream in enumerate(self.streams):
            if step == RUINED and stream.path[-1] == VICTIM:
                noise[row] *= 100
        return noise

    monkeypatch.setattr(SampleNoise, "at_step", at_step)
    algorithm: Algorithm = CREDIT[name]
    algorithm.check(STEPS)
    scorer = RewardScorer([Reward(model="flowgrpo.shapes.rewards:Graded")], Failures(retries=0))
    experience = algorithm.collect(shapes, [SHAPES], scorer, drawn_right, 0)
    scorer.close()
    a, advantage = experience.actions, algorithm.advantages(experience)
    at_fault = (a.step == RUINED) & (a.sample == VICTIM)
    others = (a.step == RUINED) & (a.sample != VICTIM)
    assert at_fault.sum() == 1
    assert advantage[at_fault].item() < -0.5
    assert advantage[at_fault].item() < advantage[others].min()
    if name in ("tempflow", "g2rpo", "tp"):
        # What the same sample did at other steps is not to blame; VGPO's values run on to the end.
        innocent = (a.step != RUINED) & (a.sample == VICTIM)
        assert advantage[innocent].min() > advantage[at_fault].item()


# Whole runs, from a configuration file.

RUNS = {
    "tempflow_grpo": ["seeds=2", "transition={kind='cps'}"],
    "g2rpo": ["granularities=[1, 2]", "steps={kind='random_steps', count=2, last=3}"],
    "tp_grpo": [
        "shared_noise=true",
        "turning_points='plain'",
        "steps={kind='all', skip_last=2}",
    ],
    "vgpo": ["anchor=0.1", "negative='refuse'"],
    "branch_grpo": ["splits=[0, 1]", "fusion='path_probability'", "width='best_of_siblings'"],
    "neighbor_grpo": ["anchors=2", "steps={kind='window', size=2}"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_each_kind(kind: str, tmp_path: Path) -> None:
    settings = [
        f"algorithm.kind={kind}",
        "algorithm.group_size=4",
        *(f"algorithm.{s}" for s in RUNS[kind]),
        *(["loss.kind='neighbor'"] if kind == "neighbor_grpo" else []),
        "sampling.num_steps=4",
        "train.iterations=2",
        "train.groups=3",
        "loss.kl_coef=0.01",
        "prompts.balance=''",
        "evaluation.every=0",
        "evaluation.images=2",
        "evaluation.images_during=2",
        "evaluation.grid_prompts=1",
        "evaluation.grid_samples=1",
        f"rewards=[{{model='{HERE}:brightness'}}]",
        "run.trackers=[]",
        "run.threads=1",
        "run.device='cpu'",
        f"run.folder='{tmp_path / 'run'}'",
    ]
    config = flowgrpo.load("quickstart_flow_grpo", settings)
    announced = geometry(config)["per prompt"]
    assert flowgrpo.train(config).finished
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for iteration, line in enumerate(map(json.loads, lines)):
        cost = config.algorithm.cost(4, iteration, Random(0).at("train", iteration))
        assert line["nfe_per_prompt"] == cost.nfe
        if iteration == 0:
            assert announced.startswith(f"{line['nfe_per_prompt']:,.0f} denoiser evaluations, ")
        assert line["grad_norm"] > 0
        assert line["log_prob/noise"] < config.loss.clip_range
        assert line["failures"] == 0
    assert flowgrpo.load(str(tmp_path / "run" / "config.toml")) == config


# The table in the documentation.


def test_the_cost_table_is_up_to_date() -> None:
    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
    written = marked_text(page, MARKER)
    assert written == table(), "run: python -m scripts.cost_table docs/algorithms.md"
    assert table().count("\n") == len(SETTINGS) + 1
    known = set(get_args(get_type_hints(Config)["algorithm"])) - {Algorithm}
    # Those that train on given pictures sample nothing.
    assert {type(a) for _, _, a in SETTINGS} == {a for a in known if not a.num_targets}
