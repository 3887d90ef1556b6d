"""What cannot be a policy is refused in one sentence; what a pipeline raises becomes one."""

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    IFPipeline,
    LCMScheduler,
    LTXConditionPipeline,
    LucyEditPipeline,
    QwenImageEditPlusPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DModel,
)
from PIL import Image

from flowgrpo.cli import main
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.prompts import Prompt
from flowgrpo.doctor import Settings, examine
from flowgrpo.doctor.examine import _completions
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.arguments import Calling, alone, generators_for, image_each, together
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.probe import check_sizes
from tests.conftest import sampling_of
from tests.tiny.parts import GRADIENT, t5_text, t5_tokenizer

Tiny = Callable[[str], Path]
SMALL = Sampling(num_steps=4, height=16, width=16)
FULL = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    KeyboardInterrupt(),
)
"""Errors that say nothing about a pipeline."""


def resaved(source: Path, kind: type[DiffusionPipeline], folder: Path) -> Path:
    """The components of a tiny folder as another pipeline."""
    components = DiffusionPipeline.from_pretrained(source).components
    kind(**components).save_pretrained(folder)
    return folder


def refusal(folder: Path, sampling: Sampling) -> str:
    """What the doctor says instead of a diagnosis: one line."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        examine(folder, Settings(sampling=sampling))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_consistency_samplers_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd15"))
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    assert "LCMScheduler cannot be a policy" in refusal(tmp_path, sampling_of("sd15"))


def test_noise_predicted_from_nothing_but_noise_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sdxl"))
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    pipeline.save_pretrained(tmp_path)
    assert "rescale_betas_zero_snr" in refusal(tmp_path, sampling_of("sdxl"))


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    for folder, words in ((tmp_path, r"no model_index\.json"), (tmp_path / "x", "no such folder")):
        with pytest.raises(FileNotFoundError, match=words):
            examine(folder, Settings(sampling=SMALL))
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is a modular pipeline"):
        examine(tmp_path, Settings(sampling=SMALL))


def test_a_broken_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny("sd15"), folder)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    assert refusal(folder, SMALL).startswith(f"loading {folder} failed: OSError")


def test_a_strength_that_cuts_the_schedule_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resaved(tiny("flux"), FluxImg2ImgPipeline, tmp_path / "img2img")
    call = {"image": GRADIENT, "max_sequence_length": 16}
    sampling = Sampling(num_steps=4, height=16, width=16, call=call)
    assert "strength = 0.6 cannot be a policy" in refusal(folder, sampling)

    # What its signature says is seen in its loop too.
    monkeypatch.setattr("flowgrpo.policy.pipeline.check_strength", lambda *_: None)
    half = Sampling(num_steps=4, height=16, width=16, call=call | {"strength": 0.5})
    policy = PipelinePolicy.from_pretrained(folder, sampling=half)
    with pytest.raises(UnsupportedPipelineError, match="took 2 of 4 denoising steps"):
        policy.images([Prompt("a")] * 2, SampleNoise([Random(0).at(i) for i in range(2)]))
    monkeypatch.undo()

    # From pure noise it is a policy, though its loop cannot be empty when a state is decoded.
    whole = Sampling(num_steps=4, height=16, width=16, call=call | {"strength": 1.0})
    assert examine(folder, Settings(sampling=whole)).passed


def test_stepping_several_states_is_refused(
    tiny: Tiny, tmp_path: Path, make_policy: Callable[..., PipelinePolicy]
) -> None:
    scheduler = make_policy("sd15").scheduler
    copy.deepcopy(scheduler)
    with pytest.raises(UnsupportedPipelineError, match="several states at once"):
        copy.deepcopy(scheduler)
    folder = resaved(tiny("skyreels_v2"), SkyReelsV2DiffusionForcingPipeline, tmp_path / "df")
    assert "it steps several states at once" in refusal(
        folder, sampling_of("skyreels_v2", num_frames=9)
    )


def test_inpainting_that_blends_between_steps_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = resaved(tiny("sdxl"), StableDiffusionXLInpaintPipeline, tmp_path / "inpaint")
    sampling = Sampling(num_steps=4, height=16, width=16, call={"strength": 1.0})
    assert "it changes its state between two steps" in refusal(folder, sampling)


def test_times_for_each_token_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    parts = DiffusionPipeline.from_pretrained(tiny("ltx")).components
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler()
    LTXConditionPipeline(**parts).save_pretrained(tmp_path)
    text = refusal(tmp_path, sampling_of("ltx"))
    assert "it steps with per_token_timesteps, so that parts of its state" in text


def test_sound_is_refused(make_policy: Callable[..., PipelinePolicy]) -> None:
    policy = make_policy("sd15")
    decode = policy.pipeline.image_processor.postprocess
    policy.pipeline.image_processor.postprocess = lambda *a, **k: decode(*a, **k)[:, 0]
    with pytest.raises(
        UnsupportedPipelineError,
        match=r"neither images nor videos, but tensors of shape \(2, 16, 16\)",
    ):
        policy.images([Prompt("a")] * 2, SampleNoise([Random(0).at(i) for i in range(2)]))


def test_a_pipeline_that_prepares_a_prior_first_is_refused(
    make_policy: Callable[..., PipelinePolicy],
) -> None:
    policy = make_policy("sd15")
    prepare = policy.pipeline.prepare_latents

    def prior_first(*args: Any, **kwargs: Any) -> Any:
        policy.scheduler.call.prepared.append(("prepare_latents", [torch.zeros(2, 32)]))
        return prepare(*args, **kwargs)

    policy.pipeline.prepare_latents = prior_first
    with pytest.raises(
        UnsupportedPipelineError, match=r"of the tensors that it prepares, \[\(2, 32\)\]"
    ):
        policy.images([Prompt("a")] * 2, SampleNoise([Random(0).at(i) for i in range(2)]))


def test_a_pipeline_without_latents_is_refused(tmp_path: Path) -> None:
    from tests.tiny.image import unet

    tokenizer = t5_tokenizer()
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, 32),
        unet=unet(cross_attention_dim=32, attention_head_dim=2, in_channels=3, out_channels=6),
        scheduler=DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path)
    assert "neither prepare_latents nor an argument latents" in refusal(tmp_path, SMALL)


def test_a_pipeline_without_prompts_is_refused(tmp_path: Path) -> None:
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(sample_size=16, **sizes, **blocks)
    DDPMPipeline(unet=model, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    assert "DDPMPipeline cannot be a policy: its call takes no prompt" in refusal(tmp_path, SMALL)


def test_what_a_call_raises_is_told_with_what_was_tried(tiny: Tiny) -> None:
    text = refusal(tiny("sd15"), Sampling(num_steps=4, height=17, width=16))
    assert "tried 3 prompts: ValueError: `height` and `width` have to be divisible by 8" in text
    assert "; 1 prompt: ValueError" in text


def test_a_missing_image_is_made(tiny: Tiny) -> None:
    sampling = sampling_of("cogvideox_i2v", call={"max_sequence_length": 16})
    diagnosis = examine(tiny("cogvideox_i2v"), Settings(sampling=sampling))
    assert diagnosis.passed
    assert diagnosis.notes == ("with a generated image",)


def test_one_prompt_at_a_time_is_enough(tiny: Tiny, tmp_path: Path) -> None:
    folder = resaved(tiny("qwen_image_edit"), QwenImageEditPlusPipeline, tmp_path / "plus")
    sampling = Sampling(num_steps=2, height=256, width=256, call={"image": GRADIENT})
    diagnosis = examine(folder, Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}
    assert diagnosis.prompts == 1
    note = "the pipeline takes one prompt at a time: set the batch sizes to 1 for training"
    assert note in diagnosis.notes


def test_the_command_takes_an_image_and_writes_json(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, result = tmp_path / "image.png", tmp_path / "result.json"
    GRADIENT.save(image)
    size = ["--size", "32x32", "--frames", "9", "--steps", "3", "--device", "cpu"]
    options = [*size, "--call", "max_sequence_length=16", "--json", str(result)]
    command = ["doctor", str(tiny("cogvideox_i2v")), *options]
    assert main([*command, "--image", str(image)]) == 0
    table = json.loads(result.read_text())
    assert table["passed"] is True
    assert table["pipeline"] == "CogVideoXImageToVideoPipeline"
    assert (table["path"], table["media"], table["prompts"]) == ("diffusion", "video", 3)
    assert table["notes"] == []
    assert all(c["passed"] and c["measured"] is not None for c in table["checks"])
    assert "an export loads back to the same image" in capsys.readouterr().out

    command[-1] = str(tmp_path / "refused.json")
    assert main([*command, "--call", "eta_=1", "--image", str(image)]) == 1
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused["passed"] is False
    assert "eta_" in refused["refused"]
    assert "eta_" in capsys.readouterr().err

    image.write_text("no image")
    assert main([*command, "--image", str(image)]) == 1
    assert f"{image} is not an image that can be read" in capsys.readouterr().err


def test_more_steps_than_the_training_timesteps_are_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """The grid of SD 1.5 is moved up by its steps_offset, and does not fit with all 1000 timesteps."""
    command = ["sample", str(tiny("sd15")), "a cat", "--steps", "1000", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "sampling.num_steps = 1000 gives the timestep 1000" in capsys.readouterr().err


def test_the_form_that_works_is_kept() -> None:
    picture = Image.new("RGB", (2, 2))
    seen: list[Any] = []

    def one_image_each(arguments: dict[str, Any]) -> int:
        seen.append(arguments["image"])
        if not isinstance(arguments["image"], list):
            raise IndexError("deep inside")
        return len(arguments["image"])

    calling = Calling()
    assert calling(one_image_each, {"prompt": ["a", "b"], "image": picture}, 2) == 2
    assert calling(one_image_each, {"prompt": ["a", "b", "c"], "image": picture}, 3) == 3
    assert seen == [picture, [picture] * 2, [picture] * 3]


def test_a_single_prompt_is_passed_as_a_string_where_a_list_is_refused() -> None:
    def single(arguments: dict[str, Any]) -> Any:
        if isinstance(arguments["prompt"], list):
            raise ValueError("no lists")
        return arguments["prompt"]

    calling = Calling()
    with pytest.raises(ValueError, match="no lists"):
        calling(single, {"prompt": ["a", "b"]}, 2)
    assert calling(single, {"prompt": ["a"]}, 1) == "a"
    with pytest.raises(UnsupportedPipelineError, match="one prompt at a time"):
        calling(single, {"prompt": ["a", "b"]}, 2)


def test_a_string_has_one_generator() -> None:
    first, second = torch.Generator(), torch.Generator()
    assert generators_for({"prompt": "a"}, [first]) is first
    assert generators_for({"prompt": "a"}, first) is first
    assert generators_for({"prompt": ["a", "b"]}, [first, second]) == [first, second]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_running_out_of_memory_is_not_another_form(error: BaseException) -> None:
    calls = []

    def full(arguments: dict[str, Any]) -> None:
        calls.append(arguments)
        raise error

    calling = Calling()
    with pytest.raises(type(error)):
        calling(full, {"prompt": ["a"], "image": Image.new("RGB", (2, 2))}, 1)
    assert len(calls) == 1
    assert calling.form is None


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_running_out_of_memory_is_not_a_loop_that_cannot_be_empty(
    error: BaseException,
    make_policy: Callable[..., PipelinePolicy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy("sd15")
    prompts, noise = [Prompt("a")], SampleNoise([Random(0).at(0)])
    (rollout,) = policy.run(prompts, noise, record=[3])
    last, evaluations = rollout.records[0].x_next, policy.num_evaluations
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(policy.pipeline.vae, "decode", full)
        with pytest.raises(type(error)):
            policy.decode(prompts, last)
    assert len(calls) == 1
    # Had the policy concluded anything, decoding would now cost a step of the denoiser.
    assert torch.equal(policy.decode(prompts, last), rollout.media)
    assert policy.num_evaluations == evaluations


@pytest.mark.parametrize("error", FULL[:3], ids=repr)
def test_running_out_of_memory_is_not_a_size_that_is_not_made(
    error: BaseException,
    make_policy: Callable[..., PipelinePolicy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = make_policy("sd15")

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(policy.pipeline.vae, "decode", full)
    with pytest.raises(type(error)):
        check_sizes(policy, [Prompt("a")], policy.sampling)


def test_a_memory_error_after_the_loop_is_raised(
    make_policy: Callable[..., PipelinePolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("sd15")
    errors: list[Exception] = [ValueError("cannot return latents"), MemoryError()]

    def fail(*_: Any, **__: Any) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(policy.pipeline, "maybe_free_model_hooks", fail)
    (rollout,) = policy.run([Prompt("a")], SampleNoise([Random(0).at(0)]), decode=False)
    assert rollout.x is not None
    with pytest.raises(MemoryError):
        list(policy.run([Prompt("a")], SampleNoise([Random(0).at(0)]), decode=False))


def test_the_forms() -> None:
    picture = Image.new("RGB", (2, 2))
    given = {"prompt": ["a", "b"], "image": picture, "height": 16}
    assert together(given, 2) == given
    texts = {
        "negative_prompt": "c",
        "prompt_2": "d",
        "system_prompt": "e",
        "negative_prompt_2": ["f"],
    }
    assert together(given | texts, 2) == given | texts | {
        "negative_prompt": ["c", "c"],
        "prompt_2": ["d", "d"],
    }
    assert alone({"prompt": ["a"], "negative_prompt": ["b"]}, 1) == {
        "prompt": "a",
        "negative_prompt": "b",
    }
    assert image_each(given, 2) == given | {"image": [picture, picture]}
    assert image_each({"prompt": ["a"]}, 1) is None
    assert alone(given, 2) is None
    assert alone({"prompt": ["a"], "height": 16}, 1) == {"prompt": "a", "height": 16}


def test_pictures_and_videos_that_a_call_needs_are_made() -> None:
    parameters = inspect.signature(LucyEditPipeline.__call__).parameters
    ways = list(_completions(Sampling(num_steps=4, num_frames=9, height=16, width=32), parameters))
    assert [words for _, words in ways] == ["", "with a generated video"]
    assert [f.size for f in ways[1][0].call["video"]] == [(32, 16)] * 9
    # As many frames as the pipeline makes by itself; nothing that was given.
    (_, (sampling, _)) = _completions(Sampling(num_steps=4), parameters)
    assert len(sampling.call["video"]) == 81
    assert len(list(_completions(Sampling(num_steps=4, call={"video": []}), parameters))) == 1
    parameters = inspect.signature(StableDiffusionXLInpaintPipeline.__call__).parameters
    words = [w for _, w in _completions(Sampling(num_steps=4), parameters)]
    assert words == ["", "with a generated image", "with a generated image and mask_image"]
