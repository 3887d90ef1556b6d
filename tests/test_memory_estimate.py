"""The memory estimate agrees with the memory of real tensors, and its advice is right."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flowgrpo
from benchmarks.memory_of_rewards import Case, estimate, measure, peak, save_reward
from flowgrpo.cli import main
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.losses.teachers import PIPELINE
from flowgrpo.memory import (
    GB,
    EstimateError,
    Footprint,
    MemoryOptions,
    advise,
    budget,
    estimate_footprint,
    memory_options,
)
from flowgrpo.memory.dispatch_modes import MemoryCounter
from flowgrpo.memory.division import fitting_division
from flowgrpo.memory.meta_pipeline import build, config_folder
from flowgrpo.memory.other_weights import other_policies
from flowgrpo.memory.printing import _print_advice
from flowgrpo.memory.tracer import Activations, Tracer, bytes_of
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.encoder_lockstep import text_encoders
from flowgrpo.policy.loading import DTYPES, denoisers, load_pipeline
from flowgrpo.policy.settings import Weights
from flowgrpo.policy.weights import Trainable
from flowgrpo.training.console import Console
from tests.conftest import noise_of, sampling_of
from tests.tiny import FAMILIES
from tests.tiny.parts import GRADIENT

Tiny = Callable[[str], Path]
PUBLISHED = Path(flowgrpo.__file__).parent / "policy" / "published"
LARGER = {"height": 64, "width": 64}
"""A size at which activations outweigh the arithmetic around the model, as at real sizes."""


def traced(folder: Path, call: dict[str, Any], dtype: str, weights: Weights) -> Activations:
    """The estimate for a training step of two samples."""
    pipeline = build(folder, DTYPES[dtype])
    Trainable(denoisers(pipeline), weights, seed=0, with_reference=False)
    full = isinstance(weights, Full)
    tracer = Tracer(pipeline, DTYPES[dtype], full=full, device="cpu", block=1)
    return tracer.training({"prompt": ["a red cube"] * 2, "num_inference_steps": 4, **call})


def measured(
    folder: Path, name: str, dtype: str, weights: Weights, checkpointing: bool
) -> tuple[int, int]:
    """Bytes that autograd saves in a real replay, and most bytes alive until its backward ends."""
    sampling = replace(sampling_of(name), height=64, width=64)
    policy = PipelinePolicy.from_pretrained(folder, sampling=sampling, weights=weights, dtype=dtype)
    assert policy.trainable is not None
    prompts = [Prompt("a red cube")] * 2
    (rollout,) = policy.run(prompts, noise_of(0, 1), record=[0], decode=False)
    for model in policy.denoisers.values():
        if checkpointing:
            model.enable_gradient_checkpointing()
    calls: list[tuple[nn.Module, Any, Any]] = []
    for model in policy.denoisers.values():
        model.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    policy.replay(prompts, rollout.records[0].x, 0, CPS())
    step, calls = calls, []
    known = [t for m in policy.models.values() for t in [*m.parameters(), *m.buffers()]]
    parameters = {t.untyped_storage()._cdata for t in known}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    for parameter in policy.trainable.parameters.values():
        # The budget counts gradients of weights separately, so they are dropped here.
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    # Only the models: at these sizes the latents would outweigh the activations of a block.
    with MemoryCounter(known) as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = [model(*args, **kwargs)[0] for model, args, kwargs in step]
        size = sum(t.untyped_storage().nbytes() for t in saved.values())
        saved.clear()
        sum(o.square().mean() for o in outputs).backward()
    return size, live.peak


@pytest.mark.parametrize(
    ("name", "dtype", "weights"),
    [
        ("sd3", "float32", LoRA(rank=4, alpha=8)),
        ("flux", "bfloat16", LoRA(rank=4, alpha=8)),
        ("sdxl", "float32", LoRA(rank=4, alpha=8)),
        ("wan_t2v", "float32", LoRA(rank=4, alpha=8)),
        ("sd3", "bfloat16", Full()),
    ],
)
def test_activations_are_those_of_a_real_replay(
    name: str, dtype: str, weights: Weights, tiny: Tiny
) -> None:
    found = traced(tiny(name), FAMILIES[name].call | LARGER, dtype, weights)
    saved, peak = measured(tiny(name), name, dtype, weights, checkpointing=False)
    assert found.saved == pytest.approx(saved, rel=0.15)
    assert found.peak(False) == pytest.approx(peak, rel=0.15)
    assert found.checkpointed is not None
    _, peak = measured(tiny(name), name, dtype, weights, checkpointing=True)
    assert found.peak(True) == pytest.approx(peak, rel=0.15)
    assert found.peak(True) < found.peak(False)


def test_gradients_of_rewards_keep_steps_decoder_and_reward(tiny: Tiny, tmp_path: Path) -> None:
    """Three steps, of which two are traced; the real update decodes one latent at a time."""
    case = Case("sd3", steps=3, decode_batch=1)
    reward = save_reward(tmp_path)
    found = estimate(case, tiny("sd3"), reward)
    for checkpointing in (False, True):
        real = measure(case, tiny("sd3"), reward, checkpointing)
        assert peak(found, case, checkpointing) == pytest.approx(real, rel=0.15)
    assert found.checkpointed is not None
    assert found.decoder > 0.2 * found.checkpointed
    assert found.checkpointed < 0.4 * found.peak(False)


def test_rewards_with_gradients_are_estimated_in_a_dry_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two texts; a reward that cannot be built without weights is named; the VAE has to stay on the device."""
    rewards = f"[{{model='pick_score', options={{model='{save_reward(tmp_path)}'}}}}, {{model='tests.test_reward_gradients:Contrast'}}]"
    settings = [
        f"model.path={tiny('flux')}", "sampling.num_steps=4", "sampling.height=32", "sampling.width=32",
        "algorithm.step_range=[0.1,0.8]", "train.optimizer=adamw", "train.train_batch=1", f"rewards={rewards}",
        "memory.gradient_checkpointing=false",
    ]  # fmt: skip
    options = [f"--set={s}" for s in settings]
    assert main(["train", "flux_srpo", "--dry-run", "--memory-gb=0.81", *options]) == 0
    said = capsys.readouterr().out
    assert "their size is unknown: Contrast" in said
    assert "activations, gradient checkpointing" in said
    assert "does NOT fit" in said
    assert "offload_vae" not in said


