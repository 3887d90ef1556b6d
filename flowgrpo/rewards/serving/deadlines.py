"""A limit on the whole time of an HTTP request.

httpx's timeouts are for each read and each write, so a server that sends a byte a second can hold a
request for ever, in the head of its answer as in the body. Here every connection of a client asks how
much time is left to the request that its thread is making.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpcore
import httpx

T = TypeVar("T")


class _Current(threading.local):
    """The deadline of the request that this thread is making, by ``time.monotonic``."""

    ends: float = float("inf")
    seconds: float = 0.0


_current = _Current()


def limit_requests(client: httpx.Client, seconds: float) -> None:
    """Let every request of a client, from its connection to the end of its answer, take this long at most.

    A request that takes longer raises ``httpx.TimeoutException``.
    """

    def begin(_: httpx.Request) -> None:
        _current.ends, _current.seconds = time.monotonic() + seconds, seconds

    client.event_hooks = {
        "request": [*client.event_hooks["request"], begin],
        "response": client.event_hooks["response"],
    }
    # httpx has no argument for httpcore's network backend.
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            transport._pool._network_backend = _Backend(transport._pool._network_backend)


def _within(
    operation: Callable[[float | None], T],
    timeout: float | None,
    error: type[httpcore.TimeoutException],
) -> T:
    """Do an operation with the time that is left, if that is less than its own timeout."""
    left = _current.ends - time.monotonic()
    if left > 0:
        try:
            return operation(left if timeout is None else min(left, timeout))
        except httpcore.TimeoutException:
            if _current.ends > time.monotonic():
                raise
    raise error(f"the answer took more than {_current.seconds:g} s")


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream):
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return _within(lambda t: self._inner.read(max_bytes, t), timeout, httpcore.ReadTimeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # In pieces: one write of a large body is many writes to the socket, each with the full timeout.
        for start in range(0, len(buffer), PIECE):
            piece = buffer[start : start + PIECE]
            _within(lambda t, p=piece: self._inner.write(p, t), timeout, httpcore.WriteTimeout)  # type: ignore[misc]

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(
            _within(
                lambda t: self._inner.start_tls(ssl_context, server_hostname, t),
                timeout,
                httpcore.ConnectTimeout,
            )
        )

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


PIECE = 64 * 2**10
"""Bytes that are written at once."""


class _Backend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend):
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(
            _within(
                lambda t: self._inner.connect_tcp(host, port, t, local_address, socket_options),
                timeout,
                httpcore.ConnectTimeout,
            )
        )

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(
            _within(
                lambda t: self._inner.connect_unix_socket(path, t, socket_options),
                timeout,
                httpcore.ConnectTimeout,
            )
        )

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)
