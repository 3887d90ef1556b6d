"""What flowgrpo and its reward servers say to each other: multipart or JSON, images as PNG.

Nothing here can run code of the other side, as pickle would. A request holds samples, in order::

    POST /score   multipart/form-data
        request   {"samples": [{"prompt": "a cat", "metadata": {...}, "frames": 2}, ...]}
        image     a PNG for each sample, or ``frames`` of them for a video

    POST /score   application/json
        {"samples": [{"prompt": "a cat", "image": "<base64>"}, {"prompt": "a dog", "frames": ["<base64>", ...]}]}

The answer is ``{"scores": [0.3, null]}``, ``null`` where scoring failed; every error is
``{"error": "..."}``. By hand, without ``request``: ``curl -F "prompt=a cat" -F image=@cat.png URL/score``.
"""

import base64
import binascii
import io
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowgrpo.experience import Prompt

FORMATS = ("PNG", "JPEG", "WEBP")
"""What a server reads. PNG keeps every 8-bit value; the others are for requests made by hand."""


class WireError(ValueError):
    """A request that cannot be answered.

    Attributes:
        status: The HTTP status that says so.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may hold.

    Attributes:
        num_bytes: Of the whole body.
        num_images: Images, or frames of videos, in all.
        num_pixels: Of one image. It is checked before the image is unpacked.
    """

    num_bytes: int = 256 * 2**20
    num_images: int = 1024
    num_pixels: int = 4096 * 4096


@dataclass(frozen=True)
class Sample:
    """One image ``(3, H, W)`` or video ``(F, 3, H, W)`` in [0, 1], and its prompt."""

    media: Tensor
    prompt: Prompt