def test_policies_besides_the_trained_one_are_counted() -> None:
    """Copies of trained weights move to the device; a guided teacher or reference runs on larger batches."""

    def found(name: str, *changes: str) -> dict[str, tuple[int, int]]:
        config = flowgrpo.load(name, ["train.monitor_states=0", *changes])
        guided = config.sampling.guidance_scale

        def evaluated(sampling: Any) -> int:
            return 2 if sampling.guidance_scale != guided else 1

        return other_policies(config, 100, 1000, evaluated)

    assert found("quickstart") == {"reference": (100, 2)}
    assert found("quickstart", "model.weights={kind='lora'}") == {"reference": (0, 2)}
    assert found("quickstart_flow_grpo") == {}
    assert found("quickstart_distillation") == {"teacher": (100, 2)}
    lora = ["model.weights={kind='lora'}"]
    assert found("quickstart_distillation", *lora) == {"teacher": (0, 2)}
    adapter = [*lora, "loss.teachers=[{path='an/adapter', guidance_scale=1.0}]"]
    assert found("quickstart_distillation", *adapter) == {"teacher": (100, 1)}
    model = [*lora, "loss.teachers=[{path='a/model', weights='model', guidance_scale=1.0}]"]
    assert found("quickstart_distillation", *model) == {"teacher": (1000, 1)}


