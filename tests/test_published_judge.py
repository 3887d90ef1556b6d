"""Published judges: their texts, what they are asked and shown, and the rule that reads their answer.

Answers are as the authors' examples and formats have them; expected scores follow the released code.
"""

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from reward_models.published_judge import PublishedJudge
from reward_models.shared.answers import Answer
from reward_models.shared.judges import JUDGES
from reward_models.shared.templates import FOLDER, template
from reward_models.vlm_pairwise import VLMPairwise
from tests import zoo
from tests.stub_vlm import Question, Reply, Stub, said

WHITE, GREY = torch.ones(1, 3, 20, 30), torch.full((1, 3, 20, 30), 0.5)


def edit(text: str = "make it <instruction> {prompt}", **metadata: Any) -> Prompt:
    return Prompt(text, metadata=metadata, images=zoo.pil(GREY))


def judge(name: str, stub: Stub, **options: Any) -> PublishedJudge:
    return PublishedJudge(name, "tiny", stub.url, patience=5.0, **options)


# Of the texts in the authors' repositories, at these commits:
# UnifiedReward ff6f520, flow_grpo ac4c86e (equal in DiffusionNFT), Edit-R1 4217f25, EditScore 6e0f1b9
# (with its score range of 25), RationalRewards 44e27ab, EditReward edb027e, VisionReward 511960d.
DIGESTS = {
    "unified_reward_1_llava": "d68ab1dcf4dc3a39",
    "unified_reward_edit_following": "401b9a17aec0a3c3",
    "unified_reward_edit_quality": "ddb40baa511dbf2f",
    "unified_reward_flex_image": "bd0c2d5635a7b6b3",
    "unified_reward_flex_video": "dd95da9d5f2b830a",
    "unified_reward_think_image": "342f6a4bd0efdae0",
    "unified_reward_think_video": "f45197425b810d08",
    "edit_r1": "95f05ede22a065da",
    "edit_score_following": "2fbb018b0e448b2d",
    "edit_score_quality": "8249deba103d112d",
    "rational_rewards_edit": "62c8c0b86030e891",
    "rational_rewards_system": "5463ca34f3c70f45",
    "edit_reward_following": "b8c53a0a3b67db1c",
    "edit_reward_quality": "4583db70a7aba603",
    "vision_reward_image": "2b603df2f4e30fe8",
    "vision_reward_video": "79de7f5e135a7957",
}


def test_texts_are_as_published() -> None:
    found = {n: hashlib.sha256(template(n).encode()).hexdigest()[:16] for n in DIGESTS}
    assert found == DIGESTS
    weights = json.loads((FOLDER / "vision_reward.json").read_text())
    assert (weights["image"][0], weights["video"][-1]) == (2.3542882631150923, 0.39418111694677266)
    assert (len(weights["image"]), len(weights["video"])) == (28, 29)


GRADES = '{{"reasoning": "the "hat" is, red", "score": [{}]}}'.format
RATIONAL = """# User Request Analysis
# Detailed Judgement
1. Text Faithfulness:
## Justification: nearly. ## Score is high.
## Score: 3.5
2. Image Faithfulness:
## Score: 1.0
3. Physical and Visual Quality:
## Score: 2.5 (seams)
4. Text Rendering:
## Score: {}
# Summary: Text Rendering: ## Score: 4"""
CASES: list[tuple[str, Callable[[Question], Reply], float]] = [
    # Released: the first match, over 5.
    ("unified_reward_1", lambda _: said("cat (object): 1\nFinal Score: 4\nFinal Score: 2"), 0.8),
    (
        "unified_reward_2",
        lambda _: said("Alignment Score (1-5): 2.5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3.25"),
        (2.5 + 4 + 3.25) / 3,
    ),
    # Released: softmax over the six digits; other tokens do not count.
    ("edit_r1", lambda _: said("4", {"4": 0.5, "5": 0.25, "0": 0.15, "The": 0.1}), 3.25 / 0.9 / 5),
    # Released: sqrt of the smaller grades, 25 points being 10.
    (
        "edit_score",
        lambda q: said(GRADES("20, 10" if len(q.pictures) == 2 else "22.5, 25")),
        math.sqrt(4 * 9),
    ),
    (
        "unified_reward_edit",
        lambda q: said(GRADES("25, 20" if len(q.pictures) == 2 else "20, 25")),
        math.sqrt(8 * 8),
    ),
    # Released: image faithfulness is read, and does not count.
    ("rational_rewards", lambda _: said(RATIONAL.format("N/A")), (3.0 - 1) / 3),
    ("rational_rewards", lambda _: said(RATIONAL.format("1.5")), (2.5 - 1) / 3),
    ("deqa", lambda _: said(" good", {" good": 0.6, " fair": 0.2, " excellent": 0.1, "x": 0.1}), (2.4 + 0.6 + 0.5) / 0.9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "expected"), CASES)
