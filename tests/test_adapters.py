"""Earlier adapters go in: as a part of the model, as the start of training, and not where they do not fit.

The files are written here by the names and shapes of each format, not by flowgrpo's own export:
sd-scripts' UNet names are diffusers' with underscores (``networks/lora.py``), its FLUX names and ComfyUI's
Wan names are those of the original checkpoints (``library/flux_models.py``, ``comfy/ldm/wan/model.py``).
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowgrpo.cli import main
from flowgrpo.core.random import Random
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.adapters import add_adapters
from flowgrpo.policy.export import base_note, export_diffusers
from flowgrpo.policy.loading import load_pipeline
from flowgrpo.policy.model_files import check_path
from flowgrpo.policy.settings import Adapter, ModelSource
from flowgrpo.training import checkpoints
from tests.conftest import MakePolicy, noise_of, sampling_of

Tiny = Callable[[str], Path]
RANK = 2
PROMPTS = [Prompt("a red cube"), Prompt("two dogs")]

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
FORMATS = {
    # Family: part, layer in the file, its matrices' names, whether there is an alpha, layers of diffusers.
    "sd15": (
        "unet", f"lora_unet_{UNET.replace('.', '_')}", ("lora_down", "lora_up"), 1.0, [UNET]
    ),
    "sd3": (
        "transformer", "transformer.transformer_blocks.0.attn.to_q", ("lora_A", "lora_B"), None,
        ["transformer_blocks.0.attn.to_q"],
    ),
    "flux": (
        "transformer", "lora_unet_double_blocks_0_img_attn_qkv", ("lora_down", "lora_up"), 1.0,
        [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")],
    ),
    "wan22": (
        "transformer_2", "diffusion_model.blocks.0.self_attn.q", ("lora_A", "lora_B"), None,
        ["blocks.0.attn1.to_q"],
    ),
}  # fmt: skip


def matrices(family: str, tiny: Tiny, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` for the layer of a format."""
    part, _, _, _, layers = FORMATS[family]
    model = load_pipeline(tiny(family)).components[part]
    rows = [model.get_submodule(n).weight.shape for n in layers]
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(RANK, rows[0][1], generator=random)
    return down, torch.randn(sum(r[0] for r in rows), RANK, generator=random)


