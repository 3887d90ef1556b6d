"""The HTTP server of one reward model, on the standard library.

``POST /score`` scores (:mod:`flowgrpo.rewards.serving.protocol` says in what form), ``POST /check`` asks whether prompts
have what the reward needs, ``GET /healthz`` answers while it can.
"""

import hmac
import ipaddress
import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from flowgrpo import __version__
from flowgrpo.rewards.protocols import RewardModel
from flowgrpo.rewards.serving.batching import Batcher, Overloaded
from flowgrpo.rewards.serving.protocol import (
    Limits,
    WireError,
    pack_error,
    pack_problem,
    pack_scores,
    unpack,
    unpack_prompts,
)

log = logging.getLogger(__name__)

PATHS = "there are GET /healthz, POST /score and POST /check"
SOCKET_SECONDS = 60.0
"""How long a client may be silent in the middle of a request."""


class RewardServer:
    """Serves a reward model until it is closed. Use as a context manager, or call :meth:`close`.

    Attributes:
        url: Where it is reached from this machine.
        batcher: What calls the model.
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
    ):
        """Start to listen.

        Args:
            reward: The model.
            name: What ``/healthz`` calls it.
            host: Address to listen on. Beyond loopback a token is required.
            port: 0 takes a free one.
            token: What requests must bear; none on loopback lets every user of this machine in.
            limits: How much a request may hold.
            max_batch: Most samples in one call of the model.
            wait: Seconds to wait for more requests after the first one.

        Raises:
            ValueError: If the address is open to others and there is no token.
            OSError: If the address is taken or not ours.
        """
        if not token and not _is_loopback(host):
            raise ValueError(
                f"host {host!r} is open to other machines: give a token (--token or FLOWGRPO_TOKEN), "
                "or listen on 127.0.0.1"
            )
        self.token, self.limits = token, limits or Limits()
        self.name = name or type(reward).__name__
        six = ":" in host
        self._http = (_Server6 if six else _Server)((host, port), _handler(self))
        self.batcher = Batcher(reward, max_batch=max_batch, wait=wait)
        self.url = f"http://{f'[{host}]' if six else host}:{self._http.server_address[1]}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def health(self) -> dict[str, Any]:
        """What ``/healthz`` tells those who bear the token; others learn the status only."""
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

    def close(self) -> None:
        """Take no more requests, answer those that wait, and stop."""
        self._http.shutdown()
        self.batcher.close()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> "RewardServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that close waits for answers under way
    request_queue_size = 128


class _Server6(_Server):
    address_family = socket.AF_INET6


def _handler(owner: RewardServer) -> type[BaseHTTPRequestHandler]:
    """A handler class for one server."""

    class Handler(_Handler):
        server_of = owner

    return Handler


class _Handler(BaseHTTPRequestHandler):
    server_of: RewardServer
    timeout = SOCKET_SECONDS
    protocol_version = "HTTP/1.1"  # so that a client may ask before it sends a large body
    server_version = f"flowgrpo/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path != "/healthz":
            self._refuse(404, PATHS)
        elif self._authorised():
            self._reply(200, json.dumps(self.server_of.health()).encode())
        elif "Authorization" in self.headers:
            self._refuse(401, "wrong token")
        else:
            self._reply(200, b'{"status": "ok"}')

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path == "/check":
                self._check(body)
            else:
                self._score(body)
        except WireError as error:
            self._refuse(error.status, str(error))
        except Overloaded as error:
            self._refuse(503, str(error), {"Retry-After": "1"})

    def _score(self, body: bytes) -> None:
        samples = unpack(self.headers.get("Content-Type", ""), body, self.server_of.limits)
        pending = self.server_of.batcher.submit(samples)
        failure = pending.exception()
        if failure is None:
            self._reply(200, pack_scores(pending.result()))
        else:
            # Not 500: the server is well, and the same request would fail again.
            self._refuse(422, f"the reward failed: {type(failure).__name__}: {failure}")

    def _check(self, body: bytes) -> None:
        """Rewards look at nothing but the prompts for this, so it need not wait for the model."""
        prompts = unpack_prompts(body, self.server_of.limits)
        check = getattr(self.server_of.batcher.reward, "check", None)
        problem = ""
        try:
            if check is not None:
                check(prompts)
        except Exception as error:
            problem = str(error) or type(error).__name__
        self._reply(200, pack_problem(problem))

    def _body(self) -> bytes:
        """The body of a request that may be answered, not read before that is known."""
        length = self.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else -1
        limit = self.server_of.limits.num_bytes
        refusals = [
            (self.path not in ("/score", "/check"), 404, PATHS),
            (not self._authorised(), 401, "wrong or missing token (Authorization: Bearer ...)"),
            # Only browsers send it: no web page shall reach a server on its user's machine.
            ("Origin" in self.headers, 403, "requests of web pages are refused"),
            (size < 0, 411, "needs a Content-Length"),
            (size > limit, 413, f"{size} bytes exceed the {limit} of one request"),
        ]
        for applies, status, message in refusals:
            if applies:
                self._discard(size)
                raise WireError(status, message)
        body = self.rfile.read(size)
        if len(body) < size:
            raise WireError(400, f"the body ended after {len(body)} of {size} bytes")
        return body

    def _discard(self, size: int) -> None:
        """Read a little of an unwanted body, so that its sender gets to see the answer."""
        self.close_connection = True
        left = min(size, 2**24)
        while left > 0:
            piece = self.rfile.read(min(left, 2**16))
            if not piece:
                return
            left -= len(piece)

    def _authorised(self) -> bool:
        token = self.server_of.token
        given = self.headers.get("Authorization", "")
        return not token or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library finds wrong, such as an unknown method, in our form."""
        self._refuse(int(code), message or "bad request")

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        log.info("%s: %s %s", self.client_address[0], status, message)
        self._reply(status, pack_error(message), headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        # One request per connection: an idle one would keep a thread, and close waiting.
        self.close_connection = True
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)
