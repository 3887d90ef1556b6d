"""Rubrics learned from preferences, and edits checked point by point."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit

from flowgrpo.cli import main
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Prompt
from flowgrpo.data.rubrics import Rubric, _solve, fit_rubrics, read_rubrics, write_rubrics
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from reward_models.edit_verifier import EditVerifier
from tests.stub_vlm import Question, Reply, Stub, said


def preferences(number: int, truth: np.ndarray, noise: int, seed: int = 0) -> np.ndarray:
    """Score differences under known weights, turned so that the first picture is preferred."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(number, len(truth) + noise))
    likes = expit(x[:, : len(truth)] @ truth) > random.uniform(size=number)
    return np.where(likes[:, None], x, -x)


# The fit.
def test_the_rubrics_that_count_are_found():
    truth = np.array([3.0, 1.5, 2.0])
    fit = fit_rubrics(preferences(400, truth, noise=12))
    assert (fit.weights[:3] > 0).all()
    assert fit.weights[3:].sum() < 0.05
    assert fit.weights.sum() == pytest.approx(1)
    assert fit.weights[0] > fit.weights[2] > fit.weights[1]
    assert 0.8 < fit.accuracy < 1
    assert fit.pairs == 400


def test_the_solution_is_optimal():
    # Karush-Kuhn-Tucker: the gradient of the loss is -penalty where w > 0, at least that elsewhere.
    x = preferences(120, np.array([2.0, 1.0]), noise=6, seed=3)
    for penalty in (0.02, 0.1, 0.2):
        w = _solve(x, penalty)
        slope = -(x * expit(-(x @ w))[:, None]).mean(axis=0)
        assert (w >= 0).all()
        assert np.abs(slope[w > 0] + penalty).max(initial=0) < 2e-4
        assert (slope[w == 0] >= -penalty - 2e-4).all()
    assert not _solve(x, 5.0).any()


def test_units_constants_and_contradictions():
    x = preferences(300, np.array([2.0]), noise=0)
    # The same in other units, a constant rubric, one that speaks against people's taste.
    fit = fit_rubrics(np.concatenate([0.01 * x, np.zeros_like(x), -x], axis=1))
    assert fit.weights.tolist() == pytest.approx([1, 0, 0])


def test_most_keeps_the_largest():
    x = preferences(400, np.array([3.0, 1.5, 2.0]), noise=3)
    assert (fit_rubrics(x, most=2).weights > 0).tolist() == [True, False, True, *[False] * 3]


def test_pairs_without_an_answer_are_left_out():
    x = preferences(60, np.array([3.0]), noise=1)
    x[::3, 1] = math.nan
    assert fit_rubrics(x).pairs == 40
    with pytest.raises(ValueError, match=r"9 of 60 pairs have an answer to every rubric; 5 folds"):
        fit_rubrics(np.where(np.arange(60)[:, None] < 9, np.nan_to_num(x), math.nan))
    with pytest.raises(ValueError, match="no candidate scores preferred pictures higher"):
        fit_rubrics(-np.abs(np.nan_to_num(x)))


def test_rubrics_are_written_as_they_are_read(tmp_path):
    rubrics = [Rubric("Ist es schön?", 0.75, "alone"), Rubric("b", -0.25)]
    write_rubrics(tmp_path / "r.jsonl", rubrics)
    assert read_rubrics(str(tmp_path / "r.jsonl")) == rubrics


# The command.
def by_rubric(question: Question) -> Reply:
    """Sees brightness and redness; cannot tell anything else."""
    (picture,) = question.pictures
    share = 0.5
    if "bright" in question.text:
        share = float(picture.mean())
    elif "red" in question.text:
        share = float(picture[0].mean())
    return said("", {"Yes": 0.9 * share + 0.05, "No": 0.95 - 0.9 * share})


def test_learning_rubrics_from_pictures(tmp_path, capsys):
    random = np.random.default_rng(0)
    lines = []
    for i in range(14):
        for name, light in (("good", 170), ("bad", 80)):
            colour = (int(random.integers(256)), light, int(light + random.integers(-20, 20)))
            Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}{i}.png")
        record = {"prompt": f"p {i}", "preferred": f"good{i}.png", "other": f"bad{i}.png"}
        lines.append(json.dumps(record))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "candidates.txt").write_text("Is it round?\nIs it bright?\nIs it red?\n")
    out = tmp_path / "rubrics.jsonl"
    arguments = [
        "--rubrics",
        str(tmp_path / "candidates.txt"),
        "--model",
        "tiny",
        "--out",
        str(out),
    ]
    with Stub(by_rubric) as stub:
        command = ["learn-rubrics", str(tmp_path / "pairs.jsonl"), *arguments]
        options = ["--base-url", stub.url, "--judge-option", f"cache={tmp_path / 'answers'}"]
        assert main([*command, *options]) == 0
        number = len(stub.questions)
        assert number == 14 * 2 * 3
        assert main([*command, *options]) == 0
        assert len(stub.questions) == number
    kept = read_rubrics(str(out))
    assert kept[0].text == "Is it bright?"
    assert kept[0].weight > 0.8
    assert "alone agrees with" in kept[0].note
    assert "Is it round?" not in [r.text for r in kept]
    assert "of 3 rubrics kept" in capsys.readouterr().out


