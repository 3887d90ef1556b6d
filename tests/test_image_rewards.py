"""HPSv2, aesthetic, ImageReward and DINO on tiny checkpoints, against computations of their own."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF
from transformers import CLIPModel, Dinov2Model, SiglipModel

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.loading import available_rewards
from reward_models.aesthetic import Aesthetic
from reward_models.dino import DINOSimilarity
from reward_models.hpsv2 import HPSv2
from reward_models.image_reward import ImageReward
from reward_models.shared.pictures import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    shrunk_and_cropped,
    shrunk_and_cropped_with_gradient,
)
from reward_models.siglip import SigLIPSimilarity
from tests import zoo
from tests.zoo import TEXTS, noise
from tests.zoo import TINY_HPS as TINY

SIZES = [(32, 32), (64, 48), (33, 57), (101, 37), (20, 31)]


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with zoo.hps_folder(tmp_path_factory.mktemp("hps")) as folder:
        yield folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_aesthetic(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_image_reward(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = zoo.save_dino(tmp_path_factory.mktemp("dino"))
    for i, image in enumerate(zoo.pil(noise(3, 50, 40, seed=7))):
        image.save(folder / f"reference{i}.png")
    return folder


Make = Callable[..., Any]
NAMES = ["hpsv2", "aesthetic", "image_reward", "dino"]


@pytest.fixture(scope="module")
def make(hps: Path, clip: Path, blip: Path, dino: Path) -> Callable[[str], Make]:
    """Of each reward: a function that makes it on its folder, or on another one."""

    def hpsv2(model: Path = hps, **options: Any) -> HPSv2:
        return HPSv2(str(model), architecture=TINY, device="cpu", **options)

    def aesthetic(model: Path = clip, **options: Any) -> Aesthetic:
        return Aesthetic(str(clip), head=str(model), device="cpu", **options)

    def image_reward(model: Path = blip, **options: Any) -> ImageReward:
        return ImageReward(str(model), tokenizer=str(blip), device="cpu", **options)

    def similarity(model: Path = dino, **options: Any) -> DINOSimilarity:
        sizes = {"resize": 36, "crop": 28} | options
        return DINOSimilarity(str(model), root=str(dino), device="cpu", **sizes)

    return dict(zip(NAMES, (hpsv2, aesthetic, image_reward, similarity), strict=True)).__getitem__


@pytest.fixture(scope="module")
def made(make: Callable[[str], Make]) -> dict[str, Any]:
    return {name: make(name)() for name in NAMES}


def prompts() -> list[Prompt]:
    return [Prompt(t, metadata={"reference": f"reference{i}.png"}) for i, t in enumerate(TEXTS)]


# What every image reward owes.
@pytest.mark.parametrize("name", NAMES)
def test_does_not_depend_on_the_batch(made: dict[str, Any], name: str) -> None:
    media, own = noise(4, 40, 56), [prompts()[i] for i in (1, 0, 1, 2)]
    together = made[name](media, own)
    assert together.shape == (4,)
    assert together.std() > 1e-3
    alone = torch.cat([made[name](m[None], [p]) for m, p in zip(media, own, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_runs_in_16_bits(make: Any, made: dict[str, Any], name: str, dtype: str) -> None:
    media = noise(3, 32, 32)
    full, half = made[name](media, prompts()), make(name)(dtype=dtype)(media, prompts())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    with pytest.raises((ValueError, TypeError), match="float64"):
        make(name)(dtype="float64")


@pytest.mark.parametrize("name", NAMES)
def test_broken_images_have_no_score(made: dict[str, Any], name: str) -> None:
    media = noise(3, 32, 32)
    whole = made[name](media, prompts())
    media[1, 0, 3, 3] = math.nan
    scores = made[name](media, prompts())
    torch.testing.assert_close(scores[[0, 2]], whole[[0, 2]])
    assert scores[1].isnan()


@pytest.mark.parametrize("name", NAMES)
def test_refuses_images_of_another_range(made: dict[str, Any], name: str) -> None:
    for media in (noise(3, 32, 32) * 255, noise(3, 32, 32) * 2 - 1):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            made[name](media, prompts())
    with pytest.raises(ValueError, match="size zero"):
        made[name](torch.zeros(3, 3, 0, 32), prompts())


def changed(folder: Path, to: Path, file: str, drop: str = "", add: str = "") -> Path:
    """A copy of a checkpoint with other keys."""
    state = torch.load(folder / file, weights_only=True)
    inner = state.get("state_dict", state)
    if drop:
        del inner[drop]
    if add:
        inner[add] = torch.zeros(4)
    torch.save(state, to / file)
    return to


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("hpsv2", "HPS_v2.1_compressed.pt", "logit_scale"),
        ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth", "layers.4.bias"),
        ("image_reward", "ImageReward.pt", "blip.text_encoder.encoder.layer.1.output.dense.bias"),
        ("image_reward", "ImageReward.pt", "blip.visual_encoder.pos_embed"),
        ("image_reward", "ImageReward.pt", "mlp.layers.6.weight"),
    ],
)
def test_refuses_checkpoints_that_do_not_fit(
    request: Any, make: Any, tmp_path: Path, name: str, file: str, key: str
) -> None:
    folder = request.getfixturevalue({"hpsv2": "hps", "aesthetic": "clip"}.get(name, "blip"))
    with pytest.raises(ValueError, match="1 weights are missing"):
        make(name)(changed(folder, tmp_path, file, drop=key))
    with pytest.raises(ValueError, match=r"1 weights are left over, such as rm_head\.weight"):
        make(name)(changed(folder, tmp_path, file, add="rm_head.weight"))
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="holds none of"):
        make(name)(tmp_path)
    with pytest.raises(ValueError, match="no file, no folder and no hub id"):
        make(name)(tmp_path / "absent" / "model")


def test_dino_refuses_another_model(make: Any, clip: Path) -> None:
    with pytest.raises(ValueError, match="is no DINOv2 model"):
        make("dino")(clip)


def test_private_modules_are_no_rewards() -> None:
    names = available_rewards()
    assert {"hpsv2", "aesthetic", "image_reward", "dino", "motion"} <= set(names)
    assert not [n for n in names if n.startswith("_")]


def test_every_reward_has_a_row_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    for name in available_rewards():
        assert f"| `{name}` |" in page, name


# HPS v2.1.
def hps_pixels(image: Image.Image, side: int) -> Tensor:
    """The published steps for one image; Pillow resizes each channel in floating point."""
    scale = side / max(image.size)
    size = tuple(round(length * scale) for length in image.size)
    canvas = np.zeros((3, side, side), np.float32)
    left, top = ((side - length) // 2 for length in size)
    for c, channel in enumerate(image.split()):
        values = Image.fromarray(np.asarray(channel, np.float32) / 255)
        resized = np.asarray(values.resize(size, Image.Resampling.BICUBIC))
        canvas[c, top : top + size[1], left : left + size[0]] = resized
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return torch.from_numpy((canvas - mean) / std)


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_is_the_cosine_of_the_published_pixels(
    hps: Path, made: dict[str, Any], size: tuple[int, int]
) -> None:
    media = noise(3, *size)
    pixels = torch.stack([hps_pixels(i, 32) for i in zoo.pil(media)])
    torch.testing.assert_close(made["hpsv2"].preprocess(media), pixels, rtol=0, atol=1e-5)
    model = open_clip.create_model(TINY).eval()
    state = torch.load(hps / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    with torch.no_grad():
        image = model.encode_image(pixels)
        text = model.encode_text(open_clip.get_tokenizer(TINY)(list(TEXTS)))
    expected = F.cosine_similarity(image, text)
    torch.testing.assert_close(made["hpsv2"](media, prompts()), expected, rtol=0, atol=1e-5)


def test_hpsv2_puts_bars_around_and_cuts_long_prompts(made: dict[str, Any]) -> None:
    black = (torch.zeros(3) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    pixels = made["hpsv2"].preprocess(torch.ones(1, 3, 64, 32))[0]
    for column, bar in ((0, True), (7, True), (8, False), (23, False), (24, True)):
        assert torch.equal(pixels[:, 5, column], black) == bar
    media, words = noise(1, 32, 32), ["cat"] * 200
    cut = made["hpsv2"](media, [Prompt(" ".join(words))])
    assert torch.equal(cut, made["hpsv2"](media, [Prompt(" ".join([*words, "bus"]))]))


# Aesthetic and ImageReward: CLIP's crop.
def clip_pixels(image: Image.Image, side: int, crop: int, mean: Any, std: Any) -> Tensor:
    """The published transform of one PIL image."""
    steps = [
        transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(crop),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    pixels: Tensor = transforms.Compose(steps)(image)
    return pixels


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_is_the_head_on_the_embedding(
    clip: Path, made: dict[str, Any], size: tuple[int, int]
) -> None:
    media = noise(3, *size)
    model = CLIPModel.from_pretrained(clip).eval()
    head = torch.load(clip / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    expected = []
    for image in zoo.pil(media):
        pixels = clip_pixels(image, 32, 32, CLIP_MEAN, CLIP_STD)
        with torch.no_grad():
            x = model.get_image_features(pixels[None]).pooler_output[0]
        x = x / x.square().sum().sqrt()
        for n in (0, 2, 4, 6, 7):
            x = head[f"layers.{n}.weight"] @ x + head[f"layers.{n}.bias"]
        expected.append(x[0])
    scores = made["aesthetic"](media, prompts())
    assert scores.std() > 0.01
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-4)
    again = made["aesthetic"](media, [Prompt("something else")] * 3)
    assert torch.equal(scores, again)


def test_aesthetic_refuses_a_head_of_another_width(make: Any, tmp_path: Path) -> None:
    head: dict[str, Tensor] = {}
    zoo.mlp_state(head, "layers", 24, torch.Generator())
    torch.save(head, tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match="takes 24 features"):
        make("aesthetic")(tmp_path)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Heads of 64, one after the other."""
    parts = []
    for h in range(0, q.shape[-1], 64):
        weights = q[:, h : h + 64] @ k[:, h : h + 64].T / 8
        if mask is not None:
            weights = weights.masked_fill(mask[None] == 0, -math.inf)
        parts.append(weights.softmax(-1) @ v[:, h : h + 64])
    return torch.cat(parts, -1)


