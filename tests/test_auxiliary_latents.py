"""Auxiliary latents: LTX-2's audio, which is stepped along with its video."""

from typing import Any

import pytest
import torch

from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Noise, PipelinePolicy
from flowgrpo.policy.auxiliary_latents import AuxiliaryLatents
from flowgrpo.policy.call import PipelineCall, UnsupportedPipelineError
from flowgrpo.policy.probe import fit_noise
from flowgrpo.policy.rollout import Rollout
from flowgrpo.policy.step_plan import StepPlan
from tests.conftest import MakePolicy, noise_of

TRANSITION = CPS(noise_level=0.7)


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("ltx2")


def sizes(policy: PipelinePolicy, x: torch.Tensor) -> tuple[int, int]:
    """The number of elements of the video and of the audio in joint states."""
    video, audio = policy._learned.latents.auxiliary._shapes[x.shape[1]]
    return video.numel(), audio.numel()


def roll(policy: PipelinePolicy, prompts: list[Prompt]) -> Rollout:
    noise = noise_of(*range(len(prompts)))
    (rollout,) = policy.run(
        prompts, noise, stochastic=[0, 1], transition=TRANSITION, record=range(4)
    )
    return rollout


def test_a_state_joins_video_and_audio(policy: PipelinePolicy) -> None:
    prompts = [Prompt("a cat", num_frames=25), Prompt("a dog", num_frames=25)]
    rollout = roll(policy, prompts)
    first, second = rollout.records[:2]
    assert first.x.ndim == 2
    video, audio = sizes(policy, first.x)
    assert video + audio == first.x.shape[1]
    assert 0 < audio < video
    assert torch.equal(first.x_next, second.x)
    # Each has noise of its own.
    noise = (first.x_next - first.gaussian.mean) / first.gaussian.std
    assert noise[:, :video].std() > 0.5
    assert noise[:, video:].std() > 0.5
    # A common stream would begin with the same numbers for both.
    assert (noise[:, :16] - noise[:, video : video + 16]).abs().max() > 0.5
    assert (noise[0] - noise[1]).abs().max() > 0.5


def test_the_video_depends_on_the_audio(policy: PipelinePolicy) -> None:
    """Both parts of a state are injected: with another audio the video is another."""
    prompts = [Prompt("a cat")]
    rollout = roll(policy, prompts)
    assert rollout.media is not None
    record = rollout.records[1]
    video, _ = sizes(policy, record.x)
    louder = record.x.clone()
    louder[:, video:] += 3

    def predicted(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return policy.replay(prompts, x, 1, TRANSITION).prediction.output

    assert torch.equal(predicted(record.x), record.prediction.output)
    assert (predicted(louder) - predicted(record.x))[:, :video].abs().max() > 1e-3
    decoded = policy.decode(prompts, rollout.records[-1].x_next)
    torch.testing.assert_close(decoded, rollout.media, atol=1e-5, rtol=0)


def test_the_state_of_a_failed_call_is_not_injected_into_the_next(
    policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt("a cat")]
    rollout = roll(policy, prompts)
    with monkeypatch.context() as patch:
        patch.setitem(policy._injection._methods, "prepare_audio_latents", _no_audio)
        with pytest.raises(ValueError, match="no audio today"):
            policy.replay(prompts, rollout.records[1].x, 1, TRANSITION)
    again = roll(policy, prompts)
    assert torch.equal(again.records[0].x, rollout.records[0].x)


def _no_audio(*_: Any, **__: Any) -> None:
    raise ValueError("no audio today")


def test_conditions_that_are_none_or_lists_are_not_changed(make_policy: MakePolicy) -> None:
    policy = make_policy("sd15")
    for condition in (None, [torch.ones(1, dtype=torch.bfloat16)]):
        policy._injection._methods["prepare_image_latents"] = lambda made=condition: made
        assert policy._injection._prepare("prepare_image_latents") is condition


def test_lengths_can_alternate(policy: PipelinePolicy) -> None:
    lengths = [[Prompt("a cat", num_frames=n)] * 2 for n in (5, 9, 5)]
    rollouts = [roll(policy, prompts) for prompts in lengths]
    assert rollouts[0].records[0].x.shape[1] < rollouts[1].records[0].x.shape[1]
    for prompts, rollout in zip(lengths, rollouts, strict=True):
        record = rollout.records[1]
        again = policy.replay(prompts, record.x, 1, TRANSITION)
        torch.testing.assert_close(
            again.prediction.output, record.prediction.output, atol=1e-5, rtol=0
        )


def test_its_initial_noise_cannot_be_trained(make_policy: MakePolicy) -> None:
    with pytest.raises(
        UnsupportedPipelineError, match="the loop of LTX2Pipeline steps more than the latents"
    ):
        fit_noise(make_policy("ltx2", weights=Noise()), [Prompt("a cat")])


def test_auxiliary_latents_at_other_steps_are_refused() -> None:
    call = PipelineCall(StepPlan())
    auxiliary = call.add_auxiliary()
    call.main.taken, auxiliary.taken = 3, 2
    with pytest.raises(UnsupportedPipelineError, match="it steps auxiliary latents at other steps"):
        AuxiliaryLatents().learn(call, "it")
    call.main.taken = 2
    with pytest.raises(
        UnsupportedPipelineError, match="are not among the tensors that it prepares"
    ):
        AuxiliaryLatents().learn(call, "it")
