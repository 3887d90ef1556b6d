"""From scores to the reward: scale, shift, clip, log, threshold, schedules, and bad values of them."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowgrpo
from flowgrpo.config import Config, load, save
from flowgrpo.core.errors import ConfigError
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward, RewardError, check_rewards, weighted_sum
from flowgrpo.shapes.architecture import build_pipeline
from tests.test_docs import TINY
from tests.test_scorer import HERE, IMAGES, PROMPTS

SCORES = torch.tensor([-0.5, 0.0, 0.5, 2.0, math.nan])


def shaped(**how: Any) -> Tensor:
    return Reward(model="m", **how).shaped(SCORES)


def close(found: Tensor, *expected: float) -> bool:
    return torch.allclose(found, torch.tensor(expected), equal_nan=True)


def test_by_default_a_score_counts_as_it_is():
    assert close(shaped(), -0.5, 0, 0.5, 2, math.nan)


def test_each_step():
    assert close(shaped(scale=-2.0, shift=1.0), 2, 1, 0, -3, math.nan)
    assert close(shaped(clip=(0.0, 1.0)), 0, 0, 0.5, 1, math.nan)
    assert close(shaped(log=True), *[math.log(1 + s) for s in SCORES.tolist()])
    assert close(shaped(threshold=0.0), 0, 0, 1, 1, math.nan)


def test_the_order_is_affine_clip_log_or_threshold():
    # 2 r + 1 = 0, 1, 2, 5; clipped 0.5, 1, 2, 3.
    how = {"scale": 2.0, "shift": 1.0, "clip": (0.5, 3.0)}
    assert close(shaped(log=True, **how), *[math.log(1 + s) for s in (0.5, 1, 2, 3, math.nan)])
    assert close(shaped(threshold=1.5, **how), 0, 0, 1, 1, math.nan)


def test_log_refuses_scores_that_it_cannot_take():
    for score in (-1.0, -3.0):
        with pytest.raises(RewardError, match=rf"'m': log needs scores above -1 and got {score:g}"):
            Reward(model="m", log=True).shaped(torch.tensor([0.0, score]))
    assert Reward(model="m", log=True, shift=3.0).shaped(torch.tensor([-3.0])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("iteration", "weight"),
    [(0, 0.0), (10, 0.0), (15, 1.0), (20, 2.0), (30, 1.5), (40, 1.0), (1000, 1.0), (None, 2.0)],
)
def test_a_schedule_is_linear_between_its_points_and_constant_outside(iteration, weight):
    reward = Reward(model="m", weight=2.0, schedule=((10.0, 0.0), (20.0, 1.0), (40.0, 0.5)))
    assert reward.weight_at(iteration) == pytest.approx(weight)


def test_a_reward_whose_weight_is_still_0_fails_nobody():
    late = Reward(model="late", schedule=((5.0, 0.0), (6.0, 1.0)))
    rewards = [Reward(model="early"), late]
    raw = {"early": torch.ones(2), "late": torch.tensor([math.nan, 1.0])}
    assert weighted_sum(rewards, raw, 5).tolist() == [1, 1]
    assert weighted_sum(rewards, raw, 6).isnan().tolist() == [True, False]
    assert weighted_sum(rewards, raw, 6)[1] == 2


def test_the_judge_goes_by_the_iteration_and_its_parts_add_up():
    light = Reward(model=f"{HERE}:brightness", threshold=0.5, weight=3.0)
    count = Reward(model=f"{HERE}:a_list", log=True, schedule=((0.0, 0.5), (10.0, 1.0)))
    scorer = RewardScorer(
        [light, count, Reward(model=f"{HERE}:brightness", name="watched", weight=0.0)]
    )
    binary, logs = torch.tensor([0.0, 0, 1, 1]), torch.arange(4.0).log1p()
    for iteration, factor in ((0, 0.5), (5, 0.75), (None, 1.0)):
        scorer.iteration = iteration
        found = scorer.score(IMAGES, PROMPTS)
        assert torch.allclose(found.reward, 3 * binary + factor * logs)
        assert torch.equal(found.raw["a_list"], torch.arange(4.0))
        parts = found.parts()
        assert set(parts) == {"brightness", "a_list"}
        assert torch.allclose(sum(parts.values()), found.reward)
    scorer.close()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clip=[1.0, 0.0]", r"rewards.0.clip must be \[low, high\] with low < high, got \[1.0, 0"),
        ("clip=[1.0]", r"rewards.0.clip must be \[low, high\]"),
        ("scale=0", "rewards.0.scale must not be 0"),
        ("log=1", "must be true or false, got 1"),
        ("threshold='high'", r"rewards\[0\].threshold must be a number, got 'high'"),
        ("schedule=[[0, 1], [0, 2]]", "rewards.0.schedule must have ascending iterations"),
        ("schedule=[[0, -1]]", "rewards.0.schedule must be a list of .*neither of them negative"),
        ("schedule=[[5, 0]]", "rewards.0.schedule = .* never counts"),
        ("schedule=[1, 2]", r"rewards\[0\].schedule\[0\] must be a list"),
    ],
)
def test_bad_values_name_the_key(setting, message):
    with pytest.raises(ConfigError, match=message):
        load("quickstart_flow_grpo", [f"rewards.0.{setting}"]).check()


def test_values_that_exclude_each_other():
    for how, message in (
        ({"log": True, "threshold": 0.5}, r"rewards.0.log and rewards.0.threshold = 0.5 exclude"),
        ({"log": True, "clip": (-2.0, 1.0)}, r"rewards.0.log needs scores above -1, but .* -2.0"),
        (
            {"weight": 0.0, "schedule": ((0.0, 1.0),)},
            "never counts; to log a reward without training on it",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Reward(model="m", **how).check("rewards.0")
    late = Reward(model="m", schedule=((5.0, 0.0), (6.0, 1.0)))
    with pytest.raises(ConfigError, match="the schedules make every weight 0 in iteration 0"):
        check_rewards([late, Reward(model="n", weight=0.0)], 100)
    check_rewards([late, Reward(model="n")], 100)
    with pytest.raises(ConfigError, match=r"reward 'brightness'.clip must be"):
        RewardScorer([Reward(model=f"{HERE}:brightness", clip=(2.0, 1.0))])


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"clip": (1.0, 1.0)}, "must be .low, high. with low < high"),
        ({"clip": (0.0, 1.0, 2.0)}, "must be .low, high. with low < high"),
        ({"log": True, "clip": (-1.0, 1.0)}, "log needs scores above -1"),
        ({"log": True, "threshold": 0.0}, "exclude each other"),
        ({"schedule": ((1.0, 0.0), (1.0, 1.0))}, "must have ascending iterations"),
        ({"schedule": ((-1.0, 1.0),)}, "neither of them negative"),
        ({"schedule": ((0.0, 1.0, 2.0),)}, "must be a list of .iteration, factor."),
        ({"schedule": ((0.0, 0.0), (5.0, 0.0))}, "never counts"),
        ({"clip": (-0.999, 1.0), "log": True, "schedule": ((0.0, 0.0), (0.5, 1.0))}, ""),
        ({"clip": (0.0, 1.0), "threshold": 0.0, "weight": -1.0}, ""),
    ],
)
def test_settings_at_their_limits(reward, problem):
    if not problem:
        Reward(model="m", **reward).check("rewards.3")
        return
    with pytest.raises(ConfigError, match=rf"rewards\.3\..*{problem}"):
        Reward(model="m", **reward).check("rewards.3")


@pytest.mark.parametrize(
    ("points", "iterations", "silent"),
    [
        (((0.0, 1.0), (4.0, 0.0)), 5, 4),
        (((0.0, 1.0), (4.0, 0.0)), 4, None),
        (((0.0, 1.0), (3.5, 0.0)), 5, 4),
        (((0.0, 1.0), (3.5, 0.0), (5.0, 1.0)), 9, None),
        (((0.0, 0.0), (2.0, 1.0)), 9, 0),
        (((0.0, 0.5), (3.0, 0.0), (3.5, 0.0), (4.0, 1.0)), 9, 3),
        (((0.0, 0.5), (2.5, 0.0), (3.5, 0.0), (4.0, 1.0)), 9, 3),
    ],
)
def test_the_first_iteration_without_any_weight_is_named(points, iterations, silent):
    rewards = [Reward(model="m", schedule=points), Reward(model="n", weight=0.0)]
    if silent is None:
        check_rewards(rewards, iterations)
        return
    with pytest.raises(ConfigError, match=f"make every weight 0 in iteration {silent},"):
        check_rewards(rewards, iterations)
    check_rewards(rewards, iterations, alone=False)  # there is a preference in addition
    check_rewards([*rewards, Reward(model="o")], iterations)


def test_what_is_trained_on_must_have_a_weight_and_be_binary_where_it_must():
    measured = Reward(model="n", weight=0.0)
    with pytest.raises(ConfigError, match="every weight is 0"):
        check_rewards([measured], 9)
    check_rewards([measured], 9, alone=False)
    check_rewards([Reward(model="m"), measured], 9, binary=True)
    for wrong in ([Reward(model="m", weight=0.5)], [Reward(model="m"), Reward(model="o")], [measured]):  # fmt: skip
        with pytest.raises(ConfigError, match="needs exactly one reward of 0 and 1, with weight 1"):
            check_rewards(wrong, 9, binary=True)
    with pytest.raises(ConfigError, match=r"rewards\.1\.scale must not be 0"):
        check_rewards([Reward(model="m"), Reward(model="o", scale=0.0)], 9)


@pytest.mark.parametrize(
    ("model", "name", "label"),
    [("jpeg_size", "", "jpeg_size"), ("a.b:C", "", "C"), ("a.b:C.d", "", "d"), ("a.b:C", "own", "own")],
)  # fmt: skip
def test_a_reward_has_the_last_part_of_its_model_as_its_name(model, name, label):
    assert Reward(model=model, name=name).label == label


def test_a_configuration_with_all_of_it_can_be_written_and_read_back(tmp_path):
    keys = ["clip=[0.0, 1.0]", "scale=0.5", "threshold=0.25", "schedule=[[0, 0.5], [9, 1]]"]
    config = load("quickstart_flow_grpo", [f"rewards.0.{k}" for k in keys])
    config.check()
    assert config.rewards[0].schedule == ((0, 0.5), (9, 1))
    save(config, tmp_path / "config.toml")
    again = load(str(tmp_path / "config.toml"))
    assert isinstance(again, Config)
    assert again == config


def test_a_run_goes_by_the_schedule_and_its_evaluations_do_not(tmp_path):
    build_pipeline().save_pretrained(tmp_path / "model")
    reward = 'rewards=[{model="jpeg_size", ignores_prompt=true, scale=2.0, schedule=[[0, 1], [1, 0.25]]}]'
    places = [f"model.path={tmp_path / 'model'}", f"run.folder={tmp_path / 'run'}"]
    flowgrpo.train(load("quickstart_flow_grpo", [*TINY, *places, reward, "guard={}"]))

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(x) for x in (tmp_path / "run" / name).read_text().splitlines()]

    for metrics, factor in zip(lines("metrics.jsonl"), (1.0, 0.25), strict=True):
        assert metrics["part/jpeg_size"] == pytest.approx(2 * factor * metrics["score/jpeg_size"])
        assert metrics["reward"] == pytest.approx(metrics["part/jpeg_size"])
    evaluations = lines("evaluations.jsonl")
    assert len(evaluations) == 3
    for found in evaluations:
        assert found["reward"] == pytest.approx(2 * found["scores"]["jpeg_size"])
