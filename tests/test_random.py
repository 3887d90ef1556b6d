"""Random streams: keyed by what they are for, whatever the batch and the order."""

import pytest
import torch

from flowgrpo.core.random import Random, SampleNoise


def test_known_values_so_that_a_change_of_the_keying_is_noticed():
    random = Random(seed=0).at("train", 12)
    assert random.integer("noise", 3) == 6046130602970654655
    draw = torch.randn(2, generator=random.generator("noise", 3))
    assert draw.tolist() == pytest.approx([0.0389822, 0.3250996], abs=1e-6)


def test_a_stream_depends_on_seed_path_keys_and_their_types():
    points = [
        Random(0),
        Random(1),
        Random(0).at(1),
        Random(0).at("1"),
        Random(0).at(1, 2),
        Random(0).at(12),
        Random(0).at("a", "b"),
        Random(0).at("ab"),
    ]
    assert len({p.integer("x") for p in points}) == len(points)
    assert Random(3).at("a").at(1).integer("b") == Random(3).at("a", 1).integer("b")
    assert all(0 <= p.integer(k) < 2**63 for p in points for k in range(100))


def test_streams_do_not_depend_on_order_or_global_state():
    streams = [Random(0).at(i) for i in range(4)]
    forward = [torch.randn(3, generator=s.generator("n")) for s in streams]
    torch.manual_seed(99)
    torch.randn(7)
    state = torch.get_rng_state()
    backward = [torch.randn(3, generator=s.generator("n")) for s in reversed(streams)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.stack(forward), torch.stack(backward[::-1]))


def noise(number: int, shared: bool = False) -> SampleNoise:
    streams = [Random(5).at("group", 0, i) for i in range(number)]
    return SampleNoise(streams, [Random(5).at("group", 0)] * number if shared else None)


@pytest.mark.parametrize("shared", [False, True])
def test_a_slice_of_a_batch_has_the_same_noise(shared):
    whole = noise(5, shared)
    part = whole[2:4]
    assert len(part) == 2
    assert torch.equal(whole.at_step(3, (4, 2))[2:4], part.at_step(3, (4, 2)))
    first, second = ([torch.randn(6, generator=g) for g in n.initial()] for n in (whole, part))
    assert torch.equal(torch.stack(first)[2:4], torch.stack(second))


def test_samples_and_steps_have_noise_of_their_own():
    whole = noise(3)
    draws = [row for step in range(3) for row in whole.at_step(step, (8,))]
    draws += [torch.randn(8, generator=g) for g in whole.initial()]
    assert len({tuple(d.tolist()) for d in draws}) == 12


def test_shared_initial_noise_is_one_start_with_different_steps():
    shared = noise(3, shared=True)
    starts = {tuple(torch.randn(8, generator=g).tolist()) for g in shared.initial()}
    assert len(starts) == 1
    assert len(shared.at_step(0, (8,)).unique(dim=0)) == 3
    assert torch.equal(shared.at_step(0, (8,)), noise(3).at_step(0, (8,)))


def test_noise_is_standard_normal():
    draws = noise(64).at_step(1, (1000,))
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.std()) == pytest.approx(1, abs=0.02)
    assert abs(float((draws[:-1] * draws[1:]).mean())) < 0.02
