"""A small web server with the page on which people vote.

It listens on the loopback address only. The first part of each path is a secret that the address of the
page contains: a page of another site can make the browser send requests here, but does not know it. The
page never learns where a picture comes from; pictures are asked for by the pair and the side.
"""

import errno
import fcntl
import json
import re
import secrets
import threading
from functools import cache
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from flowgrpo.core.text import plain
from flowgrpo.data import strict_json
from flowgrpo.data.votes import BALLOT, Ballot, Choice, Vote, VoteBook
from flowgrpo.evaluation.local_server import ADDRESS, NAMES, LocalHandler, script_source

LARGEST = 4096
"""Bytes of the largest request."""
LONGEST_NAME = 40
SIDES = ("left", "right", "tie", "skip")
PAGE = Path(__file__).parent / "vote_page.html"
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@cache
def page() -> tuple[str, str]:
    """The page, and a content security policy that lets only its own script run."""
    text = PAGE.read_text("utf-8")
    script = SCRIPT.search(text)
    assert script is not None
    return text, (
        "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; connect-src 'self'; "
        f"script-src {script_source(script[1])}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class VoteError(ValueError):
    """A request that cannot be answered; the page shows the message."""


class VoteServer(ThreadingHTTPServer):
    """Serves the pairs of a ballot, and stores each vote at once.

    Args:
        ballot: The pairs.
        port: The port; 0 for any free one.
        token: The secret part of the address; by default a random one.

    Raises:
        OSError: If the port is taken or may not be used.
        ValueError: If the votes are damaged, or another server is open on the same folder.
    """

    daemon_threads = True

    def __init__(self, ballot: Ballot, port: int, token: str | None = None):
        self.ballot, self.token = ballot, token or secrets.token_urlsafe(16)
        self._lock = threading.Lock()
        super().__init__((ADDRESS, port), _Handler)
        try:
            self._held = (ballot.folder / BALLOT).open("rb")
            _hold(self._held, ballot.folder)
            self._book = VoteBook(ballot)
            self._book.repair()
            self._book.write_pairs()
        except BaseException:
            self.server_close()
            raise

    @property
    def address(self) -> str:
        """The address of the page, with its secret."""
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    def server_close(self) -> None:
        """Close the socket, and let another server open the folder."""
        super().server_close()
        if hasattr(self, "_held"):
            self._held.close()

    def state(self, voter: str) -> dict[str, Any]:
        """What the page shows a voter: the next pair, how many are done, and the total."""
        with self._lock:
            return self._state(_name(voter))

    def vote(self, voter: str, pair: int, side: str, seconds: float | None) -> dict[str, Any]:
        """Store a vote; returns the next state.

        Raises:
            VoteError: If the side is unknown, or the pair is not the one that the voter sees.
        """
        voter = _name(voter)
        with self._lock:
            if side not in SIDES:
                raise VoteError(f"choice must be one of {', '.join(SIDES)}")
            if pair != self._next(voter):
                raise VoteError("this pair is not the next one: reload the page")
            left: Choice = "first" if self.ballot.first_is_left(pair, voter) else "second"
            right: Choice = "second" if left == "first" else "first"
            named: dict[str, Choice] = {"left": left, "right": right, "tie": "tie", "skip": "skip"}
            self._book.add(Vote(pair, voter, named[side]), left, seconds)
            self._book.write_pairs()
            return self._state(voter)

    def undo(self, voter: str) -> dict[str, Any]:
        """Take back the last vote of a voter; returns the next state, which is that pair's."""
        voter = _name(voter)
        with self._lock:
            self._book.undo(voter)
            self._book.write_pairs()
            return self._state(voter)

    def picture(self, pair: int, side: str, voter: str) -> bytes:
        """The PNG file that a voter sees on one side.

        Raises:
            VoteError: If there is none.
        """
        if not 0 <= pair < len(self.ballot.pairs) or side not in ("left", "right"):
            raise VoteError("no such picture")
        one = self.ballot.pairs[pair]
        is_first = self.ballot.first_is_left(pair, _name(voter)) == (side == "left")
        return self.ballot.picture(one.first if is_first else one.second).read_bytes()

    def _next(self, voter: str) -> int | None:
        done = self._book.of(voter)
        return next((i for i in range(len(self.ballot.pairs)) if i not in done), None)

    def _state(self, voter: str) -> dict[str, Any]:
        pair = self._next(voter)
        return {
            "voter": voter,
            "pair": pair,
            "prompt": None if pair is None else self.ballot.pairs[pair].prompt,
            "done": len(self._book.of(voter)),
            "total": len(self.ballot.pairs),
        }


def _hold(file: Any, folder: Path) -> None:
    """Lock a folder of votes.

    Raises:
        ValueError: If another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"another 'flowgrpo vote' is open on {folder}: vote there under another name, or end it"
            ) from error
        # A file system without locks.


def _name(voter: str) -> str:
    """A voter's name.

    Raises:
        VoteError: If it is empty, too long, or has characters that cannot be printed.
    """
    voter = " ".join(voter.split())
    if not voter or len(voter) > LONGEST_NAME or plain(voter) != voter:
        raise VoteError(f"a name must have 1 to {LONGEST_NAME} printable characters")
    return voter


class _Handler(LocalHandler):
    """Answers one request."""

    server: VoteServer
    timeout = 30

    def do_GET(self) -> None:
        """Answer the page, ``state`` and ``picture/PAIR/SIDE``."""
        path, query = self._path()
        if path is None:
            return
        voter = query.get("voter", [""])[0]
        if path == [""]:
            self._send("text/html; charset=utf-8", page()[0].encode())
        elif path == ["state"]:
            self._answer(lambda: self.server.state(voter))
        elif len(path) == 3 and path[0] == "picture" and path[1].isdecimal():
            try:
                self._send("image/png", self.server.picture(int(path[1]), path[2], voter))
            except (VoteError, OSError):
                self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Answer ``vote`` and ``undo``."""
        path, _ = self._path()
        if path is None:
            return
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).hostname not in NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "only from this page")
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= LARGEST:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        try:
            body = json.loads(self.rfile.read(length))
            voter = str(body["voter"])
            if path == ["undo"]:
                self._answer(lambda: self.server.undo(voter))
            elif path == ["vote"]:
                seconds = None if body.get("seconds") is None else float(body["seconds"])
                pair, side = int(body["pair"]), str(body["choice"])
                self._answer(lambda: self.server.vote(voter, pair, side, seconds))
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except (ValueError, KeyError, TypeError):
            self.send_error(HTTPStatus.BAD_REQUEST, "expected voter, pair and choice as JSON")

    def _path(self) -> tuple[list[str] | None, dict[str, list[str]]]:
        """The parts of the path after the secret, and the query; None if the request was refused."""
        if self.refuses_host():
            return None, {}
        asked = urlsplit(self.path)
        parts = asked.path.split("/")
        if len(parts) < 3 or not secrets.compare_digest(parts[1].encode(), self.server.token.encode()):  # fmt: skip
            self.send_error(HTTPStatus.NOT_FOUND, "use the address that flowgrpo vote printed")
            return None, {}
        return parts[2:], parse_qs(asked.query)

    def _answer(self, made: Any) -> None:
        try:
            self._send("application/json", strict_json.dumps(made()).encode())
        except VoteError as error:
            body = strict_json.dumps({"error": str(error)}).encode()
            self._send("application/json", body, HTTPStatus.CONFLICT)
        except OSError as error:
            body = strict_json.dumps({"error": f"the vote was not stored: {error}"}).encode()
            self._send("application/json", body, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        headers = {"Referrer-Policy": "no-referrer", "Content-Security-Policy": page()[1]}
        self.send_body(kind, body, status, headers)
