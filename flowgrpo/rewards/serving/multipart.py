"""Bodies of several parts, as forms with files are sent (RFC 7578). Parts are taken as bytes."""

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One field.

    Attributes:
        name: Of the field.
        kind: Content type.
        content: As it is.
    """

    name: str
    kind: str
    content: bytes


def join(parts: Sequence[Part]) -> tuple[str, bytes]:
    """The content type and the body that hold the parts."""
    boundary = secrets.token_hex(24)
    pieces = [piece for part in parts for piece in (_head(part, boundary), part.content, b"\r\n")]
    body = b"".join([*pieces, f"--{boundary}--\r\n".encode()])
    return f"multipart/form-data; boundary={boundary}", body


def split(content_type: str, body: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each part.

    Raises:
        ValueError: If the body is cut off or has another form.
    """
    match = re.search(r'boundary="?([^";,\s]{1,70})"?', content_type)
    if match is None:
        raise ValueError("multipart/form-data without a boundary")
    pieces = (b"\r\n" + body).split(b"\r\n--" + match[1].encode())
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ValueError("the multipart body does not end with its boundary")
    for piece in pieces[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head)
        if name is None:
            raise ValueError("a part of the multipart body has no name")
        yield name[1].decode(errors="replace"), content


def _head(part: Part, boundary: str) -> bytes:
    # Some servers take a part for a file only if it has a file name.
    file = '; filename="image.png"' if part.kind.startswith("image/") else ""
    place = f'Content-Disposition: form-data; name="{part.name}"{file}'
    return f"--{boundary}\r\n{place}\r\nContent-Type: {part.kind}\r\n\r\n".encode()
