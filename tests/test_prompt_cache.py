"""The prompt cache gives what the pipeline's own encoding gives, once per prompt."""

import inspect
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from flowgrpo.core.random import Random
from flowgrpo.policy.prompt_cache import PromptCache, rewritten_once
from flowgrpo.policy.tensor_store import TensorStore, num_bytes
from tests.conftest import sampling_of
from tests.tiny import FAMILIES

Tiny = Callable[[str], Path]

PROMPTS = ["a cat", "two red dogs riding a bus at night", "a cat", "the moon"]


class Counting:
    """An ``encode_prompt`` that notes which prompts it was asked for."""

    def __init__(self, encode: Callable[..., Any]):
        self.encode, self.calls = encode, list[list[str]]()
        self.__signature__ = inspect.signature(encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(list(self.__signature__.bind(*args, **kwargs).arguments["prompt"]))
        return self.encode(*args, **kwargs)

    def take(self) -> list[list[str]]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


@pytest.fixture(scope="module")
def pipeline(tiny: Tiny) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(tiny("sd15"))


@pytest.fixture
def encode(pipeline: DiffusionPipeline) -> Counting:
    """The real encoding of Stable Diffusion: prompt and negative prompt, or None without guidance."""

    def encode_prompt(
        prompt: Any, negative_prompt: Any = None, guidance: bool = True, image: Any = None
    ) -> Any:
        return pipeline.encode_prompt(prompt, "cpu", 1, guidance, negative_prompt=negative_prompt)

    return Counting(encode_prompt)


@torch.no_grad()
def assert_same(a: Any, b: Any) -> None:
    """Equal trees of close tensors."""
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    elif isinstance(a, tuple | list):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_encodings_are_the_pipelines(name: str, tiny: Tiny) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny(name))
    pipeline.set_progress_bar_config(disable=True)
    original = pipeline.encode_prompt
    counting = Counting(original)
    cache = PromptCache(counting)
    texts: list[list[str]] = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        whole = {
            k: v
            for k, v in bound.arguments.items()
            if isinstance(v, list) and len(v) == len(PROMPTS)
        }
        if "prompt" not in whole:  # One negative prompt for all.
            return original(*args, **kwargs)

        def call(encode: Callable[..., Any], rows: slice) -> Any:
            # Z-Image writes into the list that it is given.
            bound.arguments.update({k: v[rows] for k, v in whole.items()})
            return encode(*bound.args, **bound.kwargs)

        for rows in (slice(None), slice(None, None, -1), slice(1, 3)):
            texts.append(whole["prompt"][rows])
            assert_same(call(cache, rows), call(original, rows))
            counting.take()
            assert_same(call(cache, rows), call(original, rows))
            assert counting.take() == []
        return call(original, slice(None))

    pipeline.encode_prompt = checked
    noise = [Random(0).at(i).generator() for i in range(len(PROMPTS))]
    arguments = sampling_of(name, num_steps=2).arguments()
    if name in ("qwen_image_edit", "cogvideox_i2v", "skyreels_i2v"):
        arguments["image"] = [arguments["image"]] * len(PROMPTS)
    with torch.no_grad():
        pipeline(prompt=PROMPTS, generator=noise, output_type="latent", **arguments)
    assert texts[:3] == [PROMPTS, PROMPTS[::-1], PROMPTS[1:3]]


def test_each_prompt_is_encoded_once(encode: Counting) -> None:
    cache = PromptCache(encode)
    cache(["a cat"])
    encode.take()
    cache(PROMPTS)
    assert encode.take() == [["two red dogs riding a bus at night"], ["the moon"]]
    cache(PROMPTS[::-1])
    cache(["the moon", "a dog"])
    assert encode.take() == [["a dog"]]