def original_image_reward(s: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> float:
    """BLIP as published, for one image and one text, straight from the published weights."""

    def lin(x: Tensor, name: str) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    patch = s[f"{eye}.patch_embed.proj.weight"]
    x = F.conv2d(pixels[None], patch, s[f"{eye}.patch_embed.proj.bias"], stride=patch.shape[-1])
    x = torch.cat([s[f"{eye}.cls_token"][0], x[0].flatten(1).T]) + s[f"{eye}.pos_embed"][0]
    for block in (f"{eye}.blocks.{i}" for i in range(2)):
        q, k, v = lin(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + lin(attention(q, k, v), f"{block}.attn.proj")
        hidden = F.gelu(lin(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + lin(hidden, f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)
    words = s[f"{text}.embeddings.word_embeddings.weight"][ids]
    words = words + s[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(words, f"{text}.embeddings.LayerNorm", 1e-12)
    for layer in (f"{text}.encoder.layer.{i}" for i in range(2)):
        for name, source, hidden_from in (
            ("attention", None, mask),
            ("crossattention", seen, None),
        ):
            part = f"{layer}.{name}"
            other = y if source is None else source
            q, k, v = (
                lin(a, f"{part}.self.{n}")
                for a, n in ((y, "query"), (other, "key"), (other, "value"))
            )
            mixed = lin(attention(q, k, v, hidden_from), f"{part}.output.dense")
            y = norm(mixed + y, f"{part}.output.LayerNorm", 1e-12)
        hidden = lin(F.gelu(lin(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        y = norm(hidden + y, f"{layer}.output.LayerNorm", 1e-12)
    z = y[0]
    for n in (0, 2, 4, 6, 7):
        z = lin(z, f"mlp.layers.{n}")
    return (z.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (101, 37)])
def test_image_reward_is_the_published_network(made: dict[str, Any], size: tuple[int, int]) -> None:
    media, state = noise(3, *size), zoo.image_reward_state()
    reward = made["image_reward"]
    expected = []
    for image, text in zip(zoo.pil(media), TEXTS, strict=True):
        pixels = clip_pixels(image, 32, 32, CLIP_MEAN, CLIP_STD)
        tokens = reward.tokenizer(text)  # no padding at all
        ids, mask = (torch.tensor(tokens[key]) for key in ("input_ids", "attention_mask"))
        assert len(ids) < 35
        expected.append(original_image_reward(state, pixels, ids, mask))
    scores = reward(media, prompts())
    assert scores.std() > 0.01
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_image_reward_pads_and_cuts_at_35_tokens(made: dict[str, Any]) -> None:
    reward = made["image_reward"]
    assert reward.tokenize(["a red cube"])["input_ids"].shape == (1, 35)
    media, words = noise(1, 32, 32), ["cat"] * 40
    cut = reward(media, [Prompt(" ".join(words))])
    assert torch.equal(cut, reward(media, [Prompt(" ".join([*words, "bus"]))]))


# DINO.
def test_dino_is_the_cosine_of_class_tokens(dino: Path, made: dict[str, Any]) -> None:
    model = Dinov2Model.from_pretrained(dino).eval()

    def embed(image: Image.Image) -> Tensor:
        pixels = clip_pixels(image, 36, 28, IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            token: Tensor = model(pixel_values=pixels[None]).last_hidden_state[0, 0]
        return token / token.norm()

    media = noise(3, 45, 61)
    own = [embed(i) for i in zoo.pil(media)]
    references = [embed(Image.open(dino / f"reference{i}.png")) for i in range(3)]
    expected = torch.stack([a @ b for a, b in zip(own, references, strict=True)])
    scores = made["dino"](media, prompts())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    all_three = [Prompt("x", metadata={"reference": [f"reference{i}.png" for i in range(3)]})] * 3
    cosines = torch.stack(own) @ torch.stack(references).T
    torch.testing.assert_close(made["dino"](media, all_three), cosines.amax(1), rtol=0, atol=1e-5)
    made["dino"].several = "mean"
    torch.testing.assert_close(made["dino"](media, all_three), cosines.mean(1), rtol=0, atol=1e-5)
    made["dino"].several = "nearest"


def test_dino_knows_its_reference(dino: Path, made: dict[str, Any], tmp_path: Path) -> None:
    image = Image.open(dino / "reference1.png")
    media = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    (score,) = made["dino"](media, [prompts()[1]])
    assert score == pytest.approx(1, abs=1e-5)
    image.convert("L").save(tmp_path / "grey.png")
    shades = np.stack([np.array(image.convert("L"))] * 3)
    grey = [Prompt("x", metadata={"reference": str(tmp_path / "grey.png")})]
    (score,) = made["dino"](torch.from_numpy(shades)[None] / 255, grey)
    assert score == pytest.approx(1, abs=1e-5)
    see_through = image.convert("RGBA")
    see_through.putalpha(0)
    see_through.save(tmp_path / "clear.png")
    clear = [Prompt("x", metadata={"reference": str(tmp_path / "clear.png")})]
    (white,) = made["dino"](torch.ones(1, 3, 50, 40), clear)
    assert white == pytest.approx(1, abs=1e-5)


def test_dino_needs_references(made: dict[str, Any], make: Any) -> None:
    with pytest.raises(ValueError, match=r"'a cat' needs metadata 'reference'.*it has None"):
        made["dino"](noise(1, 32, 32), [Prompt("a cat")])
    with pytest.raises(FileNotFoundError):
        made["dino"](noise(1, 32, 32), [Prompt("x", metadata={"reference": "absent.png"})])
    made["dino"].check(prompts())
    for metadata, problem in (({}, "it has None"), ({"reference": ["absent.png"]}, "is no file")):
        with pytest.raises(ValueError, match=problem):
            made["dino"].check([*prompts(), Prompt("a cat", metadata=metadata)])
    with pytest.raises(ValueError, match="multiple of the patches"):
        make("dino")(crop=30)


# Adv-GRPO's similarities: squashed without antialiasing.
def plain_pixels(media: Tensor, mean: Any, std: Any, antialias: bool = False) -> Tensor:
    """Adv-GRPO's preprocessing of a batch, at 28x28."""
    seen = F.interpolate((media * 255).round() / 255, (28, 28), mode="bicubic", antialias=antialias)
    return (seen - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_dino_and_siglip_of_adv_grpo(dino: Path, make: Any, tmp_path: Path) -> None:
    media = noise(3, 45, 61)
    own = [Prompt("x", metadata={"reference": [f"reference{i}.png" for i in range(3)]})] * 3
    files = [torch.from_numpy(np.array(Image.open(dino / f"reference{i}.png"))) for i in range(3)]
    references = [f.permute(2, 0, 1)[None] / 255 for f in files]
    models = {
        "dino": (Dinov2Model.from_pretrained(dino), IMAGENET_MEAN, IMAGENET_STD),
        "siglip": (SiglipModel.from_pretrained(zoo.save_siglip(tmp_path)).vision_model, (0.5,) * 3, (0.5,) * 3),
    }  # fmt: skip
    found = {
        "dino": make("dino")(fit="squash", antialias=False)(media, own),
        "siglip": SigLIPSimilarity(str(tmp_path), root=str(dino), antialias=False, device="cpu")(
            media, own
        ),
    }
    for name, (model, mean, std) in models.items():
        with torch.no_grad():
            a, *rest = (
                F.normalize(model.eval()(plain_pixels(x, mean, std)).pooler_output, dim=-1)
                for x in (media, *references)
            )
        expected = (a @ torch.cat(rest).T).amax(1)
        assert expected.std() > 1e-3
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)
    for options in ({"antialias": False}, {"crop": 56}):
        with pytest.raises(ValueError, match="got"):
            make("dino")(**options)
    with pytest.raises(ValueError, match="is no SigLIP vision model"):
        SigLIPSimilarity(str(dino), device="cpu")


def test_hpsv2_without_antialiasing_is_the_older_filter(make: Any, made: dict[str, Any]) -> None:
    media = noise(2, 64, 64)
    older = make("hpsv2")(antialias=False)
    pixels = F.interpolate((media * 255).round() / 255, (32, 32), mode="bicubic")
    pixels = TF.normalize(pixels, list(CLIP_MEAN), list(CLIP_STD))
    torch.testing.assert_close(older.preprocess(media), pixels, rtol=0, atol=1e-5)
    assert (older.preprocess(media) - made["hpsv2"].preprocess(media)).abs().mean() > 0.05


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "image_reward"])
def test_scores_have_the_gradient_of_the_images(name: str, made: dict[str, Any]) -> None:
    zoo.check_gradient(made[name], prompts(), tolerance=1e-3 if name == "hpsv2" else 0.1)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("odd", ["round", "floor"])
def test_pixels_with_a_gradient_are_pillows_but_for_rounding(
    height: int, width: int, odd: Any
) -> None:
    media = (noise(3, height, width) * 255).round() / 255
    options = (17, 17, (0.0,) * 3, (1.0,) * 3, odd)
    wanted = shrunk_and_cropped(zoo.pil(media), *options)
    found = shrunk_and_cropped_with_gradient(media, *options)
    assert found.shape == wanted.shape
    levels = 255 * (found - wanted).abs()
    assert float(levels.mean()) < 0.35
    assert float(levels.max()) < 3
