"""The plan of a run: forward passes and bytes, against what a learner and a gather do."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

import flowgrpo
from flowgrpo.config import ConfigError
from flowgrpo.config.plan import plan, size
from flowgrpo.core.random import Random
from flowgrpo.core.scores import Scores
from flowgrpo.core.transitions import FlowSDE
from flowgrpo.data.experience import Actions, Candidates, Cost, Experience
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.training.launch import check_devices, idle_devices
from flowgrpo.training.learner import Learner
from flowgrpo.training.optimizer import sum_gradients
from flowgrpo.training.replay import Replay

GEOMETRY = [
    "train.groups=8", "algorithm.group_size=6", "train.train_batch=5", "sampling.num_steps=7",
    "algorithm.steps={kind='all'}", "train.rollout_batch=96",
]  # fmt: skip


def config(*more):
    one = flowgrpo.load("quickstart_flow_grpo", [*GEOMETRY, *more])
    one.check(4)
    return one


@pytest.mark.parametrize(
    "settings",
    [
        ["train.updates=2"],
        ["train.updates=3", "train.split=samples"],
        ["train.updates=2", "train.split=steps"],
        ["train.updates=1", "train.epochs=2", "train.train_batch=64"],
    ],
)
def test_forward_passes_are_those_of_the_learner(settings):
    """The learner's own division into optimizer steps and batches, on actions of one process."""
    one = config(*settings)
    work = plan(one, 4)
    steps = one.algorithm.trained_steps(7, 0, Random(0).at("train", 0))
    rows = [(g, s, k) for k in steps for g in range(2) for s in range(6)]
    group, sample, step = (torch.tensor(c) for c in zip(*rows, strict=True))
    states = torch.zeros(len(rows), 1)
    actions = Actions.between(
        states, torch.arange(len(rows)), states, step, torch.zeros(len(rows)), group, sample
    )
    shares = SimpleNamespace(sum=lambda t: t)
    policy = SimpleNamespace(num_steps=lambda: 7, device="cpu")
    learner = SimpleNamespace(train=one.train, shares=shares, policy=policy)
    learner._update_of = lambda *a: Learner._update_of(learner, *a)
    score = torch.zeros(12)
    candidates = Candidates(
        group[:12], sample[:12], step[:12], step[:12], Scores({"a": score}, score)
    )
    groups = [Group(g, Prompt("a")) for g in range(2)]
    zeros = torch.zeros(2)
    experience = Experience(
        groups, FlowSDE(), actions, candidates, Cost(0.0, 0.0, 0.0), zeros, zeros, {}
    )
    replay = SimpleNamespace(loss=one.loss, train_batch=one.train.train_batch)
    replay._split = lambda *a: Replay._split(replay, *a)
    parts = list(Learner._parts(learner, actions, Random(0)))
    assert len(parts) == work.updates
    batches = [list(Replay.batches(replay, experience, torch.ones(len(rows)), p)) for p in parts]
    largest = max(len(b) for b in batches)
    # With this seed the two groups are in different optimizer steps where groups are divided.
    assert largest == work.forwards
    assert sum(len(b) for b in batches) == work.forwards * work.updates
    assert max(len(a.starts()[0]) for b in batches for a, _ in b) == min(
        work.states, work.train_batch
    )


def test_bytes_are_those_that_are_sent():
    one = config()
    work = plan(one, 4)
    sent = []
    weights = [torch.nn.Parameter(torch.zeros(s)) for s in (10, 7)]
    accelerator = Mock(spec=Accelerator, num_processes=4)
    accelerator.reduce = lambda t, _: sent.append(t.numel() * t.element_size()) or t
    sum_gradients(weights, accelerator)
    # Each process of a ring of 4 sends three quarters of the message twice.
    assert work.gradient_bytes(17) == one.train.optimizer_steps * sent[0] * 3 // 2
    n = work.candidates
    assert n == 48
    index, score = torch.zeros(n, dtype=torch.long), torch.zeros(n)
    raw = {r.label: score for r in one.rewards}
    Candidates(index, index, index, index, Scores(raw, score)).map(
        lambda t: sent.append(t.numel() * t.element_size()) or t
    )
    assert work.score_bytes() == sum(sent[1:]) * 3 // 4
    words = work.network(17, 0)
    assert words.startswith("102 B of gradients sent by each process per iteration (1 x")
    assert plan(one, 1).network(17, 0) == ""


def test_bytes_of_a_divided_denoiser():
    """Eight processes in two copies of four parts; tests/test_sharding.py counts those of real processes."""
    one = config("parallel.shard=denoiser", "parallel.shard_group=4", "loss.kl_coef=0.1")
    work = plan(one, 8)
    # 7 steps of the 6 samples of one group; of the 6 states of a step, 5 fit into a batch.
    assert (work.parts, work.sampling_passes, work.forwards) == (4, 7, 6 * 2)
    # With gradients: forward, backward and reference policy.
    assert work.gathers == 7 + 3 * 12
    assert work.weight_bytes(1000) == 750 * work.gathers
    # Scattered among 4 processes; each of them sums its quarter with that of one other copy.
    assert work.gradient_bytes(100) == 12 * (400 * 3 // 4 + 400 // 4)
    assert work.network(100, 1000).startswith(
        f"at least {size(750 * work.gathers)} of weights sent by each process per iteration ({work.gathers} x "
        "gathering 1 kB, of which 7 to sample), 4.8 kB of gradients (12 x the sum of 100 gradients)"
    )
    words = work.network(100, 1000, 8000)
    assert words == work.network(100, 1000) + ", 6 kB of text encoders' weights for each new prompt"


def test_wasteful_plans_are_told():
    roomy = plan(config("train.rollout_batch=12"), 4)
    assert roomy.notes() == []
    first, second = plan(config("train.train_batch=64", "train.updates=2"), 4).notes()
    assert first.startswith(
        "train.rollout_batch = 96 is never filled: each of the 4 processes draws 12"
    )
    assert "an optimizer step has 6 states" in second
    # Batches that are just filled, and a batch that one process fills.
    assert plan(config("train.rollout_batch=12", "train.train_batch=12"), 4).notes() == []
    assert plan(config("train.rollout_batch=12", "train.train_batch=13"), 4).notes() != []
    assert plan(config("train.rollout_batch=13"), 4).notes() != []
    assert plan(config("train.train_batch=9"), 4).rows() == {
        "micro-batches": "about 12 of 9 states on each process in an optimizer step"
    }
    assert (
        plan(config("train.train_batch=64"), 4).rows()["micro-batches"].startswith("about 6 of 12")
    )
    # An algorithm that trains no denoising step has no such passes.
    nft = plan(config("algorithm={kind='diffusion_nft', group_size=6}", "loss={kind='nft'}"), 4)
    assert (nft.samples, nft.states, nft.forwards, nft.rows()) == (12, 0, 0, {})
    assert nft.notes() == [n for n in nft.notes() if "rollout_batch" in n]
    # With one process a large batch costs nothing.
    assert plan(config("train.train_batch=64"), 1).notes() == []


def test_devices_are_counted():
    check_devices(2, 2)
    assert idle_devices(2, 2) == ""
    assert idle_devices(1, 8).startswith("7 of the 8 devices here are not used; --nproc 8")
    with pytest.raises(ConfigError, match=r"8 processes .* can see 1 device; use --nproc 1"):
        check_devices(8, 1)


def test_sizes_have_units():
    assert [size(n) for n in (0, 999, 1000, 1500, 2.5e9, 4e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 kB",
        "2.5 GB",
        "4 TB",
    ]
