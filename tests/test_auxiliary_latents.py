"""A state that is stepped beside the latents: LTX-2's sound, which its video sees."""

import copy
from typing import Any

import pytest
import torch

from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Noise, PipelinePolicy
from flowgrpo.policy.auxiliary_latents import AuxiliaryLatents
from flowgrpo.policy.call import PipelineCall, UnsupportedPipelineError
from flowgrpo.policy.pipeline import Rollout
from flowgrpo.policy.probe import fit_noise
from flowgrpo.policy.step_plan import StepPlan
from tests.conftest import MakePolicy, noise_of

TRANSITION = CPS(noise_level=0.7)


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("ltx2")


def roll(policy: PipelinePolicy, prompts: list[Prompt]) -> Rollout:
    noise = noise_of(*range(len(prompts)))
    (rollout,) = policy.run(
        prompts, noise, stochastic=[0, 1], transition=TRANSITION, record=range(4)
    )
    return rollout


def test_a_state_is_both(policy: PipelinePolicy) -> None:
    prompts = [Prompt("a cat", num_frames=25), Prompt("a dog", num_frames=25)]
    rollout = roll(policy, prompts)
    first, second = rollout.records[:2]
    assert first.x.ndim == 2
    pictures, sound = (s.numel() for s in policy._injection._auxiliary._shapes[first.x.shape[1]])
    assert pictures + sound == first.x.shape[1]
    assert 0 < sound < pictures
    assert torch.equal(first.x_next, second.x)
    # Each has noise of its own.
    noise = (first.x_next - first.gaussian.mean) / first.gaussian.std
    assert noise[:, :pictures].std() > 0.5
    assert noise[:, pictures:].std() > 0.5
    # One stream would begin alike for both.
    assert (noise[:, :16] - noise[:, pictures : pictures + 16]).abs().max() > 0.5
    assert (noise[0] - noise[1]).abs().max() > 0.5


def test_the_video_follows_from_the_sound(policy: PipelinePolicy) -> None:
    """What enters is all of a state: another sound makes another video."""
    prompts = [Prompt("a cat")]
    rollout = roll(policy, prompts)
    assert rollout.media is not None
    record = rollout.records[1]
    pictures, _ = (s.numel() for s in policy._injection._auxiliary._shapes[record.x.shape[1]])
    louder = record.x.clone()
    louder[:, pictures:] += 3

    def said(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return policy.replay(prompts, x, 1, TRANSITION).prediction.output

    assert torch.equal(said(record.x), record.prediction.output)
    assert (said(louder) - said(record.x))[:, :pictures].abs().max() > 1e-3
    decoded = policy.decode(prompts, rollout.records[-1].x_next)
    torch.testing.assert_close(decoded, rollout.media, atol=1e-5, rtol=0)


def test_what_a_failed_call_left_behind_does_not_enter_the_next(
    policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt("a cat")]
    rollout = roll(policy, prompts)
    with monkeypatch.context() as patch:
        patch.setitem(policy._injection._methods, "prepare_audio_latents", _no_sound)
        with pytest.raises(ValueError, match="no sound today"):
            policy.replay(prompts, rollout.records[1].x, 1, TRANSITION)
    again = roll(policy, prompts)
    assert torch.equal(again.records[0].x, rollout.records[0].x)


def _no_sound(*_: Any, **__: Any) -> None:
    raise ValueError("no sound today")


def test_conditions_that_are_none_or_lists_are_left_alone(make_policy: MakePolicy) -> None:
    policy = make_policy("sd15")
    for made in (None, [torch.ones(1, dtype=torch.bfloat16)]):
        policy._injection._methods["prepare_image_latents"] = lambda made=made: made
        assert policy._injection._prepare("prepare_image_latents") is made


def test_lengths_take_turns(policy: PipelinePolicy) -> None:
    lengths = [[Prompt("a cat", num_frames=n)] * 2 for n in (5, 9, 5)]
    rollouts = [roll(policy, prompts) for prompts in lengths]
    assert rollouts[0].records[0].x.shape[1] < rollouts[1].records[0].x.shape[1]
    for prompts, rollout in zip(lengths, rollouts, strict=True):
        record = rollout.records[1]
        again = policy.replay(prompts, record.x, 1, TRANSITION)
        torch.testing.assert_close(
            again.prediction.output, record.prediction.output, atol=1e-5, rtol=0
        )


def test_its_initial_noise_is_no_policy(make_policy: MakePolicy) -> None:
    with pytest.raises(
        UnsupportedPipelineError, match="LTX2Pipeline steps other or more than the latents"
    ):
        fit_noise(make_policy("ltx2", weights=Noise()), [Prompt("a cat")])


def test_a_second_state_at_other_steps_is_refused(policy: PipelinePolicy) -> None:
    one, other = copy.copy(policy.scheduler), copy.copy(policy.scheduler)
    one.taken, other.taken = 3, 2
    other.plan = StepPlan()
    with pytest.raises(UnsupportedPipelineError, match="it steps a second state at other steps"):
        AuxiliaryLatents().learn(one, other, StepPlan(), "it")
    one.taken = 2
    with pytest.raises(
        UnsupportedPipelineError, match="beside its latents is nowhere in what it prepares"
    ):
        AuxiliaryLatents().learn(one, other, StepPlan(), "it")
