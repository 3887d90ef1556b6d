"""UnifiedReward and VideoScore2: a tiny Qwen2.5-VL that was taught its answers, and their reading."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import functional as TF

from flowgrpo.data.prompts import Prompt
from reward_models.shared.generation import token_at
from reward_models.shared.templates import template
from reward_models.unified_reward import UnifiedReward, read_grades
from reward_models.video_score2 import VideoScore2, sharpened
from tests import zoo

PROMPT = Prompt("a photo of a cat")
LONG = Prompt("a photo of two large blue dogs and a very small bird in the snow")
BLACK, WHITE = torch.zeros(1, 3, 56, 56), torch.ones(1, 3, 56, 56)


def asked(name: str, pads: str, prompt: Prompt = PROMPT) -> str:
    question = template(name).replace("{prompt}", prompt.text)
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{pads}{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def pads(kind: str, number: int = 1) -> str:
    return f"<|vision_start|><|{kind}_pad|><|vision_end|>" * number


# UnifiedReward.
GRADES = (
    "Alignment Score (1-5): 2.5\n",
    "Coherence Score (1-5): 4\n",
    "Style Score (1-5): 3.25",
    "4.5",
)
FILM = ("Physics Score (1-5): 2\n",)


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grades a white image and a black video; has nothing to say of a black image."""
    folder = zoo.save_qwen25_vl(
        tmp_path_factory.mktemp("unified"), [*GRADES, *FILM, "Final Score: "]
    )
    black, white = (zoo.pil(m)[0] for m in (BLACK, WHITE))
    zoo.teach(
        folder,
        [
            (
                {"images": [[white]]},
                asked("unified_reward_2_image", pads("image")),
                "".join(GRADES[:3]),
            ),
            (
                {"images": [[white]]},
                asked("unified_reward_2_image", pads("image"), LONG),
                "".join(GRADES[:3]),
            ),
            ({"images": [[black]]}, asked("unified_reward_2_image", pads("image")), GRADES[0]),
            (
                {"images": [[black] * 2]},
                asked("unified_reward_2_video", pads("image", 2)),
                GRADES[0] + FILM[0] + GRADES[2],
            ),
            ({"images": [[white]]}, asked("unified_reward_1", pads("image")), "Final Score: 4.5"),
        ],
        {},
    )
    return folder


def unified(folder: Path, **options: Any) -> UnifiedReward:
    return UnifiedReward(str(folder), **({"dtype": "float32", "device": "cpu"} | options))


