"""The rewards in ``reward_models``, against computations of their own."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip import factory, pretrained
from PIL import Image
from scipy import ndimage
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.clip_score import CLIPScore
from reward_models.jpeg_size import JPEGSize
from tests.zoo import check_gradient

TINY = "flowgrpo-tiny"
PROMPTS = [Prompt(t) for t in ("a red circle", "two stars above a very large blue cross", "x")]


def pictures(number: int, height: int, width: int) -> list[Image.Image]:
    """Smooth random pictures, as 8-bit images."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.random((number, height, width, 3)), (0, 3, 3, 0))
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    return [Image.fromarray((n * 255).round().astype(np.uint8)) for n in noise]


def to_media(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])


# JPEG size.
@pytest.mark.parametrize(("goal", "sign"), [("large", 1), ("small", -1)])
@pytest.mark.parametrize("quality", [50, 95])
def test_jpeg_size_is_pillows(goal, sign, quality):
    images, wanted = pictures(3, 40, 56), []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        wanted.append(sign * len(buffer.getvalue()) / 1000)
    scores = JPEGSize(goal, quality)(to_media(images), PROMPTS)
    assert scores.tolist() == pytest.approx(wanted, rel=1e-6)


def test_jpeg_size_orders_by_complexity():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 64, 64, generator=generator)
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    media = torch.stack([torch.full((3, 64, 64), 0.5), ramp, noise])
    large = JPEGSize("large")(media, PROMPTS)
    assert large[0] < large[1] < large[2]
    assert torch.equal(JPEGSize("small")(media, PROMPTS), -large)


def test_jpeg_size_takes_what_a_decoder_overshoots():
    media = torch.full((1, 3, 16, 16), 1.01)
    assert torch.equal(
        JPEGSize()(media, PROMPTS[:1]), JPEGSize()(torch.ones(1, 3, 16, 16), PROMPTS[:1])
    )


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 101}])
def test_jpeg_size_refuses_wrong_options(options):
    with pytest.raises(ValueError, match=r"'large' or 'small' and quality in 1..100"):
        JPEGSize(**options)


# CLIPScore on a tiny open_clip model with random weights, in a file as a user would have it.
@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    (folder / f"{TINY}-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(TINY)
    # Random weights of the usual size see hardly any difference between images.
    state = {k: v * 3 if "conv1" in k or "proj" in k else v for k, v in model.state_dict().items()}
    torch.save(state, folder / "weights.pt")
    yield folder / "weights.pt"
    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


def by_hand(weights: Path, images: list[Image.Image], model_name: str = TINY) -> Tensor:
    """Cosines with open_clip's own preprocessing of PIL images, one image at a time."""
    model, _, preprocess = open_clip.create_model_and_transforms(
        model_name, pretrained=str(weights)
    )
    model.eval()
    tokens = open_clip.get_tokenizer(model_name)([p.text for p in PROMPTS])
    with torch.no_grad():
        image = torch.cat([model.encode_image(preprocess(i)[None]) for i in images])
        return F.cosine_similarity(image, model.encode_text(tokens))


def checkered(height: int, width: int) -> list[Image.Image]:
    """Random pictures with the sharpest of edges."""
    rng = np.random.default_rng(0)
    cells = (rng.integers(0, 2, (3, height // 4, width // 4, 3)) * 255).astype(np.uint8)
    return [Image.fromarray(c.repeat(4, 0).repeat(4, 1)) for c in cells]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 80), (96, 40), (20, 24)])
def test_clip_score_is_open_clips(clip_weights, height, width):
    images = pictures(3, height, width)
    scores = CLIPScore(TINY, str(clip_weights), device="cpu")(to_media(images), PROMPTS)
    assert torch.allclose(scores, by_hand(clip_weights, images), atol=1e-5)
    assert scores.std() > 0.05


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (96, 40), (20, 24)])
def test_clip_score_sees_the_pixels_that_open_clip_sees(clip_weights, height, width):
    reward = CLIPScore(TINY, str(clip_weights), device="cpu")
    preprocess = open_clip.create_model_and_transforms(TINY, pretrained=str(clip_weights))[2]
    for images in (pictures(3, height, width), checkered(height, width)):
        wanted = torch.stack([preprocess(i) for i in images])
        assert torch.equal(reward.preprocess(to_media(images)), wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_clip_score_in_16_bits_and_of_broken_images(clip_weights, dtype):
    media = to_media(pictures(3, 40, 56))
    full, half = (
        CLIPScore(TINY, str(clip_weights), device="cpu", dtype=d) for d in ("float32", dtype)
    )
    assert torch.allclose(half(media, PROMPTS), full(media, PROMPTS), atol=0.05)
    media[1, 0, 2, 2] = math.nan
    for reward in (half, JPEGSize()):
        assert reward(media, PROMPTS).isnan().tolist() == [False, True, False]


def test_clip_score_does_not_depend_on_the_batch(clip_weights):
    reward, media = CLIPScore(TINY, str(clip_weights), device="cpu"), to_media(pictures(3, 40, 56))
    whole = reward(media, PROMPTS)
    single = [reward(media[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    assert torch.allclose(whole, torch.cat(single), atol=1e-5)
    assert torch.equal(whole, reward(media, PROMPTS))


def test_clip_score_reads_the_prompt_and_cuts_long_ones(clip_weights):
    reward, media = CLIPScore(TINY, str(clip_weights), device="cpu"), to_media(pictures(1, 32, 32))
    long = Prompt("a red circle " * 100)
    scores = [float(reward(media, [p])) for p in (PROMPTS[0], PROMPTS[1], long)]
    assert len(set(scores)) == 3


def test_clip_score_uses_the_activation_of_the_weights(clip_weights, monkeypatch):
    # OpenAI's weights belong to QuickGELU, which the bare architecture name does not say.
    tag = pretrained._pcfg(quick_gelu=True) | {"file": str(clip_weights)}
    monkeypatch.setitem(pretrained._PRETRAINED, TINY, {"quick": tag})
    images = pictures(3, 32, 32)
    wanted = by_hand(clip_weights, images, f"{TINY}-quickgelu")
    assert (wanted - by_hand(clip_weights, images)).abs().max() > 0.001
    scores = CLIPScore(TINY, "quick", device="cpu")(to_media(images), PROMPTS)
    assert torch.allclose(scores, wanted, atol=1e-5)


def test_clip_score_refuses_unknown_names(clip_weights):
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-L-41'"):
        CLIPScore("ViT-L-41")
    with pytest.raises(ValueError, match=r"no weights 'opneai' for ViT-L-14: .*openai"):
        CLIPScore("ViT-L-14", "opneai")
    with pytest.raises(ValueError, match=r"no weights '/no/such/file.pt'"):
        CLIPScore(TINY, "/no/such/file.pt")


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_clip_score_has_the_gradient_of_the_images(clip_weights, kernel):
    reward = CLIPScore(TINY, str(clip_weights), filter=kernel, device="cpu")
    check_gradient(reward, PROMPTS, tolerance=0.1 if kernel == "bicubic" else 1e-3)
