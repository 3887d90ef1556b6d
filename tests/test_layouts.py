"""States that a loop steps in another layout than it prepared them in, or a part of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from torch import Tensor

from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.doctor import Settings, examine
from flowgrpo.policy import Noise, PipelinePolicy
from flowgrpo.policy.arguments import UnsupportedPipelineError
from flowgrpo.policy.latent_injection import Layouts
from flowgrpo.policy.probe import fit_noise
from flowgrpo.policy.step_plan import StepPlan
from tests.conftest import LORA, noise_of, sampling_of
from tests.tiny.parts import GRADIENT

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def ltx_i2v(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It packs latents into tokens, and steps all frames but the first, unpacked."""
    folder = tmp_path_factory.mktemp("ltx_i2v")
    parts = LTXPipeline.from_pretrained(tiny("ltx")).components
    LTXImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder


def policy_of(folder: Path, **changes: int) -> PipelinePolicy:
    sampling = sampling_of("ltx", **changes)
    sampling = replace(sampling, call=sampling.call | {"image": GRADIENT})
    return PipelinePolicy.from_pretrained(folder, sampling=sampling, weights=LORA, batch_size=4)


def test_a_part_in_another_layout_passes(ltx_i2v: Path) -> None:
    sampling = sampling_of("ltx", call=sampling_of("ltx").call | {"image": GRADIENT})
    diagnosis = examine(ltx_i2v, Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}
    assert diagnosis.media == "video"


def test_every_size_has_its_layout(ltx_i2v: Path) -> None:
    """Batches, sizes and numbers of frames in turn, and each replayed exactly."""
    policy = policy_of(ltx_i2v)
    prompts = [
        [Prompt("a cat")] * 2,
        [Prompt("a cat", height=64, width=32)],
        [Prompt("a cat", num_frames=9)] * 3,
        [Prompt("a cat")],
    ]
    rollouts = []
    for alike in prompts:
        noise = noise_of(*range(len(alike)))
        (rollout,) = policy.run(
            alike, noise, stochastic=[0, 1], transition=CPS(noise_level=0.7), record=range(4)
        )
        rollouts.append(rollout)
    for alike, rollout in zip(prompts, rollouts, strict=True):
        record = rollout.records[1]
        assert record.x.ndim == 5
        again = policy.replay(alike, record.x, 1, CPS(noise_level=0.7))
        torch.testing.assert_close(
            again.prediction.output, record.prediction.output, atol=1e-5, rtol=0
        )
        assert rollout.media is not None
        decoded = policy.decode(alike, rollout.records[-1].x_next)
        torch.testing.assert_close(decoded, rollout.media, atol=1e-5, rtol=0)


def test_its_initial_noise_is_no_policy(ltx_i2v: Path) -> None:
    sampling = sampling_of("ltx", call=sampling_of("ltx").call | {"image": GRADIENT})
    policy = PipelinePolicy.from_pretrained(ltx_i2v, sampling=sampling, weights=Noise())
    with pytest.raises(
        UnsupportedPipelineError, match="LTXImageToVideoPipeline steps other or more than the"
    ):
        fit_noise(policy, [Prompt("a cat")])


def seen(state: Tensor) -> Callable[[StepPlan], None]:
    """A call whose loop begins with a state."""

    def call(plan: StepPlan) -> None:
        plan.records.append(SimpleNamespace(x=state))

    return call


def test_layouts_are_read_from_numbers() -> None:
    layouts, prepared = Layouts(), [torch.zeros(2, 3), torch.randn(2, 4, 6), "mask"]
    state = torch.arange(24.0).view(4, 6)[1:, ::2].T.repeat(2, 1, 1)
    layouts.learn(torch.Size((2, 3, 3)), prepared, seen(state), "it")
    entered = layouts.enter(prepared, torch.ones(2, 3, 3))
    assert entered is not None
    assert entered[0] is prepared[0]
    changed = entered[1] != prepared[1]
    assert torch.equal(changed[:, 1:, ::2], torch.ones(2, 3, 3, dtype=torch.bool))
    assert changed.sum() == 18
    # Another batch is the same layout, another size is not.
    assert layouts.enter([torch.zeros(1, 3), torch.zeros(1, 4, 6)], torch.ones(1, 3, 3)) is not None
    assert layouts.enter([torch.zeros(1, 3), torch.zeros(1, 4, 8)], torch.ones(1, 3, 3)) is None


@pytest.mark.parametrize("change", [0.5, 24.0, -1.0])
def test_numbers_that_were_changed_are_no_layout(change: float) -> None:
    state = torch.arange(24.0).view(1, 4, 6)[:, 1:].repeat(2, 1, 1)
    state[:, 0, 0] = change
    with pytest.raises(
        UnsupportedPipelineError, match=r"what it steps, \(2, 3, 6\), is no part .*\[\(2, 4, 6\)\]"
    ):
        Layouts().learn(torch.Size((2, 3, 6)), [torch.zeros(2, 4, 6)], seen(state), "it")
    # Two elements of a state in one place.
    state[:, 0, 0] = state[:, 0, 1]
    with pytest.raises(UnsupportedPipelineError, match="is no part"):
        Layouts().learn(torch.Size((2, 3, 6)), [torch.zeros(2, 4, 6)], seen(state), "it")