def test_scores_follow_the_released_rule(
    name: str, answer: Callable[[Question], Reply], expected: float
) -> None:
    with Stub(answer) as stub:
        reward = judge(name, stub)
        broken = torch.cat([WHITE, WHITE])
        broken[1, 0, 0, 0] = math.nan
        scores = reward(broken, [edit(), edit()])
    assert scores[0].item() == pytest.approx(expected)
    assert scores[1].isnan()


UNUSABLE = [
    ("unified_reward_1", "Final Score: 7"),
    ("edit_score", GRADES("20, 26")),
    ("edit_score", GRADES("20")),
    ("edit_score", "score: high"),
    ("rational_rewards", RATIONAL.format("5")),
    ("rational_rewards", RATIONAL.format("N/A").replace("## Score: 2.5", "")),
    ("edit_r1", "4"),
    ("vision_reward", "perhaps"),
]


@pytest.mark.parametrize(("name", "text"), UNUSABLE)
def test_an_answer_that_cannot_be_used_is_no_score(name: str, text: str) -> None:
    with Stub(lambda _: said(text)) as stub:
        reward = judge(name, stub)
        assert reward(WHITE, [edit()]).isnan().all()
        assert reward.chat.unparsed > 0


def content(stub: Stub, number: int = 0) -> list[str]:
    """The texts of a question, with ``#`` and the brightness for a picture."""
    user = next(m for m in stub.questions[number].request["messages"] if m["role"] == "user")
    shades = iter(stub.questions[number].pictures)
    return [
        p["text"] if p["type"] == "text" else f"#{float(next(shades).mean()):.1f}"
        for p in user["content"]
    ]


def test_questions_are_the_authors_down_to_the_order_of_pictures() -> None:
    with Stub(lambda _: said(GRADES("20, 20"))) as stub:
        judge("edit_score_qwen25", stub)(WHITE, [edit()])
        text = template("edit_score_following").replace(
            "<instruction>", "make it <instruction> {prompt}"
        )
        assert content(stub) == ["<img1>: ", "#0.5", "<img2>: ", "#1.0", text]
        assert content(stub, 1) == ["<img1>: ", "#1.0", template("edit_score_quality")]
        assert stub.questions[0].request["temperature"] == 0
        judge("unified_reward_edit", stub)(WHITE, [edit("hat")])
        assert stub.questions[2].text.endswith("Editing instruction:hat\n")
        assert stub.questions[2].request["chat_template_kwargs"] == {"enable_thinking": False}
    with Stub(lambda _: said("4", {"4": 1.0})) as stub:
        judge("edit_r1", stub)(WHITE, [edit("hat", requirement="a red one")])
        pictures, text = content(stub)[:2], content(stub)[2]
        assert pictures == ["#0.5", "#1.0"]
        assert "Instruction: hat\nRequirements: a red one\n" in text
        assert stub.questions[0].request["max_completion_tokens"] == 1
    with Stub(lambda _: said(RATIONAL.format("N/A"))) as stub:
        judge("rational_rewards", stub)(WHITE, [edit("hat")])
        system, user = stub.questions[0].request["messages"]
        assert system == {"role": "system", "content": template("rational_rewards_system")}
        assert [p["type"] for p in user["content"]] == ["text", "image_url"] * 2 + ["text"]
        assert (
            content(stub)[0]
            == "User Instruction: hat\nYou are provided with two images:\n1. Source Image "
        )
        assert content(stub)[1:4] == ["#0.5", "\n2. Edited Image ", "#1.0"]
    with Stub(lambda _: said(" good", {" good": 1.0})) as stub:
        judge("deqa", stub, extra={"min_p": 0.1})(WHITE, [Prompt("x")])
        request = stub.questions[0].request
        last = {"role": "assistant", "content": "The quality of the image is"}
        assert request["messages"][-1] == last
        assert (request["continue_final_message"], request["add_generation_prompt"]) == (
            True,
            False,
        )
        assert request["min_p"] == 0.1


def test_unified_reward_sees_512_pixels_or_16_frames() -> None:
    with Stub(lambda _: said("Final Score: 3")) as stub:
        judge("unified_reward_1", stub)(WHITE, [Prompt("a cat")])
        assert stub.questions[0].pictures[0].shape == (3, 512, 512)
        assert stub.questions[0].text.startswith("<image>\nYou are given a text caption")
        assert stub.questions[0].text.endswith("Text Caption: [a cat]")
    answer = "Alignment Score (1-5): 2\nPhysics Score (1-5): 3\nStyle Score (1-5): 4"
    with Stub(lambda _: said(answer)) as stub:
        video = (torch.arange(33.0) / 33).view(1, 33, 1, 1, 1).expand(-1, -1, 3, 8, 8)
        assert judge("unified_reward_2", stub)(video, [Prompt("a cat")]).item() == 3
        shades = [round(float(p.mean()) * 33) for p in stub.questions[0].pictures]
        assert shades == [int(i * 33 / 16) for i in range(16)]
        with pytest.raises(ValueError, match="'deqa' judges images only"):
            judge("deqa", stub)(video, [Prompt("a cat")])


