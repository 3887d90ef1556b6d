"""Pipelines whose call lets a language model rewrite its prompts: once per prompt, always alike.

A replay is a call too: what a sampler of tokens rewrote for the rollout, it would rewrite differently
then, and for every trained step again.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from flowgrpo.policy.store import fingerprint, seed_of

REWRITING_METHODS = (
    "rewire_prompt",  # LongCat-Image
    "_enhance_prompt_with_pe",  # ERNIE-Image
    "upsample_prompt",  # FLUX.2, Ideogram
    "enhance_prompt",  # LTX-2
)
"""Methods of pipelines that take ``prompt`` and return other text."""


def rewritten_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, asked for one prompt at a time, with a seed of its arguments, and only once.

    A list of prompts gives a list of texts. With arguments that cannot be told apart, it is asked
    anew, with everything that it was given.
    """
    signature, kept = inspect.signature(method), dict[str, Any]()

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        prompts = bound.arguments["prompt"]
        rest = fingerprint(
            [v for k, v in bound.arguments.items() if k not in ("prompt", "generator")]
        )
        if rest is None:
            return method(*args, **kwargs)

        def text(prompt: Any) -> Any:
            key = f"{prompt!r} {rest}"
            if key not in kept:
                bound.arguments["prompt"] = prompt
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(seed_of(key))
                    kept[key] = method(*bound.args, **bound.kwargs)
            return kept[key]

        if isinstance(prompts, str):
            return text(prompts)
        return [part for p in prompts for part in text([p])]

    return wrapped