def test_unified_reward_reads_the_answer_and_has_no_score_without(
    grader: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = unified(grader)
    media = torch.cat([WHITE, BLACK, WHITE])
    with caplog.at_level(logging.WARNING):
        scores = reward(media, [PROMPT] * 3)
    assert scores[[0, 2]].tolist() == pytest.approx([(2.5 + 4 + 3.25) / 3] * 2)
    assert scores[1].isnan()
    assert "no grades in UnifiedReward's answer to 'a photo of a cat'" in caplog.text
    lengths = reward(torch.cat([WHITE, WHITE]), [PROMPT, LONG])
    assert lengths.tolist() == pytest.approx([(2.5 + 4 + 3.25) / 3] * 2)
    one = torch.cat([reward(m[None], [PROMPT]) for m in media])
    torch.testing.assert_close(one, scores, equal_nan=True)
    small = unified(grader, batch_size=2, weights={"alignment": 1.0, "style": 3.0, "physics": 9.0})
    assert small(WHITE, [PROMPT]).item() == pytest.approx((2.5 + 3 * 3.25) / 4)
    media[0, 0, 0, 0] = math.nan
    assert reward(media, [PROMPT] * 3).isnan().tolist() == [True, True, False]


def test_unified_reward_of_videos_and_version_1(grader: Path) -> None:
    video = BLACK[:, None].expand(-1, 5, -1, -1, -1).clone()
    video[:, 1] = 1  # of five frames the first and the third are shown
    scores = unified(grader, num_frames=2)(video, [PROMPT])
    assert scores.item() == pytest.approx((2.5 + 2 + 3.25) / 3)
    first = unified(grader, version="1")
    assert first(WHITE, [PROMPT]).item() == pytest.approx(4.5)
    with pytest.raises(ValueError, match="grades images only"):
        first(video, [PROMPT])


def test_unified_reward_in_16_bits(grader: Path) -> None:
    half = unified(grader, dtype="bfloat16", max_new_tokens=4)
    assert half.model.dtype == torch.bfloat16
    assert half(WHITE, [PROMPT]).shape == (1,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Alignment Score (1-5): 2.69\nStyle Score (1-5): 4", [2.69, 4.0]),
        ("**Alignment Score (1-5):** 3.0\n**Style Score**: 1", [3.0, 1.0]),
        ("Alignment Score: 3 ... so Alignment Score: 2, style score = 5.0.", [2.0, 5.0]),
        ("Alignment Score (1-5): good\nStyle Score (1-5): 4", None),
        ("Alignment Score (1-5): 3", None),
        ("Alignment Score (1-5): 7\nStyle Score (1-5): 4", None),
        ("Alignment Score (1-5): -3\nStyle Score (1-5): 4", None),
        ("", None),
    ],
)
def test_read_grades(text: str, expected: list[float] | None) -> None:
    assert read_grades(text, ("Alignment Score", "Style Score")) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"weights": {"beauty": 1.0}},
        {"weights": {"style": -1.0}},
        {"version": "1", "weights": {"style": 1.0}},
        {"num_frames": 0},
    ],
)
def test_unified_reward_refuses_wrong_options(grader: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        unified(grader, **options)
    with pytest.raises(ValueError, match="leave nothing of alignment, coherence, style"):
        unified(grader, weights={"physics": 1.0})(WHITE, [PROMPT])


def test_refuses_missing_weights(grader: Path, tmp_path: Path) -> None:
    for file in grader.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(grader / "model.safetensors")
    del state[next(k for k in state if k.endswith("layers.0.mlp.up_proj.weight"))]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for make in (UnifiedReward, VideoScore2):
        with pytest.raises(ValueError, match="1 weights are missing"):
            make(str(tmp_path), device="cpu")


# VideoScore2.
PARTS = (
    "visual quality: ",
    ";\ntext-to-video alignment: ",
    ",\nphysical/common-sense consistency: ",
    "Let me think: visual quality: 1</think>",
)
ANSWER = f"{PARTS[3]}{PARTS[0]}3{PARTS[1]}4{PARTS[2]}2"
DOUBTS = {"3": {"3": 10.0, "5": 9.0, "a": 8.0}, "4": {"4": 10.0}, "2": {"2": 10.0, "1": 9.5}}


def shown(level: float) -> dict[str, Any]:
    """What the processor gets of four frames of one brightness."""
    frames = torch.full((4, 3, 56, 56), round(level * 255), dtype=torch.uint8)
    size = [336, 336]
    frames = TF.resize(frames, size, TF.InterpolationMode.BICUBIC, antialias=True)
    return {"videos": [frames], "videos_kwargs": {"do_resize": False}}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores white videos, with doubts; leaves out the last score of black ones."""
    folder = zoo.save_qwen25_vl(tmp_path_factory.mktemp("vs2"), PARTS)
    question = asked("video_score2", pads("video"))
    lessons = [(shown(1.0), question, ANSWER), (shown(0.0), question, f"{PARTS[0]}5{PARTS[1]}1")]
    zoo.teach(folder, lessons, DOUBTS)
    return folder


def film(level: float, frames: int = 4) -> Tensor:
    return torch.full((1, frames, 3, 56, 56), level)


def share(logits: dict[str, float], digit: int) -> float:
    every = [math.exp(logits.get(str(n), 0.0)) for n in range(1, 6)]
    return every[digit - 1] / sum(every)


def test_video_score2_soft_expected_and_hard(scorer: Path) -> None:
    def make(**options: Any) -> VideoScore2:
        options = {"dtype": "float32", "device": "cpu", "fps": 2.0, "max_new_tokens": 16} | options
        return VideoScore2(str(scorer), **options)

    white = film(1.0)
    soft = [d * share(DOUBTS[str(d)], d) for d in (3, 4, 2)]
    assert soft[0] < 2.5
    assert make().dimensions(white, [PROMPT])[0].tolist() == pytest.approx(soft, rel=2e-2)
    assert make()(white, [PROMPT]).item() == pytest.approx(sum(soft) / 3, rel=2e-2)
    # The released script takes its shares after temperature 0.7: 3.08 in place of 2.8.
    digits = torch.tensor([[0.0, 0.0, 0.3, 0.7, 0.0]])
    assert 4 * float(sharpened(digits, 0.7)[0, 3]) == pytest.approx(3.08, abs=5e-3)
    sharp = [d * share({k: v / 0.7 for k, v in DOUBTS[str(d)].items()}, d) for d in (3, 4, 2)]
    found = make(temperature=0.7).dimensions(white, [PROMPT])[0].tolist()
    assert found == pytest.approx(sharp, rel=2e-2)
    hard = make(score="hard")
    assert hard.dimensions(white, [PROMPT]).tolist() == [[3.0, 4.0, 2.0]]
    weighted = make(score="hard", weights={"visual": 2.0, "physics": -1.0})
    assert weighted(white, [PROMPT]).item() == pytest.approx(4.0)
    expected = [sum(n * share(DOUBTS[str(d)], n) for n in range(1, 6)) for d in (3, 4, 2)]
    values = make(score="expected").dimensions(white, [PROMPT])[0].tolist()
    assert values == pytest.approx(expected, rel=2e-2)


def test_video_score2_in_batches_and_without_scores(
    scorer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reward = VideoScore2(
        str(scorer), score="hard", fps=2.0, dtype="float32", max_new_tokens=16, device="cpu"
    )
    media = torch.cat([film(1.0), film(0.0), film(1.0)])
    with caplog.at_level(logging.WARNING):
        dimensions = reward.dimensions(media, [PROMPT] * 3)
    assert dimensions[[0, 2]].tolist() == [[3.0, 4.0, 2.0]] * 2
    assert dimensions[1].tolist()[:2] == [5.0, 1.0]
    assert dimensions[1, 2].isnan()
    assert "no physical/common-sense consistency" in caplog.text
    assert reward(media, [PROMPT] * 3).isnan().tolist() == [False, True, False]
    reward.factors = torch.tensor([1.0, 0.0, 0.0])
    assert reward(media, [PROMPT] * 3).tolist() == [3.0, 5.0, 3.0]
    media[0, 1, 0, 0, 0] = math.nan
    assert reward(media, [PROMPT] * 3).isnan().tolist() == [True, False, False]
    reward.fps = 0.0
    for ask in (lambda: reward(media, [PROMPT] * 3), lambda: reward.check([PROMPT])):
        with pytest.raises(ValueError, match="needs its frames per second"):
            ask()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "visual quality: 3; \ntext-to-video alignment: 4, \nphysical/common-sense consistency: 2.",
            [3, 4, 2],
        ),
        (
            "<think>visual quality: 1</think>\n(1) visual quality – clarity, smoothness, artifacts: 5\n"
            "(2) text-to-video alignment – fidelity to the prompt: 1\n"
            "(3) physical/common-sense consistency – naturalness and physics plausibility: 4",
            [5, 1, 4],
        ),
        (
            "visual quality: 1 at first sight\nno, visual quality: 3\n"
            "text-to-video alignment: 4\nphysical/common-sense consistency: 2",
            [3, 4, 2],
        ),
        (
            "<think>visual quality: 3; text-to-video alignment: 4; physical consistency: 2</think>",
            [3, 4, 2],
        ),
        ("visual quality: poor; (2) text-to-video alignment: 4", [math.nan, 4, math.nan]),
        ("visual quality: 3.5\ntext-to-video alignment: 12", [math.nan, math.nan, math.nan]),
    ],
)
def test_video_score2_reads_both_forms(scorer: Path, answer: str, expected: list[float]) -> None:
    reward = VideoScore2(str(scorer), score="hard", device="cpu", dtype="float32")
    ids = reward.processor.tokenizer(answer)["input_ids"]
    scores = reward._read(PROMPT, ids, torch.full((len(ids), 5), 0.2))
    assert scores == pytest.approx(expected, nan_ok=True)


def test_token_at(scorer: Path) -> None:
    tokenizer = zoo.Qwen2_5_VLProcessor.from_pretrained(scorer).tokenizer
    text = "a red cat – visual quality: 3 of 5 dogs"
    ids = tokenizer(text)["input_ids"]
    for digit in "35":
        assert tokenizer.decode([ids[token_at(tokenizer, ids, text.index(digit))]]).strip() == digit


@pytest.mark.parametrize("options", [{"weights": {"VQ": 1.0}}, {"batch_size": 0}, {"fps": -1.0}])
def test_video_score2_refuses_wrong_options(scorer: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        VideoScore2(str(scorer), device="cpu", **options)
