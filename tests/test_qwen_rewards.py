"""HPSv3 and VideoAlign on a tiny Qwen2-VL, against the plain model and preprocessing by hand."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from flowgrpo.data.prompts import Prompt
from reward_models.hpsv3 import HPSv3
from reward_models.shared.pictures import CLIP_MEAN, CLIP_STD
from reward_models.shared.qwen2_vl import seen_size, shown_frames
from reward_models.shared.templates import template
from reward_models.video_align import VideoAlign
from tests import zoo
from tests.zoo import PROMPTS, films, noise

STATISTICS = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_qwen2_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def hpsv3_state(base: Path) -> dict[str, Tensor]:
    return zoo.hpsv3_state(base)


@pytest.fixture(scope="module")
def hpsv3_file(hpsv3_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    save_file(hpsv3_state, folder / "HPSv3.safetensors")
    return folder


@pytest.fixture(scope="module")
def align_state(base: Path) -> dict[str, Tensor]:
    return zoo.video_align_state(base)


@pytest.fixture(scope="module")
def align_folder(align_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("align")
    (folder / "checkpoint-11352").mkdir()
    torch.save(align_state, folder / "checkpoint-11352" / "model.pth")
    return folder


Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make_hpsv3(base: Path, hpsv3_file: Path) -> Make:
    def make(model: Path = hpsv3_file, **options: Any) -> HPSv3:
        options = {"dtype": "float32", "device": "cpu"} | options
        return HPSv3(str(model), base=str(base), **options)

    return make


@pytest.fixture(scope="module")
def make_align(base: Path, align_folder: Path) -> Make:
    def make(model: Path = align_folder, **options: Any) -> VideoAlign:
        options = {"dtype": "float32", "device": "cpu", "fps": 8.0} | options
        return VideoAlign(str(model), base=str(base), **options)

    return make


@pytest.fixture(scope="module")
def hpsv3(make_hpsv3: Make) -> HPSv3:
    model: HPSv3 = make_hpsv3()
    return model


@pytest.fixture(scope="module")
def align(make_align: Make) -> VideoAlign:
    model: VideoAlign = make_align()
    return model


def patches(frames: np.ndarray) -> Tensor:
    """Qwen2-VL's rows: pairs of frames, in blocks of 2x2 patches of 14x14 pixels."""
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    frames = (frames.astype(np.float32) / 255 - mean) / std
    rows = []
    for t in range(0, len(frames), 2):
        for y in range(0, frames.shape[2], 28):
            for x in range(0, frames.shape[3], 28):
                for dy in (0, 14):
                    for dx in (0, 14):
                        box = frames[t : t + 2, :, y + dy : y + dy + 14, x + dx : x + dx + 14]
                        rows.append(box.transpose(1, 0, 2, 3).ravel())
    return torch.from_numpy(np.stack(rows))


