"""The doctor passes sound pipelines, names defects, and refuses pipelines that cannot be a policy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowgrpo.core.transitions import Gaussian
from flowgrpo.doctor import PROMPTS, Settings, checks, examine
from flowgrpo.doctor.examine import _call, _stock
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import Exported
from flowgrpo.policy.latent_injection import LatentInjection
from flowgrpo.policy.loading import variant_of
from flowgrpo.policy.scheduler import FlowPolicyScheduler
from tests.conftest import noise_of, sampling_of
from tests.tiny import FAMILIES
from tests.tiny.image import sd15_controlnet
from tests.tiny.parts import GRADIENT

Tiny = Callable[[str], Path]

FAMILIES_PAGE = Path(__file__).parents[1] / "docs" / "families.md"
NO_ADAPTERS = ("pixart_sigma", "prx", "prx_pixel")
FINITE = "the denoiser's output is finite"
STOCK = "noise level 0 equals the stock sampler"
VARIANCE = "sampled noise has the variance of its density"
SAME_BATCH = "replay equals rollout (same batch)"
SAME_BATCH_RATIO = "ratio is 1 before an update (same batch)"
ONE = "replay equals rollout (batch of 1)"
GRADIENTS = "gradients reach the trained weights"
BRANCH = "a branch equals its rollout"
DECODE = "decoding final latents equals the rollout"
EXPORT = "an export loads back to the same image"


def failures(folder: Path, name: str, **changes: Any) -> dict[str, str]:
    """The failed checks and their measured values."""
    diagnosis = examine(folder, Settings(sampling=sampling_of(name), **changes))
    assert len(diagnosis.checks) == 11
    documented = re.findall(r"^\| (.+?)(?: \(.*)? \|", FAMILIES_PAGE.read_text(), re.MULTILINE)
    assert {c.name.partition(" (")[0] for c in diagnosis.checks} <= set(documented)
    if "weights" not in changes:
        assert diagnosis.weights == ("full" if name in NO_ADAPTERS else "lora")
    assert diagnosis.path == ("flow" if FAMILIES[name].prediction == "flow" else "diffusion")
    assert diagnosis.media == ("video" if FAMILIES[name].video else "image")
    return {c.name: c.value for c in diagnosis.checks if not c.passed}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name: str, tiny: Tiny) -> None:
    assert failures(tiny(name), name) == {}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_full_weights_pass(name: str, tiny: Tiny) -> None:
    assert failures(tiny(name), name, weights=Full()) == {}


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_kontext", "cogvideox"])
def test_bfloat16_passes(name: str, tiny: Tiny) -> None:
    assert failures(tiny(name), name, dtype="bfloat16") == {}


@pytest.mark.parametrize("name", ["ltx2", "sd3", "wan_t2v"])
def test_bfloat16_is_no_less_exact_than_the_pipelines_own(name: str, tiny: Tiny) -> None:
    """LTX-2 computes token positions up to 512 in fp32; rounded to bfloat16 it draws another video."""
    images = {}
    noise = noise_of(0, 1)
    for dtype in ("float32", "bfloat16"):
        settings = Settings(sampling=sampling_of(name), dtype=dtype)
        stock = _stock(tiny(name), settings)
        images["stock", dtype] = _call(stock, settings.sampling, PROMPTS[:2], noise)
        policy = PipelinePolicy.from_pretrained(tiny(name), sampling=settings.sampling, dtype=dtype)
        images["ours", dtype] = policy.images(PROMPTS[:2], noise)
    exact = images["stock", "float32"]
    stock, ours = ((images[who, "bfloat16"] - exact).abs().mean() for who in ("stock", "ours"))
    assert 0 < ours < 2 * stock


def test_a_controlnet_passes_in_bfloat16(tmp_path: Path) -> None:
    sd15_controlnet().save_pretrained(tmp_path)
    condition = {"image": GRADIENT}
    assert failures(tmp_path, "sd15", dtype="bfloat16") == {}
    other = sampling_of("sd15", call=condition | {"controlnet_conditioning_scale": 0.0})
    images = [
        PipelinePolicy.from_pretrained(tmp_path, sampling=s).images(PROMPTS, noise_of(0, 1, 2))
        for s in (sampling_of("sd15", call=condition), other)
    ]
    assert (images[0] - images[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("shard", "weights"),
    [("1GB", LoRA(rank=4, alpha=4)), ("40KB", Full())],
    ids=["whole", "shards"],
)
def test_folders_with_one_variant_only_are_loaded(
    tiny: Tiny, tmp_path: Path, shard: str, weights: LoRA | Full
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd3"), dtype=torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    assert all("fp16" in f.name for f in tmp_path.rglob("*.safetensors"))
    assert variant_of(tmp_path) == "fp16"
    assert variant_of(tiny("sd3")) is None
    assert failures(tmp_path, "sd3", weights=weights) == {}
    # A plain copy in the same folder takes precedence.
    DiffusionPipeline.from_pretrained(tiny("sd3")).save_pretrained(tmp_path)
    assert variant_of(tmp_path) is None


def test_overflow_in_float16_is_caught(tiny: Tiny, tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(tiny("flux"))
    # As in FLUX's deep blocks, whose activations exceed 65504 and are normalised afterwards.
    pipeline.transformer.x_embedder.weight.data.mul_(1e6)
    pipeline.save_pretrained(tmp_path)
    diagnosis = examine(tmp_path, Settings(sampling=sampling_of("flux"), dtype="float16"))
    (check,) = (c for c in diagnosis.checks if c.name == FINITE)
    assert not check.passed
    assert check.measured > 0.1
    assert check.advice == "the model overflows in float16: use bfloat16 or float32"
    assert examine(tmp_path, Settings(sampling=sampling_of("flux"))).passed


def test_wrong_noise_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gaussian, "sample", lambda self, noise: self.mean + 1.2 * self.std * noise)
    assert set(failures(tiny("sd3"), "sd3")) == {VARIANCE}


def test_rounding_after_the_log_prob_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    step = FlowPolicyScheduler.step

    def rounding(self: FlowPolicyScheduler, *args: Any, **kwargs: Any) -> Any:
        (x_next,) = step(self, *args, **kwargs)
        return (x_next.bfloat16().float(),)

    monkeypatch.setattr(FlowPolicyScheduler, "step", rounding)
    with pytest.raises(ValueError, match="it changes its state between two steps"):
        failures(tiny("sd3"), "sd3")


def test_latents_changed_in_place_are_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    step = FlowPolicyScheduler.step

    def overwriting(self: FlowPolicyScheduler, *args: Any, **kwargs: Any) -> Any:
        (x_next,) = step(self, *args, **kwargs)
        x_next[:, :, 0] = 0
        return (x_next,)

    monkeypatch.setattr(FlowPolicyScheduler, "step", overwriting)
    with pytest.raises(ValueError, match="it changes its state between two steps"):
        failures(tiny("sd3"), "sd3")


def test_dropout_in_a_text_encoder_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    after_init(monkeypatch, lambda policy: policy.models["text_encoder_3"].train())
    assert STOCK in failures(tiny("sd3"), "sd3")


def test_dropout_in_the_denoiser_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(policy: PipelinePolicy) -> None:
        policy.denoisers["transformer"].norm_out.register_forward_hook(
            lambda _module, _inputs, output: torch.dropout(output, 0.1, train=True)
        )

    after_init(monkeypatch, drop)
    assert {SAME_BATCH, SAME_BATCH_RATIO, ONE} <= set(failures(tiny("sd3"), "sd3"))


def test_a_detached_gradient_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = FlowPolicyScheduler._predict
    monkeypatch.setattr(
        FlowPolicyScheduler, "_predict", lambda self, output, *a: predict(self, output.detach(), *a)
    )
    failed = failures(tiny("sd3"), "sd3")
    assert set(failed) == {GRADIENTS}
    assert failed[GRADIENTS].startswith("0/")


def test_unused_weights_need_no_gradient(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(policy: PipelinePolicy) -> None:
        """Add a weight that the denoising loop does not use."""
        assert policy.trainable is not None
        policy.trainable.parameters["idle"] = torch.nn.Parameter(torch.ones(3))

    with monkeypatch.context() as patch:
        after_init(patch, idle)
        diagnosis = examine(tiny("sd3"), Settings(sampling=sampling_of("sd3")))
    (check,) = (c for c in diagnosis.checks if c.name == GRADIENTS)
    assert check.passed
    assert check.value.endswith("(1 do not change the output)")

    def cut(policy: PipelinePolicy) -> None:
        norm = policy.denoisers["transformer"].norm_out
        kept = norm.forward
        norm.forward = lambda *a, **k: kept(*a, **k) + 0.1 * hidden.detach()
        assert policy.trainable is not None
        policy.trainable.parameters["hidden"] = hidden

    hidden = torch.nn.Parameter(torch.tensor(0.5))
    after_init(monkeypatch, cut)
    diagnosis = examine(tiny("sd3"), Settings(sampling=sampling_of("sd3")))
    (check,) = (c for c in diagnosis.checks if c.name == GRADIENTS)
    assert not check.passed


def test_a_gradient_that_leaks_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    after_init(
        monkeypatch, lambda p: p.denoisers["transformer"].proj_out.weight.requires_grad_(True)
    )
    assert failures(tiny("sd3"), "sd3")[GRADIENTS].endswith("1 other")


def test_inexact_injection_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = LatentInjection._prepare

    def rounding(self: LatentInjection, *args: Any, **kwargs: Any) -> Any:
        entered = enter(self, *args, **kwargs)
        return 1.05 * entered if isinstance(entered, Tensor) else entered

    monkeypatch.setattr(LatentInjection, "_prepare", rounding)
    assert {SAME_BATCH, BRANCH, DECODE} <= set(failures(tiny("sd3"), "sd3"))


def test_another_sampler_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    interval = FlowPolicyScheduler.interval
    monkeypatch.setattr(
        FlowPolicyScheduler, "interval", lambda self, a, b: interval(self, max(0, a - 1), b)
    )
    assert STOCK in failures(tiny("sd3"), "sd3")


def test_an_export_of_other_weights_is_caught(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    export = checks.export

    def halving(pipeline: Any, trainable: Any, folder: Path) -> Exported:
        exported = export(pipeline, trainable, folder)
        (file,) = folder.glob("*.safetensors")
        save_file({k: v / 2 for k, v in load_file(file).items()}, file)
        return exported

    monkeypatch.setattr(checks, "export", halving)
    assert set(failures(tiny("sd3"), "sd3")) == {EXPORT}


def test_unknown_sampling_arguments_are_refused(make_policy: Callable[..., PipelinePolicy]) -> None:
    with pytest.raises(
        ValueError, match=r"no argument 'eta_'; it takes .*num_inference_steps.*eta"
    ):
        make_policy("sd15", sampling=sampling_of("sd15", call={"eta_": 1.0}))
    with pytest.raises(ValueError, match="FluxPipeline takes no argument 'num_frames'"):
        make_policy("flux", sampling=sampling_of("flux", num_frames=5))


def test_unknown_layers_are_refused(make_policy: Callable[..., PipelinePolicy]) -> None:
    with pytest.raises(ValueError, match=r"\['to_x'\] match no .*attn2\.to_q"):
        make_policy("sd15", weights=LoRA(targets=("to_q", "to_x")))
    with pytest.raises(ValueError, match=r"no adapters for PixArt.*kind = 'full'"):
        make_policy("pixart_sigma", weights=LoRA())


def after_init(monkeypatch: pytest.MonkeyPatch, change: Callable[[PipelinePolicy], Any]) -> None:
    """Change every trainable policy that is made afterwards."""
    init = PipelinePolicy.__init__

    def broken(self: PipelinePolicy, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.trainable is not None:
            change(self)

    monkeypatch.setattr(PipelinePolicy, "__init__", broken)