@pytest.mark.parametrize("weights", [LoRA(rank=2, alpha=2), Full()], ids=["lora", "full"])
def test_copies_of_teachers_and_references_have_the_size_of_the_trained_weights(
    weights: Weights, tiny: Tiny
) -> None:
    models = denoisers(load_pipeline(tiny("sd3")))
    made = Trainable(models, weights, seed=0, with_reference=True, teachers={PIPELINE: {}, "b": {}})
    trained = sum(p.numel() for p in made.parameters.values())
    for copy in (*made._teachers.values(), made._reference or []):
        assert sum(t.nbytes for t in copy) == (4 * trained if copy else 0)
    assert bool(made._reference) == isinstance(weights, Full)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan_t2v", "cogvideox"])
def test_weights_are_counted_exactly(name: str, tiny: Tiny) -> None:
    blank, real = build(tiny(name), torch.float16), load_pipeline(tiny(name), torch.float16)
    for part, model in real.components.items():
        if isinstance(model, nn.Module):
            assert bytes_of(blank.components[part]) == bytes_of(model), part


def test_a_published_model_is_built_without_memory() -> None:
    """Not even for a moment: the allocator would keep the address space, and forks would fail."""
    allocated: list[int] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # fmt: skip
            made = func(*args, **kwargs or {})
            if isinstance(made, Tensor) and made.device.type == "cpu":
                allocated.append(made.numel() * made.element_size())
            return made

    with Counted():
        build(Path("flowgrpo/policy/published/flux1_dev"), torch.bfloat16)
    assert 0 < max(allocated) < 2**20, "positions, norms and schedules of noise"


def test_published_models_have_their_size() -> None:
    sizes = {
        ("sd35_medium", "transformer"): 2_243_171_520,
        ("sd35_medium", "text_encoder_2"): 694_659_840,
        ("sd35_medium", "text_encoder_3"): 4_762_310_656,
        ("sd35_large", "transformer"): 8_056_627_520,
        ("flux1_dev", "transformer"): 11_901_408_320,
        ("flux1_dev", "text_encoder"): 123_060_480,
        ("flux1_dev", "vae"): 83_819_683,
        ("sd15", "unet"): 859_520_964,
        ("sdxl_base", "unet"): 2_567_463_684,
        ("wan21_t2v_1_3b", "transformer"): 1_418_996_800,
        ("wan21_t2v_1_3b", "text_encoder"): 5_680_910_336,
        ("qwen_image", "transformer"): 20_430_401_088,
        ("qwen_image", "text_encoder"): 8_292_166_656,
        ("hunyuan_video", "transformer"): 12_821_012_544,
    }
    made = {name: build(PUBLISHED / name, torch.bfloat16) for name, _ in sizes}
    for (name, part), number in sizes.items():
        assert sum(p.numel() for p in made[name].components[part].parameters()) == number


@pytest.mark.parametrize("name", ["lumina2", "mochi", "flux_kontext", "flux2_klein"])
def test_values_that_shapes_depend_on_are_known(name: str, tiny: Tiny) -> None:
    """Masks and lengths, condition images, and statistics that the pipeline reads from its VAE."""
    pipeline = build(tiny(name), torch.bfloat16)
    Trainable(denoisers(pipeline), LoRA(rank=4), seed=0, with_reference=False)
    tracer = Tracer(pipeline, torch.bfloat16)
    call = {"prompt": ["a red cube"] * 2, "num_inference_steps": 4, **FAMILIES[name].call}
    tracer.rollout(call)
    assert tracer.peaks["vae"] > 0
    assert tracer.training(call).saved > tracer.peaks["transformer"] / 10


def test_missing_config_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EstimateError, match="config files of nobody/nothing cannot be downloaded"):
        config_folder("nobody/nothing")
    with pytest.raises(EstimateError, match=r"no model_index\.json"):
        config_folder(tmp_path)


FOOTPRINT = Footprint(
    denoisers={"transformer": 4 * GB},
    linear=2 * GB,
    linear_bytes=4 * GB,
    encoders={"text_encoder": 8 * GB},
    vae=0,
    trained=GB // 64,
    adapter=GB // 16,
    averaged=False,
    experience=0,
    rewards={"pick_score": 4 * GB, "own": None},
    encode=0,
    rollout=GB,
    decode=4 * GB,
    training=Activations(saved=16 * GB, transient=GB, checkpointed=2 * GB),
    within=False,
    batches=(4, 4),
)
OPTIONS = MemoryOptions(rollout_batch=4, train_batch=4)


