"""What is trained, what is not, and the ways out of a run and back in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from flowgrpo.core.random import Random
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import EMA, Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import export
from flowgrpo.policy.settings import Weights
from flowgrpo.policy.weights import ATTENTION_PROJECTIONS, Trainable, _default_targets
from tests.conftest import MakePolicy, noise_of, transition_of

Tiny = Callable[[str], Path]

PROMPTS = [Prompt("a red cube"), Prompt("two dogs")]


def trainable(policy: PipelinePolicy) -> Trainable:
    assert policy.trainable is not None
    return policy.trainable


def snapshot(policy: PipelinePolicy) -> dict[str, Tensor]:
    """Copies of all weights of all models."""
    return {
        f"{part}.{name}": p.detach().clone()
        for part, model in policy.models.items()
        for name, p in model.named_parameters()
    }


def images(policy: PipelinePolicy) -> Tensor:
    return policy.images(PROMPTS, noise_of(0, 1))


def disturb(policy: PipelinePolicy, scale: float = 0.05) -> None:
    """Change everything that is trained."""
    generator = Random(3).generator()
    with torch.no_grad():
        for p in trainable(policy).parameters.values():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def train_once(policy: PipelinePolicy, name: str) -> None:
    """One optimizer step on the log-probability of one rollout."""
    optimizer = torch.optim.AdamW(trainable(policy).parameters.values(), lr=1e-2)
    transition = transition_of(name)
    for _ in range(2):
        (rollout,) = policy.run(
            PROMPTS, noise_of(0, 1), stochastic=range(3), transition=transition, record=range(3)
        )
        for record in rollout.records:
            again = policy.replay(PROMPTS, record.x, record.step, transition)
            again.gaussian.log_prob(record.x_next).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan22"])
def test_lora_trains_only_adapters(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy(name)
    before, parameters = snapshot(policy), trainable(policy).parameters
    assert all("lora_" in key for key in parameters)
    assert {key.split(".")[0] for key in parameters} == set(policy.denoisers)
    train_once(policy, name)
    changed = {
        key for key, value in snapshot(policy).items() if not torch.equal(value, before[key])
    }
    assert changed <= set(parameters)
    assert len(changed) > 0.9 * len(parameters)


def test_full_trains_the_denoiser_alone(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", weights=Full())
    before = snapshot(policy)
    train_once(policy, "sd3")
    changed = {
        key for key, value in snapshot(policy).items() if not torch.equal(value, before[key])
    }
    assert changed == set(trainable(policy).parameters)
    assert all(key.startswith("transformer.") for key in changed)


def test_only_the_parameters_and_models_that_are_named(make_policy: MakePolicy) -> None:
    some = Full(parameters=(r".*attn\.to_[qk]\.weight", r"proj_out\..*"))
    policy = make_policy("sd3", weights=some, dtype="bfloat16")
    before, named = snapshot(policy), trainable(policy).parameters
    assert {k.split(".", 1)[1] for k in named} == {
        *(f"transformer_blocks.{b}.attn.to_{x}.weight" for b in (0, 1) for x in "qk"),
        "proj_out.weight",
        "proj_out.bias",
    }
    assert {p.dtype for p in named.values()} == {torch.float32}
    train_once(policy, "sd3")
    changed = {k for k, v in snapshot(policy).items() if not torch.equal(v, before[k])}
    assert changed == set(named)
    second = make_policy("wan22", weights=LoRA(rank=4, models=("transformer_2",)))
    assert {k.split(".")[0] for k in trainable(second).parameters} == {"transformer_2"}


def test_layers_by_regular_expression(make_policy: MakePolicy) -> None:
    lora = LoRA(rank=4, targets=(r"re:transformer_blocks\.1\.attn\.to_[qk]", "proj_out"))
    policy = make_policy("sd3", weights=lora)
    layers = {k.split(".lora_")[0].split(".", 1)[1] for k in trainable(policy).parameters}
    assert layers == {
        "transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k", "proj_out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            LoRA(targets=("re:nothing.*",)),
            r"LoRA targets \['re:nothing\.\*'\] match no linear layer",
        ),
        (
            LoRA(models=("unet",)),
            "model.weights.models: there is no denoiser 'unet'; the pipeline has transformer",
        ),
        (Full(parameters=("nothing",)), "'nothing' matches no parameter of SD3Transformer2DModel"),
    ],
)
def test_names_of_nothing_are_refused(
    weights: Weights, message: str, make_policy: MakePolicy
) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy("sd3", weights=weights)


@pytest.mark.parametrize("weights", [LoRA(rank=4, alpha=8), Full()])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_reference_is_the_untouched_model(
    name: str, weights: Weights, make_policy: MakePolicy
) -> None:
    untouched = images(make_policy(name, weights=None))
    policy = make_policy(name, weights=weights, with_reference=True)
    assert torch.equal(images(policy), untouched)
    disturb(policy)
    tuned, kept = images(policy), snapshot(policy)
    assert (tuned - untouched).abs().max() > 0.01
    with policy.reference():
        assert torch.equal(images(policy), untouched)
    assert torch.equal(images(policy), tuned)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(images(policy), tuned)
    assert all(torch.equal(value, kept[key]) for key, value in snapshot(policy).items())


@pytest.mark.parametrize("weights", [LoRA(rank=4, alpha=8), Full()])
def test_gradients_survive_a_visit_to_the_reference(
    weights: Weights, make_policy: MakePolicy
) -> None:
    """As in a KL: forward, reference, backward."""
    policy = make_policy("sd3", weights=weights, with_reference=True)
    disturb(policy)
    parameters = list(trainable(policy).parameters.values())
    (rollout,) = policy.run(PROMPTS, noise_of(0, 1), record=[0], decode=False)

    def mean() -> Tensor:
        return policy.replay(PROMPTS, rollout.records[0].x, 0, CPS()).gaussian.mean

    def anchor() -> Tensor:
        with torch.no_grad(), policy.reference():
            return mean()

    before = anchor()
    plain = torch.autograd.grad((mean() - before).square().sum(), parameters, allow_unused=True)
    here = mean()
    between = torch.autograd.grad((here - anchor()).square().sum(), parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, between, strict=True):
        assert a is b is None or (a is not None and b is not None and torch.equal(a, b))


def test_full_weights_need_a_reference_to_have_one(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", weights=Full())
    with pytest.raises(RuntimeError, match="with_reference=True"), policy.reference():
        pass


def test_adapters_are_seeded(make_policy: MakePolicy) -> None:
    before = torch.get_rng_state()
    one, two, other = (trainable(make_policy("sd3", seed=seed)).parameters for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    down = [key for key in one if "lora_A" in key]
    assert down
    for key in one:
        assert torch.equal(one[key], two[key])
        assert torch.equal(one[key], other[key]) == (key not in down)


def test_targets_choose_the_layers(make_policy: MakePolicy) -> None:
    keys = trainable(make_policy("sd3", weights=LoRA(targets=("to_q", "ff.net.2")))).parameters
    layers = {key.partition(".lora_")[0] for key in keys}
    assert layers == {
        f"transformer.transformer_blocks.{i}.{end}"
        for i in (0, 1)
        for end in ("attn.to_q", "ff.net.2")
    }


@pytest.mark.parametrize("every", [1, 4])
def test_ema_is_the_slow_one(every: int, make_policy: MakePolicy) -> None:
    policy = make_policy("sd3")
    parameters = list(trainable(policy).parameters.values())
    ema, decay = EMA(parameters, 0.5, every), 0.5
    slow = [p.detach().clone() for p in parameters]
    for update in range(1, 13):
        disturb(policy)
        ema.update()
        if update not in {1: range(13), 4: (3, 7, 11)}[every]:
            continue
        keep = min(decay, (1 + update) / (10 + update))
        slow = [keep * s + (1 - keep) * p.detach() for s, p in zip(slow, parameters, strict=True)]
    assert ema.updates == 12
    torch.testing.assert_close(ema.average, slow)


def test_ema_is_applied_and_taken_back(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3")
    parameters = list(trainable(policy).parameters.values())
    ema = EMA(parameters, 0.9)
    start = images(policy)
    disturb(policy)
    own, tuned = [p.detach().clone() for p in parameters], images(policy)
    with ema.applied():
        assert all(torch.equal(p, a) for p, a in zip(parameters, ema.average, strict=True))
        assert torch.equal(images(policy), start)
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(p, o) for p, o in zip(parameters, own, strict=True))
    assert torch.equal(images(policy), tuned)
    # Applying is no update, and an update changes the average in place.
    ema.update()
    assert not torch.equal(ema.average[0], own[0])
    with ema.applied():
        assert not torch.equal(images(policy), start)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "wan_t2v"])
def test_exported_adapters_load_into_diffusers(
    name: str, make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    # The scale alpha / rank must survive, and 4 / 8 is what no loader would assume.
    policy = make_policy(name, weights=LoRA(rank=8, alpha=4))
    start = images(policy)
    disturb(policy, 0.2)
    tuned = images(policy)
    assert (tuned - start).abs().max() > 0.01
    export(policy.stock_pipeline(), trainable(policy), tmp_path)
    assert [f.name for f in tmp_path.glob("*.*")] == ["pytorch_lora_weights.safetensors"]

    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.load_lora_weights(tmp_path)
    loaded = PipelinePolicy(pipeline, sampling=policy.sampling)
    torch.testing.assert_close(images(loaded), tuned, atol=1e-4, rtol=0)


def test_two_denoisers_export_two_adapters(
    make_policy: MakePolicy, tiny: Tiny, tmp_path: Path
) -> None:
    policy = make_policy("wan22")
    disturb(policy, 0.2)
    tuned = images(policy)
    export(policy.stock_pipeline(), trainable(policy), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny("wan22"))
    pipeline.load_lora_weights(tmp_path)
    half = images(PipelinePolicy(pipeline, sampling=policy.sampling))
    pipeline = DiffusionPipeline.from_pretrained(tiny("wan22"))
    pipeline.load_lora_weights(tmp_path)
    pipeline.transformer_2.load_lora_adapter(
        tmp_path / "transformer_2", prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    whole = images(PipelinePolicy(pipeline, sampling=policy.sampling))
    assert (half - tuned).abs().max() > 1e-3
    torch.testing.assert_close(whole, tuned, atol=1e-4, rtol=0)


def test_exported_full_weights_are_a_pipeline(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("sd15", weights=Full())
    shipped = type(policy.shipped_scheduler)
    disturb(policy)
    tuned = images(policy)
    export(policy.stock_pipeline(), trainable(policy), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler) is shipped
    for key, parameter in trainable(policy).parameters.items():
        part, _, name = key.partition(".")
        assert torch.equal(pipeline.components[part].get_parameter(name), parameter)
    assert torch.equal(images(PipelinePolicy(pipeline, sampling=policy.sampling)), tuned)


def test_weights_load_into_the_same_setting(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy, other = make_policy("sd3"), make_policy("sd3", seed=5)
    disturb(policy)
    held = {key: p.detach().clone() for key, p in trainable(policy).parameters.items()}
    trainable(other).load(held)
    assert torch.equal(images(other), images(policy))


def test_weights_of_another_setting_are_refused(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3")
    ours = trainable(policy)
    before = {key: p.detach().clone() for key, p in ours.parameters.items()}
    other = {key: p + 1 for key, p in before.items()}
    first, *_, last = other

    with pytest.raises(ValueError, match=rf"missing \['{first}'\], unexpected \[\]"):
        ours.load({k: v for k, v in other.items() if k != first})
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['transformer\.spare'\]"):
        ours.load(other | {"transformer.spare": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lora_.*has shape \(3, 3\), expected \("):
        ours.load(other | {last: torch.zeros(3, 3)})
    larger = trainable(make_policy("sd3", weights=LoRA(rank=8))).parameters
    with pytest.raises(ValueError, match=r"has shape \(8, 32\), expected \(4, 32\)"):
        ours.load({key: p.detach() for key, p in larger.items()})
    # Nothing is half loaded.
    assert all(torch.equal(p, before[key]) for key, p in ours.parameters.items())


def test_exported_files_hold_no_base_weights(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy("sd3")
    export(policy.stock_pipeline(), trainable(policy), tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(tensors) == len(trainable(policy).parameters)
    assert all("lora" in key for key in tensors)


def test_parameters_are_leaves(make_policy: MakePolicy) -> None:
    for weights in (LoRA(rank=4), Full()):
        for p in trainable(make_policy("sd3", weights=weights)).parameters.values():
            assert isinstance(p, nn.Parameter)
            assert p.is_leaf
            assert p.requires_grad


def test_attentions_are_found_under_any_name() -> None:
    usual = ["blocks.0.attn.to_q", "blocks.0.attn.to_out.0", "blocks.0.ff.net"]
    assert set(_default_targets(usual)) == {"to_q", "to_out.0"} < set(ATTENTION_PROJECTIONS)
    own = ["blocks.0.self_attention.to_query", "blocks.0.Attn.qkv", "blocks.0.feed_forward.in"]
    assert _default_targets(own) == own[:2]
    assert _default_targets(["ff.net"]) == []
