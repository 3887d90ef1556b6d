"""A vision-language model as a judge, behind an OpenAI-compatible endpoint.

This is the only file of the benchmarks that knows the chat client of the rewards.
"""

import contextlib
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from flowgrpo.bench.base import BenchError
from flowgrpo.core.imports import import_path

T = TypeVar("T")
CHAT = "reward_models._chat:Chat"
JPEG_QUALITY = 95
LOOK = 5.0
"""Seconds to wait for a server that is asked what it is."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible endpoint.

    Attributes:
        model: As the server calls it.
        url: One or several equal servers, such as ``http://127.0.0.1:8000/v1``.
        key_env: Environment variable with the key; empty for none.
        concurrency: Requests in flight at each server.
        timeout: Seconds that one attempt may take.
        patience: Seconds over which a request is tried again before it fails.
        cache: Folder for answers, keyed by request; empty for no cache.
        extra: More keys of the request, such as ``temperature``.
    """

    model: str
    url: str | Sequence[str]
    key_env: str = ""
    concurrency: int = 32
    timeout: float = 180.0
    patience: float = 300.0
    cache: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def urls(self) -> list[str]:
        """The servers."""
        return [self.url] if isinstance(self.url, str) else list(self.url)


class ChatModel:
    """Asks a server about pictures; safe to call from many threads."""

    def __init__(self, server: Server):
        """
        Raises:
            BenchError: If the key is missing or refused, or the server does not have the model.
        """
        self.server = server
        try:
            self._chat = import_path(CHAT)(
                server.model,
                server.url,
                server.key_env,
                server.timeout,
                server.patience,
                server.concurrency,
                server.cache,
                server.extra,
            )
        except ValueError as error:
            raise BenchError(f"the judge cannot be used: {error}") from error

    def ask(
        self, content: list[str | bytes], parse: Callable[[str], T | None], max_tokens: int
    ) -> T | None:
        """The parsed answer to one question; None if it cannot be parsed.

        Raises:
            RuntimeError: If the server does not answer; says why.
        """
        (found,) = self._chat.ask_all([content], lambda a: parse(a.text), max_tokens=max_tokens)
        return found

    def first_token(self, content: list[str | bytes]) -> Mapping[str, float] | None:
        """Probabilities of the 20 most likely first tokens; None if the server gives none.

        Raises:
            RuntimeError: If the server does not answer; says why.
        """
        (found,) = self._chat.ask_all(
            [content], lambda a: dict(a.first) or None, max_tokens=1, first=True
        )
        return found

    def version(self) -> str:
        """The model that the servers run under that name, and their version; empty if unknown."""
        found = {_look(url, self.server) for url in self.server.urls} - {""}
        return "; ".join(sorted(found))


def _look(url: str, server: Server) -> str:
    """Name, path and version of the model at one server; empty if it does not answer."""
    try:
        listed = json.loads(_get(f"{url.rstrip('/')}/models", server.key_env))["data"]
        (model,) = [m for m in listed if m["id"] == server.model]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    parts = [str(model["id"]), *(str(model[k]) for k in ("root", "version") if model.get(k))]
    parts = list(dict.fromkeys(parts))
    # vLLM answers with its version at /version, outside of /v1.
    place = urlsplit(url)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        parts.append(
            "vllm " + json.loads(_get(f"{place.scheme}://{place.netloc}/version", ""))["version"]
        )
    return " ".join(parts)


def _get(url: str, key_env: str) -> bytes:
    key = os.environ.get(key_env, "") if key_env else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    local = (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=LOOK) as response:
        return bytes(response.read(2**20))


def picture_bytes(path: Path, form: Literal["file", "jpeg"]) -> bytes:
    """An image as the judge gets it: the PNG file itself, or RGB as JPEG of quality 95.

    Raises:
        BenchError: If it cannot be read.
    """
    from PIL import Image

    from flowgrpo.data.pictures import as_rgb

    try:
        if form == "file" and path.suffix.lower() == ".png":
            return path.read_bytes()
        buffer = io.BytesIO()
        with Image.open(path) as image:
            rgb = as_rgb(image)
        rgb.save(buffer, "PNG") if form == "file" else rgb.save(
            buffer, "JPEG", quality=JPEG_QUALITY
        )
        return buffer.getvalue()
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
