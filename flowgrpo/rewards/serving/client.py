"""HTTP client for one or several equal servers: load balancing, retries, back-off, timeouts.

Built on httpx: one client with a pool of connections per server, HTTP/1.1 only. Redirects are not
followed, because they would send the token to another host. Environment proxies (``HTTPS_PROXY``,
``NO_PROXY``) apply to other machines and not to this one.

The back-off is ours and not tenacity's: a pause belongs to a server and is shared by all requests,
which meanwhile go to the other servers, whereas tenacity keeps it per call.
"""

import contextlib
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar
from urllib.parse import urlsplit

from flowgrpo.rewards.serving.protocol import unpack_error

try:
    import httpx

    from flowgrpo.rewards.serving.deadlines import limit_requests
except ModuleNotFoundError as error:
    raise ImportError(
        "rewards behind a server need httpx: pip install 'flowgrpo[remote]'"
    ) from error

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request can succeed later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds that a server is left alone after its first failure, doubling up to the longest pause."""
LARGEST_ANSWER = 64 * 2**20
"""Bytes of the largest answer that is read."""
KEPT_SECONDS = 15.0
"""How long an idle connection is kept. Reward servers keep it longer, so that they do not close it
while a request is on its way."""


class Refused(Exception):
    """A server refused a request and would refuse it again.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Unavailable(Exception):
    """A server did not answer, or asked for a later attempt.

    Attributes:
        retry_after: Seconds that it asked to wait; None if it did not say.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class _Server:
    """State of one server.

    Attributes:
        url: Without a slash at the end.
        busy: Requests in progress.
        failures: Consecutive failed attempts.
        paused_until: Time, by ``time.monotonic``, before which it gets no request.
        problem: The last failure, for messages.
    """

    url: str
    busy: int = 0
    failures: int = 0
    paused_until: float = 0.0
    problem: str = ""


class Endpoints:
    """Equal servers behind several URLs.

    A request goes to the server with the fewest failures and requests in progress; of equal ones, each
    process of a run (``RANK``) begins with another. After a failure
    a server is paused, 0.25 s at first and doubling to 10 s (or as long as its ``Retry-After``
    says), while the other servers take its requests.

    Attributes:
        clients: The httpx client of each URL.
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
            concurrency: Most requests in progress at one server.

        Raises:
            ValueError: If there is no URL, a URL does not start with ``http(s)://``, or a number is
                out of range.
        """
        urls = [urls] if isinstance(urls, str) else list(urls)
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is not a URL of the form http://host:port")
        if not urls or len(set(urls)) != len(urls):
            raise ValueError(f"give at least one URL, each of them once; got {urls}")
        if timeout <= 0 or patience < 0 or concurrency < 1:
            raise ValueError(
                "timeout must be positive, patience at least 0 and concurrency at least 1, got "
                f"{timeout}, {patience}, {concurrency}"
            )
        self.headers = dict(headers or {})
        self.timeout, self.patience, self.concurrency = timeout, patience, concurrency
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        # Of equally busy servers the first is taken. It is another one for each process of a run, because
        # processes do not see how many requests of the others are in progress.
        first = int(os.environ.get("RANK", "0")) % len(urls)
        self._preferred = self._servers[first:] + self._servers[:first]
        self.clients = {
            url: make_client(url, self.headers, timeout, concurrency) for url in self.urls
        }
        self._changed = threading.Condition()
        self._workers = ThreadPoolExecutor(concurrency * len(urls), thread_name_prefix="endpoints")

    @property
    def urls(self) -> list[str]:
        """The servers' URLs, without a slash at the end."""
        return [s.url for s in self._servers]

    def request(self, path: str, content_type: str = "", body: bytes | None = None) -> bytes:
        """Send a GET, or a POST if there is a body, to one of the servers; returns the answer's body.

        Raises:
            Refused: If a server answers that the request itself is wrong.
            ConnectionError: If no server answered for ``patience`` seconds.
        """
        headers = {"Content-Type": content_type} if content_type else {}

        def send(url: str) -> bytes:
            try:
                response = self.clients[url].request(
                    "GET" if body is None else "POST", url + path, content=body, headers=headers
                )
            except httpx.HTTPError as error:
                raise Unavailable(str(error) or type(error).__name__) from error
            return checked_answer(response)

        return self.call(send)

    def call(self, send: Callable[[str], T]) -> T:
        """Call ``send`` with the URL of a server until one answers.

        Args:
            send: Makes one attempt at the server of that URL. It raises :class:`Unavailable` if
                another attempt can succeed; any other exception ends the call.

        Raises:
            ConnectionError: If no server answered for ``patience`` seconds.
        """
        deadline = time.monotonic() + self.patience
        while True:
            server = self._take(deadline)
            if server is None:
                problems = "; ".join(f"{s.url}: {s.problem or 'busy'}" for s in self._servers)
                raise ConnectionError(f"no answer for {self.patience:g} s ({problems})")
            failure: Unavailable | None = None
            try:
                return send(server.url)
            except Unavailable as error:
                failure = error
            finally:
                self._give_back(server, failure)

    def ask_all(self, number: int, ask: Callable[[int], T]) -> list[T | Exception]:
        """Call ``ask(0), ask(1), ...`` in parallel; an exception is returned in place of a result."""

        def safely(index: int) -> T | Exception:
            try:
                return ask(index)
            except Exception as error:
                return error

        return list(self._workers.map(safely, range(number)))

    def _take(self, deadline: float) -> _Server | None:
        """Wait for a server that is neither paused nor full; None if there is none by the deadline."""
        with self._changed:
            while True:
                now = time.monotonic()
                free = [s for s in self._preferred if s.busy < self.concurrency]
                awake = [s for s in free if s.paused_until <= now]
                if awake:
                    server = min(awake, key=lambda s: (s.failures, s.busy))
                    server.busy += 1
                    return server
                wakes = min((s.paused_until for s in free), default=deadline)
                if now >= deadline or min(s.paused_until for s in self._servers) > deadline:
                    return None
                self._changed.wait(max(0.01, min(wakes, deadline) - now))

    def _give_back(self, server: _Server, failure: Unavailable | None) -> None:
        """Record the result of an attempt and pause the server after a failure."""
        with self._changed:
            server.busy -= 1
            if failure is None:
                if server.failures:
                    log.warning("%s answers again", server.url)
                server.failures, server.problem = 0, ""
            else:
                if not server.failures:
                    log.warning("%s does not answer (%s); trying again", server.url, failure)
                # Jitter, so that clients that failed together do not all return at once.
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(server.failures, 10))
                pause *= random.uniform(0.8, 1.2)
                if failure.retry_after is not None:
                    pause = failure.retry_after
                server.paused_until = time.monotonic() + pause
                server.failures, server.problem = server.failures + 1, str(failure)
            self._changed.notify_all()


