"""The wire format between flowgrpo and its reward servers: multipart or JSON, images as PNG.

Unlike pickle, the format cannot carry code. A request holds samples, in order::

    POST /score   multipart/form-data
        request    {"samples": [{"prompt": "a cat", "metadata": {...}, "frames": 2,
                                 "conditions": [0]}, ...]}
        image      a PNG for each sample, or ``frames`` of them for a video
        condition  a PNG for each different condition image; samples give indices of these

    POST /score   application/json
        {"samples": [{"prompt": "a cat", "image": "<base64>", "conditions": ["<base64>"]},
                     {"prompt": "a dog", "frames": ["<base64>", ...]}]}

The answer is ``{"scores": [0.3, null]}``, ``null`` where scoring failed; every error is
``{"error": "..."}``. By hand, without ``request``:
``curl -F "prompt=a cat" -F image=@cat.png URL/score``, for an edit also
``-F condition=@before.png``.

    POST /check   application/json
        {"samples": [{"prompt": "a cat", "metadata": {...}, "conditions": 1}, ...]}

checks before training whether prompts have what the reward needs. It holds numbers of condition
images instead of the images. The answer is ``{"problem": ""}`` or describes what is missing.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowgrpo.data.pictures import as_rgb, encode_png, png_of
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving.multipart import Part, TooManyParts, join, split

LARGEST_JSON = 1_000_000
"""Values in the JSON of one request, counted by its brackets, commas and colons."""
FORMATS = ("PNG", "JPEG", "WEBP")
"""Image formats that a server reads. PNG is lossless; the others are for requests made by hand."""


class WireError(ValueError):
    """A request that is refused.

    Attributes:
        status: HTTP status of the answer.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request, and all requests together, may hold.

    Attributes:
        num_bytes: Bytes of the body.
        num_images: Images, frames of videos and condition images in total.
        num_pixels: Pixels of one image, checked before the image is decoded.
        num_decoded: Bytes of all its images when they are decoded, 12 for each pixel of a sample and 3
            for each pixel of a condition image; checked before any of them is decoded.
        num_reserved: Bytes of the bodies and the decoded images of all requests in progress.
        num_connections: Connections at the same time.
    """

    num_bytes: int = 256 * 2**20
    num_images: int = 1024
    num_pixels: int = 4096 * 4096
    num_decoded: int = 4 * 2**30
    num_reserved: int = 8 * 2**30
    num_connections: int = 64


@dataclass(frozen=True)
class Sample:
    """One image ``(3, H, W)`` or video ``(F, 3, H, W)`` in [0, 1], and its prompt."""

    media: Tensor
    prompt: Prompt


@dataclass(frozen=True)
class _Packed:
    """A sample in a request: its record, the files of its media and of its condition images."""

    record: Mapping[str, Any]
    media: Sequence[bytes]
    conditions: Sequence[bytes]


def decode_image(data: bytes, limits: Limits | None = None) -> Float[Tensor, "3 height width"]:
    """An image in [0, 1] from a PNG, JPEG or WebP file; see :func:`open_image`."""
    pixels = torch.from_numpy(np.array(open_image(data, limits)))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(255)


def open_image(data: bytes, limits: Limits | None = None) -> Image.Image:
    """A PNG, JPEG or WebP file in memory, as RGB.

    Raises:
        WireError: If it is none of these, is damaged or has too many pixels.
    """
    with _opened(data, limits or Limits()) as image:
        return as_rgb(image)


def num_pixels(data: bytes, limits: Limits) -> int:
    """The number of pixels of an image, from its head: nothing is decoded. Raises as :func:`open_image`."""
    with _opened(data, limits) as image:
        return int(image.width * image.height)


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """An image whose head was read, and whose pixels are read inside."""
    allowed = limits.num_pixels
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > allowed:
                raise WireError(413, f"an image of {width}x{height} exceeds {allowed} pixels")
            yield image
    except WireError:
        raise
    except Image.DecompressionBombError as error:
        raise WireError(413, f"an image is too large: {error}") from error
    except Exception as error:  # decoders raise undocumented exceptions on damaged files
        raise WireError(
            400, f"no readable image ({', '.join(FORMATS)}), {len(data)} bytes: {error}"
        ) from error


def pack(
    media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
) -> tuple[str, bytes]:
    """A multipart request: its content type and its body.

    Raises:
        ValueError: If pixels are not finite, or metadata is not JSON.
        OSError: If a condition image cannot be read.
    """
    records = [_record(p) for p in prompts]
    images: list[bytes] = []
    conditions: dict[bytes, int] = {}
    encoded: dict[int, list[bytes]] = {}
    for record, prompt, item in zip(records, prompts, media, strict=True):
        frames = item if item.ndim == 4 else item[None]
        if item.ndim == 4:
            record["frames"] = len(frames)
        images += [encode_png(f) for f in frames]
        if prompt.images:
            # All samples of a group share a prompt: its images are encoded and sent once.
            if id(prompt) not in encoded:
                encoded[id(prompt)] = [png_of(i) for i in prompt.open_images()]
            own = encoded[id(prompt)]
            record["conditions"] = [conditions.setdefault(c, len(conditions)) for c in own]
    parts = [Part("request", "application/json", _json({"samples": records}))]
    parts += [Part("image", "image/png", image) for image in images]
    parts += [Part("condition", "image/png", image) for image in conditions]
    return join(parts)


def unpack(
    content_type: str,
    body: bytes,
    limits: Limits,
    reserve: Callable[[int], None] = lambda num_bytes: None,
) -> list[Sample]:
    """The samples of a request, multipart or JSON.

    Args:
        content_type: Its content type.
        body: Its body.
        limits: What it may hold.
        reserve: Called with the bytes that the decoded images take, before they are decoded; it may
            raise an error.

    Raises:
        WireError: If it is neither, is malformed, or holds more than it may.
    """
    kind = content_type.split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        packed = _from_multipart(content_type, body, limits)
    elif kind == "application/json":
        packed = _from_json(body)
    else:
        raise WireError(
            415, f"content type {kind or 'none'!r}: send multipart/form-data or application/json"
        )
    if not packed:
        raise WireError(400, "no samples")
    number = sum(len(p.media) + len(p.conditions) for p in packed)
    if number > limits.num_images:
        raise WireError(413, f"{number} images exceed the {limits.num_images} of one request")
    reserve(_decoded_size(packed, limits))
    opened: dict[bytes, Image.Image] = {}
    samples = []
    for i, sample in enumerate(packed):
        with _named(i):
            media = _media(sample, limits)
            for condition in sample.conditions:
                if condition not in opened:
                    opened[condition] = open_image(condition, limits)
        conditions = tuple(opened[c] for c in sample.conditions)
        samples.append(Sample(media, _prompt(sample.record, i, conditions)))
    return samples


def _decoded_size(packed: Sequence[_Packed], limits: Limits) -> int:
    """The bytes that all images of a request take when they are decoded.

    Raises:
        WireError: If they are more than a request may hold, or an image cannot be read.
    """
    size, known = 0, set[bytes]()
    for i, sample in enumerate(packed):
        with _named(i):
            size += sum(12 * num_pixels(m, limits) for m in sample.media)
            new = {c for c in sample.conditions if c not in known}
            size += sum(3 * num_pixels(c, limits) for c in new)
            known |= new
        if size > limits.num_decoded:
            raise WireError(
                413,
                f"the images take more than {limits.num_decoded} bytes when they are decoded, the limit "
                "of one request; send fewer in one request",
            )
    return size


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Name the sample in an error about it."""
    try:
        yield
    except WireError as error:
        raise WireError(error.status, f"sample {index}: {error}") from error


