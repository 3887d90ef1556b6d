"""Answers of vision-language models in this process: batched greedy decoding, probabilities of digits."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class DigitRecorder(LogitsProcessor):
    """Records the logits of the digits 1 to 5 at every generated token."""

    def __init__(self, tokenizer: Any):
        """
        Raises:
            ValueError: If a digit is not one token.
        """
        ids = [tokenizer.encode(str(n), add_special_tokens=False) for n in range(1, 6)]
        if any(len(i) != 1 for i in ids):
            raise ValueError(f"each of the digits 1 to 5 must be one token, got {ids}")
        self.ids = [i[0] for i in ids]
        self._kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._kept.append(scores[:, self.ids].float().cpu())
        return scores

    def shares(self, row: int) -> Float[Tensor, "tokens digits"]:
        """Probability of each digit among the five, at every token of one answer."""
        return torch.stack([kept[row] for kept in self._kept]).softmax(-1)


def answer_batch(
    model: Any,
    processor: Any,
    kinds: Sequence[Sequence[str]],
    questions: Sequence[str],
    max_new_tokens: int,
    watcher: LogitsProcessor | None = None,
    **media: Any,
) -> list[list[int]]:
    """Decode answers greedily; returns the tokens of each answer, without the end token.

    Args:
        model: A model that generates.
        processor: Its processor.
        kinds: For each question, ``image`` or ``video`` once per medium.
        questions: Text of each question.
        max_new_tokens: Length of the longest answer.
        watcher: Receives the logits of all tokens at every step.
        media: ``images`` or ``videos`` and their options, for the processor.
    """
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": k} for k in own), text_part(question)]}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # known to templates of models that can also think first
        )
        for own, question in zip(kinds, questions, strict=True)
    ]
    processor.tokenizer.padding_side = "left"  # so that every answer begins at the same column
    inputs = processor(text=texts, padding=True, return_tensors="pt", **media).to(model.device)
    for name, values in inputs.items():
        if torch.is_tensor(values) and values.is_floating_point() and "pixel" in name:
            inputs[name] = values.to(model.dtype)
    output: Int[Tensor, "batch tokens"] = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([watcher] if watcher else []),
    )
    ends = model.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    answers = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def text_part(question: str) -> dict[str, str]:
    """A text as a part of a chat message."""
    return {"type": "text", "text": question}


def token_at(tokenizer: Any, ids: Sequence[int], place: int) -> int:
    """Index of the token that holds the character at ``place`` of the decoded text."""
    return bisect_right(range(1, len(ids) + 1), place, key=lambda n: len(tokenizer.decode(ids[:n])))
