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
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.arguments import call_key, is_unrelated
from flowgrpo.policy.call import UnsupportedPipelineError
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
    may_rewrite: bool = True,
) -> None:
    """Let a pipeline encode every prompt and every condition image once.

    Args:
        pipeline: Its methods are replaced.
        encoders_loaded: Context in which the pipeline's encoders are on their device
            (:meth:`flowgrpo.policy.offloading.Encoders.loaded`).
        memory: Limits of the cache of encoded prompts.
        device: Device of the cached results when they are used.
        may_rewrite: Whether a text encoder may rewrite prompts; not if it is divided among processes.
    """
    for name in ENCODING_METHODS:
        method = getattr(pipeline, name, None)
        if method is None:
            continue
        if name == "encode_prompt":
            store = TensorStore(int(memory.prompt_cache_gb * GB), int(memory.prompt_disk_gb * GB))
            method = PromptCache(method, store, device, encoders_loaded)
        else:
            method = remembered(_with_encoders(method, encoders_loaded))
        setattr(pipeline, name, method)
    for name in REWRITING_METHODS:
        if hasattr(pipeline, name) and not may_rewrite:
            setattr(pipeline, name, _refusing_to_rewrite(pipeline, name))
        elif hasattr(pipeline, name):
            method = _with_encoders(getattr(pipeline, name), encoders_loaded)
            setattr(pipeline, name, rewritten_once(method))
    for vae in autoencoders(pipeline):
        if hasattr(vae, "encode"):
            vae.encode = remembered(vae.encode)


def _refusing_to_rewrite(pipeline: DiffusionPipeline, name: str) -> Callable[..., Any]:
    """Stands in for a method that rewrites prompts with a text encoder that is divided among processes."""

    @wraps(getattr(pipeline, name))
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPipelineError(
            f"parallel.shard = 'all': {type(pipeline).__name__} rewrites prompts ({name}), in which its divided "
            "text encoder would gather all of its weights for every token; switch the rewriting off in "
            "sampling.call, or use parallel.shard = 'denoiser'"
        )

    return refused


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

    Offloaded encoders come to the device once for all prompts of a rollout: prompts that are announced
    (:meth:`announce`) are encoded together with the first prompt that is not in the cache.

    Attributes:
        store: The cached encodings.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        store: TensorStore | None = None,
        device: torch.device | None = None,
        encoders_loaded: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """Wrap a pipeline's method.

        Args:
            encode: The pipeline's own method.
            store: Stores the encodings. With T5-XXL a prompt takes a few megabytes.
            device: Device of the returned encodings.
            encoders_loaded: Context in which the encoders may stay on their device.
        """
        self._encode, self._encoders_loaded = encode, encoders_loaded
        self._current: Sequence[Prompt] = ()
        self._coming: Sequence[Prompt] = ()
        self._signature = inspect.signature(encode)
        self.store = store if store is not None else TensorStore()
        self._device = device or torch.device("cpu")
        self._rules: dict[Any, Callable[[Sequence[Any]], Any] | None] = {}

    def announce(self, current: Sequence[Prompt], coming: Sequence[Prompt]) -> None:
        """Name the prompts of the next call of the pipeline, and those of calls that follow it.

        Args:
            current: The prompts of the next call.
            coming: The prompts of later calls.
        """
        key = call_key(current[0])
        self._current, self._coming = current, [p for p in coming if call_key(p) == key]

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
            with self._encoders_loaded():
                return self._encode(*args, **kwargs)
        rows = tuple(zip(*(arguments[name] for name in batched), strict=True))
        if shared in self._rules and all(_key(shared, (r,)) in self.store for r in rows):
            return self._encoded(bound, batched, rows, shared)
        # The encoders stay on the device until the last of the new prompts is encoded.
        with self._encoders_loaded():
            if shared not in self._rules:
                self._rules[shared] = (
                    None if has_media(rest) else self._learn_rule(bound, batched, rows)
                )
            encoded = self._encoded(bound, batched, rows, shared)
            if self._rules[shared] is not None:
                self._encode_coming(bound, batched, rows, shared)
        return encoded

    def _encoded(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows, shared: str
    ) -> Any:
        """The joint encoding of the prompts, from single encodings if there is a rule to join them."""
        join = self._rules[shared]
        if join is None:
            return self._remembered(bound, batched, rows, shared)
        encoded = {
            row: self._remembered(bound, batched, (row,), shared) for row in dict.fromkeys(rows)
        }
        return join([encoded[row] for row in rows])

    def _encode_coming(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows, shared: str
    ) -> None:
        """Encode announced prompts, as many as main memory holds along with the present ones."""
        coming = _rows_of(self._coming, self._current, rows)
        new = [r for r in dict.fromkeys(coming) if _key(shared, (r,)) not in self.store]
        room = self.store.room_for(_key(shared, (rows[-1],))) - len(set(rows))
        for row in new[: max(0, room)]:
            key = _key(shared, (row,))
            self.store.put(key, self._call(bound, batched, (row,)))

    def _call(self, bound: inspect.BoundArguments, batched: list[str], rows: Rows) -> Any:
        """Call ``encode_prompt`` with the given prompts and otherwise the bound arguments."""
        for name, column in zip(batched, zip(*rows, strict=True), strict=True):
            bound.arguments[name] = list(column)
        return self._encode(*bound.args, **bound.kwargs)

    def _remembered(
        self, bound: inspect.BoundArguments, batched: list[str], rows: Rows, shared: str
    ) -> Any:
        """The joint encoding of the prompts, from the cache if possible."""
        key = _key(shared, rows)
        try:
            return self.store.get(key, self._device)
        except KeyError:
            with self._encoders_loaded():
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
            if is_unrelated(error):
                raise
            return None
        finally:
            for name, column in zip(batched, zip(*rows, strict=True), strict=True):
                bound.arguments[name] = list(column)


def _key(shared: str, rows: Rows) -> str:
    """The key under which the joint encoding of some prompts is stored."""
    return repr((shared, rows))


def _rows_of(
    coming: Sequence[Prompt], current: Sequence[Prompt], rows: Rows
) -> list[tuple[str, ...]]:
    """The texts with which a pipeline will encode coming prompts, from those of the current ones.

    Args:
        coming: The prompts of later calls.
        current: The prompts of this call.
        rows: The texts of this call, one row per prompt.

    Returns:
        A row for each coming prompt. Empty if the pipeline encodes other texts than the prompts, their
        negative prompts, or texts that all prompts share.
    """
    if not coming or len(current) != len(rows):
        return []
    columns: list[Callable[[Prompt], str]] = []
    for column in zip(*rows, strict=True):
        if list(column) == [p.text for p in current]:
            columns.append(lambda p: p.text)
        elif list(column) == [p.negative for p in current]:
            columns.append(lambda p: str(p.negative))
        elif len(set(column)) == 1:
            columns.append(lambda _, text=column[0]: text)  # type: ignore[misc]
        else:
            return []
    return [tuple(value(p) for value in columns) for p in coming]


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