def pack_prompts(prompts: Sequence[Prompt]) -> bytes:
    """A request of ``/check``. Raises ValueError if metadata is not JSON."""
    counted = [{"conditions": len(p.images)} if p.images else {} for p in prompts]
    records = [_record(p) | c for p, c in zip(prompts, counted, strict=True)]
    return _json({"samples": records})


def unpack_prompts(body: bytes, limits: Limits) -> list[Prompt]:
    """The prompts in a request of ``/check``, with blank pictures in place of condition images.

    Raises:
        WireError: If it is malformed, or counts more images than a request may hold.
    """
    prompts = []
    for i, record in enumerate(_records(body)):
        number = record.get("conditions", 0)
        if not _is_count(number) or number > limits.num_images:
            raise WireError(
                400, f"sample {i}: conditions must be a number up to {limits.num_images}"
            )
        prompts.append(_prompt(record, i, (Image.new("RGB", (1, 1)),) * number))
    return prompts


def pack_problem(problem: str) -> bytes:
    """An answer of ``/check``; ``problem`` is empty if nothing is missing."""
    return _json({"problem": problem})


def unpack_problem(body: bytes) -> str:
    """The problem in an answer of ``/check``. Raises ValueError if the body is no such answer."""
    try:
        problem = json.loads(body)["problem"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected {{'problem': '...'}}, got {body[:200]!r}") from error
    if not isinstance(problem, str):
        raise ValueError(f"expected {{'problem': '...'}}, got {body[:200]!r}")
    return problem


def pack_scores(scores: Sequence[float]) -> bytes:
    """An answer; scores that are not finite are ``null``."""
    return _json({"scores": [s if math.isfinite(s) else None for s in scores]})


def unpack_scores(body: bytes, number: int) -> list[float]:
    """The scores in an answer, NaN for ``null``.

    Raises:
        ValueError: If it is not an answer to a request with ``number`` samples.
    """
    try:
        scores = json.loads(body)["scores"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected {{'scores': [...]}}, got {body[:200]!r}") from error
    numbers = isinstance(scores, list) and all(
        s is None or (isinstance(s, int | float) and not isinstance(s, bool)) for s in scores
    )
    if not numbers or len(scores) != number:
        raise ValueError(f"expected {number} scores, got {str(scores)[:200]}")
    return [math.nan if s is None else float(s) for s in scores]


def pack_error(message: str) -> bytes:
    """The body of an answer that is an error."""
    return _json({"error": message})


def unpack_error(body: bytes) -> str:
    """The message in an error's body, of a reward server or an OpenAI-compatible one, or its beginning."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:300].decode(errors="replace").strip()
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


def _json(value: Any) -> bytes:
    # Text may hold lone surrogates, which JSON can escape but UTF-8 cannot encode.
    return json.dumps(value, allow_nan=False).encode()


def _record(prompt: Prompt) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": prompt.text}
    if prompt.negative is not None:
        record["negative"] = prompt.negative
    if prompt.metadata:
        try:
            record["metadata"] = json.loads(json.dumps(dict(prompt.metadata), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata of prompt {prompt.text!r} is not JSON: {error}") from error
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _prompt(record: Mapping[str, Any], index: int, images: Sequence[Image.Image]) -> Prompt:
    text, negative = record.get("prompt", ""), record.get("negative")
    metadata = record.get("metadata", {})
    kinds = isinstance(text, str) and isinstance(negative, str | None)
    if not kinds or not isinstance(metadata, dict):
        raise WireError(
            400, f"sample {index}: prompt and negative must be strings and metadata an object"
        )
    return Prompt(text, negative, metadata, images)


def _media(sample: _Packed, limits: Limits) -> Tensor:
    """The decoded image of a sample, or the frames of its video."""
    if "frames" not in sample.record:
        return decode_image(sample.media[0], limits)
    wrong = WireError(400, "needs at least one frame, and all of one size")
    if not sample.media:
        raise wrong
    first = decode_image(sample.media[0], limits)
    # Filled frame by frame, because stacking takes the memory twice.
    video = torch.empty(len(sample.media), *first.shape)
    video[0] = first
    for i, data in enumerate(sample.media[1:], start=1):
        image = decode_image(data, limits)
        if image.shape != first.shape:
            raise wrong
        video[i] = image
    return video


def _from_multipart(content_type: str, body: bytes, limits: Limits) -> list[_Packed]:
    fields: dict[str, list[bytes]] = {"request": [], "prompt": [], "image": [], "condition": []}
    try:
        # Each image may have a prompt of its own.
        for name, content in split(content_type, body, 2 * limits.num_images + 1):
            if name not in fields:
                raise ValueError(f"unknown field {name!r} (known: {', '.join(fields)})")
            fields[name].append(content)
    except TooManyParts as error:
        raise WireError(413, str(error)) from error
    except ValueError as error:
        raise WireError(400, str(error)) from error
    images, requests, conditions = fields["image"], fields["request"], fields["condition"]
    if len(requests) == 1 and not fields["prompt"]:
        records = _records(requests[0])
    elif not requests:
        records = [{"prompt": p.decode(errors="replace")} for p in fields["prompt"]]
        if len(records) == 1:
            records[0]["conditions"] = [*range(len(conditions))]
    else:
        raise WireError(400, "give one field 'request', or fields 'prompt'")
    sizes = [r.get("frames", 1) for r in records]
    if any(not _is_count(n) or not 1 <= n <= max(1, len(images)) for n in sizes):
        raise WireError(
            400,
            f"'frames' must be the number of images that a video consists of; there are {len(images)}",
        )
    if sum(sizes) != len(images):
        raise WireError(400, f"{len(images)} images for samples that need {sum(sizes)}")
    rest = iter(images)
    return [
        _Packed(record, [next(rest) for _ in range(n)], own)
        for record, n, own in zip(records, sizes, _owners(records, conditions), strict=True)
    ]


def _owners(records: Sequence[Mapping[str, Any]], conditions: Sequence[bytes]) -> list[list[bytes]]:
    """The condition images of each record, which gives their indices."""
    places = [r.get("conditions", []) for r in records]
    for i, own in enumerate(places):
        if not isinstance(own, list) or not all(_is_count(p) and p < len(conditions) for p in own):
            raise WireError(
                400, f"sample {i}: conditions must be places among {len(conditions)} images"
            )
    if {p for own in places for p in own} != {*range(len(conditions))}:
        raise WireError(400, "a condition image belongs to no sample; 'request' says whose it is")
    return [[conditions[p] for p in own] for own in places]


def _from_json(body: bytes) -> list[_Packed]:
    packed = []
    for i, record in enumerate(_records(body)):
        if ("image" in record) == ("frames" in record):
            raise WireError(400, f"sample {i}: needs either 'image' or 'frames'")
        media = record["frames"] if "frames" in record else [record["image"]]
        conditions = record.get("conditions", [])
        for texts in (media, conditions):
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise WireError(
                    400,
                    f"sample {i}: images must be base64 strings, 'frames' and 'conditions' lists",
                )
        try:
            files = [[base64.b64decode(t, validate=True) for t in x] for x in (media, conditions)]
        except ValueError as error:
            raise WireError(400, f"sample {i}: no base64: {error}") from error
        packed.append(_Packed(record, *files))
    return packed


def _records(body: bytes) -> list[dict[str, Any]]:
    # Three bytes of JSON, such as "{},", can take a hundred in memory; base64 has none of these.
    if sum(body.count(mark) for mark in b"{[,:") > LARGEST_JSON:
        raise WireError(413, f"the JSON has more than {LARGEST_JSON} values")
    try:
        samples = json.loads(body)["samples"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(400, "expected JSON with a list 'samples'") from error
    if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
        raise WireError(400, "'samples' must be a list of objects")
    known = {"prompt", "negative", "metadata", "image", "frames", "conditions"}
    for i, sample in enumerate(samples):
        if not sample.keys() <= known:
            raise WireError(400, f"sample {i}: unknown keys {sorted(sample.keys() - known)}")
    return samples
