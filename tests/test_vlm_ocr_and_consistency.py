"""Transcription and consistency of pictures, over HTTP."""

import math

import pytest
import torch

from flowgrpo.data.prompts import Prompt
from reward_models.vlm_consistency import VLMConsistency, cells, grid_of
from reward_models.vlm_ocr import VLMOCR
from tests import zoo
from tests.stub_vlm import Question, Reply, Stub, said

IMAGES = zoo.noise(4, 16, 24)


@pytest.mark.parametrize(
    ("mode", "scores"),
    [
        ("edit", [1.0, 0.8, 0.0, math.nan]),
        ("whole", [0.2, 0.8, 0.0, math.nan]),
        ("exact", [0.0] * 3 + [math.nan]),
    ],
)
def test_a_transcription_is_scored_by_the_rules_of_ocr(mode, scores) -> None:
    # The pictures differ in brightness; the answers follow it.
    media = torch.stack([torch.full((3, 8, 8), v) for v in (0.2, 0.4, 0.6, 0.8)])
    answers = {0.2: "HEL LO\nyou", 0.4: "<think>hello</think>hallo", 0.6: "None.", 0.8: " "}
    if mode == "whole":
        answers[0.2] = "HELLOworld"[:9]
    with Stub(lambda q: said(answers[round(q.light, 1)])) as stub:
        reward = VLMOCR("tiny", stub.url, mode=mode, patience=5.0)
        found = reward(media, [Prompt('a sign "Hello"')] * 4)
        assert found.tolist() == pytest.approx(scores, nan_ok=True)
        with pytest.raises(ValueError, match="no metadata 'text'"):
            reward.check([Prompt("a sign")])
        media[0, 0, 0, 0] = math.nan
        assert reward(media[:1], [Prompt('"Hello"')]).isnan().all()


def test_all_pairs_of_a_grid_are_asked() -> None:
    shades = torch.tensor([[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]])
    image = shades.repeat_interleave(5, 0).repeat_interleave(4, 1).expand(1, 3, -1, -1)

    def answer(question: Question) -> Reply:
        gap = abs(float(question.pictures[0].mean() - question.pictures[1].mean()))
        return said("Yes", {"Yes": 0.5 * gap, " yes": 0.5 * gap, "No": max(1 - gap, 1e-6)})

    with Stub(answer) as stub:
        reward = VLMConsistency("tiny", stub.url, patience=5.0)
        score = reward(image, [Prompt("a cat, 2 x 3 grid")])
        flat = shades.flatten()
        gaps = [abs(float(a - b)) for i, a in enumerate(flat) for b in flat[i + 1 :]]
        assert len(stub.questions) == len(gaps) == 15
        assert score.item() == pytest.approx(sum(gaps) / 15, abs=0.01)
        assert all(p.shape == (3, 5, 4) for q in stub.questions for p in q.pictures)
    assert grid_of(Prompt("3x3", metadata={"grid": [1, 2]})) == (1, 2)
    for prompt in (Prompt("a cat"), Prompt("1x1"), Prompt("x", metadata={"grid": [2, 0]})):
        with pytest.raises(ValueError, match="needs metadata 'grid'"):
            grid_of(prompt)
    with pytest.raises(ValueError, match="has no 20x2 cells"):
        cells(IMAGES[0], 20, 2)


def test_an_edit_is_consistent_and_followed() -> None:
    def answer(question: Question) -> Reply:
        share = 0.81 if "carried out" in question.text else 0.25
        return said("Yes", {"Yes": share, "No": 1 - share})

    edits = [Prompt("add a hat", images=zoo.pil(IMAGES[1:2]))]
    with Stub(answer) as stub:
        reward = VLMConsistency("tiny", stub.url, mode="edit", patience=5.0)
        assert reward(IMAGES[:1], edits).item() == pytest.approx(0.45)
        with pytest.raises(ValueError, match="no condition image"):
            reward.check([Prompt("add a hat")])
        with pytest.raises(ValueError, match="templates of mode 'edit' must be 2, got 1"):
            VLMConsistency("tiny", stub.url, mode="edit", templates=["consistent_pair"])
    with Stub(lambda _: said("Perhaps", {"Perhaps": 1.0})) as stub:
        reward = VLMConsistency("tiny", stub.url, mode="edit", patience=5.0)
        assert reward(IMAGES[:1], edits).isnan().all()
