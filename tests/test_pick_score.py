"""PickScore on a tiny checkpoint of the real classes, against the processor on PIL images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from flowgrpo.data.prompts import Prompt
from reward_models.pick_score import PickScore
from tests.tiny.parts import clip_tokenizer
from tests.zoo import check_gradient

TEXTS = ("a red cube", "two blue dogs riding a bus", "a photo of a cat")
PROMPTS = [Prompt(t) for t in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of some kilobytes with its processor, 32x32."""
    tokenizer = clip_tokenizer()
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
    }
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        initializer_factor=5.0,
    )
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> PickScore:
    return PickScore(str(folder), device="cpu")


def noise(number: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images with coarse structure, so that resizing leaves something of them."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 5, 7, generator=random)
    fine = torch.rand(number, 3, height, width, generator=random)
    images: Tensor = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (images + 0.2 * fine).clamp(0, 1)


def by_pil(folder: Path, media: Tensor, texts: Sequence[str]) -> Tensor:
    """PickScore of PIL images, one pair at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    scores = []
    for image, text in zip(media, texts, strict=True):
        array = np.round(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        pixels = processor.image_processor(Image.fromarray(array), return_tensors="pt")
        tokens = processor.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            a = model.get_image_features(**pixels).pooler_output[0]
            b = model.get_text_features(**tokens).pooler_output[0]
        scores.append(model.logit_scale.exp().item() * torch.cosine_similarity(a, b, dim=0))
    return torch.stack(scores)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (33, 57), (101, 37), (20, 31)])
def test_equals_the_processor_on_pil_images(
    folder: Path, reward: PickScore, size: tuple[int, int]
) -> None:
    media = noise(3, *size)
    expected = by_pil(folder, media, TEXTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(reward(media, PROMPTS), expected, rtol=0, atol=2e-4)


def test_the_whole_text_counts_up_to_77_tokens(folder: Path, reward: PickScore) -> None:
    """By PIL and the plain tokenizer, which cuts nothing; the last word is the 75th."""
    tokenizer = clip_tokenizer()
    words = ["cat", "dog", "bird"] * 24 + ["cat"] * 2
    texts = [" ".join([*words, last]) for last in ("bird", "dog")]
    fitting = [t for t in texts if len(tokenizer(t)["input_ids"]) <= 77]
    while not fitting:
        words = words[:-1]
        texts = [" ".join([*words, last]) for last in ("bird", "dog")]
        fitting = [t for t in texts if len(tokenizer(t)["input_ids"]) <= 77]
    assert len(tokenizer(texts[0])["input_ids"]) > 70
    media = noise(1, 32, 32).expand(2, -1, -1, -1)
    expected = by_pil(folder, media, texts)
    assert (expected[0] - expected[1]).abs() > 1e-3
    scores = reward(media, [Prompt(t) for t in texts])
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-4)


def test_does_not_depend_on_the_batch(reward: PickScore) -> None:
    media = noise(4, 40, 56)
    prompts = [PROMPTS[i] for i in (1, 0, 1, 2)]
    together = reward(media, prompts)
    alone = torch.cat([reward(m[None], [p]) for m, p in zip(media, prompts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    order = [2, 3, 0, 1]
    shuffled = reward(media[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-4)


def test_pairs_each_image_with_its_own_prompt(reward: PickScore) -> None:
    image = noise(1, 32, 32).expand(3, -1, -1, -1)
    scores = reward(image, PROMPTS)
    assert scores.shape == (3,)
    assert len(set(scores.tolist())) == 3
    assert len(set(reward(image, [PROMPTS[0]] * 3).tolist())) == 1


def test_range_and_precision(folder: Path, reward: PickScore) -> None:
    media = noise(3, 32, 32)
    scores = reward(media, PROMPTS)
    bound = math.exp(reward.model.logit_scale.item())
    assert bool((scores.abs() <= bound).all())
    half = PickScore(str(folder), dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16
    torch.testing.assert_close(half(media, PROMPTS), scores, rtol=0, atol=0.05 * bound)
    with pytest.raises((ValueError, TypeError), match="float64"):
        PickScore(str(folder), dtype="float64")  # type: ignore[arg-type]


def test_long_prompts_are_cut(reward: PickScore) -> None:
    media = noise(1, 32, 32)
    words = ["cat", "dog", "bird"] * 40
    cut = reward(media, [Prompt(" ".join(words))])
    longer = reward(media, [Prompt(" ".join([*words, "bus"]))])
    assert torch.equal(cut, longer)


def test_broken_images_have_no_score(reward: PickScore) -> None:
    media = noise(2, 32, 32)
    whole = reward(media, PROMPTS[:2])
    media[1, 0, 3, 3] = math.nan
    scores = reward(media, PROMPTS[:2])
    assert torch.equal(scores[0], whole[0])
    assert scores[1].isnan()


def changed(folder: Path, to: Path, drop: str = "", add: Sequence[str] = ()) -> str:
    """A copy of the checkpoint with other keys."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != drop}
    assert not drop or len(weights) < len(load_file(folder / "model.safetensors"))
    weights |= {name: torch.arange(4)[None] for name in add}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize("key", ["logit_scale", "text_projection.weight"])
def test_refuses_missing_weights(folder: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"1 weights are missing, such as {key}"):
        PickScore(changed(folder, tmp_path, drop=key), device="cpu")


def test_refuses_left_over_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 weights are left over, such as rm_head\.weight"):
        PickScore(changed(folder, tmp_path, add=["rm_head.weight"]), device="cpu")


def test_takes_the_position_tables_of_old_checkpoints(
    folder: Path, tmp_path: Path, reward: PickScore
) -> None:
    tables = [f"{part}_model.embeddings.position_ids" for part in ("text", "vision")]
    old = PickScore(changed(folder, tmp_path, add=tables), device="cpu")
    media = noise(3, 32, 32)
    assert torch.equal(old(media, PROMPTS), reward(media, PROMPTS))


def test_processor_from_another_folder(folder: Path, tmp_path: Path, reward: PickScore) -> None:
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    split = PickScore(str(tmp_path), processor=str(folder), device="cpu")
    media = noise(3, 32, 32)
    assert torch.equal(split(media, PROMPTS), reward(media, PROMPTS))


def test_scores_have_the_gradient_of_the_images(reward: PickScore) -> None:
    check_gradient(reward, PROMPTS, tolerance=0.1)


def test_another_processor_is_refused_with_a_gradient(folder: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    images = CLIPImageProcessor(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(images, clip_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs CLIP's processor"):
        PickScore(str(tmp_path), device="cpu").scores_with_gradient(noise(3, 32, 32), PROMPTS)