def test_the_number_of_devices_that_a_divided_denoiser_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that groups can be shared among; moments in 8 bits and quantised weights are not divided."""
    large = replace(
        FOOTPRINT,
        denoisers={"transformer": 48 * GB},
        trained=6 * GB,
        experience=32 * GB,
        linear=0,
        linear_bytes=0,
    )
    config = flowgrpo.load("hunyuan_dance", ["train.groups=24"])
    assert budget(large, replace(OPTIONS, optimizer="adamw8bit")).peak > 100 * GB
    found = fitting_division(config, large, 1, 60 * GB)
    assert found is not None
    assert found.processes == 4
    assert found.settings[:2] == ("parallel.shard = 'denoiser'", "train.optimizer = 'adamw'")
    # 48 GB of weights, as many of moments, 24 of gradients, 32 of latents in four parts; the reward's 4 are whole.
    assert found.peak > (48 + 48 + 24 + 32) / 4 * GB + 4 * GB
    assert found.peak < 60 * GB
    assert fitting_division(config, large, 1, 8 * GB) is None
    _print_advice(config, large, memory_options(config), 1, 60 * GB, Console())
    said = capsys.readouterr().out
    assert "does NOT fit\n" in said  # No setting helps on one device, so none is announced.
    assert "a smaller model, or LoRA" in said
    assert (
        "divide it among 4 devices: --nproc 4 with parallel.shard = 'denoiser', train.optimizer = 'adamw'"
        in said
    )
    assert (
        fitting_division(
            flowgrpo.load("hunyuan_dance", ["train.groups=3", "train.updates=1"]), large, 1, 60 * GB
        )
        is None
    )


def test_second_models_are_counted() -> None:
    """A fake score's values and two moments, always; a teacher's weights while it is evaluated; an old policy."""
    plain = budget(FOOTPRINT, OPTIONS)
    scored = budget(replace(FOOTPRINT, fake_score=True), OPTIONS)
    assert scored.peak - plain.peak == 12 * FOOTPRINT.trained
    other = {"teacher": (4 * GB, FOOTPRINT.rollout)}
    taught = budget(replace(FOOTPRINT, others=other), replace(OPTIONS, train_batch=2))
    assert taught.phases["teacher"] == 4 * GB + GB // 2
    assert "teacher" not in plain.phases
    old = budget(replace(FOOTPRINT, old_policy=True), OPTIONS)
    assert old.peak - plain.peak == 4 * FOOTPRINT.trained


def test_decoding_in_parts_is_advised_where_the_decoder_is_recomputed() -> None:
    """Of the peak with checkpointing, the VAE's part shrinks with the latents that it decodes at a time."""
    training = Activations(saved=64 * GB, transient=0, checkpointed=12 * GB, decoder=8 * GB)
    footprint = replace(FOOTPRINT, training=training, encoders={}, vae=GB)
    options = replace(OPTIONS, gradient_checkpointing=True, vae_stays=True)
    whole, single = (budget(footprint, replace(options, decode_batch=d)) for d in (0, 1))
    assert whole.phases["training"] - single.phases["training"] == 6 * GB
    changes, fits = advise(footprint, options, 17 * GB)
    assert fits
    assert [c.setting for c in changes] == ["memory.decode_batch = 1"]


