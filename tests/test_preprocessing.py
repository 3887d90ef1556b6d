"""What each image reward sees of picture files of all kinds, against the library's own processor.

The library gets the file as a user of it would give it: opened by Pillow, and turned to RGB by
transformers where it does not do that itself. The reward gets what ``flowgrpo score`` makes of it.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image
from torch import Tensor
from torchvision import transforms
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    Mask2FormerImageProcessor,
    Qwen2VLImageProcessor,
    ViTImageProcessor,
)
from transformers.image_transforms import convert_to_rgb

from flowgrpo.cli import main
from flowgrpo.cli.score import find_media, read_medium
from flowgrpo.data.prompts import Prompt
from reward_models.adversarial import Adversarial
from reward_models.aesthetic import Aesthetic
from reward_models.clip_score import CLIPScore
from reward_models.dino import DINOSimilarity
from reward_models.geneval import Mask2FormerDetector, detector_size
from reward_models.hpsv2 import HPSv2
from reward_models.hpsv3 import HPSv3
from reward_models.image_reward import ImageReward
from reward_models.jpeg_size import JPEGSize
from reward_models.ocr import OCR
from reward_models.pick_score import PickScore
from reward_models.shared.pictures import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from reward_models.unified_reward import UnifiedReward
from tests import zoo
from tests.test_image_rewards import hps_pixels
from tests.test_ocr import page
from tests.tiny.parts import clip_tokenizer

KINDS = ("L", "LA", "RGBA", "P", "1", "RGB")
SIZES = ((33, 57), (101, 37), (20, 31), (64, 64))
LEVEL = 1 / 255
"""One of 256 values: resizing before or after rounding may differ by that much."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of every kind in several sizes; where there is alpha, colours lie under it."""
    folder = tmp_path_factory.mktemp("files")
    found = []
    for n, (height, width) in enumerate(SIZES):
        image = zoo.pil(zoo.noise(1, height, width, seed=n))[0]
        fade = Image.linear_gradient("L").resize(image.size)
        for kind in KINDS:
            picture = image.convert(kind)
            if kind in ("LA", "RGBA"):
                picture.putalpha(fade)
            found.append(folder / f"{kind}-{height}x{width}.png")
            picture.save(found[-1])
        found.append(folder / f"CMYK-{height}x{width}.jpg")
        image.convert("CMYK").save(found[-1])
    return found


@pytest.fixture(scope="module")
def media(files: list[Path]) -> list[Tensor]:
    """The same, as ``flowgrpo score`` reads them."""
    return [read_medium(m)[None] for m in find_media(files[0].parent)]


@pytest.fixture(scope="module")
def opened(files: list[Path]) -> list[Image.Image]:
    return [Image.open(m.files[0]) for m in find_media(files[0].parent)]


def seen_by(model: Any, call: Callable[[], Any], key: str = "pixel_values") -> Tensor:
    """What a model is given while something is called."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(kwargs[key] if key in kwargs else args[0]),
        with_kwargs=True,
    )
    call()
    handle.remove()
    assert len(seen) == 1
    return seen[0].float()


def near(found: Tensor, wanted: Tensor, std: tuple[float, ...], image: Image.Image) -> None:
    """Within four of the 256 values that a pixel has, where no edges are sharp, and half on average."""
    assert found.shape == wanted.shape
    gaps = (found - wanted).abs() / (LEVEL / torch.tensor(std).view(3, 1, 1))
    # Processors resize tensors, which rounds overshoots at edges otherwise than Pillow.
    most, mean = (32, 5) if image.mode in ("1", "P") else (4.01, 0.5)
    assert float(gaps.max()) <= most
    assert float(gaps.mean()) <= mean


def test_files_of_all_kinds_are_read_as_the_libraries_read_them(
    media: list[Tensor], opened: list[Image.Image]
) -> None:
    for tensor, image in zip(media, opened, strict=True):
        pixels = np.asarray(convert_to_rgb(image), np.float32).transpose(2, 0, 1) / 255
        assert torch.equal(tensor[0], torch.from_numpy(pixels))


def test_clip_score_sees_what_open_clips_transform_makes(
    media: list[Tensor], opened: list[Image.Image], tmp_path: Path
) -> None:
    name = f"local-dir:{zoo.save_open_clip(tmp_path)}"
    reward = CLIPScore(name, device="cpu")
    transform = open_clip.create_model_and_transforms(name)[2]
    for tensor, image in zip(media, opened, strict=True):
        # open_clip itself resizes before it turns to RGB, palettes without interpolation.
        wanted = transform(convert_to_rgb(image))
        assert torch.equal(reward.preprocess(tensor), wanted[None])


def test_variants_of_clip_score_differ_by_the_documented_pixels(tmp_path: Path) -> None:
    """DiffusionNFT's transform, and the figures in the docstring, on the picture named there."""
    image = Image.open(Path(__file__).parents[1] / "docs" / "quickstart_flow_grpo.png").convert(
        "RGB"
    )
    tensor = transforms.functional.to_tensor(image)
    nft = [transforms.Resize(224), transforms.CenterCrop(224), transforms.Normalize(CLIP_MEAN, CLIP_STD)]  # fmt: skip
    bicubic = transforms.InterpolationMode.BICUBIC
    older = [transforms.Resize(224, bicubic, antialias=False), *nft[1:]]
    first = open_clip.image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(image)
    levels = 255 * torch.tensor(CLIP_STD).view(3, 1, 1)
    for steps, figure in ((nft, 0.96), (older, 3.5)):
        gap = ((transforms.Compose(steps)(tensor) - first).abs() * levels).mean()
        assert float(gap) == pytest.approx(figure, rel=0.05)
        assert f"{figure}" in str(CLIPScore.__doc__)
    theirs = CLIPImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
    assert float(((theirs - first).abs() * levels).mean()) < 0.01
    name = f"local-dir:{zoo.save_open_clip(tmp_path)}"
    reward = CLIPScore(name, filter="bilinear", device="cpu")
    small = [transforms.Resize(reward.model.visual.image_size[0]), transforms.CenterCrop(reward.model.visual.image_size[0]), nft[2]]  # fmt: skip
    seen = reward.preprocess(tensor[None])[0]
    torch.testing.assert_close(seen, transforms.Compose(small)(tensor), rtol=0, atol=1e-5)
    with pytest.raises((ValueError, TypeCheckError), match="filter"):
        CLIPScore(name, filter="nearest")  # type: ignore[arg-type]


