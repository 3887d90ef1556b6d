"""Published judges: the question, the order of pictures, and the rule that reads the answer, as data.

A judge is a vision-language model that its authors serve behind an endpoint and ask in a fixed
wording. Judges differ in few things, so each is an entry of :data:`JUDGES`. Texts are the authors',
character for character (``reward_models/templates/README.md`` has the sources).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_models.shared.answers import (
    Answer,
    Read,
    grades_after,
    rubric_scores,
    scores_in_list,
    share_mean,
)
from reward_models.shared.templates import FOLDER, Content, template

FIELD = re.compile(r"\{(prompt|instruction|requirement|request)\}|<(instruction)>|\[\[(prompt)\]\]")
"""Placeholders of the authors' texts."""
NO_THINKING: Mapping[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
"""The authors serve the Qwen3.5 versions of their models so; other chat templates ignore it."""

Combine = Callable[[Sequence[Sequence[float]]], float]
"""A score from the numbers of all questions, in their order."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a sample.

    Attributes:
        text: As published, with the authors' placeholders.
        read: Numbers from the answer.
        shows: The pictures in order: ``source`` (before an edit) and ``result``.
        marker: Where each picture goes in the text; empty if they come before it.
        label: Text before each picture, with ``{n}`` for its number.
        system: Text of the system message; empty for none.
        begins: Beginning of the answer, which the model continues; empty for none.
        first: Whether the answer is read from the probabilities of the first token.
        max_tokens: Longest answer.
    """

    text: str
    read: Read
    shows: Sequence[str] = ("result",)
    marker: str = ""
    label: str = ""
    system: str = ""
    begins: str = ""
    first: bool = False
    max_tokens: int = 1024

    def fill(self, texts: Mapping[str, str], pictures: Mapping[str, Sequence[bytes]]) -> Content:
        """The question about a sample. Placeholders within a prompt are not replaced.

        Args:
            texts: ``prompt`` and ``requirement``.
            pictures: ``source`` and ``result``, a picture or the frames of a video each, as PNG.
        """

        def value(match: re.Match[str]) -> str:
            name = next(g for g in match.groups() if g)
            return texts["requirement" if name == "requirement" else "prompt"]

        pieces = self.text.split(self.marker) if self.marker else ["", self.text]
        content: Content = []
        for number, piece in enumerate(pieces):
            if piece:
                content.append(FIELD.sub(value, piece))
            if number == len(pieces) - 1:
                break
            names = self.shows if not self.marker else self.shows[number : number + 1]
            for name in names:
                for picture in pictures[name]:
                    if self.label:
                        shown = sum(isinstance(c, bytes) for c in content)
                        content.append(self.label.replace("{n}", str(shown + 1)))
                    content.append(picture)
        return content


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A published judge.

    Attributes:
        model: Hub id of its default model.
        image: Questions about an image or an edit; none if it judges videos only.
        video: Questions about a video; none if it judges images only.
        combine: The score from the numbers of all questions.
        side: Images are resized to this square first; 0 for none.
        frames: Frames of a video that are shown.
        from_start: Whether frame ``i`` of ``n`` is at ``i F / n``, not spread to the last frame.
        extra: Further keys of the request.
    """

    model: str
    image: Sequence[Question] = ()
    video: Sequence[Question] = ()
    combine: Combine
    side: int = 0
    frames: int = 8
    from_start: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def edits(self) -> bool:
        """Whether it compares with the picture before the edit."""
        return any("source" in q.shows for q in self.image)


def _mean(answers: Sequence[Sequence[float]]) -> float:
    numbers = [n for numbers in answers for n in numbers]
    return sum(numbers) / len(numbers)


def _only(answers: Sequence[Sequence[float]]) -> float:
    return answers[0][0]


def _vie_score(answers: Sequence[Sequence[float]]) -> float:
    """VIEScore's rule on grades from 0 to 25: 0 to 10."""
    following, quality = (min(numbers) / 2.5 for numbers in answers)
    return math.sqrt(following * quality)


def _first_final_score(answer: Answer) -> list[float] | None:
    found = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", answer.text)
    return [float(found[1]) / 5] if found else None


def _edit_pair(names: Sequence[str], **more: Any) -> list[Question]:
    """A question about an edit and one about its result, each graded twice from 0 to 25."""
    read = scores_in_list(2, 0.0, 25.0)
    following, quality = (template(name) for name in names)
    return [
        Question(text=following, shows=("source", "result"), read=read, **more),
        Question(text=quality, read=read, **more),
    ]


def _unified_reward_1() -> Judge:
    text = template("unified_reward_1_llava")
    question = Question(text=text, read=_first_final_score)
    return Judge(
        model="CodeGoat24/UnifiedReward-7b-v1.5", image=[question], combine=_only, side=512
    )


def _unified_reward_2() -> Judge:
    def asked(kind: str, second: str) -> list[Question]:
        grades = ("Alignment Score", second, "Style Score")
        text = template(f"unified_reward_2_{kind}")
        return [Question(text=text, read=grades_after(grades), max_tokens=4096)]

    return Judge(
        model="CodeGoat24/UnifiedReward-2.0-qwen35-9b",
        image=asked("image", "Coherence Score"),
        video=asked("video", "Physics Score"),
        combine=_mean,
        frames=16,
        from_start=True,
        extra=NO_THINKING,
    )


def _unified_reward_edit() -> Judge:
    names = ("unified_reward_edit_following", "unified_reward_edit_quality")
    return Judge(
        model="CodeGoat24/UnifiedReward-Edit-qwen3vl-8b",
        image=_edit_pair(names, max_tokens=4096),
        combine=_vie_score,
        extra=NO_THINKING,
    )


def _edit_r1() -> Judge:
    digits = share_mean({str(n): n / 5 for n in range(6)})
    question = Question(
        text=template("edit_r1"), read=digits, shows=("source", "result"), first=True, max_tokens=1
    )
    return Judge(model="Qwen/Qwen2.5-VL-32B-Instruct", image=[question], combine=_only)


def _edit_score(model: str, label: str = "") -> Judge:
    names = ("edit_score_following", "edit_score_quality")
    return Judge(
        model=model, image=_edit_pair(names, label=label, max_tokens=512), combine=_vie_score
    )


def _rational_rewards() -> Judge:
    read = rubric_scores(
        ("Text Faithfulness:", "Image Faithfulness:", "Physical and Visual Quality:", "Text Rendering:"),
        used=(0, 2, 3),
        optional=(3,),
    )  # fmt: skip
    question = Question(
        text=template("rational_rewards_edit"),
        read=read,
        shows=("source", "result"),
        marker="<image>",
        system=template("rational_rewards_system"),
        max_tokens=2048,
    )
    return Judge(
        model="TIGER-Lab/RationalRewards-8B-Edit",
        image=[question],
        combine=lambda answers: (_mean(answers) - 1) / 3,
    )


def _deqa() -> Judge:
    words = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
    question = Question(
        text="How would you rate the quality of this image?\n<|image|>",
        marker="<|image|>",
        read=share_mean(words),
        begins="The quality of the image is",
        first=True,
        max_tokens=1,
    )
    return Judge(model="Qwen/Qwen3-VL-8B-Instruct", image=[question], combine=_only)


MASKS = {0: (22, 23, 24, 28, 29), 1: (25, 26), 2: (27,)}
"""VisionReward's questions about a body, a face and hands, and those that count only with a yes there."""


def _yes_no(answer: Answer) -> list[float] | None:
    found = re.match(r"\W*(yes|no)\b", answer.text, re.IGNORECASE)
    return [1.0 if found[1].lower() == "yes" else -1.0] if found else None


def _vision_reward() -> Judge:
    """A checklist: a weighted sum of answers, 1 for yes and -1 for no."""
    weights = json.loads((FOLDER / "vision_reward.json").read_text())

    def asked(kind: str) -> list[Question]:
        lines = template(f"vision_reward_{kind}").splitlines()
        return [Question(text=q.strip(), read=_yes_no, max_tokens=4) for q in lines]

    def combine(answers: Sequence[Sequence[float]]) -> float:
        numbers = [n for (n,) in answers]
        if len(numbers) == len(weights["video"]):
            return sum(w * n for w, n in zip(weights["video"], numbers, strict=True)) / len(numbers)
        alignment, *said = numbers
        for mask, places in MASKS.items():
            for place in places:
                said[place] *= said[mask] > 0
        counted = [alignment, *said[len(MASKS) :]]
        return sum(w * n for w, n in zip(weights["image"], counted, strict=True))

    alignment = Question(
        text='Does this figure show "{prompt}"? Please answer yes or no.',
        read=share_mean({"yes": 1.0, "no": 0.0}),
        first=True,
        max_tokens=1,
    )
    return Judge(
        model="Qwen/Qwen3-VL-8B-Instruct",
        image=[alignment, *asked("image")],
        video=asked("video"),
        combine=combine,
        frames=24,
    )


JUDGES: Mapping[str, Callable[[], Judge]] = {
    "unified_reward_1": _unified_reward_1,
    "unified_reward_2": _unified_reward_2,
    "unified_reward_edit": _unified_reward_edit,
    "edit_r1": _edit_r1,
    "edit_score": lambda: _edit_score("EditScore/EditScore-Qwen3-VL-8B-Instruct"),
    "edit_score_qwen25": lambda: _edit_score("EditScore/EditScore-7B", label="<img{n}>: "),
    "rational_rewards": _rational_rewards,
    "vision_reward": _vision_reward,
    "deqa": _deqa,
}
"""Judges by name."""