def test_a_budget_adds_the_largest_phase() -> None:
    found = budget(FOOTPRINT, OPTIONS)
    assert found.phase == "training"
    always = 4 + 8 + 1 / 16 + 8 / 64 + 4
    assert found.peak == round((always + 4 / 64 + 17) * GB)
    eight_bit = budget(FOOTPRINT, replace(OPTIONS, optimizer="adamw8bit"))
    assert found.peak - eight_bit.peak == pytest.approx((8 - 2 - 8 / 256) / 64 * GB)
    smaller = budget(FOOTPRINT, replace(OPTIONS, quantize="nf4"))
    assert found.peak - smaller.peak == pytest.approx((4 - 2 * 0.5625) * GB)
    offloaded = budget(FOOTPRINT, replace(OPTIONS, offload_text_encoders=True))
    assert found.peak - offloaded.peak == 8 * GB
    assert offloaded.phases["text encoding"] == 8 * GB
    heavy = replace(FOOTPRINT, vae=GB)
    resident = budget(heavy, OPTIONS)
    offloaded_vae = budget(heavy, replace(OPTIONS, offload_vae=True))
    assert resident.peak - offloaded_vae.peak == GB
    assert offloaded_vae.phases["decoding"] - resident.phases["decoding"] == GB
    assert "weights of vae" not in offloaded_vae.resident
    kept = replace(FOOTPRINT, within=True)
    assert budget(kept, OPTIONS).phases["training"] == found.phases["training"]
    wide = replace(kept, rollout=6 * GB)
    assert budget(wide, OPTIONS).phases["training"] == round((4 / 64 + 16 + 6) * GB)


def test_a_divided_denoiser_takes_its_part_and_the_blocks_that_are_gathered() -> None:
    footprint = replace(
        FOOTPRINT,
        averaged=True,
        others={"reference": (GB, 0)},
        gathered=GB // 2,
        gathered_gradients=GB // 4,
    )
    alone, parts = budget(footprint, OPTIONS), budget(footprint, replace(OPTIONS, parts=8))
    divided = (
        "weights of transformer",
        "adapter",
        "optimizer (adamw)",
        "moving average",
    )
    for name, size in alone.resident.items():
        assert parts.resident[name] == (size / 8 if name in divided else size), name
    assert parts.phases["rollout"] - alone.phases["rollout"] == GB // 2
    assert alone.phases["reference"] == GB
    assert parts.phases["reference"] == GB // 8 + GB // 2
    assert parts.phases["decoding"] == alone.phases["decoding"]
    gradients = 4 * footprint.trained
    change = parts.phases["training"] - alone.phases["training"]
    assert change == GB // 2 + GB // 4 - gradients * 7 // 8


