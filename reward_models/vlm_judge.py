"""A vision-language model behind an OpenAI-compatible endpoint as a reward: yes or no, grades, rubrics."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.data.rubrics import Rubric, read_rubrics
from reward_models.shared.answers import Answer
from reward_models.shared.chat import Chat
from reward_models.shared.templates import Template, check_pictures, pictures_of

__all__ = ["VLMJudge"]

DEFAULT_URL = "http://127.0.0.1:8000/v1"
DEFAULT_RUBRIC = "Does the picture show everything that the prompt asks for, as it asks for it?"
GRADE = re.compile(r"score[\s:=*_>\"]*(-?\d+(?:\.\d+)?)(?!\d)", re.IGNORECASE)


class VLMJudge:
    """A vision-language model's rating of a picture, in [0, 1] if no weight is negative.

    Each rubric is one question. With ``w`` their weights and ``s`` their scores the reward is
    ``sum(w * s) / sum(|w|)``. The score of a question, by ``answer``:

    - ``yes_no``: ``P(yes) / (P(yes) + P(no))`` from the probabilities of the answer's first token,
      summed over the spellings among the 20 most likely.
    - ``grade``: the expected grade under those probabilities, ``sum(v * P(v)) / sum(P(v))``, moved
      to [0, 1]: ``(v - low) / (high - low)``. Needs grades of one digit.
    - ``written``: the number after the last "Score" in the text, moved to [0, 1]; for models that
      reason first, and for servers without log-probabilities.

    A sample has no score (NaN) if an answer about it cannot be used: the expected words have less
    than half of the first token's probability, there is no number or one outside the scale, or no
    answer came in time. The attributes ``chat.asked``, ``chat.cached`` and ``chat.unparsed`` count
    questions.

    Works with vLLM, SGLang and clouds; the first two modes need log-probabilities. Of a video,
    ``frames`` evenly spaced frames are shown in order.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = DEFAULT_URL,
        answer: Literal["yes_no", "grade", "written"] = "yes_no",
        rubrics: str | Sequence[str | Mapping[str, Any]] = (),
        template: str = "",
        scale: Sequence[int] = (1, 5),
        frames: int = 8,
        longest_side: int = 0,
        max_tokens: int = 1024,
        api_key_env: str = "",
        timeout: float = 120.0,
        patience: float = 300.0,
        concurrency: int = 16,
        cache: str = "",
        extra: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            model: Name of the model at the server.
            base_url: One server or several equal ones.
            answer: How a question is answered; see above.
            rubrics: A ``.txt`` or ``.jsonl`` file, or a list of questions or of tables with
                ``rubric`` and ``weight``; by default one question about the prompt.
            template: A ``.txt`` file with ``$media``, and ``$prompt``, ``$rubric``, ``$low`` and
                ``$high`` as needed; by default the one that comes with ``answer``.
            scale: Lowest and highest grade.
            frames: Most frames of a video that are shown.
            longest_side: Larger pictures are shrunk to this length; 0 keeps them.
            max_tokens: Longest ``written`` answer.
            api_key_env, timeout, patience, concurrency, cache, extra: As for
                :class:`reward_models.shared.chat.Chat`.

        Raises:
            ValueError: If an option, the template or a rubric is invalid, the key is refused, or
                the server does not have the model.
            FileNotFoundError: If there is no such template or rubric file.
        """
        if answer not in ("yes_no", "grade", "written"):
            raise ValueError(f"answer must be 'yes_no', 'grade' or 'written', got {answer!r}")
        if len(scale) != 2 or not scale[0] < scale[1]:
            raise ValueError(f"scale must be [low, high] with low < high, got {list(scale)}")
        if answer == "grade" and not 0 <= scale[0] < scale[1] <= 9:
            raise ValueError(
                f"answer = 'grade' needs grades of one digit, which is one token; got {list(scale)}"
            )
        check_pictures(frames, longest_side, max_tokens)
        self.rubrics = read_rubrics(rubrics) if rubrics else [Rubric(DEFAULT_RUBRIC)]
        texts = ("prompt", "rubric", "low", "high")
        self.template = Template.load(template or answer, texts, ("media",))
        self.answer, self.low, self.high = answer, scale[0], scale[1]
        self.frames, self.longest_side, self.max_tokens = frames, longest_side, max_tokens
        self.chat = Chat(
            model, base_url, api_key_env, timeout, patience, concurrency, cache, extra
        )  # fmt: skip

    def __call__(
        self, media: Float[Tensor, "batch *frames 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            RuntimeError: If every question failed; names the first error.
        """
        weights = torch.tensor([r.weight for r in self.rubrics])
        # (B, rubrics) -> (B,). One rubric without an answer leaves its sample without a score: NaN.
        return (self.by_rubric(media, prompts) * weights).sum(1) / weights.abs().sum()

    def by_rubric(
        self, media: Float[Tensor, "batch *frames 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "batch rubrics"]:
        """The score of each question in [0, 1], NaN where it got no answer."""
        scores = torch.full((len(prompts), len(self.rubrics)), math.nan)
        sound = media.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        places, questions = [], []
        for row in sound:
            pictures = {"media": pictures_of(media[row], self.frames, self.longest_side)}
            for column, rubric in enumerate(self.rubrics):
                texts = {
                    "prompt": prompts[row].text,
                    "rubric": rubric.text,
                    "low": str(self.low),
                    "high": str(self.high),
                }
                places.append((row, column))
                questions.append(self.template.fill(texts, pictures))
        written = self.answer == "written"
        values = self.chat.ask_all(
            questions, self._parser(), max_tokens=self.max_tokens if written else 1, first=not written
        )  # fmt: skip
        for (row, column), value in zip(places, values, strict=True):
            if value is not None:
                scores[row, column] = value
        return scores

    def _parser(self) -> Callable[[Answer], float | None]:
        return {"yes_no": yes_no, "grade": self._grade, "written": self._written}[self.answer]

    def _grade(self, answer: Answer) -> float | None:
        grades = range(self.low, self.high + 1)
        shares = answer.share([str(g) for g in grades])
        if shares is None:
            return None
        mean = sum(g * s for g, s in zip(grades, shares, strict=True))
        return (mean - self.low) / (self.high - self.low)

    def _written(self, answer: Answer) -> float | None:
        found = GRADE.findall(answer.text)
        grade = float(found[-1]) if found else math.nan
        if not self.low <= grade <= self.high:
            return None
        return (grade - self.low) / (self.high - self.low)


def yes_no(answer: Answer) -> float | None:
    """``P(yes) / (P(yes) + P(no))`` of the first token."""
    shares = answer.share(["yes", "no"])
    return None if shares is None else shares[0]