def test_pick_score_sees_what_clips_processor_makes(
    media: list[Tensor], opened: list[Image.Image], tmp_path: Path
) -> None:
    zoo.save_clip(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor.save_pretrained(tmp_path)
    reward = PickScore(str(tmp_path), device="cpu")
    for tensor, image in zip(media, opened, strict=True):
        call = lambda t=tensor: reward(t, [Prompt("a cat")])  # noqa: E731
        wanted = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(seen_by(reward.model.vision_model, call), wanted)


@pytest.fixture
def hps(tmp_path: Path) -> Iterator[HPSv2]:
    with zoo.hps_folder(tmp_path) as folder:
        yield HPSv2(str(folder), architecture=zoo.TINY_HPS, device="cpu")


def test_hpsv2_sees_what_its_code_makes(
    hps: HPSv2, media: list[Tensor], opened: list[Image.Image]
) -> None:
    for tensor, image in zip(media, opened, strict=True):
        wanted = hps_pixels(convert_to_rgb(image), 32)[None]
        torch.testing.assert_close(hps.preprocess(tensor), wanted, rtol=0, atol=1e-5)


def published(image: Image.Image, side: int) -> Tensor:
    """The transform in the code of ImageReward and of the aesthetic predictor."""
    steps = [
        transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(side),
        transforms.ToTensor(),
        transforms.Normalize(CLIP_MEAN, CLIP_STD),
    ]
    pixels: Tensor = transforms.Compose(steps)(convert_to_rgb(image))
    return pixels[None]


def test_aesthetic_and_image_reward_see_what_their_code_makes(
    media: list[Tensor], opened: list[Image.Image], tmp_path: Path
) -> None:
    for name in ("clip", "blip"):
        (tmp_path / name).mkdir()
    clip = str(zoo.save_aesthetic(tmp_path / "clip"))
    blip = str(zoo.save_image_reward(tmp_path / "blip"))
    rewards = (Aesthetic(clip, head=clip, device="cpu"), ImageReward(blip, blip, device="cpu"))
    for tensor, image in zip(media, opened, strict=True):
        for reward in rewards:
            assert torch.equal(reward.preprocess(tensor), published(image, 32))


def test_dino_and_adversarial_see_what_processors_make(
    media: list[Tensor], opened: list[Image.Image], tmp_path: Path
) -> None:
    folder = str(zoo.save_dino(tmp_path))
    Image.new("RGB", (30, 30)).save(tmp_path / "reference.png")
    prompts = [Prompt("x", metadata={"reference": "reference.png"})]
    similarity = DINOSimilarity(folder, root=folder, resize=36, crop=28, device="cpu")
    similarity(torch.zeros(1, 3, 30, 30), prompts)  # the reference is seen once
    adversarial = Adversarial(folder, root=folder, side=28, device="cpu")
    norm = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3}
    square = {"height": 28, "width": 28}
    crop = BitImageProcessor(size={"shortest_edge": 36}, crop_size=square, **norm)
    squash = ViTImageProcessor(size=square, **norm)
    for tensor, image in zip(media, opened, strict=True):
        for reward, processor in ((similarity, crop), (adversarial, squash)):
            call = lambda r=reward, t=tensor: r(t, prompts)  # noqa: E731
            wanted = processor(convert_to_rgb(image), return_tensors="pt")["pixel_values"]
            near(seen_by(reward.model, call), wanted, IMAGENET_STD, image)


