"""Settings of the ``[memory]`` section change what is kept, not what comes out."""

import importlib.util
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
)
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.arithmetic import RulesOfCuda
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, LoRA, Memory, PipelinePolicy, Sampling, placement
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.compilation import CompiledBlocks, repeated_blocks
from flowgrpo.policy.export import export
from flowgrpo.policy.offloading import Encoders, HostCopy, offload_autoencoder
from flowgrpo.policy.prompt_cache import fingerprint
from flowgrpo.policy.settings import PACKAGES, Quantization, absent_packages
from flowgrpo.policy.step_plan import StepRecord
from tests.conftest import MakePolicy, noise_of, transition_of

PROMPTS = [Prompt("a"), Prompt("two red dogs"), Prompt("a")]


def images(policy: PipelinePolicy) -> Tensor:
    return policy.images(PROMPTS, noise_of(0, 1, 2))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd3", {"vae_slicing": True}),
        ("sd3", {"decode_batch": 2}),
        ("wan_t2v", {"decode_batch": 1}),
        ("ltx", {"decode_batch": 2}),
        ("flux", {"attention": "native"}),
        ("sd3", {"prompt_cache_gb": 0.0, "prompt_disk_gb": 0.0}),
        ("sd3", {"prompt_cache_gb": 0.0}),
    ],
)
def test_the_image_stays_the_same(
    name: str, settings: dict[str, Any], make_policy: MakePolicy
) -> None:
    expected = images(make_policy(name))
    got = images(make_policy(name, memory=Memory(**settings)))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_tiles_are_really_decoded(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", memory=Memory(vae_tiling=True))
    assert policy.models["vae"].use_tiling


def test_a_batch_is_decoded_in_parts(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", memory=Memory(decode_batch=2))
    sizes: list[int] = []
    policy.models["vae"].decoder.register_forward_pre_hook(lambda _m, a: sizes.append(len(a[0])))
    images(policy)
    assert sizes == [2, 1]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan_t2v"])
@pytest.mark.parametrize("weights", [LoRA(rank=4, alpha=8), Full()])
def test_checkpointing_keeps_less_and_gives_the_same_gradient(
    name: str, weights: LoRA | Full, make_policy: MakePolicy
) -> None:
    def gradient(**memory: Any) -> tuple[Tensor, int]:
        policy = make_policy(name, weights=weights, memory=Memory(**memory))
        (rollout,) = policy.run(
            PROMPTS, noise_of(0, 1, 2), record=[1], stochastic=[1], transition=transition_of(name)
        )
        (record,) = rollout.records
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ):
            again = policy.replay(PROMPTS, record.x, 1, transition_of(name))
        again.gaussian.log_prob(record.x_next).sum().backward()
        assert policy.trainable is not None
        grads = [p.grad for p in policy.trainable.parameters.values() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads]), sum(kept)

    plain, all_kept = gradient()
    again, few_kept = gradient(gradient_checkpointing=True)
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
    assert few_kept < 0.5 * all_kept


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_compiled_blocks_compute_the_same(name: str, make_policy: MakePolicy) -> None:
    expected = images(make_policy(name))
    policy = make_policy(name, memory=Memory(compile="regional"))
    torch.testing.assert_close(images(policy), expected, atol=1e-4, rtol=0)
    (rollout,) = policy.run(
        PROMPTS, noise_of(0, 1, 2), record=[1], stochastic=[1], transition=CPS()
    )
    (record,) = rollout.records
    log_prob = policy.replay(PROMPTS, record.x, 1, CPS()).gaussian.log_prob(record.x_next)
    torch.testing.assert_close(log_prob, record.gaussian.log_prob(record.x_next), atol=1e-5, rtol=0)
    log_prob.sum().backward()
    assert policy.trainable is not None
    assert all(p.grad is not None for p in policy.trainable.parameters.values())
    (blocks,) = policy.compiled.values()
    assert str(blocks) == f"{blocks.number} of {blocks.number} blocks"


