"""HTTP servers that may be slow, busy or about to restart: shared work, retries, back-off.

The standard library's client, so that rewards need no web framework. Redirects are not followed:
they would carry the token to strangers.
"""

import http.client
import logging
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from typing import TypeVar

from flowgrpo.rewards.serving.protocol import unpack_error

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer later."""
LONGEST_REST = 10.0
LARGEST_ANSWER = 64 * 2**20


class Refused(Exception):
    """A server answered that it will not, and would say so again.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class _Server:
    url: str
    busy: int = 0
    failures: int = 0
    rests_until: float = 0.0
    problem: str = field(default="")


class Endpoints:
    """Equal servers behind several URLs.

    A request goes to the server that has least to do. One that fails rests, longer each time (0.25 s
    doubling to 10 s, or what its ``Retry-After`` says), while the others go on.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        patience: float = 300.0,
        concurrency: int = 4,
    ):
        """
        Args:
            urls: One or several, such as ``http://127.0.0.1:8500``.
            headers: Sent with each request.
            timeout: Seconds that one attempt may take.
            patience: Seconds over which a request is tried again before it fails.
            concurrency: Requests under way at one server.

        Raises:
            ValueError: If there is no URL, one is no ``http(s)://`` URL, or a number is out of range.
        """
        urls = [urls] if isinstance(urls, str) else list(urls)
        for url in urls:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no URL of the form http://host:port")
        if not urls or len(set(urls)) != len(urls):
            raise ValueError(f"at least one URL, each of them once; got {urls}")
        if timeout <= 0 or patience < 0 or concurrency < 1:
            raise ValueError(
                "timeout must be positive, patience at least 0 and concurrency at least 1, got "
                f"{timeout}, {patience}, {concurrency}"
            )
        self.headers = dict(headers or {})
        self.timeout, self.patience, self.concurrency = timeout, patience, concurrency
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._free = threading.Condition()
        self._workers = ThreadPoolExecutor(concurrency * len(urls), thread_name_prefix="endpoints")

    @property
    def urls(self) -> list[str]:
        """The servers."""
        return [s.url for s in self._servers]

    def request(self, path: str, content_type: str = "", body: bytes | None = None) -> bytes:
        """GET, or POST if there is a body; the answer's body.

        Raises:
            Refused: If a server says that the request itself is at fault.
            ConnectionError: If no server answered for ``patience`` seconds.
        """
        deadline = time.monotonic() + self.patience
        while True:
            server = self._take(deadline)
            if server is None:
                problems = "; ".join(f"{s.url}: {s.problem or 'busy'}" for s in self._servers)
                raise ConnectionError(f"no answer for {self.patience:g} s ({problems})")
            problem, pause = "", None
            try:
                status, after, answer = self._once(server.url + path, content_type, body)
                if 200 <= status < 300:
                    return answer
                message = f"status {status}: {unpack_error(answer)}"
                if status not in RETRIED:
                    raise Refused(status, f"{server.url}{path}: {message}")
                problem, pause = message, after
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            finally:
                self._give_back(server, problem, pause)

    def ask_all(self, number: int, ask: Callable[[int], T]) -> list[T | Exception]:
        """``ask(0), ask(1), ...``, as many at a time as the servers may have; errors as values."""

        def safely(index: int) -> T | Exception:
            try:
                return ask(index)
            except Exception as error:
                return error

        return list(self._workers.map(safely, range(number)))

    def ready(self) -> Iterable[str]:
        """The URLs that are not resting."""
        now = time.monotonic()
        return [s.url for s in self._servers if s.rests_until <= now]

    def _take(self, deadline: float) -> _Server | None:
        """The server with least to do, as soon as there is one; none after the deadline."""
        with self._free:
            while True:
                now = time.monotonic()
                free = [s for s in self._servers if s.busy < self.concurrency]
                awake = [s for s in free if s.rests_until <= now]
                if awake:
                    server = min(awake, key=lambda s: (s.failures, s.busy))
                    server.busy += 1
                    return server
                wakes = min((s.rests_until for s in free), default=deadline)
                if now >= deadline or min(s.rests_until for s in self._servers) > deadline:
                    return None
                self._free.wait(max(0.01, min(wakes, deadline) - now))

    def _give_back(self, server: _Server, problem: str, pause: float | None) -> None:
        with self._free:
            server.busy -= 1
            if not problem:
                if server.failures:
                    log.warning("%s answers again", server.url)
                server.failures, server.problem = 0, ""
            else:
                if not server.failures:
                    log.warning("%s does not answer (%s); trying again", server.url, problem)
                # Clients that failed together should not come back together.
                jitter = random.uniform(0.8, 1.2)
                rest = min(LONGEST_REST, 0.25 * 2 ** min(server.failures, 10)) * jitter
                server.rests_until = time.monotonic() + (rest if pause is None else pause)
                server.failures, server.problem = server.failures + 1, problem
            self._free.notify_all()

    def _once(
        self, url: str, content_type: str, body: bytes | None
    ) -> tuple[int, float | None, bytes]:
        """Status, seconds to wait if it says so, and body of one attempt."""
        headers = self.headers | ({"Content-Type": content_type} if content_type else {})
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with _opener(url).open(request, timeout=self.timeout) as response:
                answer = _limited(response)
                if not answer:  # cut off in its head, perhaps: no answer of ours is empty
                    raise http.client.IncompleteRead(answer)
                return response.status, None, answer
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _retry_after(error.headers), _limited(error)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """A client that reaches this machine directly, whatever proxy the environment names."""
    host = urllib.parse.urlsplit(url).hostname or ""
    here = host in ("localhost", "::1") or host.startswith("127.")
    proxies = urllib.request.ProxyHandler({} if here else None)
    return urllib.request.build_opener(proxies, _NoRedirects())


def _limited(response: "http.client.HTTPResponse | urllib.error.HTTPError") -> bytes:
    body = response.read(LARGEST_ANSWER + 1)
    # Asked for a number of bytes, the library takes an answer that was cut off for a whole one.
    promised = response.headers.get("Content-Length", "")
    if promised.isdigit() and len(body) < min(int(promised), LARGEST_ANSWER + 1):
        raise http.client.IncompleteRead(body, int(promised) - len(body))
    if len(body) > LARGEST_ANSWER:
        raise Refused(200, f"an answer of more than {LARGEST_ANSWER} bytes")
    return body


def _retry_after(headers: Message) -> float | None:
    """Seconds, if the server names them; dates are rare and left to the usual back-off."""
    text = headers.get("Retry-After", "").strip()
    return float(text) if text.replace(".", "", 1).isdigit() else None