def hidden_at(
    base: Path,
    state: dict[str, Tensor],
    frames: np.ndarray,
    kind: str,
    question: str,
    tokens: list[str],
) -> Tensor:
    """Hidden states of one question about one picture, by the plain model with a head for words."""
    processor = Qwen2VLProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(tokens, special_tokens=True)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base).eval()
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.load_state_dict(state)
    grid = torch.tensor([[len(frames) // 2, frames.shape[2] // 14, frames.shape[3] // 14]])
    number = int(grid.prod()) // 4
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{f'<|{kind}_pad|>' * number}<|vision_end|>{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    with torch.no_grad():
        hidden = model(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            output_hidden_states=True,
            **{pixels: patches(frames), f"{kind}_grid_thw": grid},
        ).hidden_states[-1][0]
    wanted = processor.tokenizer.convert_tokens_to_ids(tokens)
    places = [int((ids[0] == w).nonzero()) for w in wanted]
    chosen: Tensor = hidden[places]
    return chosen


# The templates.
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("hpsv3", "e61d58f3c7d3be65"),
        ("unified_reward_1", "f56f919ce3bc6aab"),
        ("unified_reward_2_image", "75d52d3ae771f89b"),
        ("unified_reward_2_video", "707411fb9175547e"),
        ("video_align", "fd7862ecb43bbe39"),
        ("video_score2", "5d7eaf4888b7d1d4"),
    ],
)
def test_templates_are_as_published(name: str, digest: str) -> None:
    """Down to blanks at line ends, which an editor takes away and a model may miss."""
    text = template(name)
    assert text.count("{prompt}") == 1
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


# Sizes and frames.
@pytest.mark.parametrize(
    ("size", "least", "most", "expected"),
    [
        ((512, 512), 200_704, 200_704, (448, 448)),
        ((1024, 1024), 200_704, 200_704, (448, 448)),
        ((720, 1280), 200_704, 200_704, (336, 588)),
        ((64, 48), 200_704, 200_704, (532, 392)),
        ((240, 416), 100_352, 200_704, (252, 420)),
        ((480, 832), 100_352, 602_112, (476, 840)),
        ((10, 1000), 1, 10**9, (28, 1008)),
        ((70, 98), 1, 10**9, (56, 112)),  # halves go to the even number
    ],
)
def test_seen_size(size: Any, least: int, most: int, expected: Any) -> None:
    assert seen_size(size, least, most) == expected


def test_seen_size_refuses_threads() -> None:
    with pytest.raises(ValueError, match="1:200 at most, got 4x1000"):
        seen_size((4, 1000), 1, 10**9)


@pytest.mark.parametrize(
    ("total", "fps", "nearest", "expected"),
    [
        (33, 16.0, True, [0, 11, 21, 32]),
        (53, 8.0, True, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]),
        (53, 8.0, False, []),
        (3, 8.0, True, [0, 2]),
        (9, 1.0, True, [0, 1, 2, 3, 5, 6, 7, 8]),
    ],
)
def test_shown_frames(total: int, fps: float, nearest: bool, expected: list[int]) -> None:
    video = torch.arange(total, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 28, 28)
    shown = shown_frames(video, fps, 2.0, 200_704, nearest)
    assert shown.shape[1:] == (3, 336, 336)
    if expected:
        assert shown[:, 0, 0, 0].tolist() == expected
    else:  # 13.25 of 53 frames: 14 to the nearest even number, 12 downwards
        assert len(shown) == 12


# HPSv3.
def test_hpsv3_is_the_mean_of_the_head(
    base: Path, hpsv3_state: dict[str, Tensor], hpsv3: HPSv3
) -> None:
    body = {k: v for k, v in hpsv3_state.items() if not k.startswith("rm_head.")}
    media, expected = noise(2, 60, 90), []
    for image, prompt in zip(zoo.pil(media), PROMPTS, strict=False):
        seen = np.asarray(image.resize((560, 392), Image.Resampling.BICUBIC))
        frames = np.stack([seen.transpose(2, 0, 1)] * 2)
        question = template("hpsv3").replace("{prompt}", prompt.text)
        x = hidden_at(base, body, frames, "image", question, ["<|Reward|>"])[0]
        for n in (0, 3, 5):
            x = hpsv3_state[f"rm_head.{n}.weight"] @ x + hpsv3_state[f"rm_head.{n}.bias"]
            x = x.relu() if n < 5 else x
        expected.append(x[0].item())
    scores = hpsv3(media, PROMPTS[:2])
    assert abs(expected[0] - expected[1]) > 0.1
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)


def test_hpsv3_sees_image_and_prompt_and_not_the_batch(make_hpsv3: Make, hpsv3: HPSv3) -> None:
    media = noise(3, 40, 40)
    prompts = [
        Prompt("a cat"),
        Prompt("two blue dogs riding a very big red bus in the snow"),
        *PROMPTS[:1],
    ]
    together = hpsv3(media, prompts)
    assert together.std() > 0.01
    in_pairs = make_hpsv3(batch_size=2)(media, prompts)
    torch.testing.assert_close(together, in_pairs, rtol=0, atol=1e-3)
    torch.testing.assert_close(together[1:2], hpsv3(media[1:2], prompts[1:2]), rtol=0, atol=1e-3)
    assert (hpsv3(media, [PROMPTS[0]] * 3) - together)[:2].abs().min() > 1e-3