def test_hpsv3_and_unified_reward_see_what_qwens_processor_makes(
    media: list[Tensor], opened: list[Image.Image], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    base = zoo.save_qwen2_vl(tmp_path / "base")
    save_file(zoo.hpsv3_state(base), tmp_path / "HPSv3.safetensors")
    hpsv3 = HPSv3(str(tmp_path), base=str(base), dtype="float32", device="cpu")
    folder = str(zoo.save_qwen25_vl(tmp_path / "unified", []))
    unified = UnifiedReward(folder, max_new_tokens=1, dtype="float32", device="cpu")
    # Rows of 1,176 values: a patch of 14x14 in two frames, channel by channel.
    unit = (LEVEL / torch.tensor(CLIP_STD)).repeat_interleave(2 * 14 * 14)
    published = Qwen2VLImageProcessor(min_pixels=200_704, max_pixels=200_704)
    pairs = list(zip(media, opened, strict=True))[::5]  # all kinds, all sizes
    for tensor, image in pairs:
        call = lambda t=tensor: hpsv3(t, [Prompt("a cat")])  # noqa: E731
        found = seen_by(hpsv3.reader.model.visual, call, "hidden_states")
        wanted = published(image, return_tensors="pt")["pixel_values"]
        assert found.shape == wanted.shape
        assert float(((found - wanted).abs() / unit).max()) <= (12 if image.mode in "1P" else 2.01)
        call = lambda t=tensor: unified(t, [Prompt("a cat")])  # noqa: E731
        found = seen_by(unified.model.model.visual, call, "hidden_states")
        wanted = unified.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, wanted)


def test_geneval_sees_what_mask2formers_processor_makes(
    media: list[Tensor], opened: list[Image.Image], tmp_path: Path
) -> None:
    detector = Mask2FormerDetector(str(zoo.save_mask2former(tmp_path)))
    processor = Mask2FormerImageProcessor(
        size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=32, resample=2
    )
    pairs = zip(media, opened, strict=True)
    # Of odd sizes mmdet, which GenEval used, makes a pixel more or less than transformers.
    for tensor, image in (p for p in pairs if p[1].size == (64, 64)):
        found = seen_by(detector.model, lambda t=tensor: detector.detect(t))
        wanted = processor(convert_to_rgb(image), return_tensors="pt")["pixel_values"]
        assert found.shape == wanted.shape
        # mmdet pads after it has normalised, transformers before.
        height, width = detector_size(*tensor.shape[-2:])
        found, wanted = (x[..., :height, :width] for x in (found, wanted))
        near(found, wanted, IMAGENET_STD, image)


def test_jpeg_size_is_that_of_the_file(media: list[Tensor], opened: list[Image.Image]) -> None:
    for tensor, image in zip(media, opened, strict=True):
        buffer = io.BytesIO()
        convert_to_rgb(image).save(buffer, "JPEG", quality=95)
        (score,) = JPEGSize("large")(tensor, [Prompt("")])
        assert float(score) == pytest.approx(buffer.tell() / 1000)


def test_text_is_read_in_files_of_all_kinds(tmp_path: Path) -> None:
    (image,) = zoo.pil(page("Grand Opening").reshape(1, 3, *page("Grand Opening").shape[-2:]))
    for kind in ("L", "RGBA", "P"):
        image.convert(kind).save(tmp_path / f"{kind}.png")
    reward = OCR("exact", threads=1)
    prompts = [Prompt('a sign that says "Grand Opening"')]
    for medium in find_media(tmp_path):
        assert reward(read_medium(medium)[None], prompts).tolist() == [1.0], medium.name


def test_the_command_scores_files_of_all_kinds_and_refuses_16_bits(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["score", str(files[0].parent), "--reward", "jpeg_size"]
    assert main([*arguments, "--out", str(tmp_path / "scores.csv")]) == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + len(files)
    (tmp_path / "deep").mkdir()
    Image.new("I;16", (8, 8), 40000).save(tmp_path / "deep" / "deep.png")
    assert main(["score", str(tmp_path / "deep"), "--reward", "jpeg_size"]) == 1
    assert "more than 8 bits" in capsys.readouterr().err
