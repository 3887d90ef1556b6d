"""What a reward of the user's own takes, and what is said about a mistake in it."""

import functools
import inspect
import sys
from types import ModuleType

import pytest
import torch

from flowgrpo import Prompt, Reward, RewardScorer
from flowgrpo.rewards.calls import check_call, problem_of
from flowgrpo.rewards.loading import available_rewards, check_places, found
from flowgrpo.rewards.settings import Failures, RewardError

HERE = __name__
IMAGES, PROMPTS = torch.rand(4, 3, 8, 8), [Prompt("a cat")] * 4


def good(media, prompts, power=1.0):
    return media.mean((1, 2, 3)) * power


def of_flow_grpo(images, prompts, metadata):
    return [1.0], {}


def factory():
    return good


def for_pictures(media, prompts):
    return [len(image.convert("RGB").getcolors()) for image in media]


def of_metadata(media, prompts):
    return [p.metadata["tag"] for p in prompts]


class Sound:
    takes_audio = True

    def __call__(self, media, prompts, audio): ...


class Deaf:
    takes_audio = True

    def __call__(self, media, prompts): ...


class One:
    def __call__(self, media): ...


def adapted(score):
    @functools.wraps(score)
    def call(media, prompts):
        return score(media)

    return call


@adapted
def of_media(media):
    return media.mean((1, 2, 3))


class Static:
    @staticmethod
    def __call__(media, prompts): ...


class Hears:
    def __init__(self):
        self.takes_audio = True

    def __call__(self, media, prompts, audio): ...


@pytest.mark.parametrize(
    "target",
    [good, Sound, Sound(), lambda *x: 0, max, inspect.Signature, of_media, Static, Hears, Hears()],
)
def test_what_takes_media_and_prompts_is_accepted(target):
    check_call("x", target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (of_flow_grpo, r"takes \(images, prompts, metadata\), but a reward is called as \(media, prompts\): missing a required argument: 'metadata'"),
        (factory, r"takes \(\), but a reward"),
        (One, r"takes \(self, media\), but a reward"),
        (Deaf(), r"takes \(media, prompts\), but a reward is called as \(media, prompts, audio\)"),
    ],
)  # fmt: skip
def test_what_takes_anything_else_is_refused(target, words):
    with pytest.raises(ValueError, match=words):
        check_call("x", target)


@pytest.mark.parametrize("value", [None, 0.5, ("head", 1)])
def test_another_meaning_of_weights_in_a_module_is_no_declaration(value, monkeypatch):
    module = ModuleType("mine")
    module.WEIGHTS = value
    monkeypatch.setitem(sys.modules, "mine", module)
    check_places(Reward(model="mine:Score", options={"head": "nowhere.pth"}), "rewards[0].options")


def test_the_shipped_rewards_take_media_and_prompts():
    for name in ("jpeg_size", "motion", "consistency"):
        assert name in available_rewards()
        check_call(name, found(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("for_pictures", "AttributeError: 'Tensor' object has no attribute 'convert' (media are tensors, not PIL"),
        ("of_metadata", "KeyError: 'tag'"),
    ],
)  # fmt: skip
def test_the_last_sentence_has_the_reason(name, words):
    scorer = RewardScorer([Reward(model=f"{HERE}:{name}")], failures=Failures(retries=0))
    with pytest.raises(RewardError) as error:
        scorer.probe(IMAGES, PROMPTS)
    scorer.close()
    assert f"gave no finite score to 4 probe images: {words}" in str(error.value)
    assert problem_of(RuntimeError("no route")) == "no route"
