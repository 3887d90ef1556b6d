"""States are injected where the loop holds them: in a prepared tensor, in a part of it, in a layout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from torch import Tensor

from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.doctor import Settings, examine
from flowgrpo.policy import Noise, PipelinePolicy
from flowgrpo.policy.call import (
    Place,
    UnsupportedPipelineError,
    place_by_shape,
    place_by_value,
)
from flowgrpo.policy.latent_injection import Layouts, inject
from flowgrpo.policy.probe import fit_noise
from tests.conftest import LORA, noise_of, sampling_of
from tests.tiny.parts import GRADIENT

Tiny = Callable[[str], Path]


def test_the_place_is_the_tensor_of_the_states_shape() -> None:
    state = torch.Size([2, 4, 8])
    wide, other = torch.Size([2, 9, 8]), torch.Size([2, 16])
    assert place_by_shape(state, [other, state]) == Place(1, (0, 0, 0))
    # Exact wins over larger; a larger one holds the state in its first part.
    assert place_by_shape(state, [wide, state]) == Place(1, (0, 0, 0))
    assert place_by_shape(state, [None, wide, other]) == Place(1, (0, 0, 0))
    # Not smaller, not larger along two axes, not one of several.
    for shapes in ([torch.Size([2, 3, 8])], [torch.Size([3, 9, 8])], [wide, wide], [other], []):
        assert place_by_shape(state, shapes) is None


def test_injection_copies_the_state_and_keeps_the_rest_of_the_tensor() -> None:
    state, ids = torch.rand(2, 4, 3), torch.arange(6)
    latents = torch.rand(2, 4, 5)
    injected, kept = inject((latents, ids), state)
    assert kept is ids
    assert torch.equal(injected, torch.cat([state, latents[..., 3:]], dim=-1))
    alone = inject(torch.rand(2, 4, 3), state)
    assert torch.equal(alone, state)
    alone.zero_()
    assert state.any()
    with pytest.raises(
        UnsupportedPipelineError,
        match=r"Some pipeline cannot begin with this state: .* has shape \(2, 4, 3\)",
    ):
        inject((ids,), state, name="Some pipeline")


def test_a_state_is_found_by_its_values_at_either_end() -> None:
    latents, ids = torch.rand(2, 5, 9), torch.arange(6)
    state = latents[:, 1:, :4]
    found = place_by_value(state, [ids, latents])
    assert found == Place(1, (0, 1, 0), whole=(5, 9))
    # By shape alone it cannot be found; with a known place it can.
    with pytest.raises(UnsupportedPipelineError, match="cannot begin with this state"):
        inject((ids, latents), state)
    _, injected = inject((ids, latents), state + 1, found)
    assert torch.equal(injected[:, 1:, :4], state + 1)
    assert torch.equal(injected[:, :1], latents[:, :1])
    assert torch.equal(injected[..., 4:], latents[..., 4:])
    assert place_by_value(state + 1, [ids, latents]) is None
    # A known place is not used if the prepared tensor is too small for it.
    assert torch.equal(inject(latents[:1, :4, :4], state[:1], found), state[:1])


@pytest.fixture(scope="module")
def ltx_i2v(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that packs latents into tokens, and steps all frames but the first, unpacked."""
    folder = tmp_path_factory.mktemp("ltx_i2v")
    parts = LTXPipeline.from_pretrained(tiny("ltx")).components
    LTXImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder


def policy_of(folder: Path, **changes: int) -> PipelinePolicy:
    sampling = sampling_of("ltx", **changes)
    sampling = replace(sampling, call=sampling.call | {"image": GRADIENT})
    return PipelinePolicy.from_pretrained(folder, sampling=sampling, weights=LORA, batch_size=4)


def test_a_pipeline_with_a_layout_passes(ltx_i2v: Path) -> None:
    sampling = sampling_of("ltx", call=sampling_of("ltx").call | {"image": GRADIENT})
    diagnosis = examine(ltx_i2v, Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}
    assert diagnosis.media == "video"


def test_every_size_has_its_layout(ltx_i2v: Path) -> None:
    """Batches, sizes and numbers of frames alternate, and each is replayed exactly."""
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


def test_the_initial_noise_of_a_layout_cannot_be_trained(ltx_i2v: Path) -> None:
    sampling = sampling_of("ltx", call=sampling_of("ltx").call | {"image": GRADIENT})
    policy = PipelinePolicy.from_pretrained(ltx_i2v, sampling=sampling, weights=Noise())
    with pytest.raises(
        UnsupportedPipelineError,
        match="the loop of LTXImageToVideoPipeline steps more than the latents",
    ):
        fit_noise(policy, [Prompt("a cat")])


def numbered(state: Tensor) -> Callable[[int], Tensor]:
    """A numbered call whose loop begins with a state."""
    return lambda index: state


def test_layouts_follow_from_numbered_elements() -> None:
    layouts, prepared = Layouts(), [torch.zeros(2, 3), torch.randn(2, 4, 6), "mask"]
    state = torch.arange(24.0).view(4, 6)[1:, ::2].T.repeat(2, 1, 1)
    layouts.learn(torch.Size((2, 3, 3)), prepared, numbered(state), "it")
    injected = layouts.inject(prepared, torch.ones(2, 3, 3))
    assert injected is not None
    assert injected[0] is prepared[0]
    changed = injected[1] != prepared[1]
    assert torch.equal(changed[:, 1:, ::2], torch.ones(2, 3, 3, dtype=torch.bool))
    assert changed.sum() == 18
    # A batch of another size has the same layout; another image size does not.
    assert (
        layouts.inject([torch.zeros(1, 3), torch.zeros(1, 4, 6)], torch.ones(1, 3, 3)) is not None
    )
    assert layouts.inject([torch.zeros(1, 3), torch.zeros(1, 4, 8)], torch.ones(1, 3, 3)) is None


@pytest.mark.parametrize("change", [0.5, 24.0, -1.0])
def test_changed_numbers_are_no_layout(change: float) -> None:
    state = torch.arange(24.0).view(1, 4, 6)[:, 1:].repeat(2, 1, 1)
    state[:, 0, 0] = change
    with pytest.raises(
        UnsupportedPipelineError,
        match=r"state that it steps, \(2, 3, 6\), is not a part .*\[\(2, 4, 6\)\]",
    ):
        Layouts().learn(torch.Size((2, 3, 6)), [torch.zeros(2, 4, 6)], numbered(state), "it")
    # Two elements of a state at one position.
    state[:, 0, 0] = state[:, 0, 1]
    with pytest.raises(UnsupportedPipelineError, match="is not a part"):
        Layouts().learn(torch.Size((2, 3, 6)), [torch.zeros(2, 4, 6)], numbered(state), "it")