def encode_png(image: Float[Tensor, "3 height width"]) -> bytes:
    """An image in [0, 1] as PNG, rounded to 8 bits.

    Raises:
        ValueError: If a value is not finite, which no picture can show.
    """
    if not bool(image.isfinite().all()):
        raise ValueError("an image holds values that are not finite")
    buffer = io.BytesIO()
    # Level 1 is several times faster than the default, and hardly larger.
    eight_bits = (image * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = eight_bits.permute(1, 2, 0).contiguous().cpu().numpy()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(data: bytes, limits: Limits | None = None) -> Float[Tensor, "3 height width"]:
    """An image in [0, 1] from a PNG, JPEG or WebP file.

    Raises:
        WireError: If it is none of these, is damaged or has too many pixels.
    """
    allowed = (limits or Limits()).num_pixels
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > allowed:
                raise WireError(413, f"an image of {width}x{height} exceeds {allowed} pixels")
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
            return pixels.permute(2, 0, 1).to(torch.float32) / 255
    except WireError:
        raise
    except Image.DecompressionBombError as error:
        raise WireError(413, f"an image is too large: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise WireError(
            400, f"no readable image ({', '.join(FORMATS)}), {len(data)} bytes"
        ) from error


def pack(
    media: Float[Tensor, "batch *frames channels height width"], prompts: Sequence[Prompt]
) -> tuple[str, bytes]:
    """A multipart request: its content type and its body.

    Raises:
        ValueError: If pixels are not finite, or metadata is no JSON.
    """
    records = [_record(p) for p in prompts]
    images: list[bytes] = []
    for record, item in zip(records, media, strict=True):
        frames = item if item.ndim == 4 else item[None]
        if item.ndim == 4:
            record["frames"] = len(frames)
        images += [encode_png(f) for f in frames]
    boundary = secrets.token_hex(24)
    parts = [_part(boundary, "request", "application/json", _json({"samples": records}))]
    parts += [_part(boundary, "image", "image/png", image) for image in images]
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return f"multipart/form-data; boundary={boundary}", body


def unpack(content_type: str, body: bytes, limits: Limits) -> list[Sample]:
    """The samples of a request, multipart or JSON.

    Raises:
        WireError: If it is neither, is malformed, or holds more than it may.
    """
    kind = content_type.split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        records, blobs = _from_multipart(content_type, body)
    elif kind == "application/json":
        records, blobs = _from_json(body)
    else:
        raise WireError(
            415, f"content type {kind or 'none'!r}: send multipart/form-data or application/json"
        )
    if not records:
        raise WireError(400, "no samples")
    number = sum(len(b) for b in blobs)
    if number > limits.num_images:
        raise WireError(413, f"{number} images exceed the {limits.num_images} of one request")
    return [
        Sample(_media(record, blob, i, limits), _prompt(record, i))
        for i, (record, blob) in enumerate(zip(records, blobs, strict=True))
    ]


def pack_scores(scores: Sequence[float]) -> bytes:
    """An answer; scores that are not finite are ``null``."""
    return _json({"scores": [s if math.isfinite(s) else None for s in scores]})


def unpack_scores(body: bytes, number: int) -> list[float]:
    """The scores in an answer, NaN for ``null``.

    Raises:
        ValueError: If it is no answer to a request with ``number`` samples.
    """
    try:
        scores = json.loads(body)["scores"]
    except (ValueError, KeyError, TypeError) as error:
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
    """What an error's body says: our own, that of an OpenAI-compatible server, or its beginning."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body[:300].decode(errors="replace").strip()
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def _record(prompt: Prompt) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": prompt.text}
    if prompt.negative is not None:
        record["negative"] = prompt.negative
    if prompt.metadata:
        try:
            record["metadata"] = json.loads(json.dumps(dict(prompt.metadata), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata of prompt {prompt.text!r} is no JSON: {error}") from error
    return record


def _prompt(record: Mapping[str, Any], index: int) -> Prompt:
    text, negative = record.get("prompt", ""), record.get("negative")
    metadata = record.get("metadata", {})
    kinds = isinstance(text, str) and isinstance(negative, str | None)
    if not kinds or not isinstance(metadata, dict):
        raise WireError(
            400, f"sample {index}: prompt and negative must be strings and metadata an object"
        )
    return Prompt(text, negative, metadata)


def _media(record: Mapping[str, Any], blobs: Sequence[bytes], index: int, limits: Limits) -> Tensor:
    try:
        images = [decode_image(b, limits) for b in blobs]
    except WireError as error:
        raise WireError(error.status, f"sample {index}: {error}") from error
    if "frames" not in record:
        return images[0]
    if len({i.shape for i in images}) != 1:
        raise WireError(400, f"sample {index}: needs at least one frame, and all of one size")
    return torch.stack(images)


def _part(boundary: str, name: str, kind: str, content: bytes) -> bytes:
    # Some servers take a part for a file only if it has a file name.
    file = '; filename="image.png"' if kind.startswith("image/") else ""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: {kind}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def _from_multipart(
    content_type: str, body: bytes
) -> tuple[list[dict[str, Any]], list[list[bytes]]]:
    match = re.search(r'boundary="?([^";,\s]{1,70})"?', content_type)
    if match is None:
        raise WireError(400, "multipart/form-data without a boundary")
    fields: dict[str, list[bytes]] = {"request": [], "prompt": [], "image": []}
    for name, content in _parts(body, match[1].encode()):
        if name not in fields:
            raise WireError(400, f"unknown field {name!r} (known: {', '.join(fields)})")
        fields[name].append(content)
    images, requests = fields["image"], fields["request"]
    if len(requests) == 1 and not fields["prompt"]:
        records = _records(requests[0])
    elif not requests:
        records = [{"prompt": p.decode(errors="replace")} for p in fields["prompt"]]
    else:
        raise WireError(400, "give one field 'request', or fields 'prompt'")
    sizes = [r.get("frames", 1) for r in records]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise WireError(400, "'frames' must be the number of images that a video consists of")
    if sum(sizes) != len(images):
        raise WireError(400, f"{len(images)} images for samples that need {sum(sizes)}")
    rest = iter(images)
    return records, [[next(rest) for _ in range(n)] for n in sizes]


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each part."""
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise WireError(400, "the multipart body does not end with its boundary")
    for piece in pieces[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head)
        if name is None:
            raise WireError(400, "a part of the multipart body has no name")
        yield name[1].decode(errors="replace"), content


def _from_json(body: bytes) -> tuple[list[dict[str, Any]], list[list[bytes]]]:
    records = _records(body)
    blobs = []
    for i, record in enumerate(records):
        if ("image" in record) == ("frames" in record):
            raise WireError(400, f"sample {i}: needs either 'image' or 'frames'")
        texts = record["frames"] if "frames" in record else [record["image"]]
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise WireError(400, f"sample {i}: images must be base64 strings, 'frames' a list")
        try:
            blobs.append([base64.b64decode(t, validate=True) for t in texts])
        except binascii.Error as error:
            raise WireError(400, f"sample {i}: no base64: {error}") from error
    return records, blobs


def _records(body: bytes) -> list[dict[str, Any]]:
    try:
        samples = json.loads(body)["samples"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(400, "expected JSON with a list 'samples'") from error
    if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
        raise WireError(400, "'samples' must be a list of objects")
    known = {"prompt", "negative", "metadata", "image", "frames"}
    for i, sample in enumerate(samples):
        if not sample.keys() <= known:
            raise WireError(400, f"sample {i}: unknown keys {sorted(sample.keys() - known)}")
    return samples
