"""A vision-language model behind an endpoint as a pairwise judge, as in Pref-GRPO (arXiv:2508.20751)."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.answers import Answer
from reward_models.shared.chat import Chat
from reward_models.shared.templates import Content, Template, check_pictures, pictures_of
from reward_models.shared.templates import template as published

__all__ = ["VLMPairwise"]

DEFAULT_RUBRIC = "Which of them is better: truer to the prompt first, and better made second?"
VERDICT = re.compile(r"\b(?:image|video|picture)\s*([12])\s+is\s+better\b", re.IGNORECASE)
TIE = re.compile(r"\b(tie|tied|equal|equally|same)\b", re.IGNORECASE)
NUM_CATEGORIES = 3


class VLMPairwise:
    """The probability that the first of two pictures is better, in [0, 1]; a ``PairwiseJudge``.

    By ``answer``:

    - ``choice``: ``P("1") / (P("1") + P("2"))`` of the answer's first token; any model.
    - ``think``: UnifiedReward-Think. 1 or 0 from ``<answer>Image 1 is better</answer>`` after the
      reasoning, 0.5 for an explicit tie.
    - ``flex``: UnifiedReward-Flex. Each winner in its JSON is worth 1, 0 or 0.5; the result is
      ``(o * winner + d * mean(first three categories)) / (o + d)`` with ``(o, d) = flex_weights``,
      and ``winner`` alone if there are no categories. ``category_weights`` are the weights in that
      mean. In Pref-GRPO's released code the weight of the last category takes the place of ``d``
      (``flex_rule = "released"``), so that (0.3 o + 0.7 m) can become (0.3 o + 1.0 m) / 1.3 and the
      winner can change. The code combines win rates of a group, by the names of categories in order
      of appearance; for answers with the same categories in the same order this is the mean of the
      verdicts here.

    A pair without a verdict is NaN; Pref-GRPO's released code counts it as a tie. With ``swap``
    each pair is also shown in the other order, and the result is ``(a + 1 - b) / 2``, which costs
    twice as much and cancels a preference for the first place.

    ``think`` and ``flex`` ask in the words that UnifiedReward was trained with (for images and for
    videos, MIT licence), after the pictures. They have no place for a ``rubric``; the templates named
    ``think`` and ``flex`` do, in a wording of this library. Serve the Qwen3.5 versions of UnifiedReward
    with ``--default-chat-template-kwargs '{"enable_thinking": false}'``, as the authors do. Of
    videos, frame ``i`` of ``n`` is at ``floor(i (F - 1) / (n - 1))`` for ``flex``, as in their code.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = "http://127.0.0.1:8000/v1",
        answer: Literal["choice", "think", "flex"] = "choice",
        swap: bool = False,
        rubric: str = DEFAULT_RUBRIC,
        template: str = "",
        flex_weights: Sequence[float] = (0.3, 0.7),
        category_weights: Sequence[float] = (),
        flex_rule: Literal["weighted", "released"] = "weighted",
        frames: int = 8,
        longest_side: int = 0,
        max_tokens: int = 4096,
        api_key_env: str = "",
        timeout: float = 300.0,
        patience: float = 600.0,
        concurrency: int = 16,
        cache: str = "",
        extra: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            model: Name of the model at the server.
            base_url: One server or several equal ones.
            answer: The form of the verdict; see above.
            swap: Also show each pair in the other order.
            rubric: Definition of better; replaces ``$rubric``.
            template: A ``.txt`` file with ``$first``, ``$second``, and ``$prompt`` and ``$rubric``
                as needed, or a name; by default ``choice``, or UnifiedReward's own wording.
            flex_weights: Weights of the overall winner and of the categories.
            category_weights: Weights of the categories in the order of the answer; 1 where none is
                given.
            flex_rule: ``weighted``, or ``released`` as above.
            frames: Most frames of each video that are shown.
            longest_side: Larger pictures are shrunk to this length; 0 keeps them.
            max_tokens: Longest ``think`` and ``flex`` answer.
            api_key_env, timeout, patience, concurrency, cache, extra: As for
                :class:`reward_models.shared.chat.Chat`.

        Raises:
            ValueError: If an option or the template is invalid, the key is refused, or the server
                does not have the model.
            FileNotFoundError: If there is no such template.
        """
        _check_options(answer, flex_weights, category_weights, flex_rule)
        self.category_weights = [float(w) for w in category_weights]
        self.flex_rule = flex_rule
        check_pictures(frames, longest_side, max_tokens)
        self.answer, self.swap, self.rubric = answer, swap, rubric
        self.own = answer != "choice" and not template
        _check_rubric(answer, rubric, self.own)
        self.template = Template.load(
            template or answer, ("prompt", "rubric"), ("first", "second")
        )  # fmt: skip
        self.flex_weights = float(flex_weights[0]), float(flex_weights[1])
        self.frames, self.longest_side, self.max_tokens = frames, longest_side, max_tokens
        self.chat = Chat(
            model, base_url, api_key_env, timeout, patience, concurrency, cache, extra
        )  # fmt: skip

    def compare(
        self,
        first: Float[Tensor, "batch *frames channels height width"],
        second: Float[Tensor, "batch *frames channels height width"],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            RuntimeError: If every question failed; names the first error.
        """
        sound = first.isfinite().flatten(1).all(1) & second.isfinite().flatten(1).all(1)
        rows = sound.nonzero().flatten().tolist()
        questions: list[Content] = []
        for row in rows:
            a, b = (
                pictures_of(m[row], self.frames, self.longest_side, floor=self.answer == "flex")
                for m in (first, second)
            )
            for pair in ((a, b), (b, a)) if self.swap else ((a, b),):
                if self.own:
                    kind = "video" if first.ndim == 5 else "image"
                    text = published(f"unified_reward_{self.answer}_{kind}")
                    questions.append(
                        [*pair[0], *pair[1], text.replace("{prompt}", prompts[row].text)]
                    )
                    continue
                texts = {"prompt": prompts[row].text, "rubric": self.rubric}
                questions.append(self.template.fill(texts, {"first": pair[0], "second": pair[1]}))
        choice = self.answer == "choice"
        values = self.chat.ask_all(
            questions, self._parser(), max_tokens=1 if choice else self.max_tokens, first=choice
        )
        verdicts = torch.tensor([math.nan if v is None else v for v in values])
        if self.swap:
            verdicts = (verdicts[::2] + 1 - verdicts[1::2]) / 2
        result = torch.full((len(prompts),), math.nan)
        result[sound] = verdicts
        return result

    def _parser(self) -> Callable[[Answer], float | None]:
        return {"choice": _choice, "think": think_verdict, "flex": self._flex}[self.answer]

    def _flex(self, answer: Answer) -> float | None:
        released = self.flex_rule == "released"
        return flex_verdict(answer, self.flex_weights, self.category_weights, released)


