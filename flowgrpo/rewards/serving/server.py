"""The HTTP server of one reward model, on FastAPI and uvicorn.

``POST /score`` scores media (:mod:`flowgrpo.rewards.serving.protocol` defines the format), ``POST
/check`` tells whether prompts have what the reward needs, ``GET /healthz`` reports counts and
limits.

FastAPI routes requests; uvicorn speaks HTTP, keeps connections open and drains them on shutdown;
python-multipart reads forms. This module adds what they do not guarantee: the token, the size and
the origin of a request are checked before its body is read, a client that stalls or sends too slowly
is disconnected, the number of connections and the memory of all requests are limited, and the server
stops within a given time.
"""

import asyncio
import hmac
import ipaddress
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from flowgrpo import __version__
from flowgrpo.rewards.protocols import RewardModel
from flowgrpo.rewards.serving.batching import Batcher, Overloaded
from flowgrpo.rewards.serving.memory import Reserve, Share
from flowgrpo.rewards.serving.protocol import (
    Limits,
    WireError,
    pack_error,
    pack_problem,
    pack_scores,
    unpack,
    unpack_prompts,
)

try:
    import python_multipart  # noqa: F401  (protocol.unpack needs it)
    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ModuleNotFoundError as error:
    raise ImportError(
        "serving a reward needs FastAPI, uvicorn and python-multipart: pip install 'flowgrpo[serve]'"
    ) from error

log = logging.getLogger(__name__)

PATHS = "the server has GET /healthz, POST /score and POST /check"
SILENT_SECONDS = 60.0
"""How long a client may send nothing in the middle of a request, or keep an idle connection."""
BODY_SECONDS = 300.0
"""How long a client may take to send the whole body of a request."""
DISCARDED_BYTES = 2**24
"""Bytes of a refused body that are still read, so that its sender gets to read the answer."""


class RewardServer:
    """Serves a reward model from a background thread. Use as a context manager, or call :meth:`close`.

    Attributes:
        url: Address for clients on this machine.
        batcher: Calls the model.
    """

    def __init__(
        self,
        reward: RewardModel,
        *,
        name: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        limits: Limits | None = None,
        max_batch: int = 64,
        wait: float = 0.01,
        drain: float = 30.0,
    ):
        """Listen and start serving.

        Args:
            reward: The model.
            name: Its name in ``/healthz``.
            host: Address to listen on. Any other than loopback requires a token.
            port: 0 takes a free port.
            token: Token that requests must bear; without one, every user of this machine has
                access.
            limits: How much requests may hold, one and all together.
            max_batch: Most samples in one call of the model.
            wait: Seconds to wait for more requests after the first one.
            drain: Seconds in which requests in progress are answered when the server is closed.

        Raises:
            ValueError: If a number is out of range, or if other machines can reach the address and there is no token.
            OSError: If the address is in use or does not belong to this machine.
        """
        if not token and not _is_loopback(host):
            raise ValueError(
                f"host {host!r} is open to other machines: give a token (--token or FLOWGRPO_TOKEN), "
                "or listen on 127.0.0.1"
            )
        self.token, self.limits, self.drain = token, limits or Limits(), drain
        if min(vars(self.limits).values()) < 1 or drain < 0:
            raise ValueError(
                f"limits must be at least 1 and drain at least 0, got {self.limits}, {drain}"
            )
        self.memory = Reserve(self.limits.num_reserved)
        self.name = name or getattr(reward, "__name__", type(reward).__name__)
        six = ":" in host
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if six else socket.AF_INET, backlog=128
        )
        # asyncio does this for its own sockets only. Without it, the two writes of an answer on a
        # connection that is kept open take 40 ms (Nagle's algorithm with delayed acknowledgements).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.batcher = Batcher(reward, max_batch=max_batch, wait=wait)
        self.url = f"http://{f'[{host}]' if six else host}:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(_settings(self))
        # Connections queue in the listening socket until the thread accepts them.
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="reward-server", daemon=True
        )
        self._thread.start()

    def health(self) -> dict[str, Any]:
        """The answer of ``/healthz`` to clients with the token; others get the status only."""
        return {
            "status": "ok",
            "reward": self.name,
            "version": __version__,
            "scored": self.batcher.num_scored,
            "failed": self.batcher.num_failed,
            "waiting": self.batcher.num_waiting,
            "calls": self.batcher.num_calls,
            "limits": vars(self.limits),
        }

    def close(self) -> bool:
        """Accept no more requests, answer those in progress for up to ``drain`` seconds, and stop.

        Returns:
            Whether all were answered. If not, their connections are closed; the model may still be
            busy, in a thread that does not keep the process alive.
        """
        ends = time.monotonic() + self.drain
        self._server.should_exit = True
        # uvicorn ends requests after the same time, and needs a moment to close the connections.
        self._thread.join(self.drain + 2.0)
        answered = self.batcher.close(max(0.5, ends - time.monotonic()))
        return answered and not self._thread.is_alive()

    def __enter__(self) -> "RewardServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _settings(server: RewardServer) -> uvicorn.Config:
    class Protocol(_Protocol):
        max_connections = server.limits.num_connections

    return uvicorn.Config(
        make_app(server),
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        headers=[("Server", f"flowgrpo/{__version__}")],
        timeout_keep_alive=int(SILENT_SECONDS),
        timeout_graceful_shutdown=math.ceil(server.drain),
    )


