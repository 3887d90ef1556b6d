"""Encodes every prompt once: the pipeline's ``encode_prompt``, memoised per prompt and collated."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from flowgrpo.policy.loading import autoencoders
from flowgrpo.policy.memory import Encoders, Memory
from flowgrpo.policy.prompt_rewriting import REWRITING_METHODS, rewritten_once
from flowgrpo.policy.store import GB, TensorStore, fingerprint, has_media, remembered

PROMPT_ARGUMENTS = (
    "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3",
)  # fmt: skip


ENCODING_METHODS = ("encode_prompt", "encode_image")
"""Methods of pipelines that call their encoders."""
Rows = tuple[tuple[str, ...], ...]


def remember_encodings(
    pipeline: DiffusionPipeline, encoders: Encoders, memory: Memory, device: torch.device
) -> None:
    """Let a pipeline encode every prompt and every condition image once."""
    for name in ENCODING_METHODS:
        method = getattr(pipeline, name, None)
        if method is None:
            continue
        method = _brought_in(method, encoders)
        if name == "encode_prompt":
            store = TensorStore(int(memory.prompt_cache_gb * GB), int(memory.prompt_disk_gb * GB))
            method = PromptCache(method, store, device)
        else:
            method = remembered(method)
        setattr(pipeline, name, method)
    for name in REWRITING_METHODS:
        if hasattr(pipeline, name):
            method = _brought_in(getattr(pipeline, name), encoders)
            setattr(pipeline, name, rewritten_once(method))
    for vae in autoencoders(pipeline):
        if hasattr(vae, "encode"):
            vae.encode = remembered(vae.encode)


def _brought_in(method: Callable[..., Any], encoders: Encoders) -> Callable[..., Any]:
    """The method with the encoders at work, and away afterwards."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with encoders.at_work():
            return method(*args, **kwargs)

    return wrapped


class PromptCache:
    """Stands in for ``pipeline.encode_prompt``.

    Each prompt is encoded alone and the results are joined. Outputs differ: some have a batch axis,
    some are shared by the batch (FLUX's text ids), some are lists. How to join is learned by
    comparing single encodings with one joint encoding of different prompts; where none of the known
    ways reproduces the joint encoding, or images take part, whole batches are encoded and cached.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        store: TensorStore | None = None,
        device: torch.device | None = None,
    ):
        """
        Args:
            encode: The pipeline's own method.
            store: Where encodings are kept; for T5-XXL a prompt takes some megabytes.
            device: Where they are wanted.
        """
        self._encode = encode
        self._signature = inspect.signature(encode)
        self.store = store if store is not None else TensorStore()
        self._device = device or torch.device("cpu")
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
        single = {n: arguments.get(n) for n in PROMPT_ARGUMENTS if n not in batched}
        shared = fingerprint([rest, single])
        if "prompt" not in batched or shared is None:
            return self._encode(*args, **kwargs)
        rows = tuple(zip(*(arguments[name] for name in batched), strict=True))
        if shared not in self._rules:
            self._rules[shared] = (
                None if has_media(rest) else self._learn_rule(bound, batched, rows)
            )
        join = self._rules[shared]
        if join is None:
            return self._remembered(bound, batched, rows, shared)
        encoded = {
            row: self._remembered(bound, batched, (row,), shared) for row in dict.fromkeys(rows)
        }
        return join([encoded[row] for row in rows])

    def _call(self, bound: inspect.BoundArguments, batched: list[str], rows: Rows) -> Any:
        """``encode_prompt`` with the given prompts and otherwise the bound arguments."""
        for name, column in zip(batched, zip(*rows, strict=True), strict=True):
            bound.arguments[name] = list(column)
        return self._encode(*bound.args, **bound.kwargs)

    def _remembered(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows, shared: str
    ) -> Any:
        """The encoding of these prompts together, from the cache if it is there."""
        key = repr((shared, rows))
        if key not in self.store:
            self.store.put(key, self._call(bound, batched, rows))
        return self.store.get(key, self._device)

    def _learn_rule(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows
    ) -> Callable[[Sequence[Any]], Any] | None:
        """How to join single encodings, checked on three rows of different length; None if unknown."""
        short, long = (
            ("a",) * len(batched),
            ("a photo of two red things left of a third thing",) * len(batched),
        )
        probe = (rows[0], short, long)
        # Some methods are told the size of the batch beside the prompts, and take no other.
        try:
            joint = self._call(bound, batched, probe)
            singles = [self._call(bound, batched, (row,)) for row in probe]
            rule = _rule(joint, singles)
            return rule if _equal(rule(singles), joint) else None
        except (ValueError, RuntimeError, TypeError, IndexError):
            return None
        finally:
            for name, column in zip(batched, zip(*rows, strict=True), strict=True):
                bound.arguments[name] = list(column)


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
