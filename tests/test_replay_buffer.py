"""Earlier groups that are trained on again: their weights against a naive version, the buffer, and resuming."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

import flowgrpo
from flowgrpo.config import ConfigError
from flowgrpo.config.replay import ReplaySettings
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Actions
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.training.learner import Learner
from flowgrpo.training.replay_buffer import ReplayBuffer

T = 4
SMALL = [
    "algorithm={kind='flow_grpo', group_size=3, steps={kind='all'}}",
    "loss={kind='clipped', clip='kl', clip_range=1e-3}",
    "train.iterations=3",
    "train.groups=2",
    "train.updates=2",
    "train.replay={groups=2, capacity=3, keep='all', skip_last=2}",
    f"sampling.num_steps={T}",
    "train.train_batch=4",
    "train.lr=1e-3",
    "evaluation.images=2",
    "evaluation.every=0",
    "evaluation.artefacts=false",
    "evaluation.regimes=[]",
    "evaluation.metrics=[]",
    "evaluation.grid_prompts=1",
    "evaluation.grid_samples=1",
    "evaluation.inspected_prompts=0",
    "run.checkpoint_every=1",
    "run.device=cpu",
    "run.trackers=[]",
    "failures.probe=off",
    "rewards=[{model='tests.test_replay_buffer:darkness'}]",
]


def darkness(media, prompts):
    return 1 - media.mean((1, 2, 3))


def train(folder, *more):
    config = flowgrpo.load("quickstart_flow_grpo", [*SMALL, f"run.folder={folder}", *more])
    assert flowgrpo.train(config).finished
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run: its folder, its metrics, and for each iteration its actions, advantages and the log-densities
    and means of its weights, each state by itself."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    update, seen = Learner.update, []

    def watched(self, experience, advantages, *rest):
        a, prompts = experience.actions, {g.index: g.prompt for g in experience.groups}
        alone = []
        for i in range(len(a)):
            x, step = a.states[a.state[i : i + 1]], int(a.step[i])
            with torch.no_grad():
                g = self.policy.replay([prompts[int(a.group[i])]], x, step, experience.transition).gaussian  # fmt: skip
            alone.append((float(g.log_prob(a.states[a.next_state[i : i + 1]])), g.mean[0]))
        seen.append((experience, advantages, alone))
        return update(self, experience, advantages, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", watched)
        metrics = train(folder)
    return folder, metrics, seen


def key(experience, row):
    """What identifies an action over iterations: its states."""
    a = experience.actions
    return tuple(a.states[int(a.state[row])].flatten()[:4].tolist()), int(a.step[row])


def test_replayed_actions_have_the_weights_and_densities_of_a_naive_version(run):
    _, metrics, seen = run
    fresh = {}  # By action: its log-density under the policy that sampled, and its advantage.
    replayed = 0
    for iteration, (experience, advantages, alone) in enumerate(seen):
        a, ratios, trajectories = experience.actions, defaultdict(list), {}
        for row in range(len(a)):
            # All actions that an update sees have the log-density and the mean of the present weights.
            assert float(a.old_log_prob[row]) == pytest.approx(alone[row][0], abs=1e-4)
            torch.testing.assert_close(a.old_mean[row], alone[row][1], atol=1e-4, rtol=0)
            if a.group[row] >= 2:
                own = int(a.group[row]), int(a.sample[row])
                mu, _ = fresh[key(experience, row)]
                ratios[own].append(alone[row][0] - mu)
                trajectories[row] = own
        for row, own in trajectories.items():
            wanted = min(2.0, float(torch.tensor(ratios[own]).mean().exp()))
            _, advantage = fresh[key(experience, row)]
            assert float(advantages[row]) == pytest.approx(wanted * advantage, rel=1e-3)
            assert len(ratios[own]) == T - 2
            assert int(a.step[row]) < T - 2
        replayed += len(trajectories)
        weights = [float(torch.tensor(r).mean().exp()) for r in ratios.values()]
        assert metrics[iteration]["replay/groups"] == (2 if iteration else 0)
        if iteration:
            assert metrics[iteration]["replay/weight"] == pytest.approx(sum(weights) / len(weights), rel=1e-3)  # fmt: skip
            assert max(abs(w - 1) for w in weights) > 1e-3  # Otherwise nothing was tested.
        fresh |= {
            key(experience, row): (float(a.old_log_prob[row]), float(advantages[row]))
            for row in range(len(a))
            if a.group[row] < 2
        }
    assert replayed == 2 * 2 * 3 * (T - 2)


def test_a_resumed_run_has_the_same_numbers(run, tmp_path):
    straight, _, _ = run
    train(tmp_path / "run", "train.iterations=2")
    train(tmp_path / "run")
    for name in ("metrics.jsonl", "checkpoints/000003/weights.safetensors", "checkpoints/000003/replay.safetensors"):  # fmt: skip
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()


class Collected:
    """Two groups of an iteration: of each, sample 0 is good, 1 is bad, and 2 has no advantage."""

    def __init__(self, prompts, places):
        self.groups = [Group(i, prompts[i]) for i in places]
        number = 3 * len(places)
        self.actions = Actions.between(
            torch.randn(number, 5), torch.arange(number), torch.randn(number, 5),
            torch.tensor([0, 1, 2] * len(places)), torch.randn(number),
            torch.tensor(places).repeat_interleave(3), torch.tensor([0, 1, 2] * len(places)),
        )  # fmt: skip
        self.advantages = torch.tensor([1.0, -1.0, 0.0] * len(places))


def test_the_buffer_is_bounded_and_equal_on_all_ranks():
    prompts = [Prompt(str(i)) for i in range(8)]
    settings = ReplaySettings(groups=2, capacity=5, keep="all")
    one, both = ReplayBuffer(settings, prompts), [ReplayBuffer(settings, prompts) for _ in range(2)]
    shape = torch.Size([5])
    for iteration in range(3):
        parts = [Collected(prompts, (0, 1)), Collected(prompts, (2, 3))]
        found = []
        for part in parts:
            alone = ReplayBuffer(replace(settings, capacity=99), prompts)
            alone.add(part.groups, part.actions, part.advantages, iteration, 9, lambda own: own)
            found += alone.groups
        for buffer, part in zip([one, *both], [parts[0], *parts], strict=True):
            buffer.add(
                part.groups,
                part.actions,
                part.advantages,
                iteration,
                9,
                lambda own, everyone=found: everyone,
            )
    assert [(g.iteration, g.prompt) for g in one.groups] == [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert all(g.tensors["sample"].tolist() == [0, 1] for g in one.groups)
    whole = one.drawn(shape, Random(4), 0, 1, first=4)
    halves = [b.drawn(shape, Random(4), rank, 2, first=4) for rank, b in enumerate(both)]
    assert [[i for i, _ in part] for part in halves] == [[4], [5]]
    assert [(i, g.iteration, g.prompt) for i, g in whole] == [(i, g.iteration, g.prompt) for part in halves for i, g in part]  # fmt: skip
    # States of another size cannot be in one batch with the fresh ones.
    assert one.drawn(torch.Size([6]), Random(4), 0, 1, first=4) == []

    copy = ReplayBuffer(settings, prompts)
    copy.restore(one.state())
    for g, other in zip(one.groups, copy.groups, strict=True):
        assert (g.iteration, g.prompt) == (other.iteration, other.prompt)
        assert all(torch.equal(g.tensors[k], other.tensors[k]) for k in g.tensors)

    good = ReplayBuffer(replace(settings, keep="good"), prompts)
    part = Collected(prompts, (0, 1))
    good.add(part.groups, part.actions, part.advantages, 0, 1, lambda own: own)
    assert [g.tensors["sample"].tolist() for g in good.groups] == [[0], [0]]
    good.add(
        part.groups, part.actions, -part.advantages, 0, 1, lambda own: own
    )  # Sample 1 is at step 1, which is too late.
    assert len(good.groups) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.replay={groups=3}", "train.updates=2"], "the nearest that can is 4"),
        (["train.replay={groups=4, capacity=2}"], "capacity of at least as many groups, got 2"),
        (["train.replay={groups=2, skip_last=7}"], "use at most 6"),
        (["train.replay={groups=2, skip_last=3}", "algorithm={kind='flow_grpo', steps={kind='window', start=5, size=2}}"], "replays nothing: the steps that are trained begin with 5"),
        (["train.replay.groups=2", "algorithm={kind='matching'}", "loss={kind='matching'}"], "steps with a density"),
        (["train.replay.groups=2", "algorithm={kind='vgpo'}"], "VGPO judges branches or states"),
        (["train.replay.groups=2", "train.staleness=1"], "trains on actions of other weights already"),
        (["train.replay.groups=2", "guard.reset_every=3", "loss.kl_coef=0.1"], "remove \\[guard\\]"),
    ],
)  # fmt: skip
def test_runs_that_cannot_replay_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        flowgrpo.load("quickstart_flow_grpo", settings).check()
