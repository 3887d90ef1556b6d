"""Encodes every prompt once: the pipeline's ``encode_prompt``, memoised per prompt and collated."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PROMPT_ARGUMENTS = (
    "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3",
)  # fmt: skip


Rows = tuple[tuple[str, ...], ...]
PLAIN = (str, int, float, bool, type(None), torch.device, torch.dtype)
"""What ``repr`` tells apart. With any other argument, such as an image, nothing is cached."""


class PromptCache:
    """Stands in for ``pipeline.encode_prompt``.

    Each prompt is encoded alone and the results are joined. Outputs differ: some have a batch axis,
    some are shared by the batch (FLUX's text ids), some are lists. How to join is learned by
    comparing single encodings with one joint encoding of different prompts; where none of the known
    ways reproduces the joint encoding, whole batches are encoded and cached instead.
    """

    def __init__(self, encode: Callable[..., Any], capacity: int = 256):
        """Remember the last ``capacity`` prompts, which for T5-XXL are some megabytes each."""
        self._encode = encode
        self._signature = inspect.signature(encode)
        self._capacity = capacity
        self._kept: OrderedDict[tuple[str, Rows], Any] = OrderedDict()
        self._rules: dict[Any, Callable[[Sequence[Any]], Any] | None] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``encode_prompt`` would return."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        batched = [
            name for name in PROMPT_ARGUMENTS if isinstance(arguments.get(name), list | tuple)
        ]
        rest = {k: v for k, v in arguments.items() if k not in PROMPT_ARGUMENTS}
        if "prompt" not in batched or not _is_plain(rest):
            return self._encode(*args, **kwargs)
        shared = repr([rest, {n: arguments.get(n) for n in PROMPT_ARGUMENTS if n not in batched}])
        rows = tuple(zip(*(arguments[name] for name in batched), strict=True))
        if shared not in self._rules:
            self._rules[shared] = self._learn_rule(bound, batched, rows)
        join = self._rules[shared]
        if join is None:
            return self._remembered(bound, batched, rows, shared)
        return join([self._remembered(bound, batched, (row,), shared) for row in rows])

    def _call(self, bound: inspect.BoundArguments, batched: list[str], rows: Rows) -> Any:
        """``encode_prompt`` with the given prompts and otherwise the bound arguments."""
        for name, column in zip(batched, zip(*rows, strict=True), strict=True):
            bound.arguments[name] = list(column)
        return self._encode(*bound.args, **bound.kwargs)

    def _remembered(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows, shared: str
    ) -> Any:
        """The encoding of these prompts together, from the cache if it is there."""
        key, kept = (shared, rows), self._kept
        if key in kept:
            kept.move_to_end(key)
        else:
            kept[key] = self._call(bound, batched, rows)
        value = kept[key]
        while sum(len(held) for _, held in kept) > self._capacity:
            kept.popitem(last=False)
        return value

    def _learn_rule(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows
    ) -> Callable[[Sequence[Any]], Any] | None:
        """How to join single encodings, checked on three rows of different length; None if unknown."""
        short, long = (
            ("a",) * len(batched),
            ("a photo of two red things left of a third thing",) * len(batched),
        )
        probe = (rows[0], short, long)
        joint = self._call(bound, batched, probe)
        singles = [self._call(bound, batched, (row,)) for row in probe]
        try:
            rule = _rule(joint, singles)
            return rule if _equal(rule(singles), joint) else None
        except (ValueError, RuntimeError, TypeError):
            return None


def _rule(joint: Any, singles: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """The way to join values of this kind. Raises ValueError if there is none."""
    if isinstance(joint, Tensor):
        if all(_equal(s, joint) for s in singles):
            return lambda parts: parts[0]
        if not all(isinstance(s, Tensor) for s in singles):
            raise ValueError("present in a batch only")
        if joint.shape[0] == sum(s.shape[0] for s in singles):
            return lambda parts: torch.cat(list(parts))
        raise ValueError("no batch axis")
    if isinstance(joint, list) and sum(len(s) for s in singles) == len(joint):
        return lambda parts: [value for part in parts for value in part]
    if isinstance(joint, tuple | list):
        rules = [_rule(j, column) for j, *column in zip(joint, *singles, strict=True)]
        kind = type(joint)
        return lambda parts: kind(r(column) for r, *column in zip(rules, *parts, strict=True))
    if all(s == joint for s in singles):
        return lambda parts: parts[0]
    raise ValueError(f"cannot join {type(joint).__name__}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-3)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return isinstance(value, PLAIN)
