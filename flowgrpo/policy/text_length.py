"""Prompts that are longer than a text encoder reads."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowgrpo.core.text import counted
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.settings import Sampling

LONGEST = 100_000
"""Tokenizers without a limit name a huge number."""


def tokenizers_of(components: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizers among a pipeline's components."""
    return {
        name: part
        for name, part in components.items()
        if name.startswith("tokenizer") and hasattr(part, "model_max_length")
    }


def cut_prompts(
    tokenizers: Mapping[str, Any],
    call: Callable[..., Any],
    sampling: Sampling,
    prompts: Sequence[Prompt],
) -> list[str]:
    """Sentences about the prompts whose end a text encoder does not read; none if all are read.

    The limit is 77 tokens for CLIP, and ``max_sequence_length`` of the pipeline's call for other encoders.
    Templates that a pipeline puts around a prompt are not counted.

    Args:
        tokenizers: By their names in the pipeline.
        call: The pipeline's call, whose default of ``max_sequence_length`` applies.
        sampling: May set ``max_sequence_length``.
        prompts: The prompts.

    Returns:
        One sentence per encoder that cuts, with the number of prompts and the longest as an example.
    """
    found = []
    limits = {n: _limit(t, call, sampling) for n, t in tokenizers.items()}
    for name, tokenizer in tokenizers.items():
        limit = limits[name]
        # A token has at least one byte, so short texts need no tokenizer.
        texts = [p.text for p in prompts if limit and len(p.text.encode()) + 2 > limit]
        lengths = {
            t: len(tokenizer(t, truncation=False)["input_ids"]) for t in dict.fromkeys(texts)
        }
        cut = [t for t in texts if lengths[t] > (limit or 0)]
        if not cut:
            continue
        longest = max(cut, key=lambda t: lengths[t])
        shown = longest if len(longest) <= 60 else f"{longest[:60]}…"
        whole = [n for n, m in limits.items() if n != name and (m is None or m >= lengths[longest])]
        others = f"; {' and '.join(whole)} read them whole" if whole else ""
        verb = "is" if len(cut) == 1 else "are"
        found.append(
            f"{len(cut)} of {len(prompts)} {verb} longer than the {counted(limit or 0, 'token')} that the encoder of {name} "
            f"reads, and the rest is ignored there. The longest has {lengths[longest]}: {shown!r}{others}"
        )
    return found


def _limit(tokenizer: Any, call: Callable[..., Any], sampling: Sampling) -> int | None:
    """The number of tokens that the encoder of a tokenizer reads; None for any number."""
    longest = int(tokenizer.model_max_length)
    own = longest if longest < LONGEST else None
    if "CLIP" in type(tokenizer).__name__:
        return own
    parameter = inspect.signature(call).parameters.get("max_sequence_length")
    given = sampling.call.get("max_sequence_length", parameter.default if parameter else None)
    return given if isinstance(given, int) else own
