"""Caches the results of a pipeline's frozen encoders, so that each prompt and image is encoded once.

Every rollout, every replayed step and every decoded batch is a call of the pipeline, and each call would
encode its prompts again. Three methods are replaced: ``encode_prompt`` by a :class:`PromptCache`,
``encode_image`` and the VAE's ``encode`` by :func:`remembered`, and methods in which a language model
rewrites prompts by :func:`rewritten_once`.
"""

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from flowgrpo.policy.arguments import is_out_of_memory
from flowgrpo.policy.loading import autoencoders
from flowgrpo.policy.settings import Memory
from flowgrpo.policy.tensor_store import GB, TensorStore

PROMPT_ARGUMENTS = (
    "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3",
)  # fmt: skip
"""Arguments of ``encode_prompt`` that hold one text for each prompt."""
ENCODING_METHODS = ("encode_prompt", "encode_image")
"""Methods with which pipelines call their encoders."""
REWRITING_METHODS = (
    "rewire_prompt",  # LongCat-Image
    "_enhance_prompt_with_pe",  # ERNIE-Image
    "upsample_prompt",  # FLUX.2, Ideogram
    "enhance_prompt",  # LTX-2
)
"""Methods with which pipelines let a language model rewrite ``prompt``."""
Rows = tuple[tuple[str, ...], ...]
"""For each prompt of a batch its texts, one for each argument."""
SIMPLE = (str, int, float, bool, type(None), torch.device, torch.dtype)
"""Types whose values ``repr`` distinguishes."""


def cache_encodings(
    pipeline: DiffusionPipeline,
    encoders_loaded: Callable[[], AbstractContextManager[None]],
    memory: Memory,
    device: torch.device,
) -> None:
    """Let a pipeline encode every prompt and every condition image once.

    Args:
        pipeline: Its methods are replaced.
        encoders_loaded: Context in which the pipeline's encoders are on their device
            (:meth:`flowgrpo.policy.placement.Encoders.loaded`).
        memory: Limits of the cache of encoded prompts.
        device: Device of the cached results when they are used.
    """
    for name in ENCODING_METHODS:
        method = getattr(pipeline, name, None)
        if method is None:
            continue
        method = _with_encoders(method, encoders_loaded)
        if name == "encode_prompt":
            store = TensorStore(int(memory.prompt_cache_gb * GB), int(memory.prompt_disk_gb * GB))
            method = PromptCache(method, store, device)
        else:
            method = remembered(method)
        setattr(pipeline, name, method)
    for name in REWRITING_METHODS:
        if hasattr(pipeline, name):
            method = _with_encoders(getattr(pipeline, name), encoders_loaded)
            setattr(pipeline, name, rewritten_once(method))
    for vae in autoencoders(pipeline):
        if hasattr(vae, "encode"):
            vae.encode = remembered(vae.encode)


