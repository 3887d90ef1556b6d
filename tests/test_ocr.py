"""The OCR reward with the real engine on text drawn by Pillow, and its rule without an engine."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.frames import FrameScore
from reward_models.ocr import OCR, edit_distance, wanted_text

WORDS = st.text("abc", max_size=6)


@pytest.fixture(scope="module")
def engine() -> OCR:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return OCR(threads=1)


def page(text: str, size: int = 40, color: str = "navy") -> Tensor:
    """A 384x384 image with dark text on a light ground, in Pillow's own font."""
    image = Image.new("RGB", (384, 384), (235, 235, 220))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).multiline_text((20, 120), text, fill=color, font=font)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def ask(text: str) -> Prompt:
    return Prompt(f"a sign that says {text}", metadata={"text": text})


def fixed(*lines: str) -> Any:
    """An engine that reads the same lines in every image."""
    return lambda image: lines


@pytest.mark.parametrize("text", ["Grand Opening", "Lemon 1.80", "50% OFF!", "Open: 9-5"])
def test_reads_what_is_written(engine: OCR, text: str) -> None:
    media = torch.stack([page(text), page(text.replace(" ", "\n")), page("Closed")])
    scores = engine(media, [ask(text)] * 3)
    assert scores[:2].tolist() == [1.0, 1.0]
    assert scores[2] < 0.5


def test_nearer_text_scores_higher(engine: OCR) -> None:
    texts = ["New York Coffee", "New York Toffee", "New Dark Toffee", "Zzz"]
    media = torch.stack([page(t, 36) for t in texts])
    scores = engine(media, [ask(texts[0])] * 4)
    expected = [1 - min(13, edit_distance(plain(t), plain(texts[0]))) / 13 for t in texts]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert len(set(scores.tolist())) == 4


def plain(text: str) -> str:
    return text.replace(" ", "").lower()


def test_without_text_nothing_is_read(engine: OCR) -> None:
    random = torch.Generator().manual_seed(0)
    media = torch.stack([torch.full((3, 384, 384), 0.4), torch.rand(3, 384, 384, generator=random)])
    assert engine(media, [ask("Hello")] * 2).tolist() == [0.0, 0.0]


def test_does_not_read_upside_down(engine: OCR) -> None:
    upright = page("HELP MARK")
    scores = engine(torch.stack([upright, upright.flip(1, 2)]), [ask("HELP MARK")] * 2)
    assert scores[0] == 1
    assert scores[1] < 0.6


def test_red_is_not_taken_for_blue() -> None:
    seen: list[np.ndarray] = []

    def reader(image: np.ndarray) -> Sequence[str]:
        seen.append(image)
        return ["x"]

    media = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    assert OCR(reader=reader)(media, [ask("x")]).tolist() == [1.0]
    assert seen[0].shape == (4, 6, 3)
    assert seen[0][0, 0].tolist() == [255, 128, 0]