def test_hpsv3_takes_the_older_names_and_16_bits(
    make_hpsv3: Make, hpsv3: HPSv3, hpsv3_state: dict[str, Tensor], tmp_path: Path
) -> None:
    media = noise(2, 40, 40)
    torch.save({"model": zoo.old_names(hpsv3_state)}, tmp_path / "old.pth")
    old = make_hpsv3(tmp_path / "old.pth")
    assert torch.equal(old(media, PROMPTS[:2]), hpsv3(media, PROMPTS[:2]))
    half = make_hpsv3(dtype="bfloat16")
    assert half.reader.model.dtype == torch.bfloat16
    assert half.head[0].weight.dtype == torch.float32
    assert half(media, PROMPTS[:2]).isfinite().all()
    media[0, 0, 0, 0] = math.nan
    assert hpsv3(media, PROMPTS[:2]).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("drop", "add", "problem"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight", "", "1 weights are missing"),
        ("model.visual.patch_embed.proj.weight", "", "1 weights are missing"),
        ("model.language_model.embed_tokens.weight", "", "1 weights are missing"),
        ("rm_head.3.bias", "", "1 weights are missing, such as 3.bias"),
        ("rm_head.5.weight", "", "1 weights are missing, such as 5.weight"),
        ("", "rm_head.7.weight", "1 weights are left over"),
        ("", "model.language_model.layers.2.mlp.up_proj.weight", "1 weights are left over"),
    ],
)
def test_hpsv3_refuses_checkpoints_that_do_not_fit(
    make_hpsv3: Make,
    hpsv3_state: dict[str, Tensor],
    tmp_path: Path,
    drop: str,
    add: str,
    problem: str,
) -> None:
    state = {k: v for k, v in hpsv3_state.items() if k != drop}
    if add:
        state[add] = torch.zeros(64, 32)
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=problem):
        make_hpsv3(tmp_path)


def test_special_tokens_in_prompts_are_refused(hpsv3: HPSv3) -> None:
    for text in ("a <|Reward|> cat", "a <|image_pad|> cat"):
        with pytest.raises(ValueError, match="special token"):
            hpsv3(noise(1, 40, 40), [Prompt(text)])


def test_prompts_with_braces_are_taken_as_they_are(hpsv3: HPSv3) -> None:
    assert hpsv3(noise(1, 40, 40), [Prompt("a {cat} {0}")]).isfinite().all()


# VideoAlign.
def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The body with its LoRAs, alpha 128 and rank 64, under today's names."""
    body = {}
    for key, tensor in state.items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if ".lora_" in name or name.startswith("rm_head"):
            continue
        if f"{key.removesuffix('.base_layer.weight')}.lora_A.default.weight" in state:
            a, b = (state[key.replace("base_layer", f"lora_{h}.default")] for h in "AB")
            tensor = tensor + 2 * b @ a
        if not name.startswith("lm_head"):
            name = (
                f"model.{name}"
                if name.startswith("visual")
                else name.replace("model.", "model.language_model.", 1)
            )
        body[name] = tensor
    return body