def test_divided_text_encoders_take_their_parts_and_the_blocks_that_are_gathered() -> None:
    encoders = {"text_encoder": 8 * GB, "image_encoder": GB}
    footprint = replace(FOOTPRINT, encoders=encoders, gathered_encoders=GB // 2)
    options = replace(OPTIONS, parts=8, encoder_parts=8)
    whole, parts = (budget(footprint, o) for o in (replace(options, encoder_parts=1), options))
    name = "weights of text_encoder"
    assert whole.resident.pop(name) == 8 * parts.resident.pop(name) == 8 * GB
    assert whole.resident == parts.resident
    assert parts.phases == {
        **whole.phases,
        "text encoding": whole.phases["text encoding"] + GB // 2,
    }
    # Parts that are offloaded stay in main memory; the image encoder, which is whole, visits the device.
    offloaded = budget(footprint, replace(options, offload_text_encoders=True))
    assert name not in offloaded.resident
    assert offloaded.phases["text encoding"] == parts.phases["text encoding"] + GB
    large = replace(
        footprint, encoders={"text_encoder": 40 * GB}, denoisers={"transformer": 20 * GB}
    )
    changes, fits = advise(large, replace(OPTIONS, most_parts=4), 24 * GB)
    assert fits
    assert "parallel.shard = 'all'" in [c.setting for c in changes]
    assert "parallel.shard = 'denoiser'" not in [c.setting for c in changes]


def test_sharding_is_advised_where_several_processes_can_shard() -> None:
    footprint = replace(FOOTPRINT, denoisers={"transformer": 40 * GB})
    changes, fits = advise(footprint, replace(OPTIONS, most_parts=4), 24 * GB)
    assert fits
    settings = [c.setting for c in changes]
    assert "parallel.shard = 'denoiser'" in settings
    assert not any("8bit" in s or "quantize" in s for s in settings)
    changes, _ = advise(footprint, OPTIONS, 24 * GB)
    assert not any("shard" in c.setting for c in changes)


def test_the_gathered_parameters_are_two_blocks_and_what_is_outside(tiny: Tiny) -> None:
    prompt = [Prompt("a red cube")]
    changes = [f"model.path={tiny('sd3')}", "sampling.height=32", "sampling.width=32", "sampling.call={max_sequence_length=16}"]  # fmt: skip
    config = flowgrpo.load("quickstart_flow_grpo", [*changes, "parallel.shard=denoiser"])
    found = estimate_footprint(config, prompt, 2, device="cpu")
    (model,) = denoisers(load_pipeline(tiny("sd3"))).values()
    blocks = [bytes_of(b) for b in model.transformer_blocks]
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert len(blocks) == 2  # so that all parameters are whole at once
    assert found.gathered == parameters
    # Gradients in fp32, and the message that adds them.
    assert found.gathered_gradients == 2 * max(blocks)
    assert memory_options(config, 2).parts == 2
    assert memory_options(config, 2).most_parts == 2
    assert memory_options(config, 2).encoder_parts == 1
    every = flowgrpo.load(
        "quickstart_flow_grpo", [*changes, "parallel.shard=all", "parallel.shard_group=2"]
    )
    assert memory_options(every, 4).encoder_parts == memory_options(every, 4).parts == 2
    encoders = text_encoders(load_pipeline(tiny("sd3"))).values()
    # Each has two blocks, so that all parameters of the largest are whole at once.
    sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in encoders]
    assert (found.gathered_encoders, found.whole_encoders) == (max(sizes), sum(sizes))
    half = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert estimate_footprint(half, prompt, 2, device="cpu").gathered == parameters // 2
    quantised = flowgrpo.load("quickstart_flow_grpo", [*changes, "model.weights.kind=lora", "memory.quantize=nf4"])  # fmt: skip
    assert memory_options(quantised, 2).most_parts == 1


def test_advice_fits_when_followed() -> None:
    assert advise(FOOTPRINT, OPTIONS, 80 * GB) == ([], True)
    changes, fits = advise(FOOTPRINT, OPTIONS, 24 * GB)
    assert fits
    assert changes[0].setting == "memory.offload_text_encoders = true"
    assert [c.peak for c in changes] == sorted((c.peak for c in changes), reverse=True)
    assert changes[-1].peak < 24 * GB
    assert len({c.setting.partition(" ")[0] for c in changes}) == len(changes)
    assert not advise(FOOTPRINT, OPTIONS, 2 * GB)[1]


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantize must be one of none, nf4.* got 'q2'"):
        replace(OPTIONS, quantize="q2")


def test_activations_scale_with_the_batch(tiny: Tiny) -> None:
    """The budget scales the traced activations; tracing with the other batch size must agree."""
    sizes = ["sampling.height=64", "sampling.width=64", "sampling.num_steps=4"]
    settings = [f"model.path='{tiny('sd3')}'", "model.dtype='bfloat16'", *sizes]
    found = []
    for batch in (2, 4):
        more = [f"train.rollout_batch={batch}", f"train.train_batch={batch}"]
        config = flowgrpo.load("sd35_medium_pickscore", [*settings, *more])
        found.append(estimate_footprint(config, [Prompt("a red cube")]))
    two, four = found
    choice = MemoryOptions(rollout_batch=4, train_batch=4)
    assert math.isclose(budget(two, choice).peak, budget(four, choice).peak, rel_tol=0.03)
    assert two.rewards == {"pick_score": 4 * 986_109_441}