def write(family: str, down: Tensor, up: Tensor, file: Path) -> Path:
    _, layer, names, alpha, _ = FORMATS[family]
    tensors = {
        f"{layer}.{name}.weight": m.contiguous() for name, m in zip(names, (down, up), strict=True)
    }
    if alpha is not None:
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("family", FORMATS)
def test_adapters_of_every_format_are_added_with_their_scales(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    part, _, _, alpha, layers = FORMATS[family]
    (one, other) = (matrices(family, tiny, seed) for seed in (0, 1))
    expert = part if part == "transformer_2" else ""
    source = ModelSource(
        path=str(tiny(family)),
        adapters=(
            Adapter(str(write(family, *one, tmp_path / "one.safetensors")), model=expert),
            Adapter(str(write(family, *other, tmp_path / "other.safetensors")), -0.5, expert),
        ),
    )
    plain, changed = load_pipeline(source.path), load_pipeline(source)
    factor = 1.0 if alpha is None else alpha / RANK
    delta = factor * (one[1] @ one[0] - 0.5 * other[1] @ other[0])
    for layer, rows in zip(layers, delta.chunk(len(layers)), strict=True):
        before, after = (p.components[part].get_submodule(layer).weight for p in (plain, changed))
        torch.testing.assert_close(after, before + rows, atol=1e-5, rtol=1e-5)
    names = [n for n, _ in changed.components[part].named_parameters()]
    assert names == [n for n, _ in plain.components[part].named_parameters()]


@pytest.fixture(scope="module")
def tuned(
    make_policy: MakePolicy, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Tensor, Tensor]:
    """An exported adapter of a tiny SD3, its images, and those of the base."""
    folder = tmp_path_factory.mktemp("tuned")
    policy = make_policy("sd3", weights=LoRA(rank=4, alpha=2))
    assert policy.trainable is not None
    with torch.no_grad():
        for name, parameter in policy.trainable.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    changed = policy.images(PROMPTS, noise_of(0, 1))
    with policy.reference():
        base = policy.images(PROMPTS, noise_of(0, 1))
    assert (changed - base).abs().max() > 1e-2
    export_diffusers(policy.stock_pipeline(), policy.trainable, folder)
    return folder, changed, base


def test_an_adapter_is_a_frozen_part_of_the_model(
    tuned: tuple[Path, Tensor, Tensor], tiny: Tiny, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Halves of an adapter make the whole; the reference policy has it, and the export does not."""
    folder, changed, _ = tuned
    half = Adapter(str(folder), 0.5)
    source = ModelSource(path=str(tiny("sd3")), adapters=(half, half))
    policy = PipelinePolicy.from_pretrained(
        source, sampling=sampling_of("sd3"), weights=LoRA(rank=4, alpha=4)
    )
    with policy.reference():
        images = policy.images(PROMPTS, noise_of(0, 1))
    torch.testing.assert_close(images, changed, atol=1e-4, rtol=0)
    assert policy.trainable is not None
    ups = [p for n, p in policy.trainable.parameters.items() if "lora_B" in n]
    assert ups
    assert not any(p.any() for p in ups)
    note = base_note(source, policy.trainable)
    assert f"belongs to {tiny('sd3')} with {folder} (scale 0.5), {folder} (scale 0.5)" in note
    assert "--format merged" in note
    whole = PipelinePolicy.from_pretrained(source, sampling=sampling_of("sd3"), weights=Full())
    torch.testing.assert_close(whole.images(PROMPTS, noise_of(0, 1)), changed, atol=1e-4, rtol=0)


def test_training_starts_from_an_adapter(
    tuned: tuple[Path, Tensor, Tensor], make_policy: MakePolicy
) -> None:
    """With a larger rank and another alpha the model is the same, and it is the reference policy."""
    folder, changed, _ = tuned
    policy = make_policy("sd3", weights=LoRA(rank=6, alpha=12, init=str(folder)))
    torch.testing.assert_close(policy.images(PROMPTS, noise_of(0, 1)), changed, atol=1e-4, rtol=0)
    assert policy.trainable is not None
    assert set(policy.trainable.denoisers["transformer"].peft_config) == {"default"}
    with torch.no_grad():
        for parameter in policy.trainable.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=Random(1).generator()))
    assert (policy.images(PROMPTS, noise_of(0, 1)) - changed).abs().max() > 1e-3
    with policy.reference():
        start = policy.images(PROMPTS, noise_of(0, 1))
    torch.testing.assert_close(start, changed, atol=1e-4, rtol=0)


def test_the_model_without_the_adapter_can_stay_the_reference_policy(
    tuned: tuple[Path, Tensor, Tensor], make_policy: MakePolicy
) -> None:
    """A run that goes on from the adapter of another one then keeps the reference policy of that run."""
    folder, changed, base = tuned
    policy = make_policy("sd3", weights=LoRA(rank=4, alpha=4, init=str(folder), reference="model"))
    torch.testing.assert_close(policy.images(PROMPTS, noise_of(0, 1)), changed, atol=1e-4, rtol=0)
    assert policy.trainable is not None
    assert policy.trainable.reference_is_at_hand, "no copy is kept"
    with policy.reference():
        reference = policy.images(PROMPTS, noise_of(0, 1))
    torch.testing.assert_close(reference, base, atol=1e-4, rtol=0)


def test_training_starts_from_a_checkpoint_of_a_run(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    """The averaged weights, with the alpha of their run; whole weights and other places are refused."""
    own = LoRA(rank=4, alpha=12)
    policy = make_policy("sd3", weights=own)
    assert policy.trainable is not None
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable.parameters.values()):
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    changed = policy.images(PROMPTS, noise_of(0, 1))
    parameters = policy.trainable.parameters
    place = tmp_path / "run" / "checkpoints" / "000020"
    checkpoints.save(place, {"weights": {k: p + 1 for k, p in parameters.items()}, "ema": parameters}, {"iteration": 20})  # fmt: skip
    config = place.parents[1] / "config.toml"
    config.write_text("[model.weights]\nkind = 'lora'\nrank = 4\nalpha = 12\n")
    begun = make_policy("sd3", weights=LoRA(rank=5, alpha=5, init=str(place)))
    torch.testing.assert_close(begun.images(PROMPTS, noise_of(0, 1)), changed, atol=1e-4, rtol=0)
    with pytest.raises(FileNotFoundError, match=r"export .*/run --checkpoint 20 --out FOLDER"):
        add_adapters(policy.stock_pipeline(), [Adapter(str(place))])
    with pytest.raises(FileNotFoundError, match="is a checkpoint of a run: write a model with"):
        check_path(str(place))
    with pytest.raises(FileNotFoundError, match="is a run directory: after full fine-tuning give"):
        check_path(str(place.parents[1]))
    config.write_text("[model.weights]\nkind = 'full'\n")
    with pytest.raises(
        ValueError, match="trained weights of the kind 'full'; write them as a model"
    ):
        make_policy("sd3", weights=LoRA(init=str(place)))
    config.unlink()
    with pytest.raises(
        ValueError, match="which has the rank and alpha of its adapter, cannot be read"
    ):
        make_policy("sd3", weights=LoRA(init=str(place)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (LoRA(rank=2), r"init has rank 4; set model\.weights\.rank to at least 4, not 2"),
        (
            LoRA(rank=8, targets=("to_q",)),
            r"init has \d+ of its \d+ layers outside of model\.weights\.targets, such as transformer_blocks",
        ),
    ],
)
def test_a_start_that_does_not_fit_the_settings_is_refused(
    weights: LoRA, message: str, tuned: tuple[Path, Tensor, Tensor], make_policy: MakePolicy
) -> None:
    weights = LoRA(rank=weights.rank, targets=weights.targets, init=str(tuned[0]))
    with pytest.raises(ValueError, match=message):
        make_policy("sd3", weights=weights)


def test_adapters_that_do_not_fit_are_refused(
    tuned: tuple[Path, Tensor, Tensor], tiny: Tiny, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Each in one sentence with the number of layers; nothing is applied in part."""

    def refused(family: str, path: Path) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_pipeline(ModelSource(path=str(tiny(family)), adapters=(Adapter(str(path)),)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # An adapter of another architecture, of which no layer has a place.
    assert "does not fit StableDiffusionPipeline" in refused("sd15", tuned[0])
    # One known layer, and one that the model does not have.
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    block = "transformer.transformer_blocks.{}.attn.to_q.lora_{}.weight"
    tensors = {block.format(i, m): w.clone() for i in (0, 7) for m, w in (("A", down), ("B", up))}
    save_file(tensors, tmp_path / "half.safetensors")
    assert "1 of its 2 layers have a place in it" in refused("sd3", tmp_path / "half.safetensors")
    # The right names with the sizes of another model.
    save_file(
        {
            block.format(0, m): torch.randn(2 if m == "A" else 64, 64 if m == "A" else 2)
            for m in "AB"
        },
        tmp_path / "wide.safetensors",
    )
    assert "(1 layer in the file)" in refused("sd3", tmp_path / "wide.safetensors")
    save_file({"a": up}, tmp_path / "none.safetensors")
    assert "none of its tensors (1) is a part of one" in refused(
        "sd3", tmp_path / "none.safetensors"
    )
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert "not in safetensors' format" in refused("sd3", tmp_path / "torn.safetensors")
    assert "adapter: no such file or folder" in refused("sd3", tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    assert "has no adapter files (.safetensors)" in refused("sd3", tmp_path / "empty")
    policy = make_policy("sd3")
    assert policy.trainable is not None
    export_diffusers(policy.stock_pipeline(), policy.trainable, tmp_path / "zero")
    assert "all zeros" in refused("sd3", tmp_path / "zero")


def test_an_adapter_of_a_text_encoder_is_no_start(tiny: Tiny, tmp_path: Path) -> None:
    layer = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    down, up = matrices("sd15", tiny)
    file = write("sd15", down, up, tmp_path / "both.safetensors")
    tensors = load_file(file) | {
        f"{layer}.lora_down.weight": torch.randn(2, 32),
        f"{layer}.lora_up.weight": torch.randn(32, 2),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"also adapts 1 layer of text_encoder.*model\.adapters"):
        PipelinePolicy.from_pretrained(
            tiny("sd15"), sampling=sampling_of("sd15"), weights=LoRA(init=str(file))
        )
    plain = load_pipeline(tiny("sd15"))
    changed = load_pipeline(ModelSource(path=str(tiny("sd15")), adapters=(Adapter(str(file)),)))
    for part in ("unet", "text_encoder"):
        pairs = zip(
            plain.components[part].parameters(), changed.components[part].parameters(), strict=True
        )
        assert sum(not torch.equal(a, b) for a, b in pairs) == 1


def test_sample_takes_adapters(
    tuned: tuple[Path, Tensor, Tensor],
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = ["--steps", "2", "--size", "16x16", "--samples", "1", "--device", "cpu"]
    call = ["--call", "max_sequence_length=16"]
    pictures = []
    for name, more in {
        "base": [],
        "none": ["--lora", f"{tuned[0]}:0"],
        "all": ["--lora", str(tuned[0])],
    }.items():
        out = tmp_path / name
        assert (
            main(["sample", str(tiny("sd3")), "a red cube", "--out", str(out), *size, *call, *more])
            == 0
        )
        (file,) = out.glob("*.png")
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    # docs/export.md: the pictures of diffusers alone, rounded alike.
    stock = DiffusionPipeline.from_pretrained(tiny("sd3"))
    stock.load_lora_weights(tuned[0])
    stock.set_progress_bar_config(disable=True)
    row = json.loads((tmp_path / "all" / "index.jsonl").read_text())
    generator = torch.Generator().manual_seed(row["noise_seed"])
    settings = {"num_inference_steps": 2, "width": 16, "height": 16, "max_sequence_length": 16}
    drawn = stock(row["prompt"], generator=generator, **settings).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(tmp_path / "all" / row["file"])))
    command = [
        "sample",
        str(tiny("sd3")),
        "x",
        "--out",
        str(tmp_path / "x"),
        "--lora",
        "a.safetensors:b",
    ]
    assert main(command) != 0
    assert "with a number as scale" in capsys.readouterr().err