@dataclass
class _Received:
    """The body of a request, and the memory that it has reserved."""

    body: bytes
    share: Share


def make_app(server: RewardServer) -> FastAPI:
    """The FastAPI application of a server, without the pages that document it."""
    # A redirect to a path without its slash would name the host that the request claims.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    async def received(request: Request) -> AsyncIterator[_Received]:
        # What is reserved is given back after the answer.
        with Share(server.memory) as share:
            yield _Received(await _read_body(request, server, share), share)

    @app.get("/healthz")
    async def healthz(request: Request) -> JSONResponse:
        if _authorised(request, server.token):
            return JSONResponse(server.health())
        if "Authorization" in request.headers:
            raise WireError(401, "wrong token")
        return JSONResponse({"status": "ok"})

    @app.post("/score")
    async def score(request: Request, sent: Annotated[_Received, Depends(received)]) -> Response:
        kind = request.headers.get("Content-Type", "")
        # Decoding images takes long: in a thread, so that the server keeps answering.
        samples = await run_in_threadpool(unpack, kind, sent.body, server.limits, sent.share.take)
        pending = asyncio.wrap_future(server.batcher.submit(samples))
        # Not awaited itself: a reward that raises SystemExit would end the event loop.
        await asyncio.wait([pending])
        failure = pending.exception()
        if failure is not None:
            # Not status 500: the server works, and the same request would fail again.
            raise WireError(422, f"the reward failed: {type(failure).__name__}: {failure}")
        return _json(200, pack_scores(pending.result()))

    @app.post("/check")
    def check(sent: Annotated[_Received, Depends(received)]) -> Response:
        """Checks look at prompts only, so they do not wait for the model."""
        prompts = unpack_prompts(sent.body, server.limits)
        check = getattr(server.batcher.reward, "check", None)
        problem = ""
        try:
            if check is not None:
                check(prompts)
        except Exception as error:
            problem = str(error) or type(error).__name__
        return _json(200, pack_problem(problem))

    _add_error_handlers(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error as ``{"error": "..."}``."""

    @app.exception_handler(WireError)
    async def refuse(request: Request, error: WireError) -> Response:
        return _refusal(request, error.status, str(error))

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        return _refusal(request, 503, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; {PATHS}"
        return _refusal(request, error.status_code, message, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        # uvicorn logs the traceback.
        return _refusal(request, 500, f"the server failed: {type(error).__name__}: {error}")


async def _read_body(request: Request, server: RewardServer, share: Share) -> bytes:
    """The body of a request that passes all checks, which come before it is read.

    Raises:
        WireError: If the token is wrong, the request comes from a web page or is too large, or the
            client stops sending or takes too long.
        Overloaded: If there is no memory left for it.
    """
    length = request.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else -1
    limit = server.limits.num_bytes
    refusals = [
        (
            not _authorised(request, server.token),
            401,
            "wrong or missing token (Authorization: Bearer ...)",
        ),
        # Only browsers send it: a web page must not reach a server on its reader's machine.
        ("Origin" in request.headers, 403, "requests of web pages are refused"),
        (size < 0, 411, "a request needs a Content-Length"),
        (size > limit, 413, f"{size} bytes exceed the {limit} of one request"),
    ]
    for applies, status, message in refusals:
        if applies:
            # A client that expects "100 Continue" has not sent its body and need not do so.
            if size > 0 and "Expect" not in request.headers:
                await _receive(request, min(size, DISCARDED_BYTES), keep=False)
            raise WireError(status, message)
    share.take(size)
    return await _receive(request, size)


async def _receive(request: Request, size: int, keep: bool = True) -> bytes:
    """Read up to ``size`` bytes of a body, each piece within :data:`SILENT_SECONDS`.

    All of them must come within :data:`BODY_SECONDS`.
    """
    pieces, left = [], size
    stream = request.stream()
    ends = time.monotonic() + BODY_SECONDS
    try:
        while left > 0:
            seconds = min(SILENT_SECONDS, ends - time.monotonic())
            piece = await asyncio.wait_for(anext(stream), seconds)
            left -= len(piece)
            if keep:
                pieces.append(piece)
    except StopAsyncIteration:
        pass
    except TimeoutError as error:
        late = time.monotonic() >= ends
        why = f"not sent within {BODY_SECONDS:g} s" if late else f"no data for {SILENT_SECONDS:g} s"
        raise WireError(408, f"{why}; {left} bytes are missing") from error
    except ClientDisconnect as error:
        raise WireError(400, f"the client left; {left} bytes are missing") from error
    return b"".join(pieces)


def _authorised(request: Request, token: str) -> bool:
    given = request.headers.get("Authorization", "")
    return not token or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def _json(status: int, body: bytes, headers: Any = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def _refusal(request: Request, status: int, message: str, headers: Any = None) -> Response:
    client = request.client.host if request.client else "?"
    log.info("%s: %s %s", client, status, message)
    # The rest of a refused body may still be on its way: it must not be taken for a next request.
    return _json(status, pack_error(message), {**(headers or {}), "Connection": "close"})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Protocol(H11Protocol):
    """Limits the number of connections, and the time until a request's head is complete.

    uvicorn limits the time between two requests, and :func:`_receive` that of a body.
    """

    max_connections: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.max_connections:
            body = pack_error(f"there are {self.max_connections} connections already")
            head = (
                "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                f"Retry-After: 1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            transport.write(head.encode() + body)
            transport.close()
            self._refused = True
            return
        self._refused = False
        super().connection_made(transport)
        self._head_ends: float | None = self.loop.time() + SILENT_SECONDS
        self._limit_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._refused:
            super().connection_lost(exc)

    def eof_received(self) -> None:
        if not self._refused:
            super().eof_received()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._head_ends is None:  # the first bytes of a next request
            self._head_ends = self.loop.time() + SILENT_SECONDS
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._limit_head()
        else:
            self._head_ends = None

    def _limit_head(self) -> None:
        """Disconnect the client at the end of its time, however many bytes it sends until then."""
        if self.timeout_keep_alive_task is None and self._head_ends is not None:
            self.timeout_keep_alive_task = self.loop.call_at(
                self._head_ends, self.timeout_keep_alive_handler
            )