def vision_reward_by_hand(yes: Callable[[str], bool], alignment: float) -> float:
    """The released arithmetic."""
    masks = {0: [22, 23, 24, 28, 29], 1: [25, 26], 2: [27]}
    said = [1 if yes(q) else -1 for q in template("vision_reward_image").splitlines()]
    for mask, places in masks.items():
        for place in places:
            said[place] *= int(said[mask] > 0)
    weights = json.loads((FOLDER / "vision_reward.json").read_text())["image"]
    return sum(w * v for w, v in zip(weights, [alignment, *said[3:]], strict=True))


def test_vision_reward_masks_and_weighs_its_checklist() -> None:
    def yes(question: str) -> bool:
        return "face" in question or len(question) % 3 == 0

    def answer(question: Question) -> Reply:
        if question.text.startswith("Does this figure show"):
            assert question.text == 'Does this figure show "a cat"? Please answer yes or no.'
            return said("yes", {"yes": 0.3, "Yes": 0.2, "no": 0.5})
        return said("Yes." if yes(question.text) else "no")

    with Stub(answer) as stub:
        found = judge("vision_reward", stub)(WHITE, [Prompt("a cat")])
        assert found.item() == pytest.approx(vision_reward_by_hand(yes, 0.5))
        assert len(stub.questions) == 31
        video = WHITE[:, None].expand(-1, 30, -1, -1, -1)
        found = judge("vision_reward", stub)(video, [Prompt("a cat")])
        assert len(stub.questions) == 31 + 29
        assert len(stub.questions[-1].pictures) == 24
        assert sum('stated in the text "a cat"' in q.text for q in stub.questions) == 3
    lines = template("vision_reward_video").replace("[[prompt]]", "a cat").splitlines()
    weights = json.loads((FOLDER / "vision_reward.json").read_text())["video"]
    wanted = sum(w * (1 if yes(q) else -1) for w, q in zip(weights, lines, strict=True)) / 29
    assert found.item() == pytest.approx(wanted)


def test_several_passes_differ_in_the_seed_and_are_averaged() -> None:
    def answer(question: Question) -> Reply:
        seed = question.request["seed"]
        if seed == 44:
            return said("I would rather not")
        return said(GRADES("25, 25" if seed == 42 else "4, 4"))

    with Stub(answer) as stub:
        scores = judge("edit_score", stub, passes=3)(WHITE, [edit()])
        assert scores.item() == pytest.approx((10 + 1.6) / 2)
        assert {q.request["temperature"] for q in stub.questions} == {0.7}


def test_wrong_options_and_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no judge 'beauty': choose one of unified_reward_1"):
        PublishedJudge("beauty")
    with pytest.raises(ValueError, match="passes must be at least 1"):
        PublishedJudge("deqa", passes=0)
    with Stub(lambda _: said("")) as stub:
        with pytest.raises(ValueError, match="no condition image"):
            judge("edit_r1", stub).check([Prompt("x")])
        judge("deqa", stub).check([Prompt("x")])
        reward = Reward(model="published_judge", options={"judge": "deqa", "base_url": stub.url})
        with pytest.raises(ValueError, match="has no model 'Qwen/Qwen3-VL-8B-Instruct'"):
            RewardScorer([reward]).loaded(reward)
    for name, make in JUDGES.items():
        assert "/" in make().model, name


# Pairs.
@pytest.mark.parametrize(("form", "word"), [("think", "better"), ("flex", "winner")])
def test_pairs_are_asked_in_unified_rewards_words(form: Any, word: str) -> None:
    def answer(question: Question) -> Reply:
        kind = "Video" if "videos" in question.text or "Video 1" in question.text else "Image"
        if form == "think":
            return said(f"<think>a</think><answer>{kind} 1 is better</answer>")
        return said(json.dumps({"categories": [], "winner": f"{kind} 1"}))

    def compared(stub: Stub, a: Tensor, b: Tensor) -> float:
        pair = VLMPairwise("tiny", stub.url, answer=form, patience=5.0)
        return pair.compare(a, b, [Prompt("a {cat}")]).item()

    with Stub(answer) as stub:
        assert compared(stub, WHITE, GREY) == 1
        text = template(f"unified_reward_{form}_image").replace("{prompt}", "a {cat}")
        assert content(stub) == ["#1.0", "#0.5", text]
        assert word in text
        video = (torch.arange(12.0) / 12).view(1, 12, 1, 1, 1).expand(-1, -1, 3, 8, 8)
        assert compared(stub, video, 1 - video) == 1
        assert stub.questions[1].text == template(f"unified_reward_{form}_video").replace(
            "{prompt}", "a {cat}"
        )
        if form == "flex":  # numpy's linspace, cut to whole numbers
            shades = [round(float(p.mean()) * 12) for p in stub.questions[1].pictures[:8]]
            assert shades == [0, 1, 3, 4, 6, 7, 9, 11]
    with pytest.raises(ValueError, match="has no place for a rubric"):
        VLMPairwise("tiny", answer=form, rubric="colours")


def test_an_answer_has_shares_of_words() -> None:
    assert Answer("", {"\u2581Yes": 0.6, "no": 0.2}).share(["yes", "no"]) == pytest.approx(
        [0.75, 0.25]
    )