def _with_encoders(
    method: Callable[..., Any], encoders_loaded: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """The method, called with the encoders on their device."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with encoders_loaded():
            return method(*args, **kwargs)

    return wrapped


class PromptCache:
    """Replaces ``pipeline.encode_prompt``.

    Each prompt is encoded alone, and the results are joined to a batch. Pipelines return different
    kinds of values: tensors with a batch axis, tensors shared by the batch (FLUX's text ids), lists. The
    rule for joining them is learned by comparing single encodings with the joint encoding of different
    prompts. If no known rule reproduces the joint encoding, or if images are encoded along, whole
    batches are encoded and cached.

    Attributes:
        store: The cached encodings.
        union: Joins lists of all processes, without duplicates. Set where the text encoders are
            sharded: every process then encodes what any of them needs.
    """

    union: Callable[[list[Rows]], list[Rows]] | None = None

    def __init__(
        self,
        encode: Callable[..., Any],
        store: TensorStore | None = None,
        device: torch.device | None = None,
    ):
        """Wrap a pipeline's method.

        Args:
            encode: The pipeline's own method.
            store: Stores the encodings. With T5-XXL a prompt takes a few megabytes.
            device: Device of the returned encodings.
        """
        self._encode = encode
        self._signature = inspect.signature(encode)
        self.store = store if store is not None else TensorStore()
        self._device = device or torch.device("cpu")
        self._rules: dict[Any, Callable[[Sequence[Any]], Any] | None] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of ``encode_prompt`` for the same arguments."""
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
            self._require_text()
            return self._encode(*args, **kwargs)
        rows = tuple(zip(*(arguments[name] for name in batched), strict=True))
        if shared not in self._rules:
            self._rules[shared] = (
                None if has_media(rest) else self._learn_rule(bound, batched, rows)
            )
        join = self._rules[shared]
        if join is None:
            self._require_text()
            return self._remembered(bound, batched, rows, shared)
        needed: list[Rows] = [(row,) for row in dict.fromkeys(rows)]
        if self.union is not None:
            # The encoders gather their parameters from all processes, so that all encode what any of
            # them lacks. What is there comes first, before the store drops it for something new.
            there = [one for one in needed if repr((shared, one)) in self.store]
            needed = there + self.union([one for one in needed if one not in there])
        encoded = {one[0]: self._remembered(bound, batched, one, shared) for one in needed}
        return join([encoded[row] for row in rows])

    def _require_text(self) -> None:
        """Refuse to encode a batch of which other processes know nothing.

        Raises:
            ValueError: If the text encoders are sharded.
        """
        if self.union is not None:
            raise ValueError(
                "the pipeline encodes its prompts together with images or in whole batches, which does not "
                "work with sharded text encoders: shard the denoiser only"
            )

    def _call(self, bound: inspect.BoundArguments, batched: list[str], rows: Rows) -> Any:
        """Call ``encode_prompt`` with the given prompts and otherwise the bound arguments."""
        for name, column in zip(batched, zip(*rows, strict=True), strict=True):
            bound.arguments[name] = list(column)
        return self._encode(*bound.args, **bound.kwargs)

    def _remembered(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows, shared: str
    ) -> Any:
        """The joint encoding of the prompts, from the cache if possible."""
        key = repr((shared, rows))
        try:
            return self.store.get(key, self._device)
        except KeyError:
            self.store.put(key, self._call(bound, batched, rows))
            return self.store.get(key, self._device)

    def _learn_rule(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows
    ) -> Callable[[Sequence[Any]], Any] | None:
        """Learn how to join single encodings, from three prompts of different length.

        Returns:
            The rule; None if no known rule reproduces the joint encoding.
        """
        short, long = (
            ("a",) * len(batched),
            ("a photo of two red things left of a third thing",) * len(batched),
        )
        probe = (rows[0], short, long)
        # Some methods also take the batch size as an argument, and fail with any other number of prompts.
        try:
            joint = self._call(bound, batched, probe)
            singles = [self._call(bound, batched, (row,)) for row in probe]
            rule = _rule(joint, singles)
            return rule if _equal(rule(singles), joint) else None
        except (ValueError, RuntimeError, TypeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return None
        finally:
            for name, column in zip(batched, zip(*rows, strict=True), strict=True):
                bound.arguments[name] = list(column)


def _rule(joint: Any, singles: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """The rule that joins ``singles`` to ``joint``.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(joint, Tensor):
        if all(_equal(s, joint) for s in singles):
            return lambda parts: parts[0]
        if not all(isinstance(s, Tensor) for s in singles):
            raise ValueError("a tensor for a batch, and none for a single prompt")
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


def rewritten_once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A prompt-rewriting method that rewrites each prompt once, seeded by its arguments.

    A replay is a call too: a language model that samples would rewrite the prompt of a replayed step
    differently from that of the rollout. Prompts are rewritten one at a time, and a list of prompts gives
    a list of texts. If the other arguments have no fingerprint, the method is called as it is.
    """
    signature, cached = inspect.signature(method), dict[str, Any]()

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
            if key not in cached:
                bound.arguments["prompt"] = prompt
                with torch.random.fork_rng(), torch.no_grad():
                    torch.manual_seed(seed_of(key))
                    cached[key] = method(*bound.args, **bound.kwargs)
            return cached[key]

        if isinstance(prompts, str):
            return text(prompts)
        return [part for p in prompts for part in text([p])]

    return wrapped


def fingerprint(value: Any) -> str | None:
    """A text that is the same for equal values only; None if the value has a type without such a text."""
    if isinstance(value, SIMPLE):
        return repr(value)
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}{_digest(value.tobytes())}"
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return (
            f"{plain.dtype}{tuple(plain.shape)}{_digest(plain.flatten().view(torch.uint8).numpy())}"
        )
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{_digest(np.ascontiguousarray(value))}"
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        parts = [fingerprint(v) for v in value]
        return None if None in parts else f"[{', '.join(p for p in parts if p is not None)}]"
    return None


def seed_of(text: str) -> int:
    """A seed that depends only on a text, the same in every process."""
    return int(_digest(text.encode())[:15], 16)


def _digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def has_media(value: Any) -> bool:
    """Whether a nested value contains an image, a tensor or an array."""
    if isinstance(value, dict):
        return any(has_media(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(has_media(v) for v in value)
    return isinstance(value, Image.Image | Tensor | np.ndarray)


def remembered(method: Callable[..., Any], capacity: int = 64) -> Callable[..., Any]:
    """A method of a frozen model that caches its last results by its arguments.

    For the encodings of condition images, which a pipeline would compute in every call.

    Args:
        method: The method.
        capacity: Number of cached results.
    """
    cached: OrderedDict[str, Any] = OrderedDict()

    @torch.no_grad()
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        key = fingerprint([args, kwargs])
        if key is None:
            return method(*args, **kwargs)
        if key not in cached:
            cached[key] = method(*args, **kwargs)
            if len(cached) > capacity:
                cached.popitem(last=False)
        cached.move_to_end(key)
        return cached[key]

    return wrapped
