"""Judges that see pictures: probabilities, grades, rubrics, pairs, caches, and servers that misbehave."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowgrpo.data.prompts import Prompt
from flowgrpo.data.rubrics import read_rubrics
from flowgrpo.rewards.protocols import PairwiseJudge
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.serving import client
from flowgrpo.rewards.settings import Failures, Reward
from reward_models.shared.answers import Answer
from reward_models.shared.templates import Template
from reward_models.vlm_judge import VLMJudge
from reward_models.vlm_pairwise import VLMPairwise, flex_verdict, think_verdict
from tests.stub_vlm import Question, Reply, Stub, said

PROMPTS = [Prompt(f"prompt {i}") for i in range(5)]
IMAGES = (torch.linspace(0.1, 0.9, 5) * 255).round().view(5, 1, 1, 1).expand(5, 3, 6, 8) / 255
LIGHT = IMAGES.flatten(1).mean(1)


def by_light(question: Question) -> Reply:
    """Says yes as surely as the pictures are light."""
    return said("Yes", {"Yes": question.light, "No": 1 - question.light})


def judge(stub: Stub | str, **options: Any) -> VLMJudge:
    url = stub if isinstance(stub, str) else stub.url
    return VLMJudge("tiny", url, **{"timeout": 10.0, "patience": 5.0, **options})


def pairwise(stub: Stub, **options: Any) -> VLMPairwise:
    return VLMPairwise("tiny", stub.url, **{"timeout": 10.0, "patience": 5.0, **options})


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5, equal_nan=True)


# Answers to one question.
def test_yes_or_no_by_probability():
    with Stub(by_light) as stub:
        assert close(judge(stub)(IMAGES, PROMPTS), LIGHT)
    question = next(q for q in stub.questions if "prompt 2" in q.text)
    assert question.parts == ["image_url", "text"]
    assert torch.equal(question.pictures[0], IMAGES[2])
    wanted = {"model": "tiny", "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 0}  # fmt: skip
    assert wanted.items() <= question.request.items()


def test_spellings_are_summed_and_other_words_left_out():
    first = {"Yes": 0.3, " yes": 0.2, "\u2581YES": 0.1, "No": 0.1, "\u0120no.": 0.1, "Maybe": 0.15}
    with Stub(lambda _: said("Yes", first)) as stub:
        assert close(judge(stub)(IMAGES[:1], PROMPTS[:1]), torch.tensor([0.75]))


def test_an_answer_that_is_neither_has_no_score():
    with Stub(lambda _: said("The", {"The": 0.6, "Yes": 0.3, "No": 0.05})) as stub:
        subject = judge(stub)
        assert subject(IMAGES, PROMPTS).isnan().all()
    assert (subject.chat.asked, subject.chat.unparsed) == (5, 5)


def test_grades_are_means_of_the_scale():
    with Stub(lambda _: said("4", {"5": 0.25, " 4": 0.5, "1": 0.25, "9": 0.2})) as stub:
        # (5 / 4 + 2 + 1 / 4 - 1) / 4
        assert close(judge(stub, answer="grade")(IMAGES[:1], PROMPTS[:1]), torch.tensor([0.625]))
        assert "from 1 (not at all) to 5" in stub.questions[0].text


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It is fine.\nScore: 4", 0.75),
        ("Score: 2, no.\n**Score:** 4.5/5", 0.875),
        ("<Score>1</Score>", 0.0),
        ("Score: 7", None),
        ("Score (1-5): good", None),
        ("four", None),
        ("", None),
    ],
)
def test_written_grades(text, score):
    with Stub(lambda _: said(text)) as stub:
        found = judge(stub, answer="written")(IMAGES[:1], PROMPTS[:1])
        assert close(found, torch.tensor([math.nan if score is None else score]))
        assert "logprobs" not in stub.questions[0].request


# Rubrics.
def rubric_light(question: Question) -> Reply:
    if "garbled" in question.text and "prompt 3" in question.text:
        return said("Hm", {"Hm": 1.0})
    share = question.light if "bright" in question.text else 0.5
    return said("", {"Yes": share, "No": 1 - share})


def test_rubrics_are_weighted_and_one_without_answer_spoils_its_sample():
    rubrics = [{"rubric": "Is it bright?", "weight": 3}, "Is it free of garbled text?"]
    with Stub(rubric_light) as stub:
        subject = judge(stub, rubrics=rubrics)
        expected = (3 * LIGHT + 0.5) / 4
        expected[3] = math.nan
        assert close(subject(IMAGES, PROMPTS), expected)
        assert subject.by_rubric(IMAGES, PROMPTS).isnan().sum() == 1
    assert len(stub.questions) == 20


def test_a_negative_weight_counts_against():
    rubrics = [{"rubric": "bright", "weight": 1.0}, {"rubric": "other", "weight": -1.0}]
    with Stub(rubric_light) as stub:
        assert close(judge(stub, rubrics=rubrics)(IMAGES, PROMPTS), (LIGHT - 0.5) / 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rubric": "a"}\n{"rubric": "b"', "line 2: not valid JSON"),
        ('\n{"rubrik": "a"}', "line 2: expected a question, or an object with rubric, weight, note"),
        ('{"rubric": "a", "weight": 0}', "line 1: 'weight' must be a number other than 0, got 0"),
        ('{"rubric": "a", "weight": "1"}', "line 1: 'weight' must be a number"),
        ('{"rubric": " "}', "line 1: 'rubric' must be some text"),
        ('"a"\n"a"', "the same rubric twice: 'a'"),
        ("\n", "no rubrics in it"),
    ],
)  # fmt: skip
def test_a_rubric_file_with_an_error(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rubrics(str(tmp_path / "r.jsonl"))


def test_rubric_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rubric file"):
        read_rubrics(str(tmp_path / "r.txt"))
    with pytest.raises(ValueError, match=r"must be a .txt or .jsonl file"):
        read_rubrics("r.yaml")
    (tmp_path / "r.txt").write_text("Is it bright?\n\nIs it round?\n")
    assert [r.text for r in read_rubrics(str(tmp_path / "r.txt"))] == ["Is it bright?", "Is it round?"]  # fmt: skip


# Templates.
def test_a_template_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Costs $$5: $prompt\n$media\n$rubric")
    with Stub(by_light) as stub:
        judge(stub, template=str(file), rubrics=["Why $media?"])(IMAGES[:1], [Prompt("$rubric")])
    (question,) = stub.questions
    assert question.parts == ["text", "image_url", "text"]
    # What is filled in is not filled in again.
    assert question.text == "Costs $5: $rubric\nWhy $media?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$media\n\n$promt", r"line 3: unknown \$promt \(known: \$prompt, \$rubric, .* write \$\$"),
        ("$media costs $5", r"line 1: unknown \$5"),
        ("$prompt", r"needs \$media once, .* found 0"),
        ("$media $media", "found 2"),
    ],
)
def test_templates_with_errors(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:9/v1", template=str(tmp_path / "t.txt"))


def test_unknown_templates_are_named_with_those_there_are():
    with pytest.raises(
        FileNotFoundError,
        match=r"no template 'nope': .*one of choice, consistent_edit, consistent_pair, edit_check",
    ):
        Template.load("nope", (), ())


def test_videos_are_shown_as_some_of_their_frames_and_large_pictures_shrunk():
    videos = torch.arange(10).view(1, 10, 1, 1, 1).expand(1, 10, 3, 8, 16) / 255
    with Stub(by_light) as stub:
        judge(stub, frames=4, longest_side=8)(videos, PROMPTS[:1])
    (question,) = stub.questions
    assert [p.shape for p in question.pictures] == [(3, 4, 8)] * 4
    assert [round(float(p.mean()) * 255) for p in question.pictures] == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": [5, 1]}, r"scale must be \[low, high\] with low < high, got \[5, 1\]"),
        ({"answer": "grade", "scale": [1, 10]}, "needs grades of one digit"),
        ({"frames": 0}, "frames and max_tokens must be at least 1"),
        ({"api_key_env": "NO_SUCH_KEY"}, "the environment variable 'NO_SUCH_KEY' is empty"),
        ({"timeout": 0.0}, "timeout must be positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:9/v1", **options)


# Servers.
def test_a_wrong_model_or_key_is_found_at_the_start(monkeypatch):
    with Stub(by_light) as stub:
        with pytest.raises(ValueError, match=r"has no model 'big'; it has \['tiny', 'other'\]"):
            VLMJudge("big", stub.url)
        monkeypatch.setenv("KEY", "wrong")
        with pytest.raises(ValueError, match="the key is refused"):
            judge(stub, api_key_env="KEY")
        monkeypatch.setenv("KEY", "right")
        judge(stub, api_key_env="KEY", extra={"top_k": 1})(IMAGES[:1], PROMPTS[:1])
    assert stub.questions[0].headers["Authorization"] == "Bearer right"
    assert stub.questions[0].request["top_k"] == 1


def test_a_judge_sends_no_key_that_was_not_given_and_nothing_about_this_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of another account")
    monkeypatch.setenv("OPENAI_ORG_ID", "an organisation")
    with Stub(by_light) as stub:
        judge(stub)(IMAGES[:1], PROMPTS[:1])
    sent = stub.questions[0].headers
    assert "Authorization" not in sent
    assert not [k for k in sent if k.startswith("Openai-")]
    assert [k for k in sent if k.startswith("X-Stainless-")] == ["X-Stainless-Raw-Response"]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": "Yes"}}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
        b'{"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": [{"token": 1}]}]}}]}',
    ],
)  # fmt: skip
def test_garbage_is_counted_and_never_a_score(body, tmp_path, caplog):
    with Stub(lambda _: (200, {}, body)) as stub:
        subject = judge(stub, cache=str(tmp_path))
        assert subject(IMAGES[:2], PROMPTS[:2]).isnan().all()
    assert subject.chat.unparsed == 2
    assert "cannot be parsed" in caplog.text
    assert not list(tmp_path.rglob("*.json"))


def failing(times: int, reply: Reply) -> Callable[[Question], Reply]:
    left = [reply] * times

    def answer(question: Question) -> Reply:
        return left.pop() if left else by_light(question)

    return answer


@pytest.mark.parametrize(
    "reply", [(429, {"Retry-After": "0.1"}, b"slow down"), (500, {}, b""), (503, {}, b"loading")]
)
def test_a_busy_server_is_asked_again(reply):
    with Stub(failing(3, reply)) as stub:
        subject = judge(stub, concurrency=2)
        assert close(subject(IMAGES, PROMPTS), LIGHT)
    assert (len(stub.questions), subject.chat.asked) == (8, 5)


def test_a_server_is_not_asked_before_the_time_it_names():
    with Stub(failing(1, (429, {"Retry-After": "0.8"}, b""))) as stub:
        subject = judge(stub)
        began = time.perf_counter()
        assert close(subject(IMAGES[:1], PROMPTS[:1]), LIGHT[:1])
        assert time.perf_counter() - began >= 0.8


def test_a_request_that_is_refused_is_not_asked_again():
    refusal = (400, {}, b'{"error": {"message": "too many pictures"}}')
    with Stub(lambda _: refusal) as stub, pytest.raises(RuntimeError, match="too many pictures"):
        judge(stub)(IMAGES, PROMPTS)
    assert len(stub.questions) == 5


def test_if_some_questions_fail_the_others_count(caplog):
    with Stub(lambda q: (400, {}, b"no") if "prompt 1" in q.text else by_light(q)) as stub:
        found = judge(stub)(IMAGES, PROMPTS)
    assert found.isnan().tolist() == [False, True, False, False, False]
    assert "1 of 5 questions failed" in caplog.text


def test_no_more_questions_at_once_than_allowed():
    with Stub(by_light, seconds=0.1) as stub:
        judge(stub, concurrency=3)(IMAGES.repeat(2, 1, 1, 1), PROMPTS * 2)
    assert stub.most_at_once == 3


def test_a_server_that_hangs_is_asked_again_after_the_timeout():
    slow = [1.0]

    def answer(question: Question) -> Reply:
        if slow:
            time.sleep(slow.pop())
        return by_light(question)

    with Stub(answer) as stub:
        began = time.perf_counter()
        found = judge(stub, timeout=0.3)(IMAGES[:1], PROMPTS[:1])
        assert close(found, LIGHT[:1])
        assert time.perf_counter() - began < 5


def test_a_server_that_restarts_is_waited_for():
    with Stub(by_light) as stub:
        training = RewardScorer(
            [Reward(model="vlm_judge", options={"model": "tiny", "base_url": stub.url, "patience": 20.0})],
            Failures(retries=0),
        )  # fmt: skip
    pending = training.submit(IMAGES, PROMPTS)
    time.sleep(0.4)
    assert not pending.done()
    with Stub(by_light, port=stub.port):
        assert close(pending.result(timeout=20).reward, LIGHT)
    training.close()


def test_two_servers_share_the_questions():
    with Stub(by_light, seconds=0.05) as a, Stub(by_light, seconds=0.05) as b:
        subject = VLMJudge("tiny", [a.url, b.url], concurrency=1)
        assert close(subject(IMAGES, PROMPTS), LIGHT)
    assert min(len(a.questions), len(b.questions)) >= 2


def test_scores_do_not_depend_on_order_or_batch():
    with Stub(by_light) as stub:
        subject = judge(stub)
        whole = subject(IMAGES, PROMPTS)
        singles = [subject(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)]
        assert torch.equal(torch.cat(singles), whole)
        assert torch.equal(subject(IMAGES.flip(0), PROMPTS[::-1]).flip(0), whole)
        broken = IMAGES.clone()
        broken[1, 0, 0, 0] = math.nan
        assert subject(broken, PROMPTS).isnan().tolist() == [False, True, False, False, False]


def test_redirects_are_not_followed():
    with Stub(by_light) as elsewhere:
        redirect = (302, {"Location": f"{elsewhere.url}/chat/completions"}, b"")
        with Stub(lambda _: redirect) as stub, pytest.raises(RuntimeError, match="status 302"):
            judge(stub)(IMAGES[:1], PROMPTS[:1])
    assert not elsewhere.questions


def test_an_answer_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(client, "LARGEST_ANSWER", 1000)
    with (
        Stub(lambda _: said("x" * 2000)) as stub,
        pytest.raises(RuntimeError, match="an answer of more than 1000 bytes"),
    ):
        judge(stub)(IMAGES[:1], PROMPTS[:1])
    assert len(stub.questions) == 1


# The cache.
def test_kept_answers_need_no_network(tmp_path):
    with Stub(by_light) as stub:
        first = judge(stub, cache=str(tmp_path))
        scores = first(IMAGES, PROMPTS)
        assert (first.chat.asked, first.chat.cached) == (5, 0)
        changed = [
            judge(stub, cache=str(tmp_path), rubrics=["Is it bright?"])(IMAGES, PROMPTS),
            VLMJudge("other", stub.url, cache=str(tmp_path))(IMAGES, PROMPTS),
            first(IMAGES, [Prompt("another")] * 5),
            first(IMAGES.flip(3).mul(0.5), PROMPTS),
            judge(stub, cache=str(tmp_path), extra={"seed": 1})(IMAGES, PROMPTS),
        ]
        assert len(stub.questions) == 5 * (1 + len(changed))
    again = judge(stub, cache=str(tmp_path))
    assert torch.equal(again(IMAGES, PROMPTS), scores)
    assert (again.chat.asked, again.chat.cached) == (0, 5)


def test_a_damaged_cache_is_asked_anew(tmp_path):
    with Stub(by_light) as stub:
        judge(stub, cache=str(tmp_path))(IMAGES[:1], PROMPTS[:1])
        (file,) = tmp_path.rglob("*.json")
        file.write_text(file.read_text()[:10])
        assert close(judge(stub, cache=str(tmp_path))(IMAGES[:1], PROMPTS[:1]), LIGHT[:1])
    assert len(stub.questions) == 2


# Pairs.
def lighter(question: Question) -> Reply:
    """Prefers the lighter picture, and the first one by 0.2."""
    a, b = (float(p.mean()) for p in question.pictures)
    share = min(1.0, max(0.0, 0.5 + (a - b) / 2)) * 0.8 + 0.2
    return said("1", {"1": share, "2": 1 - share})


def test_a_choice_and_the_bias_that_swapping_removes():
    with Stub(lighter) as stub:
        subject = pairwise(stub)
        assert isinstance(subject, PairwiseJudge)
        first, second = IMAGES[[4, 0, 2]], IMAGES[[0, 4, 2]]
        biased = subject.compare(first, second, PROMPTS[:3])
        fair = pairwise(stub, swap=True).compare(first, second, PROMPTS[:3])
    assert close(biased, torch.tensor([0.92, 0.28, 0.6]))
    assert close(fair, torch.tensor([0.82, 0.18, 0.5]))
    question = stub.questions[0]
    assert question.parts == ["text", "image_url", "text", "image_url", "text"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<think>Image 2 is better at first</think><answer>Image 1 is better</answer>", 1.0),
        ("<answer> video 2 is better than video 1 </answer>", 0.0),
        ("<answer>Image 1 and image 2: image 2 is better</answer>", 0.0),
        ("<answer>Both images are equally good</answer>", 0.5),
        ("<answer>Image 1 is better, or Image 2 is better</answer>", None),
        ("<answer>Image 3 is better</answer>", None),
        ("Image 1 is better", None),
        ("<think>and so on", None),
    ],
)
def test_think_verdicts(text, verdict):
    assert think_verdict(Answer(text)) == verdict


def flex(winner: str, *categories: str) -> str:
    return json.dumps({"categories": [{"cat_winner": c} for c in categories], "winner": winner})


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (flex("Image 1", "Image 1", "Image 2", "Image 1"), 0.3 + 0.7 * 2 / 3),
        (flex("Image 2", "Image 1", "Image 1", "Image 1", "Image 2"), 0.7),
        (flex("Image 2"), 0.0),
        (flex("tie", "Image 1"), 0.3 * 0.5 + 0.7),
        ("```json\n" + flex("Image 1", "Image 2") + "\n```", 0.3),
        ('{"a": 1} then ' + flex("Image 1"), 1.0),
        (flex("Image 1", "Image 4"), None),
        (flex("Image 1")[:-2], None),
        ("{" * 5000, None),
        ("Image 1", None),
    ],
)
def test_flex_verdicts(text, verdict):
    assert flex_verdict(Answer(text), (0.3, 0.7)) == (
        None if verdict is None else pytest.approx(verdict)
    )


def test_the_released_rule_of_categories_can_change_the_winner():
    """Overall the first wins; of the categories it wins 0.3 by weight, the last one of weight 1."""
    answer = Answer(flex("Image 1", "Image 2", "Image 2", "Image 1"))
    weights = [1.0, 4 / 3, 1.0]
    assert flex_verdict(answer, (0.3, 0.7), weights) == pytest.approx(0.3 + 0.7 * 0.3)
    released = flex_verdict(answer, (0.3, 0.7), weights, released=True)
    assert released == pytest.approx((0.3 + 1.0 * 0.3) / 1.3)
    assert released < 0.5
    # With 0.7 as the last weight the two rules agree on the weight of the categories.
    last = flex_verdict(answer, (0.3, 0.7), [1.0, 1.0, 0.7], released=True)
    assert last == pytest.approx(0.3 + 0.7 * 0.7 / 2.7)
    assert last == pytest.approx(flex_verdict(answer, (0.3, 0.7), [1.0, 1.0, 0.7]))
    assert flex_verdict(Answer(flex("Image 2")), (0.3, 0.7), weights, released=True) == 0.0


def test_pairs_without_verdict_are_nan():
    def answer(question: Question) -> Reply:
        text = "hm" if "prompt 1" in question.text else "<answer>Image 2 is better</answer>"
        return said(text)

    with Stub(answer) as stub:
        subject = pairwise(stub, answer="think", swap=True)
        found = subject.compare(IMAGES[:3], IMAGES[2:5], PROMPTS[:3])
        broken = pairwise(stub, answer="think").compare(
            IMAGES[:1] * math.nan, IMAGES[:1], PROMPTS[:1]
        )
    # Always the second place: swapping makes that a tie.
    assert close(found, torch.tensor([0.5, math.nan, 0.5]))
    assert subject.chat.unparsed == 2
    assert broken.isnan().all()
    assert stub.questions[0].request["max_completion_tokens"] == 4096


def test_pairs_of_videos():
    videos = IMAGES[:2, None].expand(2, 5, 3, 6, 8)
    with Stub(lambda _: said(flex("Video 2", "Video 1"))) as stub:
        found = pairwise(stub, answer="flex", frames=3).compare(videos, videos, PROMPTS[:2])
    assert close(found, torch.tensor([0.7, 0.7]))
    assert len(stub.questions[0].pictures) == 6


def test_bad_options_of_pairs():
    with pytest.raises(ValueError, match="flex_weights must be two numbers"):
        VLMPairwise("tiny", flex_weights=[0.0, 0.0])


def test_every_template_that_comes_along_is_used():
    import reward_models

    package = Path(str(reward_models.__path__[0]))
    source = "".join(p.read_text() for p in package.rglob("*.py"))
    for template in (package / "templates").glob("*.txt"):
        # Families such as unified_reward_2_image are named by a part that is filled in.
        name, words = template.stem, template.stem.split("_")
        families = ["_".join(words[:n]) + "_{" for n in range(2, len(words))]
        assert any(part in source for part in (f'"{name}"', *families)), name


def test_a_server_in_a_process_of_its_own():
    """It answers well, slowly, with an error and then well, with garbage; then it is gone."""
    command = [sys.executable, "-m", "tests.stub_vlm"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        subject = judge(url, patience=3.0)
        scores = subject(IMAGES, PROMPTS)
        process.kill()
        assert scores[3].isnan(), "garbage is no score"
        others = [0, 1, 2, 4]
        assert close(scores[others], LIGHT[others])
        process.wait()
        with pytest.raises(Exception, match=r"127\.0\.0\.1"):
            judge(url, patience=0.3)(IMAGES[:1], PROMPTS[:1])
