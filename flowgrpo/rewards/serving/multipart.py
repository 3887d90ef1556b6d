"""Forms with files, ``multipart/form-data`` (RFC 7578): written by httpx, read by python-multipart.

Both work on bytes in memory, whose size the server limits before it reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One field of a form.

    Attributes:
        name: Name of the field.
        kind: Content type.
        content: Bytes of the field.
    """

    name: str
    kind: str
    content: bytes


def join(parts: Sequence[Part]) -> tuple[str, bytes]:
    """Encode a form; returns its content type and its body.

    Images get a file name, because some servers accept a field as a file only with one.
    """
    from httpx import Request

    files = [
        (p.name, ("image.png" if p.kind.startswith("image/") else None, p.content, p.kind))
        for p in parts
    ]
    request = Request("POST", "http://localhost", files=files)
    return request.headers["Content-Type"], request.read()


class TooManyParts(ValueError):
    """A form with more fields than allowed."""


def split(content_type: str, body: bytes, most: int = 4096) -> list[tuple[str, bytes]]:
    """Decode a form; returns name and content of each field, in order.

    Args:
        content_type: The request's.
        body: The whole body.
        most: The largest number of fields.

    Raises:
        TooManyParts: If there are more fields.
        ValueError: If the body is cut off or is not a form.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise ValueError("multipart/form-data without a boundary")
    reader = _Reader(most)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise ValueError(f"the multipart body is malformed: {error}") from error
    if not reader.ended:  # python-multipart takes a body that was cut off for a whole one
        raise ValueError("the multipart body does not end with its boundary")
    return reader.fields


class _Reader:
    """Collects the fields that python-multipart finds."""

    def __init__(self, most: int) -> None:
        self.fields: list[tuple[str, bytes]] = []
        self.ended = False
        self._most = most
        self._key, self._value, self._disposition = b"", b"", b""
        # Contents that look like a boundary arrive in pieces of a byte: a list of them would take
        # many times the memory.
        self._content = bytearray()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        if len(self.fields) >= self._most:
            raise TooManyParts(f"the form has more than {self._most} fields")
        self._content, self._disposition = bytearray(), b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._key.lower() == b"content-disposition":
            self._disposition = self._value
        self._key, self._value = b"", b""

    def _end(self) -> None:
        from python_multipart.multipart import parse_options_header

        name = parse_options_header(self._disposition)[1].get(b"name")
        if name is None:
            raise ValueError("a field of the multipart body has no name")
        self.fields.append((name.decode(errors="replace"), bytes(self._content)))
        self._content = bytearray()

    def _finish(self) -> None:
        self.ended = True