def test_pairs_with_errors(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "preferred": "a.png"}\n')
    (tmp_path / "r.txt").write_text("a\n")
    command = ["learn-rubrics", str(tmp_path / "pairs.jsonl"), "--rubrics", str(tmp_path / "r.txt")]
    assert main([*command, "--model", "tiny", "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "pairs.jsonl, line 1: expected an object with prompt, pref" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "preferred": "a.png", "other": "b.png"}')
    assert main([*command, "--model", "tiny", "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "line 1: no picture" in capsys.readouterr().err


# Edits.
PRINCIPLES = [
    {"kind": "follow", "text": "The sky is red."},
    {"kind": "keep", "text": "The house is as before."},
    {"kind": "keep", "text": "The tree is as before."},
]


def verifier_stub(question: Question) -> Reply:
    if "Split" in question.text:
        if "nonsense" in question.text:
            return said("I cannot do that.")
        return said("Here:\n```json\n" + json.dumps(PRINCIPLES) + "\n```")
    before, after = question.pictures
    if "sky is red" in question.text:
        holds = float(after[0].mean()) > float(before[0].mean())
        return said(f"The sky is {'' if holds else 'not '}redder.\n**Verdict:** {'Yes' if holds else 'No'}")  # fmt: skip
    if "house is" in question.text:
        return said("It stands there.\nVerdict: Yes")
    return said("Who knows." if "vague" in question.text else "The tree is gone.\nVerdict: no.")


@pytest.fixture
def before(tmp_path: Path) -> str:
    Image.new("RGB", (6, 4), (100, 100, 100)).save(tmp_path / "before.png")
    return str(tmp_path / "before.png")


EDITED = torch.stack([torch.full((3, 4, 6), 0.9), torch.full((3, 4, 6), 0.1)])


@pytest.mark.parametrize(
    ("aggregate", "scores"),
    [("kinds", [0.75, 0.25]), ("mean", [2 / 3, 1 / 3]), ("all", [0.0, 0.0])],
)
def test_an_edit_is_checked_point_by_point(before, aggregate, scores, tmp_path):
    prompts = [Prompt("Make the sky red", metadata={"image": before})] * 2
    with Stub(verifier_stub) as stub:
        subject = EditVerifier(
            "tiny", stub.url, aggregate=aggregate, reasons=str(tmp_path / "reasons.jsonl")
        )
        assert subject(EDITED, prompts).tolist() == pytest.approx(scores)
        assert len(stub.questions) == 1 + 2 * 3
        subject(EDITED, prompts)
        assert len(stub.questions) == 1 + 4 * 3  # split once
    checked = next(q for q in stub.questions if len(q.pictures) == 2)
    assert checked.parts == ["text", "image_url", "text", "image_url", "text"]
    assert torch.allclose(checked.pictures[0], torch.tensor(100 / 255))
    lines = [json.loads(x) for x in (tmp_path / "reasons.jsonl").read_text().splitlines()]
    assert [x["score"] for x in lines] == pytest.approx(scores * 2)
    assert lines[1]["checks"][0] == {
        "kind": "follow", "text": "The sky is red.", "holds": False, "reason": "The sky is not redder.",
    }  # fmt: skip
    assert subject.last[0][2].reason == "The tree is gone."


def test_the_condition_image_of_a_prompt_file_is_the_picture_before(before, tmp_path):
    """As a run has it: read from a file, checked by the judge before any long work."""
    rows = [{"prompt": "Make the sky red", "image": Path(before).name}, {"prompt": "no picture"}]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    edit, plain = PromptSet.load(tmp_path / "edits.jsonl").prompts
    with Stub(verifier_stub) as stub:
        judge = RewardScorer(
            [Reward(model="edit_verifier", options={"model": "tiny", "base_url": stub.url})]
        )
        judge.check_prompts([edit])
        with pytest.raises(
            ValueError, match="'edit_verifier': prompt 'no picture' has no condition"
        ):
            judge.check_prompts([edit, plain])
        scores = judge.score(EDITED[:1], [edit]).reward
        judge.close()
    assert scores.tolist() == pytest.approx([0.75])
    checked = next(q for q in stub.questions if len(q.pictures) == 2)
    assert torch.allclose(checked.pictures[0], torch.tensor(100 / 255))


def test_what_cannot_be_split_or_judged_has_no_score(before):
    texts = ["Make the sky red", "nonsense", "vague wish"]
    prompts = [Prompt(t, metadata={"image": before}) for t in texts]
    with Stub(verifier_stub) as stub:
        subject = EditVerifier("tiny", stub.url)
        found = subject(EDITED[[0, 0, 0]], prompts)
        assert found.isnan().tolist() == [False, True, True]
        assert subject.chat.unparsed == 2


def test_principles_may_come_with_the_prompt(before):
    def prompt(principles: Any) -> Prompt:
        return Prompt("Make it so", metadata={"image": before, "principles": principles})

    with Stub(verifier_stub) as stub:
        subject = EditVerifier("tiny", stub.url)
        assert subject(EDITED[:1], [prompt(PRINCIPLES[:2])]).tolist() == [1]
        assert len(stub.questions) == 2
        with pytest.raises(ValueError, match=r"'Make it so': principles must be a list of objects"):
            subject(EDITED[:1], [prompt([{"kind": "style", "text": "x"}])])
        subject.check([prompt(PRINCIPLES)])
        with pytest.raises(ValueError, match="principles must be a list of objects"):
            subject.check([prompt(PRINCIPLES), prompt("be good")])
        with pytest.raises(
            ValueError,
            match=r"'x' has no condition image, and its metadata 'image' names no picture",
        ):
            subject(EDITED[:1], [Prompt("x", metadata={"principles": PRINCIPLES})])
