"""The model of an iteration's time, against sums by hand and a simulated cluster of pauses."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import Cluster, Work, iteration, report, works
from benchmarks.simulated_cluster import Case
from scripts.page_tables import marked_text

ROOT = Path(__file__).parents[1]
WORK = Work(
    step=1e12, decode=0, groups=4, group_size=10, nfe=20, decodes=10, trained_steps=1, passes=3,
    updates=2, parameters=10**9, trained=10**9, calls=0, rollout_batch=5,
)  # fmt: skip
CLUSTER = Cluster(
    tflops=1,
    sampling=1,
    training=0.5,
    inside=1e9,
    between=1e8,
    latency=0,
    spread=0,
    score=1,
    servers=4,
)


def test_the_parts_are_their_sums_by_hand():
    one = iteration(WORK, CLUSTER, 1)
    # 4 groups of 20 steps of a second; 40 replays of 3 steps at half the speed; no network.
    assert (one.sample, one.train, one.network, one.wait) == (80, 240, 0, 0)
    # 40 scores on 4 servers while sampling goes on; those of the last of 8 batches remain.
    assert one.score == 10 / 8
    two = iteration(WORK, CLUSTER, 2)
    # Each of 2 processes sends 4 GB for each of 2 optimizer steps.
    assert (two.sample, two.train, two.network) == (40, 120, 8)
    # Sixteen GPUs take a group each, and the ring goes over the slower network.
    many = iteration(WORK, CLUSTER, 16)
    assert (many.groups, many.sample, many.train) == (16, 20, 60)
    assert many.network == pytest.approx(2 * 4e9 * 2 * 15 / 16 / 1e8)
    assert many.bound == "network"


def test_staleness_hides_scoring_behind_the_whole_iteration():
    slow = replace(CLUSTER, score=20.0)
    # 200 s of scoring: all but the first batch's sampling (10 s) overlap with 80 s of sampling.
    assert iteration(WORK, slow, 1).score == 200 - 70
    assert iteration(replace(WORK, staleness=1), slow, 1).score == 0
    slower = replace(CLUSTER, score=40.0)
    assert iteration(replace(WORK, staleness=1), slower, 1).score == 400 - 80 - 240


def test_the_page_shows_the_model():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert marked_text(page, "scaling") == report(works(), Cluster()).strip("\n")


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_scheduling_agrees_with_the_model(staleness):
    """Real worker and client, two servers of which one is away for a time; pauses for everything else."""
    case = Case(
        "small", ranks=2, servers=2, samples=4, batch=2, sample=0.05, train=0.1, score=0.1,
        staleness=staleness, away=(0.3, 0.5),
    )  # fmt: skip
    began = time.monotonic()
    seconds, scored = case.measured(5)
    # A busy machine makes pauses longer, not shorter. A server that stays away would double the time.
    assert 0.8 * case.expected() < seconds < 1.7 * case.expected()
    assert sum(scored) == 2 * 4 * 5
    assert min(scored) > 5
    assert time.monotonic() - began < 30
