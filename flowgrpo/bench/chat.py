"""A vision-language model as a judge, behind an OpenAI-compatible endpoint.

Servers are chosen, retried and rested by :class:`~flowgrpo.rewards.serving.client.Endpoints`. The
``openai`` client that the rewards use takes 1.4 ms more per call, which would limit 32 requests in
flight to half of what a fast server answers. Each thread has an httpx client with a connection of its
own, because a shared pool looks at all of its connections for every request, which takes longer than
the rest of the call.
"""

import base64
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable
from urllib.parse import urlsplit

from flowgrpo.bench.base import BenchError
from flowgrpo.bench.files import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")
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


@runtime_checkable
class JudgeSettings(Protocol):
    """The settings of a benchmark whose judge is behind an endpoint; the names that all share."""

    @property
    def judge_model(self) -> str:
        """The judge, as its server calls it."""
        ...

    @property
    def judge_url(self) -> str | Sequence[str]:
        """One or several equal servers."""
        ...

    @property
    def judge_key_env(self) -> str:
        """Environment variable with the key; empty for none."""
        ...

    @property
    def concurrency(self) -> int:
        """Requests in flight at each server."""
        ...

    @property
    def timeout(self) -> float:
        """Seconds that one attempt may take."""
        ...

    @property
    def patience(self) -> float:
        """Seconds over which a request is tried again."""
        ...

    @property
    def extra(self) -> Mapping[str, Any]:
        """More keys of each request."""
        ...