def test_video_align_reads_each_token(
    base: Path, align_state: dict[str, Tensor], align: VideoAlign, make_align: Make
) -> None:
    media = films(1, 9, 100, 150)
    frames = (media[0, [0, 3, 5, 8]] * 255).round().to(torch.uint8)  # 1.125 s: 4 frames at least
    frames = TF.resize(frames, [280, 392], TF.InterpolationMode.BICUBIC, antialias=True)
    question = template("video_align").replace("{prompt}", PROMPTS[1].text)
    tokens = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
    hidden = hidden_at(base, merged(align_state), frames.numpy(), "video", question, tokens)
    raw = (hidden @ align_state["base_model.model.rm_head.weight"][0]).tolist()
    assert np.std(raw) > 0.1
    expected = [(r - m) / s for r, (m, s) in zip(raw, STATISTICS.values(), strict=True)]
    dimensions = align.dimensions(media, PROMPTS[1:2])
    assert dimensions[0].tolist() == pytest.approx(expected, abs=2e-3)
    assert align(media, PROMPTS[1:2]).tolist() == pytest.approx([sum(expected)], abs=5e-3)
    plain = make_align(weights={"MQ": 2.0}, normalize=False)
    assert plain(media, PROMPTS[1:2]).tolist() == pytest.approx([2 * raw[1]], abs=5e-3)


def test_video_align_takes_the_frame_rate_from_the_prompt(
    align: VideoAlign, make_align: Make
) -> None:
    media = films(2, 16, 56, 56)
    slow, fast = (Prompt("a cat", metadata={"fps": f}) for f in (4, 8.0))
    mixed = make_align(fps=0.0)(media, [slow, fast])
    default = align(media, [Prompt("a cat")] * 2)
    assert mixed[1] == pytest.approx(default[1].item(), abs=1e-3)
    assert abs(mixed[0] - default[0]) > 1e-4
    with pytest.raises(ValueError, match=r"'a cat' needs its frames per second.*got 0\.0"):
        make_align(fps=0.0)(media, [Prompt("a cat")] * 2)
    align.check([Prompt("a cat")])
    with pytest.raises(ValueError, match="needs its frames per second"):
        make_align(fps=0.0).check([slow, Prompt("a cat")])
    with pytest.raises(ValueError, match="got 'fast'"):
        align(media[:1], [Prompt("a cat", metadata={"fps": "fast"})])


def test_video_align_does_not_depend_on_the_batch(align: VideoAlign, make_align: Make) -> None:
    media = films(3, 6, 56, 84)
    together = align(media, PROMPTS)
    assert together.std() > 1e-3
    torch.testing.assert_close(
        make_align(batch_size=2)(media, PROMPTS), together, rtol=0, atol=1e-3
    )
    broken = media.clone()
    broken[2, 5, 0, 0, 0] = math.nan
    scores = align(broken, PROMPTS)
    torch.testing.assert_close(scores[:2], together[:2], rtol=0, atol=1e-3)
    assert scores[2].isnan()
    half = make_align(dtype="bfloat16")(media, PROMPTS)
    assert half.isfinite().all()


def test_video_align_with_a_head_for_each_token(
    make_align: Make, align: VideoAlign, align_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(align_state)
    state["base_model.model.rm_head.weight"] = align_state["base_model.model.rm_head.weight"] * (
        torch.tensor([[1.0], [2.0], [3.0]])
    )
    torch.save(state, tmp_path / "model.pth")
    three = make_align(tmp_path, normalize=False)
    media = films(1, 4, 56, 56)
    one = make_align(normalize=False).dimensions(media, PROMPTS[:1])
    expected = one * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(three.dimensions(media, PROMPTS[:1]), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "drop",
    [
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "base_model.model.visual.merger.mlp.0.bias",
        "base_model.model.rm_head.weight",
    ],
)
def test_video_align_refuses_checkpoints_that_do_not_fit(
    make_align: Make, align_state: dict[str, Tensor], tmp_path: Path, drop: str
) -> None:
    state = {k: v for k, v in align_state.items() if k != drop}
    assert len(state) < len(align_state)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="1 weights are missing"):
        make_align(tmp_path)


@pytest.mark.parametrize(
    "options", [{"weights": {"XY": 1.0}}, {"weights": {"VQ": 0.0}}, {"batch_size": 0}]
)
def test_video_align_refuses_wrong_options(make_align: Make, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        make_align(**options)
