"""``train.staleness = 1``: sampling goes ahead of scores, with exact ratios and the same numbers after a resume."""

import json
import time
from dataclasses import dataclass, replace

import pytest
import torch

import flowgrpo
from flowgrpo.algorithms import FlowGRPO
from flowgrpo.config import ConfigError
from flowgrpo.training.learner import Learner
from flowgrpo.training.replay import Replay

SMALL = [
    "algorithm={kind='tests.test_staleness:Watched', group_size=4, steps={kind='all'}}",
    "train.iterations=3",
    "train.groups=2",
    "sampling.num_steps=4",
    "train.rollout_batch=4",
    "train.updates=1",
    "train.lr=1e-2",
    "evaluation.images=2",
    "evaluation.every=0",
    "evaluation.grid_prompts=1",
    "evaluation.grid_samples=1",
    "evaluation.inspected_prompts=0",
    "run.checkpoint_every=1",
    "run.device=cpu",
    "run.trackers=[]",
    "failures.probe=off",
    "rewards=[{model='tests.test_staleness:slow'}]",
]
EVENTS: list[str] = []
LATE: list[bool] = []


def slow(media, prompts):
    """Darkness. In a run that samples ahead, the second batch of an iteration waits for the next one."""
    if len(prompts) == 4 and LATE:
        LATE.append(len(LATE) % 2 == 0)
        wanted, deadline = 1 + len(LATE) // 2, time.monotonic() + 60
        while LATE[-1] and EVENTS.count("sampling") < min(wanted, 3):
            assert time.monotonic() < deadline, (
                "the next iteration is not sampled before this one is scored"
            )
            time.sleep(0.01)
    return 1 - media.mean((1, 2, 3))


def train(folder, *more):
    config = flowgrpo.load("quickstart_flow_grpo", [*SMALL, f"run.folder={folder}", *more])
    EVENTS.clear()
    assert flowgrpo.train(config).finished
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True, kw_only=True)
class Watched(FlowGRPO):
    """Notes when it samples."""

    def collect(self, *arguments):
        EVENTS.append("sampling")
        return super().collect(*arguments)


@dataclass(frozen=True, kw_only=True)
class Reading(FlowGRPO):
    """Uses the scores while it samples, without saying so."""

    def collect(self, *arguments):
        found = super().collect(*arguments)
        scores = found.candidates.scores.with_score("more", torch.ones(8), 1.0)
        return replace(found, candidates=replace(found.candidates, scores=scores))


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """A run with staleness: its folder, metrics, events, and the log-ratios of its updates."""
    folder = tmp_path_factory.mktemp("stale") / "run"
    update, inputs, seen = Learner.update, Replay.inputs, []

    def watched(self, *arguments):
        EVENTS.append("update")
        seen.append([])
        return update(self, *arguments)

    def noted(self, experience, batch, first_update):
        found = inputs(self, experience, batch, first_update)
        log_prob = found.gaussian.log_prob(found.x_next).detach()
        seen[-1].append((first_update, float((log_prob - found.old_log_prob).abs().max())))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "update", watched)
        patch.setattr(Replay, "inputs", noted)
        LATE.append(True)
        metrics = train(folder, "train.staleness=1")
        LATE.clear()
    return folder, metrics, list(EVENTS), seen


def test_the_next_iteration_is_sampled_while_this_one_is_scored(ahead):
    _, metrics, events, _ = ahead
    assert events == ["sampling", "sampling", "update", "sampling", "update", "update"]
    assert [m["staleness"] for m in metrics] == [0, 1, 1]


def test_ratios_are_to_the_weights_that_sampled(ahead, tmp_path):
    _, metrics, _, seen = ahead
    usual = train(tmp_path / "usual", "train.iterations=2")
    # The second iteration is drawn by the weights of the base model, as in a run that does not learn.
    still = train(tmp_path / "still", "train.lr=1e-12", "train.iterations=2")
    assert metrics[0]["reward"] == usual[0]["reward"]
    assert metrics[1]["reward"] == pytest.approx(still[1]["reward"], abs=1e-6)
    assert abs(metrics[1]["reward"] - usual[1]["reward"]) > 1e-5
    # The first iteration is replayed by the weights that sampled, the others by those of one update later.
    assert [{first for first, _ in one} for one in seen] == [{True}, {False}, {False}]
    first, *later = [max(deviation for _, deviation in one) for one in seen]
    assert first < 1e-5
    assert min(later) > 1e-4
    assert metrics[1]["ratio/deviation"] > 1e-4 > usual[1]["ratio/deviation"]


def test_a_resumed_run_has_the_same_numbers(ahead, tmp_path):
    straight, _, _, _ = ahead
    folder = tmp_path / "resumed"
    train(folder, "train.staleness=1", "train.iterations=2")
    train(folder, "train.staleness=1")
    for name in ("metrics.jsonl", "checkpoints/000003/weights.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.refill=1"], "train.refill replaces groups"),
        (
            ["algorithm={kind='pref_grpo', preference={kind='compared', reward='strict'}}"],
            "PrefGRPO uses the scores while it samples",
        ),
        (["algorithm.kind=diffusion_nft", "loss.kind=nft"], "NFTLoss has an old policy"),
        (["algorithm.kind=matching", "loss.kind=matching"], "MatchingLoss has an old policy"),
        (["train.staleness=2"], "train.staleness must be at most 1"),
    ],
)
def test_what_needs_the_scores_or_the_update_before_is_refused(settings, words):
    config = flowgrpo.load("quickstart_flow_grpo", ["train.staleness=1", *settings])
    with pytest.raises(ConfigError, match=words):
        config.check()


def test_an_algorithm_that_reads_scores_without_saying_so_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Reading uses the scores while it samples"):
        train(tmp_path / "run", "train.staleness=1", SMALL[0].replace("Watched", "Reading"))


def test_a_reward_that_learns_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="reward 'Learning' learns from the candidates"):
        train(tmp_path / "run", "train.staleness=1", "rewards=[{model='tests.test_docs:Learning'}]")


def test_too_many_failures_of_an_iteration_are_found(tmp_path):
    settings = ["train.staleness=1", "rewards=[{model='tests.test_train:never'}]"]
    more = ["failures.retries=0", "evaluation.images=1"]
    with pytest.raises(flowgrpo.rewards.settings.RewardError, match="8 of 8 scores failed"):
        train(tmp_path / "run", *settings, *more)