def test_other_arguments_are_other_encodings(encode: Counting) -> None:
    cache = PromptCache(encode)
    guided, unguided = cache(PROMPTS, guidance=True), cache(PROMPTS, guidance=False)
    assert_same(guided, encode(PROMPTS, guidance=True))
    assert_same(unguided, encode(PROMPTS, guidance=False))
    assert guided[1] is not None
    assert unguided[1] is None

    own = ["ugly", "dark", "bad", "dark ugly image"]
    for negatives in (own, own[::-1], None):
        assert_same(cache(PROMPTS, negatives), encode(PROMPTS, negatives))
        assert_same(cache(PROMPTS, negatives), encode(PROMPTS, negatives))
    encode.take()
    cache(PROMPTS[:2], own[:2])
    cache(PROMPTS[:2], own[::-1][:2])
    assert encode.take() == []
    # A new pair of known texts is a new encoding.
    cache(["the moon"], ["dark"])
    assert encode.take() == [["the moon"]]


def test_what_repr_cannot_tell_apart_is_not_cached(encode: Counting) -> None:
    class Picture:
        def __repr__(self) -> str:
            return "a picture"

    cache = PromptCache(encode)
    for image in (Picture(), Picture(), [Picture()]):
        cache(PROMPTS, image=image)
    assert encode.take() == [PROMPTS] * 3


def test_encodings_with_images_are_cached_by_their_content(encode: Counting) -> None:
    cache = PromptCache(encode)
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    for image in (red, blue, torch.zeros(2), torch.ones(2), [red, blue]):
        cache(PROMPTS, image=image)
        cache(PROMPTS, image=image)
    assert encode.take() == [PROMPTS] * 5
    cache(PROMPTS, image=red.copy())
    assert encode.take() == []


def test_encodings_that_mix_a_batch_are_cached_whole(encode: Counting) -> None:
    """As in pipelines that pad to the longest prompt or depend on the batch in other ways."""

    def mixing(prompt: list[str]) -> Tensor:
        embeddings, _ = encode.encode(prompt)
        return embeddings - embeddings.mean(0)

    counting = Counting(mixing)
    cache = PromptCache(counting)
    for texts in (PROMPTS, PROMPTS[:2], PROMPTS[::-1]):
        assert_same(cache(texts), mixing(texts))
        counting.take()
        assert_same(cache(texts), mixing(texts))
        assert counting.take() == []


def test_running_out_of_memory_is_no_rule(encode: Counting) -> None:
    """Whole batches would be encoded and cached from then on."""
    errors = [torch.OutOfMemoryError("CUDA out of memory")]

    def full_once(prompt: list[str]) -> Tensor:
        if errors and len(prompt) > 1:
            raise errors.pop()
        embeddings, _ = encode.encode(prompt)
        return embeddings

    counting = Counting(full_once)
    cache = PromptCache(counting)
    with pytest.raises(torch.OutOfMemoryError):
        cache(PROMPTS)
    cache(PROMPTS)
    counting.take()
    assert_same(cache(PROMPTS[::-1]), full_once(PROMPTS[::-1]))
    assert counting.take() == []


def test_encodings_without_a_batch_axis_are_shared(encode: Counting) -> None:
    def with_ids(prompt: list[str]) -> tuple[Tensor, Tensor, list[str], int]:
        embeddings, _ = encode.encode(prompt)
        return embeddings, torch.arange(77).view(77, 1), [p.upper() for p in prompt], 3

    counting = Counting(with_ids)
    cache = PromptCache(counting)
    cache(["a cat"])
    assert_same(cache(PROMPTS), with_ids(PROMPTS))
    counting.take()
    assert_same(cache(PROMPTS[::-1]), with_ids(PROMPTS[::-1]))
    assert counting.take() == []


def test_the_least_recently_used_are_forgotten(encode: Counting) -> None:
    size = num_bytes(encode(["a"]))
    cache = PromptCache(encode, TensorStore(2 * size, 0))
    cache(["a"])
    cache(["b"])
    cache(["a"])
    encode.take()
    cache(["c"])
    cache(["a"])
    assert encode.take() == [["c"]]
    cache(["b"])
    assert encode.take() == [["b"]]
    # More at once than it holds.
    assert_same(cache(["a", "b", "c", "d"]), encode(["a", "b", "c", "d"]))
    assert len(cache.store) == 2


