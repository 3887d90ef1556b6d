"""Answers of vision-language models in this process: ask, decode greedily, look at the digits."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class DigitRecorder(LogitsProcessor):
    """Keeps, for every token that is generated, how likely each of the digits 1 to 5 was."""

    def __init__(self, tokenizer: Any):
        """
        Raises:
            ValueError: If a digit is not one token.
        """
        ids = [tokenizer.encode(str(n), add_special_tokens=False) for n in range(1, 6)]
        if any(len(i) != 1 for i in ids):
            raise ValueError(f"the digits 1 to 5 must be a token each, got {ids}")
        self.ids = [i[0] for i in ids]
        self._kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._kept.append(scores[:, self.ids].float().cpu())
        return scores

    def shares(self, row: int) -> Float[Tensor, "tokens digits"]:
        """Of one answer: the probability of each digit among the five."""
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
    """The tokens of each answer, decoded greedily, without the end.

    Args:
        model: A model that generates.
        processor: Its processor.
        kinds: Of each question: ``image`` or ``video``, as often as it has them.
        questions: What is asked.
        max_new_tokens: Length of the longest answer.
        watcher: Sees the scores of all tokens at every step.
        media: ``images`` or ``videos`` and their options, for the processor.
    """
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": k} for k in own), text_part(question)]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for own, question in zip(kinds, questions, strict=True)
    ]
    processor.tokenizer.padding_side = "left"  # answers begin where questions end
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
    """A question as a part of a message."""
    return {"type": "text", "text": question}


def token_at(tokenizer: Any, ids: Sequence[int], place: int) -> int:
    """Which token the character at ``place`` of the decoded text comes from."""
    return bisect_right(range(1, len(ids) + 1), place, key=lambda n: len(tokenizer.decode(ids[:n])))