def test_batches_of_all_sizes_run_the_same_compiled_code(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(placement, "CompiledBlocks", partial(CompiledBlocks, backend="eager"))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    policy = make_policy("sd3", batch_size=3, memory=Memory(compile="regional"))
    plain = make_policy("sd3", batch_size=3)
    policy.replay_batch = 2
    options: dict[str, Any] = {"record": [1, 2], "stochastic": [1, 2], "transition": CPS()}

    def roll(policy: PipelinePolicy, number: int) -> Any:
        prompts = [PROMPTS[i % 3] for i in range(number)]
        return list(policy.run(prompts, noise_of(*range(number)), **options))

    def again(policy: PipelinePolicy, x: Tensor) -> StepRecord:
        return policy.replay(PROMPTS[: len(x)], x, 1, CPS())

    whole, *_ = roll(policy, 3)
    again(policy, whole.records[0].x[:2])
    compiled = graphs["unique_graphs"]
    assert compiled > 0
    for number in (1, 2, 5):
        for ours, theirs in zip(roll(policy, number), roll(plain, number), strict=True):
            torch.testing.assert_close(ours.media, theirs.media, atol=1e-4, rtol=0)
            for a, b in zip(ours.records, theirs.records, strict=True):
                torch.testing.assert_close(a.x_next, b.x_next, atol=1e-5, rtol=0)
                torch.testing.assert_close(a.gaussian.mean, b.gaussian.mean, atol=1e-5, rtol=0)
            assert ours.records[0].x_next is ours.records[1].x
    x = whole.records[0].x[:1]
    one, other = again(policy, x), again(plain, x)
    torch.testing.assert_close(one.gaussian.mean, other.gaussian.mean, atol=1e-5, rtol=0)
    assert one.prediction.output.requires_grad
    assert graphs["unique_graphs"] == compiled
    (blocks,) = policy.compiled.values()
    assert str(blocks) == f"{blocks.number} of {blocks.number} blocks"
    assert "uncompiled" not in caplog.text

    # Beyond the limit blocks run uncompiled, and the count says so.
    with torch._dynamo.config.patch(recompile_limit=1):
        policy.replay_batch = 0
        again(policy, whole.records[0].x)
        again(policy, x)
    assert blocks.eager
    assert "a block runs uncompiled" in caplog.text
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sd15", {"ResnetBlock2D", "Transformer2DModel"}),
        ("sd3", {"JointTransformerBlock"}),
        ("wan_t2v", {"WanTransformerBlock"}),
    ],
)
def test_repeated_blocks_are_found(name: str, kinds: set[str], make_policy: MakePolicy) -> None:
    (model,) = make_policy(name, weights=None).denoisers.values()
    blocks = repeated_blocks(model)
    assert blocks
    assert {type(b).__name__ for b in blocks} <= kinds
    nested = [b for a in blocks for b in blocks if a is not b and any(m is b for m in a.modules())]
    assert not nested, "a block in a block would be compiled twice"


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao_int8"])
def test_a_quantised_base_is_trained_through_its_adapter(
    kind: Quantization, make_policy: MakePolicy
) -> None:
    package = PACKAGES[kind].module
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "bitsandbytes" and not torch.cuda.is_available():
        pytest.skip("diffusers quantises with bitsandbytes on an accelerator only")
    policy = make_policy("sd3", memory=Memory(quantize=kind))
    exact = images(make_policy("sd3"))
    assert 0 < (images(policy) - exact).abs().mean() < 0.1
    (rollout,) = policy.run(
        PROMPTS, noise_of(0, 1, 2), record=[1], stochastic=[1], transition=CPS()
    )
    (record,) = rollout.records
    again = policy.replay(PROMPTS, record.x, 1, CPS())
    log_prob = again.gaussian.log_prob(record.x_next)
    torch.testing.assert_close(log_prob, record.gaussian.log_prob(record.x_next), atol=1e-5, rtol=0)
    log_prob.sum().backward()
    assert policy.trainable is not None
    assert all(p.grad is not None for p in policy.trainable.parameters.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "xformer"}, "memory.attention must be one of .* did you mean 'xformers'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memory(**settings).check(trains_all=False)