def test_what_memory_cannot_hold_comes_back_from_disk_and_leaves_no_file(
    encode: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    size = num_bytes(encode(["a"]))
    cache = PromptCache(encode, TensorStore(2 * size, 10**6))
    texts = [f"text {i}" for i in range(5)]
    expected = [encode([t]) for t in texts]
    for text in texts:
        cache([text])
    encode.take()
    for text, value in zip(texts, expected, strict=True):
        assert_same(cache([text]), value)
    assert encode.take() == []
    assert len(cache.store) == 5
    # Also while it is open: nothing is left however the process ends.
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_encodings_is_no_larger_than_allowed(encode: Counting) -> None:
    size = num_bytes(encode(["a"]))
    store = TensorStore(size, 10**6)
    cache = PromptCache(encode, store)
    cache(["a"])
    cache(["b"])
    (record,) = store._on_disk.values()
    store.disk_bytes = 3 * record.size + 100
    texts = [f"{i}" for i in range(9)]
    for text in [*texts, *texts[::-1], *texts]:
        assert_same(cache([text]), encode([text]))
        places = sorted((r.start, r.start + r.size) for r in store._on_disk.values())
        assert len(places) <= 3
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert store._file is not None
    assert os.fstat(store._file.fileno()).st_size <= store.disk_bytes


@pytest.mark.parametrize("damage", ["flip", "truncate", "full"])
def test_damaged_encodings_are_encoded_again(
    encode: Counting, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TensorStore(num_bytes(encode(["a"])), 10**6)
    cache = PromptCache(encode, store)
    cache(["a"])
    if damage == "full":
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "wb", 0))  # noqa: SIM115
    cache(["b"])
    if damage == "flip":
        (record,) = store._on_disk.values()
        store._file.seek(record.start + record.size // 2)
        byte = store._file.read(1)[0]
        store._file.seek(record.start + record.size // 2)
        store._file.write(bytes([byte ^ 1]))
    elif damage == "truncate":
        os.truncate(store._file.fileno(), 100)
    encode.take()
    assert_same(cache(["a"]), encode(["a"]))
    assert encode.take() == [["a"], ["a"]]
    assert ("No space left" if damage == "full" else "was damaged") in caplog.text


def test_prompts_are_rewritten_once_and_always_alike() -> None:
    asked: list[Any] = []

    def rewrite(prompt: Any, device: str, temperature: float = 1.0, image: Any = None) -> Any:
        asked.append(prompt)
        draw = f" {torch.rand(()).item():.6f}"
        return prompt + draw if isinstance(prompt, str) else [p + draw for p in prompt]

    state = torch.random.get_rng_state()
    once, again = rewritten_once(rewrite), rewritten_once(rewrite)
    first = once(["a", "b"], "cpu")
    assert asked == [["a"], ["b"]]
    assert first[0] != first[1].replace("b", "a")
    assert once(prompt=["b", "a"], device="cpu") == first[::-1]
    assert asked == [["a"], ["b"]]
    assert once("a", "cpu") == once("a", device="cpu")
    assert asked == [["a"], ["b"], "a"]
    assert once(["a"], "cpu", temperature=0.5) != [first[0]]
    # Another process, another time: the same text; and nobody else's randomness is touched.
    torch.rand(3)
    assert again(["a", "b"], "cpu") == first
    torch.random.set_rng_state(state)
    before = torch.rand(2)
    torch.random.set_rng_state(state)
    rewritten_once(rewrite)(["c"], "cpu")
    assert torch.equal(torch.rand(2), before)
    # What cannot be told apart is asked anew.
    count = len(asked)
    for _ in range(2):
        once(["a", "b"], "cpu", image=object())
    assert asked[count:] == [["a", "b"]] * 2
