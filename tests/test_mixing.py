"""Less of what was learned: the model before training takes the late steps, or weights are scaled."""

import pytest
import torch

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation.grid_settings import Axis, Cell
from flowgrpo.policy import Full, Sampling
from tests.conftest import LORA, sampling_of

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares")]


def noise():
    return SampleNoise([Random(3).at(i) for i in range(len(PROMPTS))])


@pytest.fixture(params=[LORA, Full()], ids=["lora", "full"])
def policy(request, make_policy):
    return make_policy("sd3", weights=request.param, with_reference=True, sampling=sampling_of("sd3", num_steps=4))  # fmt: skip


def train(policy, by=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable.parameters.values():
            parameter += by * torch.randn(parameter.shape, generator=generator) * parameter.std().clamp(min=0.1)  # fmt: skip


def images(policy, base_after=None):
    return policy.images(PROMPTS, noise(), sampling_of("sd3", num_steps=4, base_after=base_after))


@pytest.mark.parametrize(("base_after", "tuned"), [(0.25, 1), (0.6, 2), (3.0, 3)])
def test_the_model_before_training_takes_the_late_steps(policy, base_after, tuned):
    before = images(policy)
    # The same model in both parts: the call is only divided.
    torch.testing.assert_close(images(policy, base_after), before, atol=1e-5, rtol=0)
    train(policy)
    layer = next(m for n, m in policy.denoisers["transformer"].named_modules() if n.endswith("attn.to_q"))  # fmt: skip
    seen = []

    def note(module, inputs):
        disabled = getattr(module, "disable_adapters", False)
        seen.append(f"{disabled}, {float(module.weight.sum()):.6f}")

    hook = layer.register_forward_pre_hook(note)
    mixed = images(policy, base_after)
    hook.remove()
    assert len(seen) == 4
    assert len(set(seen[:tuned])) == len(set(seen[tuned:])) == 1
    assert seen[0] != seen[-1]
    whole = images(policy)
    for other in (before, whole):
        assert float((mixed - other).abs().max()) > 1e-3


def test_the_effect_of_training_is_scaled(policy):
    before = images(policy)
    train(policy)
    whole = images(policy)
    trained = {k: p.detach().clone() for k, p in policy.trainable.parameters.items()}
    policy.trainable.scale(1.0)
    assert torch.allclose(images(policy), whole, atol=1e-6)
    policy.trainable.scale(0.5)
    with policy.reference():
        base = {k: p.detach().clone() for k, p in policy.trainable.parameters.items()}
    for name, parameter in policy.trainable.parameters.items():
        if isinstance(policy.trainable.weights, Full):
            expected = (base[name] + trained[name]) / 2
        else:
            expected = trained[name] / 2 if "lora_B" in name else trained[name]
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=0)
    policy.trainable.scale(0.0)
    torch.testing.assert_close(images(policy), before, atol=1e-5, rtol=0)


def test_full_weights_are_scaled_only_with_the_model_before_training(make_policy):
    policy = make_policy("sd3", weights=Full())
    with pytest.raises(RuntimeError, match="with_reference=True"):
        policy.trainable.scale(0.5)


@pytest.mark.parametrize("base_after", [0.01, 0.99, 4, 2.5, 9])
def test_both_models_take_a_step(base_after):
    with pytest.raises(ValueError, match="from 1 to 3, so that both models take a step of 4"):
        Sampling(num_steps=4, base_after=float(base_after)).check()


def test_a_grid_has_an_axis_of_it():
    axis = Axis.parse("base_after=0.25,6")
    assert axis.values == (0.25, 6.0)
    cell = Cell("runs/a", "last", (), None, None, 0)
    assert cell.at("base_after", 0.25).base_after == 0.25
    assert cell.at("base_after", 0.25).weights == cell.weights  # one loaded model draws both
    with pytest.raises(ValueError, match="expected of a run: shares of the steps"):
        Axis.parse("base_after=half")