def make_client(
    url: str, headers: Mapping[str, str], timeout: float, concurrency: int
) -> httpx.Client:
    """An httpx client for one server, whose requests are limited in time and their answers in size."""
    host = urlsplit(url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    client = httpx.Client(
        # Compressed answers could unpack to any size.
        headers={"Accept-Encoding": "identity", **headers},
        timeout=timeout,
        limits=httpx.Limits(
            max_connections=concurrency,
            max_keepalive_connections=concurrency,
            keepalive_expiry=KEPT_SECONDS,
        ),
        http2=False,
        follow_redirects=False,
        trust_env=not local,
        # The system's certificates, so that a private authority that is installed there is trusted.
        verify=_certificates(),
        event_hooks={"response": [_limit_size]},
    )
    limit_requests(client, timeout)
    return client


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes as long as several requests."""
    return ssl.create_default_context()


def checked_answer(response: httpx.Response) -> bytes:
    """The body of an answer.

    Raises:
        Unavailable: If the status says that another attempt can succeed, or a 2xx answer is empty,
            which reward servers never send: its connection was cut.
        Refused: If any other status but 2xx was sent.
    """
    if response.is_success:
        if not response.content:
            raise Unavailable("an empty answer")
        return response.content
    message = f"status {response.status_code}: {unpack_error(response.content)}"
    if response.status_code in RETRIED:
        raise Unavailable(message, retry_after(response.headers))
    raise Refused(response.status_code, f"{response.url}: {message}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a ``Retry-After`` header; None if there is none, or it names a date."""
    text = headers.get("Retry-After", "").strip()
    return float(text) if text.replace(".", "", 1).isdecimal() else None


def _limit_size(response: httpx.Response) -> None:
    """Limit the body that is about to be read."""
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _LimitedStream(response.stream)


class _LimitedStream(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream):
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self.stream:
            size += len(piece)
            if size > LARGEST_ANSWER:
                raise Refused(200, f"an answer of more than {LARGEST_ANSWER} bytes")
            yield piece

    def close(self) -> None:
        with contextlib.suppress(httpx.HTTPError):
            self.stream.close()
