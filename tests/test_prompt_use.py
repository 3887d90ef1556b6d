"""Rewards that ignore their prompts are found by shuffling prompts, and refused if they are all there is."""

import json

import pytest
import torch

from flowgrpo.core.errors import ConfigError
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import available_rewards, found
from flowgrpo.rewards.prompt_use import (
    find_ignoring,
    is_declared,
    is_ignored,
    prompt_notes,
    shuffled,
)
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from tests.test_scorer import IMAGES, PROMPTS

HERE = "tests.test_prompt_use"


def brightness(media, prompts):
    return media.flatten(1).mean(1)


def wanted(media, prompts):
    """How near the brightness is to the number in the prompt."""
    target = torch.tensor([int(p.text.split()[-1]) / 3 for p in prompts])
    return 1 - (media.flatten(1).mean(1) - target).abs()


def exact(media, prompts):
    """A rare binary reward: 1 for one of the images."""
    return torch.tensor([float(p.text == "prompt 2" and m.mean() > 0.6) for m, p in zip(media, prompts, strict=True)])  # fmt: skip


def jittered(media, prompts):
    """Kernels that are not deterministic."""
    jittered.calls += 1
    return brightness(media, prompts) + 1e-4 * jittered.calls * torch.tensor([1.0, -1, 1, -1])


jittered.calls = 0


def constant(media, prompts):
    return torch.ones(len(prompts))


def only_its_own(media, prompts):
    if prompts[0].text != "prompt 0":
        raise ValueError("the picture has another size")
    return brightness(media, prompts)


def rewards(*names, **settings):
    return [Reward(model=f"{HERE}:{n}", **settings) for n in names]


def test_shuffled_prompts_differ_and_samples_stay_together():
    prompts = [Prompt("a"), Prompt("a"), Prompt("b"), Prompt("a", metadata={"n": 1})]
    others = shuffled(prompts)
    assert [(p.text, dict(p.metadata)) for p in others] == [("b", {}), ("b", {}), ("a", {"n": 1}), ("a", {})]  # fmt: skip
    assert shuffled([Prompt("a"), Prompt("a")]) is None


@pytest.mark.parametrize("batch", [0, 3])
def test_only_a_reward_that_ignores_prompts_is_found(batch):
    names = ("brightness", "wanted", "exact", "jittered", "constant", "only_its_own")
    chosen = [*rewards(*names), Reward(model=f"{HERE}:brightness", name="measured", weight=0.0)]
    scorer = RewardScorer(chosen, batch=batch)
    calls = find_ignoring(scorer, IMAGES, PROMPTS)
    scorer.close()
    if batch:  # the samples of the second part have another constant
        calls.pop("jittered")
        calls.pop("only_its_own")
    expected = {
        "brightness": True, "wanted": False, "exact": False, "jittered": True, "constant": None,
        "only_its_own": None,
    }  # fmt: skip
    assert calls == {k: expected[k] for k in calls}


def test_a_failed_score_decides_nothing():
    own = torch.tensor([0.0, 1.0, 2.0])
    assert is_ignored(own, own.clone()) is True
    assert is_ignored(own, torch.tensor([0.0, torch.nan, torch.nan])) is None
    assert is_ignored(own, own + 0.1) is False


def test_what_a_run_says(tmp_path):
    one, both = rewards("brightness"), rewards("brightness", "wanted")
    with pytest.raises(ConfigError, match=r"'brightness' ignores its prompt.*set rewards\.0\.ignores_prompt = true"):  # fmt: skip
        prompt_notes(one, {"brightness": True}, alone=True, refuse=True)
    (warned,) = prompt_notes(one, {"brightness": True}, alone=True, refuse=False)
    assert "Nothing else is trained on" in warned
    # With a preference, or another reward, there is something that reads prompts.
    assert len(prompt_notes(one, {"brightness": True}, alone=False, refuse=True)) == 1
    (named,) = prompt_notes(both, {"brightness": True, "wanted": False}, alone=True, refuse=True)
    assert named.endswith("when the prompts of images are shuffled")
    assert not prompt_notes(rewards("brightness", ignores_prompt=True), {"brightness": True}, alone=True, refuse=True)  # fmt: skip
    assert not prompt_notes(one, {"brightness": None}, alone=True, refuse=True)


def test_shipped_rewards_that_ignore_prompts_say_so():
    declared = {n for n in available_rewards() if is_declared(found(n))}
    assert declared == {"aesthetic", "deqa", "jpeg_size", "motion", "consistency", "vote_head"}


def test_a_run_is_refused_once_and_measures_once(tmp_path, monkeypatch, capsys):
    import flowgrpo
    from flowgrpo.training import evaluator
    from tests.test_train import SMALL

    def config(*more):
        settings = [s for s in SMALL if s != "failures.probe=off"]
        short = ["train.iterations=1", "evaluation.every=0", "evaluation.inspected_prompts=0"]
        return flowgrpo.load(
            "quickstart_flow_grpo", [*settings, *short, f"run.folder={tmp_path}/run", *more]
        )

    with pytest.raises(ConfigError, match="ignores_prompt = true"):  # before anything is written
        flowgrpo.train(config("rewards=[{model='jpeg_size'}]"))
    assert not (tmp_path / "run").exists()
    mine = f"{{model='{HERE}:brightness', name='bright'}}"
    with pytest.raises(ConfigError, match="reward 'bright' ignores its prompt"):
        flowgrpo.train(config(f"rewards=[{mine}]"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    both = f"rewards=[{mine}, {{model='flowgrpo.shapes.rewards:Graded'}}]"
    assert flowgrpo.train(config(both)).finished
    use = json.loads((tmp_path / "run" / "prompt_use.json").read_text())
    assert use["ignores_prompt"] == {"bright": True, "Graded": False}
    assert "Bright" not in (page := (tmp_path / "run" / "report.html").read_text())
    assert "Reward &#x27;bright&#x27; ignores its prompt" in page
    assert "WARNING: reward 'bright' ignores its prompt" in capsys.readouterr().out
    monkeypatch.setattr(evaluator, "find_ignoring", lambda *_: pytest.fail("measured again"))
    assert flowgrpo.train(config(both, "train.iterations=2")).finished