@pytest.mark.parametrize(
    ("settings", "trains_all", "dtype", "message"),
    [
        (
            {},
            False,
            "float16",
            r"'native' is not supported with model\.dtype = 'float16'.*'bfloat16'",
        ),
        ({}, True, "bfloat16", r"full fine-tuning keeps them in fp32; use memory\.arithmetic"),
        ({"quantize": "nf4"}, False, "bfloat16", r"not supported with memory\.quantize = 'nf4'"),
    ],
)
def test_what_needs_autocast_is_refused(
    settings: dict[str, Any], trains_all: bool, dtype: str, message: str
) -> None:
    memory = Memory(arithmetic="native", **settings)
    empty = object.__new__(DiffusionPipeline)  # refused before it is looked at
    with pytest.raises(ValueError, match=message):
        memory.check(trains_all, dtype)
    weights = Full() if trains_all else LoRA()
    with pytest.raises(ValueError, match=message):
        PipelinePolicy(empty, sampling=Sampling(), weights=weights, dtype=dtype, memory=memory)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_native_arithmetic_is_autocast_within_the_noise_of_bfloat16(
    name: str, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Gradients and weights of the adapter are in fp32, and the first ratio is exactly 1."""
    outputs, gradients, kept = {}, {}, {}
    for mode, dtype in (("fp32", "float32"), ("autocast", "bfloat16"), ("native", "bfloat16")):
        memory = Memory(arithmetic="native" if mode == "native" else "autocast")
        policy = make_policy(name, dtype=dtype, memory=memory)
        assert policy.trainable is not None
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable.parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        with RulesOfCuda():
            (rollout,) = policy.run(
                PROMPTS, noise_of(0, 1, 2), nodes=[0, 1], record=[0], stochastic=[0], transition=CPS(),
                decode=False,
            )  # fmt: skip
            (record,) = rollout.records
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
            ):
                again = policy.replay(PROMPTS, record.x, 0, CPS())
        log_prob = again.gaussian.log_prob(record.x_next)
        assert torch.equal(log_prob, record.gaussian.log_prob(record.x_next))
        again.prediction.output.float().square().sum().backward()
        found = [p.grad for p in policy.trainable.parameters.values()]
        assert all(g is not None and g.dtype == torch.float32 for g in found)
        outputs[mode] = again.prediction.output.detach().float()
        gradients[mode] = torch.cat([g.flatten() for g in found if g is not None])
        kept[mode] = sum(sizes)
        export(policy.stock_pipeline(), policy.trainable, tmp_path / mode)

    def error(values: Mapping[str, Tensor], mode: str) -> float:
        return float((values[mode] - values["fp32"]).norm() / values["fp32"].norm())

    for values in (outputs, gradients):
        assert 0 < error(values, "native") < max(2 * error(values, "autocast"), 0.02)
    assert kept["native"] < kept["autocast"]
    files = [
        load_file(tmp_path / m / "pytorch_lora_weights.safetensors") for m in ("autocast", "native")
    ]
    assert all(
        torch.equal(files[0][k], v) and v.dtype == torch.float32 for k, v in files[1].items()
    )
    assert files[0].keys() == files[1].keys()


def test_mixed_precisions_are_answered_in_one_sentence(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", dtype="bfloat16", memory=Memory(arithmetic="native"))
    policy.pipeline.transformer.proj_out.float()
    with pytest.raises(
        UnsupportedPipelineError, match=r"SD3Transformer2DModel mixes precisions.*'autocast'"
    ):
        images(policy)


def test_what_cannot_go_together_or_is_not_there(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match=r"freezes the denoiser; it needs .* 'lora'"):
        Memory(quantize="nf4").check(trains_all=True)
    with pytest.raises(ValueError, match=r"memory.attention = 'flash': .*"):
        make_policy("flux", memory=Memory(attention="flash"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowgrpo.policy.settings.find_spec", lambda name: None)
    assert absent_packages(Memory(attention="_native_flash"), "adamw") == []
    install = "needs bitsandbytes: pip install 'flowgrpo[quant]'"
    assert absent_packages(Memory(quantize="nf4"), "adamw8bit") == [
        f"memory.quantize = 'nf4' {install}",
        f"train.optimizer = 'adamw8bit' {install}",
    ]
    # The packages that diffusers itself misses here, by its messages.
    missed = {}
    for backend in AttentionBackendName:
        try:
            _check_attention_backend_requirements(backend)
        except RuntimeError as error:
            missed[backend.value] = re.sub(r"\W", "", str(error)).lower()
    missed = {k: v for k, v in missed.items() if not k.endswith(("npu", "xla"))}
    assert "xformers" in missed
    for backend, message in missed.items():
        (sentence,) = absent_packages(Memory(attention=backend), "adamw")
        package = sentence.removeprefix(f"memory.attention = '{backend}' needs ").partition(":")[0]
        assert re.sub(r"\W", "", package).lower() in message


def test_encoders_stay_where_they_are_on_the_cpu() -> None:
    model = torch.nn.Linear(2, 2)
    encoders = Encoders({"text_encoder": model}, torch.device("cpu"), offload=True)
    assert encoders.copies == {}
    with encoders.loaded():
        assert model(torch.ones(1, 2)).device.type == "cpu"


class Offloaded(Encoders):
    """Encoders that are offloaded although their device is the CPU."""

    def __init__(self, models: Mapping[str, torch.nn.Module], device: torch.device, offload: bool):
        super().__init__(models, device, offload=False)
        self.copies = {name: HostCopy(model, device) for name, model in models.items()}


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_rollout_brings_the_encoders_once(
    name: str, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_policy(name, weights=None, batch_size=4)
    made: list[Offloaded] = []
    monkeypatch.setattr(placement, "Encoders", lambda *a: made.append(Offloaded(*a)) or made[-1])
    policy = make_policy(name, weights=None, batch_size=4)

    def visits() -> list[int]:
        return [copy.visits for copy in made[0].copies.values()]

    prompts = [Prompt(f"{i} cats", negative=f"{i} dogs") for i in range(12)]
    noise = noise_of(*range(12))
    options: dict[str, Any] = {"nodes": [0, 1], "record": [0], "decode": False}
    ours = [r.records[0] for r in policy.run(prompts, noise, **options)]
    assert set(visits()) == {1}
    theirs = [r.records[0] for r in expected.run(prompts, noise, **options)]
    assert all(torch.equal(a.x_next, b.x_next) for a, b in zip(ours, theirs, strict=True))
    list(policy.run(prompts, noise, **options))
    policy.replay(prompts[8:], ours[2].x, 0, transition_of(name))
    assert set(visits()) == {1}
    list(policy.run([*prompts[6:], Prompt("a", negative="b")], noise_of(*range(7)), **options))
    assert set(visits()) == {2}


def test_a_frozen_model_is_not_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    copy = HostCopy(model, torch.device("cpu"))
    host = model.weight.data_ptr()
    assert copy.num_bytes == 24
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    for _ in range(2):
        model(torch.ones(1, 2))
        assert model.weight.data_ptr() != host
    assert copy.visits == 1
    copy.drop()
    assert model.weight.data_ptr() == host


def test_an_offloaded_vae_is_there_while_it_works() -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    copy = offload_autoencoder(vae, torch.device("cpu"))
    # This is how a pipeline knows where the work is done.
    assert vae._hf_hook.execution_device == torch.device("cpu")
    present: list[bool] = []
    vae.decoder.register_forward_pre_hook(lambda *_: present.append(copy.is_present))
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mean
        assert not copy.is_present
        vae.decode(latents)
        assert present == [True]
        assert not copy.is_present
        with pytest.raises(RuntimeError):
            vae.decode(torch.zeros(1, 3, 8, 8))
    assert not copy.is_present
    assert copy.visits == 3


def test_fingerprints_tell_values_apart() -> None:
    values = [
        1, 1.0, "1", None, True, [1], [[1]], {"a": 1}, torch.ones(1), torch.ones(1, 1),
        torch.ones(1, dtype=torch.bfloat16), torch.zeros(1), torch.ones(1).numpy(),
    ]  # fmt: skip
    prints = [fingerprint(v) for v in values]
    assert None not in prints
    assert len(set(prints)) == len(values)
    assert fingerprint(torch.ones(1)) == fingerprint(torch.ones(1))
    assert fingerprint([1, object()]) is None
