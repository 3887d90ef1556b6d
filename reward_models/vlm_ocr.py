"""Text rendering, read by a vision-language model behind an OpenAI-compatible endpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.ocr import plain_text, text_score, wanted_text
from reward_models.shared.answers import Answer
from reward_models.shared.chat import Chat
from reward_models.shared.pictures import check_media
from reward_models.shared.templates import Template, check_pictures, pictures_of

__all__ = ["VLMOCR"]


class VLMOCR:
    """The reward ``ocr`` with a vision-language model as the engine, in [0, 1].

    The model transcribes all text of the image, and the transcription is compared with the wanted
    text by the rules of ``ocr``: ``edit``, ``whole`` or ``exact``. Such models read curved, large and
    hand-written text that OCR engines miss. They also tend to correct misspellings, which an OCR
    engine does not; compare both before training on one. The wanted text is the prompt's
    ``metadata["text"]``, or else the only part of the prompt in double quotes.

    Models for transcription with a question of their own (GLM-OCR, DeepSeek-OCR, PaddleOCR-VL) are
    asked by a ``template``. An answer that was cut off at ``max_tokens`` is used as it is. Without an
    answer, and for an image with NaN, the score is NaN.
    """

    def __init__(
        self,
        model: str,
        base_url: str | Sequence[str] = "http://127.0.0.1:8000/v1",
        mode: Literal["edit", "whole", "exact"] = "edit",
        template: str = "transcribe",
        none: str = "NONE",
        longest_side: int = 0,
        max_tokens: int = 256,
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
            mode: As for the reward ``ocr``.
            template: A template with ``$media``.
            none: The answer for an image without text.
            longest_side: Larger images are shrunk to this length; 0 keeps them.
            max_tokens: Longest answer.
            api_key_env, timeout, patience, concurrency, cache, extra: As for
                :class:`reward_models.shared.chat.Chat`.

        Raises:
            ValueError: If an option or the template is invalid, the key is refused, or the server
                does not have the model.
            FileNotFoundError: If there is no such template.
        """
        if mode not in ("edit", "whole", "exact"):
            raise ValueError(f"mode must be 'edit', 'whole' or 'exact', got {mode!r}")
        check_pictures(1, longest_side, max_tokens)
        self.mode, self.none = mode, none
        self.longest_side, self.max_tokens = longest_side, max_tokens
        self.template = Template.load(template, (), ("media",))
        self.chat = Chat(
            model, base_url, api_key_env, timeout, patience, concurrency, cache, extra
        )  # fmt: skip

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one does not say which text is wanted.
        """
        for prompt in prompts:
            wanted_text(prompt)

    def __call__(
        self, media: Float[Tensor, "batch 3 height width"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt does not say which text is wanted.
            RuntimeError: If every question failed; names the first error.
        """
        check_media(media, prompts)
        targets = [plain_text(wanted_text(p)) for p in prompts]
        rows = media.isfinite().flatten(1).all(1).nonzero().flatten().tolist()
        questions = [
            self.template.fill({}, {"media": pictures_of(media[row], 1, self.longest_side)})
            for row in rows
        ]
        answers = self.chat.ask_all(questions, self._transcription, max_tokens=self.max_tokens)
        scores = torch.full((len(prompts),), math.nan)
        for row, text in zip(rows, answers, strict=True):
            if text is not None:
                scores[row] = text_score(plain_text(text), targets[row], self.mode)
        return scores

    def _transcription(self, answer: Answer) -> str | None:
        """The text in an answer; no text at all for ``none``, and None for an empty answer."""
        text = answer.text.split("</think>")[-1].strip()
        if not text:
            return None
        return "" if text.strip(" .\"'").casefold() == self.none.casefold() else text
