"""States are put where the loop keeps them, and LoRA finds attentions under any name."""

import pytest
import torch

from flowgrpo.policy.arguments import UnsupportedPipelineError
from flowgrpo.policy.latent_injection import Place, enter, locate, place
from flowgrpo.policy.weights import ATTENTION_PROJECTIONS, _default_targets


def test_the_place_is_the_tensor_of_the_states_shape() -> None:
    state = torch.Size([2, 4, 8])
    wide, other = torch.Size([2, 9, 8]), torch.Size([2, 16])
    assert place(state, [other, state]) == Place(1, (0, 0, 0))
    # Exact wins over larger; a larger one holds the state in its first part.
    assert place(state, [wide, state]) == Place(1, (0, 0, 0))
    assert place(state, [None, wide, other]) == Place(1, (0, 0, 0))
    # Not smaller, not larger along two axes, not one of several.
    for shapes in ([torch.Size([2, 3, 8])], [torch.Size([3, 9, 8])], [wide, wide], [other], []):
        assert place(state, shapes) is None


def test_entering_copies_the_state_and_keeps_what_is_behind_it() -> None:
    state, ids = torch.rand(2, 4, 3), torch.arange(6)
    latents = torch.rand(2, 4, 5)
    entered, kept = enter((latents, ids), state)
    assert kept is ids
    assert torch.equal(entered, torch.cat([state, latents[..., 3:]], dim=-1))
    alone = enter(torch.rand(2, 4, 3), state)
    assert torch.equal(alone, state)
    alone.zero_()
    assert state.any()
    with pytest.raises(
        UnsupportedPipelineError,
        match=r"Some pipeline cannot be entered: .* its loop holds \(2, 4, 3\)",
    ):
        enter((ids,), state, name="Some pipeline")


def test_a_state_is_found_by_its_values_at_either_end() -> None:
    latents, ids = torch.rand(2, 5, 9), torch.arange(6)
    state = latents[:, 1:, :4]
    found = locate(state, [ids, latents])
    assert found == Place(1, (0, 1, 0), whole=(5, 9))
    # By shape alone it is not to be found, once it was seen it is.
    with pytest.raises(UnsupportedPipelineError, match="cannot be entered"):
        enter((ids, latents), state)
    _, entered = enter((ids, latents), state + 1, found)
    assert torch.equal(entered[:, 1:, :4], state + 1)
    assert torch.equal(entered[:, :1], latents[:, :1])
    assert torch.equal(entered[..., 4:], latents[..., 4:])
    assert locate(state + 1, [ids, latents]) is None
    # A place that what was prepared does not have is not used.
    assert torch.equal(enter(latents[:1, :4, :4], state[:1], found), state[:1])


def test_attentions_are_found_under_any_name() -> None:
    usual = ["blocks.0.attn.to_q", "blocks.0.attn.to_out.0", "blocks.0.ff.net"]
    assert set(_default_targets(usual)) == {"to_q", "to_out.0"} < set(ATTENTION_PROJECTIONS)
    own = ["blocks.0.self_attention.to_query", "blocks.0.Attn.qkv", "blocks.0.feed_forward.in"]
    assert _default_targets(own) == own[:2]
    assert _default_targets(["ff.net"]) == []