@pytest.mark.parametrize("name", ["sd3", "flux_kontext"])
def test_sizes_and_conditions_of_prompts_are_counted(name: str, tiny: Tiny) -> None:
    """Sizes of their own, condition images, and a negative prompt for all."""
    settings = [f"model.path='{tiny(name)}'", "model.dtype='bfloat16'"]
    batches = ["train.rollout_batch=2", "train.train_batch=2"]
    config = flowgrpo.load("flux_dance", [*settings, *batches])
    sampling = sampling_of(name, num_steps=4)
    call = {k: v for k, v in sampling.call.items() if k not in ("image", "max_area")}
    config = replace(config, sampling=replace(sampling, call=call))
    more = {"sd3": {"height": 64, "width": 64}, "flux_kontext": {"images": [GRADIENT]}}[name]
    plain = [Prompt("a red cube"), Prompt("a blue one")]
    usual = estimate_footprint(config, plain)
    found = estimate_footprint(config, [plain[0], replace(plain[1], **more)])
    assert found.rollout > 1.2 * usual.rollout
    assert found.training.peak(checkpointing=False) > 1.2 * usual.training.peak(checkpointing=False)
    guided = call | {"negative_prompt": "blurry"}
    config = replace(config, sampling=replace(sampling, call=guided))
    assert estimate_footprint(config, plain).rollout >= usual.rollout


def test_a_second_autoencoder_is_supported(tiny: Tiny) -> None:
    """LTX-2 reads the statistics of its audio latents from the autoencoder's buffers."""
    settings = [f"model.path='{tiny('ltx2')}'", "train.rollout_batch=2", "train.train_batch=2"]
    config = flowgrpo.load("wan21_t2v", [*settings, "model.dtype='bfloat16'"])
    config = replace(config, sampling=sampling_of("ltx2"))
    found = estimate_footprint(config, [Prompt("a red cube")])
    assert found.decode > 0
    assert found.training.saved > 0


def test_a_component_that_cannot_be_built_is_named(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("sd3"), tmp_path / "sd3")
    file = tmp_path / "sd3" / "model_index.json"
    index = json.loads(file.read_text())
    # A list that is a plain value is not taken for a component.
    file.write_text(json.dumps(index | {"layers": [1, 2]}))
    with pytest.raises(TypeError, match="layers"):
        build(tmp_path / "sd3", torch.float32)
    file.write_text(json.dumps(index | {"vae": ["diffusers", "Nothing"]}))
    with pytest.raises(EstimateError, match="the component vae cannot be built"):
        build(tmp_path / "sd3", torch.float32)


def test_a_dry_run_prints_the_estimate(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["sampling.num_steps=4", "sampling.height=32", "sampling.width=32"]
    options = [f"--set={s}" for s in (f"model.path={tiny('sd3')}", *settings)]
    assert main(["train", "sd35_medium_pickscore", "--dry-run", "--memory-gb=4.5", *options]) == 0
    said = capsys.readouterr().out
    for part in ("weights of transformer", "optimizer (adamw)", "training", "decoding", "peak"):
        assert part in said
    assert "without, " in said
    assert "does NOT fit" in said
    assert main(["train", "sd35_medium_pickscore", "--dry-run", "--memory-gb=9", *options]) == 0
    assert "of 9.00 GB: fits" in capsys.readouterr().out


def test_a_dry_run_works_without_an_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", "sd35_medium_pickscore", "--dry-run", "--set=model.path=no/such"]) == 0
    said = capsys.readouterr().out
    assert "the memory cannot be estimated: the config files of no/such" in said
    assert "the configuration is valid" in said


def test_the_counter_follows_the_lifetime_of_storages() -> None:
    known = torch.ones(4)
    with MemoryCounter([known], block=512) as live:
        a = torch.ones(256) + 1
        assert (live.live, live.peak) == (1024, 2048)
        view = a[:4]
        known.add_(1)
        assert live.live == 1024
        del a
        assert live.live == 1024
        del view
        assert live.live == 0


def test_a_real_pipeline_is_left_alone(tiny: Tiny) -> None:
    """The tracer makes subclasses; other pipelines of the same class do not change."""
    pipeline = build(tiny("sd3"), torch.float32)
    Tracer(pipeline, torch.float32)
    real = DiffusionPipeline.from_pretrained(tiny("sd3"))
    assert type(real) is not type(pipeline)
    assert type(real.transformer) is not type(pipeline.transformer)
    assert next(real.transformer.parameters()).device.type == "cpu"