def test_the_engine_gets_the_colours_as_from_a_file(
    engine: OCR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine receives what its own loader makes of the saved picture."""
    from rapidocr.ch_ppocr_det import TextDetector
    from rapidocr.utils.load_image import LoadImage

    media = page("Red", color="red")
    pixels = (media * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "page.png")
    seen: list[np.ndarray] = []
    detect = TextDetector.__call__

    def noting(self: Any, image: np.ndarray) -> Any:
        seen.append(image.copy())
        return detect(self, image)

    monkeypatch.setattr(TextDetector, "__call__", noting)
    engine(media[None], [ask("Red")])
    colours = [[int(v) for v in c] for c in np.unique(seen[0].reshape(-1, 3), axis=0)]
    loaded = LoadImage()(str(tmp_path / "page.png"))
    assert [int(v) for v in loaded[0, 0]] in colours
    # Pure red in the engine's order.
    assert [0, 0, 255] in loaded.reshape(-1, 3).tolist()
    assert [0, 0, 255] in colours
    assert [255, 0, 0] not in colours


@pytest.mark.parametrize(
    ("read", "edit", "exact"),
    [
        (["Open"], 1.0, 1.0),
        (["o p", " EN"], 1.0, 1.0),
        (["now open daily"], 1.0, 0.0),
        (["Opem"], 0.75, 0.0),
        (["Ope"], 0.75, 0.0),
        (["Opeens"], 0.5, 0.0),
        (["Hush", "money", "hugs"], 0.0, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_scores_by_hand(read: list[str], edit: float, exact: float) -> None:
    media = torch.rand(1, 3, 8, 8)
    assert OCR("edit", reader=fixed(*read))(media, [ask("Open")]).tolist() == [edit]
    assert OCR("exact", reader=fixed(*read))(media, [ask("Open")]).tolist() == [exact]


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance_by_hand(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS, WORDS)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert edit_distance(a + c, b + c) == edit_distance(a, b)


def test_where_the_wanted_text_comes_from() -> None:
    assert wanted_text(Prompt('a sign "Bar"', metadata={"text": "Café"})) == "Café"
    assert wanted_text(Prompt('a sign that says "Grand Opening" in red')) == "Grand Opening"
    assert wanted_text(Prompt("a sign that says “Don't” in red")) == "Don't"


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("a plain sign"),
        Prompt('a sign "'),
        Prompt('a sign ""'),
        Prompt('a sign "  "'),
        Prompt('"A" beside "B"'),
        Prompt('a sign "A"', metadata={"text": ""}),
        Prompt('a sign "A"', metadata={"text": " \n"}),
        Prompt('a sign "A"', metadata={"text": 7}),
    ],
)
def test_refuses_prompts_without_one_text(prompt: Prompt) -> None:
    reward = OCR(reader=fixed("A"))
    with pytest.raises(ValueError, match=r"prompt .*(sign|beside)") as error:
        reward(torch.rand(1, 3, 8, 8), [prompt])
    assert repr(prompt.text) in str(error.value)
    reward.check([Prompt('a sign "A"')])
    with pytest.raises(ValueError, match="prompt"):
        reward.check([Prompt('a sign "A"'), prompt])


def test_a_failing_engine_gives_no_score(engine: OCR, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: np.ndarray) -> Sequence[str]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        OCR(reader=fail)(torch.rand(1, 3, 8, 8), [ask("A")])

    from rapidocr.ch_ppocr_rec import TextRecognizer, TextRecOutput

    monkeypatch.setattr(TextRecognizer, "__call__", lambda self, args: TextRecOutput())
    with pytest.raises(RuntimeError, match="recogniser"):
        engine(page("Hello")[None], [ask("Hello")])


def test_broken_images_have_no_score() -> None:
    media = torch.rand(2, 3, 8, 8)
    media[0, 1, 2, 3] = math.nan
    scores = OCR(reader=fixed("A"))(media, [ask("A")] * 2)
    assert scores[0].isnan()
    assert scores[1] == 1


@pytest.mark.parametrize("absent", ["rapidocr", "onnxruntime"])
def test_says_what_to_install(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "reward_models.ocr.find_spec", lambda name: None if name == absent else real(name)
    )
    with pytest.raises(ImportError, match=rf"{absent}.*pip install 'flowgrpo\[ocr\]'"):
        OCR()


@pytest.mark.parametrize("options", [{"mode": "fuzzy"}, {"longest_side": 8}, {"threads": -1}])
def test_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=str(next(iter(options.values())))):
        OCR(**options)


def test_flash_grpos_video_reward_is_the_mean_of_the_best_frames() -> None:
    """max(1, int(0.3 n)) frames, as in the released code; a missing score is not passed over."""
    for number, best in ((10, 3), (5, 1), (2, 1)):
        media = torch.rand(2, number, 3, 4, 4)
        video = FrameScore(model="tests.test_ocr:brightness", reduce="mean_top")
        wanted = media.flatten(2).mean(2).sort(dim=1, descending=True).values[:, :best].mean(1)
        torch.testing.assert_close(video(media, [ask("A")] * 2), wanted)
    media[1, 0] = torch.nan
    assert video(media, [ask("A")] * 2).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"share in \(0, 1\], got 1, 32, 'mean_top', 0.0"):
        FrameScore(model="tests.test_ocr:brightness", reduce="mean_top", share=0.0)


def test_flow_grpos_video_reward_counts_frames_with_a_score_and_extra_text() -> None:
    """The released rule's own examples: 1.0 for the text in half the frames, 0.0 beside other text."""

    def score(*frames: str) -> list[float]:
        read = iter(frames)
        each = OCR("whole", reader=lambda image: [next(read)])
        video = FrameScore(model="tests.test_ocr:brightness", every=1, reduce="mean_positive")
        video.reward = each
        plain = FrameScore(model="tests.test_ocr:brightness", every=1)
        plain.reward = OCR(reader=lambda image: [next(again)])
        again = iter(frames)
        media = torch.zeros(1, len(frames), 3, 8, 8)
        return [float(video(media, [ask("HELLO")])), float(plain(media, [ask("HELLO")]))]

    assert score("HELLO", "", "hello", "") == [1.0, 0.5]
    assert score("HELLO WORLD", "HELLO WORLD") == [0.0, 1.0]
    assert score("", "") == [0.0, 0.0]
    assert score("HELL", "") == pytest.approx([0.8, 0.4])