def _choice(answer: Answer) -> float | None:
    shares = answer.share(["1", "2"])
    return None if shares is None else shares[0]


def think_verdict(answer: Answer) -> float | None:
    """The verdict in the last ``<answer>``; None if there is none."""
    blocks = re.findall(r"<answer>(.*?)</answer>", answer.text, re.IGNORECASE | re.DOTALL)
    if not blocks:
        return None
    named = set(VERDICT.findall(blocks[-1]))
    if len(named) == 1:
        return 1.0 if named == {"1"} else 0.0
    return 0.5 if not named and TIE.search(blocks[-1]) else None


def flex_verdict(
    answer: Answer,
    weights: tuple[float, float],
    category_weights: Sequence[float] = (),
    released: bool = False,
) -> float | None:
    """The weighted winners in the JSON object of the answer.

    Args:
        answer: An answer with a JSON object.
        weights: Weights of the overall winner and of the mean over categories.
        category_weights: Weights in that mean, in the order of the answer; 1 where none is given.
        released: Whether the last category's weight replaces the second of ``weights``.
    """
    found = _object_with_winner(answer.text)
    if found is None:
        return None
    overall = _worth(found["winner"])
    categories = found.get("categories") or []
    if overall is None or not isinstance(categories, list):
        return None
    winners = [c.get("cat_winner") if isinstance(c, dict) else None for c in categories]
    worths = [_worth(w) for w in winners[:NUM_CATEGORIES]]
    known = [w for w in worths if w is not None]
    if len(known) < len(worths):
        return None
    if not known:
        return overall
    missing = len(known) - len(category_weights)
    own = [*category_weights, *[1.0] * missing][: len(known)]
    mean = sum(w * value for w, value in zip(own, known, strict=True)) / sum(own)
    rest = own[-1] if released else weights[1]
    return (weights[0] * overall + rest * mean) / (weights[0] + rest)


def _object_with_winner(text: str) -> dict[str, Any] | None:
    """The last JSON object with the key ``winner``, which other text may surround."""
    decoder, found, place = json.JSONDecoder(), None, text.find("{")
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and "winner" in value:
            found = value
        place = text.find("{", end)
    return found


def _worth(winner: Any) -> float | None:
    """1 for the first, 0 for the second, 0.5 for neither."""
    if not isinstance(winner, str):
        return None
    named = set(re.findall(r"\b(?:image|video|picture)\s*([12])\b", winner, re.IGNORECASE))
    if len(named) == 1:
        return 1.0 if named == {"1"} else 0.0
    return 0.5 if TIE.search(winner) else None


def _check_options(
    answer: str, flex_weights: Sequence[float], category_weights: Sequence[float], flex_rule: str
) -> None:
    """Raise ValueError if the form of the answer, or the weights of a ``flex`` answer, make no sense."""
    if answer not in ("choice", "think", "flex"):
        raise ValueError(f"answer must be 'choice', 'think' or 'flex', got {answer!r}")
    if len(flex_weights) != 2 or min(flex_weights) < 0 or sum(flex_weights) <= 0:
        raise ValueError(
            f"flex_weights must be two numbers, not negative and not both 0; got {list(flex_weights)}"
        )
    if min(category_weights, default=1) <= 0 or flex_rule not in ("weighted", "released"):
        raise ValueError(
            "category_weights must be above 0 and flex_rule 'weighted' or 'released', got "
            f"{list(category_weights)} and {flex_rule!r}"
        )


def _check_rubric(answer: str, rubric: str, own: bool) -> None:
    """Raise ValueError if a rubric would be ignored, as UnifiedReward's own wording has none."""
    if own and rubric != DEFAULT_RUBRIC:
        raise ValueError(
            f"the wording of UnifiedReward has no place for a rubric: give template = {answer!r} "
            "too, which has"
        )