class ChatModel:
    """Asks servers about pictures; safe to call from many threads.

    Attributes:
        server: The settings.
    """

    def __init__(self, server: Server):
        """
        Raises:
            BenchError: If the key is missing or refused, or a server does not have the model.
        """
        from flowgrpo.rewards.serving.client import Endpoints

        headers = {}
        if server.key_env:
            key = os.environ.get(server.key_env, "")
            if not key:
                raise BenchError(
                    f"the environment variable {server.key_env!r} has no key for the judge"
                )
            headers["Authorization"] = f"Bearer {key}"
        self.server, self._headers, self._own = server, headers, threading.local()
        try:
            self._endpoints = Endpoints(
                server.url,
                headers=headers,
                timeout=server.timeout,
                patience=server.patience,
                concurrency=server.concurrency,
            )
        except ValueError as error:
            raise BenchError(f"the judge's URL or settings are wrong: {error}") from error
        # Asked once, without retries.
        quick: dict[str, Any] = {"timeout": LOOK, "patience": 0.0}
        self._models = {u: Endpoints(u, headers=headers, **quick) for u in server.urls}
        roots = {u: f"{urlsplit(u).scheme}://{urlsplit(u).netloc}" for u in server.urls}
        self._roots = {u: Endpoints(root, **quick) for u, root in roots.items()}
        for url in server.urls:
            self._check(url)

    @classmethod
    def of(cls, settings: JudgeSettings, cache: str = "") -> "ChatModel":
        """The judge of a benchmark.

        Args:
            settings: The benchmark.
            cache: Folder for answers; empty for no cache.

        Raises:
            BenchError: If the key is missing or refused, or a server does not have the model.
        """
        return cls(
            Server(
                model=settings.judge_model,
                url=settings.judge_url,
                key_env=settings.judge_key_env,
                concurrency=settings.concurrency,
                timeout=settings.timeout,
                patience=settings.patience,
                cache=cache,
                extra=settings.extra,
            )
        )

    @property
    def concurrency(self) -> int:
        """Requests in flight at all servers together."""
        return self.server.concurrency * len(self.server.urls)

    def ask(
        self,
        content: Sequence[str | bytes],
        parse: Callable[[str], T | None],
        max_tokens: int,
        system: str = "",
    ) -> T | None:
        """The parsed answer to one question; None if it cannot be parsed.

        Args:
            content: Texts, and images as PNG or JPEG, in the order in which the model reads them.
            parse: Returns None for an answer that cannot be used.
            max_tokens: Longest answer.
            system: The system message; empty for none.

        Raises:
            RuntimeError: If the server refuses the question.
            ConnectionError: If no server answers.
        """

        def read(choice: Mapping[str, Any]) -> T | None:
            return parse(choice["message"].get("content") or "")

        return self._ask({"max_completion_tokens": max_tokens}, content, read, system)

    def first_token(self, content: Sequence[str | bytes]) -> Mapping[str, float] | None:
        """Probabilities of the 20 most likely first tokens; None if the server gives none.

        Raises:
            RuntimeError: If the server refuses the question.
            ConnectionError: If no server answers.
        """

        def read(choice: Mapping[str, Any]) -> Mapping[str, float] | None:
            shares: dict[str, float] = {}
            for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
                shares[entry["token"]] = shares.get(entry["token"], 0.0) + math.exp(
                    entry["logprob"]
                )
            return shares or None

        keys = {"max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return self._ask(keys, content, read)

    def _ask(
        self,
        keys: Mapping[str, Any],
        content: Sequence[str | bytes],
        read: Callable[[Mapping[str, Any]], T | None],
        system: str = "",
    ) -> T | None:
        from flowgrpo.rewards.serving.client import Refused

        messages = [{"role": "system", "content": system}] if system else []
        request = {
            "model": self.server.model,
            "messages": [*messages, {"role": "user", "content": [_part(c) for c in content]}],
            "temperature": 0,
            **keys,
            **self.server.extra,
        }
        body = json.dumps(request, sort_keys=True).encode()
        place = self._place(body)
        if place is not None and place.is_file():
            found = _first_choice(place.read_bytes(), read)
            if found is not None:
                return found
        try:
            raw = self._endpoints.call(lambda url: self._send(url, body))
        except Refused as error:
            raise RuntimeError(f"the judge refuses the question: {error}") from error
        found = _first_choice(raw, read)
        if found is not None and place is not None:
            write_atomically(place, raw)
        return found

    def _send(self, url: str, body: bytes) -> bytes:
        """One attempt at a server, over this thread's own connection."""
        import httpx

        from flowgrpo.rewards.serving.client import Unavailable, checked_answer, make_client

        clients = self._own.__dict__.setdefault("clients", {})
        if url not in clients:
            client = make_client(url, self._headers, self.server.timeout, 1)
            client.headers["Content-Type"] = "application/json"
            # The address is parsed once.
            clients[url] = client, httpx.URL(f"{url}/chat/completions")
        client, address = clients[url]
        try:
            return checked_answer(client.post(address, content=body))
        except httpx.HTTPError as error:
            raise Unavailable(str(error) or type(error).__name__) from error

    def _place(self, body: bytes) -> Path | None:
        """The file of the answer to a request, which holds all that decides the answer."""
        name = hashlib.sha256(body).hexdigest()
        return (
            Path(self.server.cache) / name[:2] / f"{name[2:]}.json" if self.server.cache else None
        )

    def _check(self, url: str) -> None:
        """Find a wrong key or model name now. A server that is away is asked when it is needed."""
        from flowgrpo.rewards.serving.client import Refused

        try:
            names = [m["id"] for m in json.loads(self._models[url].request("/models"))["data"]]
        except Refused as error:
            if error.status in (401, 403):
                raise BenchError(f"the judge refuses the key: {error}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s does not list its models: %s", url, error)
        else:
            if self.server.model not in names:
                raise BenchError(f"{url} has no model {self.server.model!r}; it has {names[:20]}")

    def version(self) -> str:
        """The model that the servers run under that name, and their version; empty if unknown."""
        found = {self._version(url) for url in self.server.urls} - {""}
        return "; ".join(sorted(found))

    def _version(self, url: str) -> str:
        """Name, path and version of the model at one server; empty if it does not answer."""
        from flowgrpo.rewards.serving.client import Refused

        try:
            listed = json.loads(self._models[url].request("/models"))["data"]
            (model,) = [m for m in listed if m["id"] == self.server.model]
        except (OSError, ValueError, KeyError, TypeError, Refused):
            return ""
        parts = [str(model[k]) for k in ("id", "root", "version") if model.get(k)]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, Refused):
            # vLLM answers with its version at /version, outside of /v1.
            parts.append(f"vllm {json.loads(self._roots[url].request('/version'))['version']}")
        return " ".join(dict.fromkeys(parts))


def _first_choice(raw: bytes, read: Callable[[Mapping[str, Any]], T | None]) -> T | None:
    """``read`` of the first choice of a response; None if it is no chat completion."""
    try:
        return read(json.loads(raw)["choices"][0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return None


def _part(content: str | bytes) -> dict[str, Any]:
    """A text or an image as a part of a message."""
    if isinstance(content, str):
        return {"type": "text", "text": content}
    kind = "jpeg" if content.startswith(b"\xff\xd8") else "png"
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def picture_bytes(path: Path, form: Literal["file", "jpeg"]) -> bytes:
    """An image as the judge gets it: the PNG file itself, or RGB as JPEG of quality 95.

    Raises:
        BenchError: If it cannot be read.
    """
    from PIL import Image

    from flowgrpo.data.pictures import UNREADABLE, as_rgb

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
    except UNREADABLE as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
