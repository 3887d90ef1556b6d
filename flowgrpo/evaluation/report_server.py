"""A small web server for one run's report, which follows the run.

It listens on the loopback address only and answers two paths: ``/``, the page, and ``/state``, which the
page asks every two seconds. The answer holds the new content if files of the run have changed since.
"""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from flowgrpo.data import strict_json
from flowgrpo.evaluation.local_server import ADDRESS, LocalHandler
from flowgrpo.evaluation.records import CREDIT_FILE
from flowgrpo.evaluation.report import page, report_content
from flowgrpo.evaluation.samples import FOLDER

WATCHED = ("*.jsonl", "*.json", "config.toml", CREDIT_FILE, "grids/*", f"{FOLDER}/*.png")
"""Files of a run directory from which the report is made."""
WAITING = (
    '<header><p class="brand">flowgrpo run</p><h1>Waiting for the first results</h1></header>'
    '<section class="card"><p>The run has not logged an iteration or an evaluation yet. '
    "This page shows them as soon as they are there.</p></section>"
)

Status = Callable[[], tuple[str, str]]
"""Returns the state of the run (``running``, ``finished``, ...) and a line about it."""


class ReportServer(ThreadingHTTPServer):
    """Serves the report of a run directory.

    Attributes:
        folder: The run directory.
        status: The state of the run.
        interval: Seconds after which a page asks again.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int, status: Status, interval: float = 2.0):
        """Listen on a port of the loopback address.

        Args:
            folder: The run directory.
            port: The port; 0 for any free one.
            status: Returns the state of the run and a line about it.
            interval: Seconds after which a page asks again.

        Raises:
            OSError: If the port is taken or may not be used.
        """
        self.folder, self.status, self.interval = folder, status, interval
        self._lock = threading.Lock()
        self._version, self._title, self._content = "", folder.resolve().name, WAITING
        super().__init__((ADDRESS, port), _Handler)

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def current(self) -> tuple[str, str, str]:
        """Version, title and content of the report, written again if a file has changed.

        A line that the run is just writing cannot be read; the content then stays as it was until the
        next question.
        """
        with self._lock:
            version = self._stamp()
            if version != self._version:
                try:
                    self._title, self._content = report_content(self.folder)
                    self._version = version
                except (ValueError, OSError):
                    self._version = self._version or "waiting"
            return self._version, self._title, self._content

    def _stamp(self) -> str:
        """The times and the sizes of the files from which the report is made."""
        found = []
        for pattern in WATCHED:
            for path in self.folder.glob(pattern):
                try:
                    known = path.stat()
                except FileNotFoundError:  # renamed in the meantime
                    continue
                found.append((path.name, known.st_mtime_ns, known.st_size))
        return f"{hash(tuple(sorted(found))):x}"


class _Handler(LocalHandler):
    """Answers one request."""

    server: ReportServer

    def do_GET(self) -> None:
        """Answer ``/`` and ``/state``."""
        if self.refuses_host():
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            version, title, content = self.server.current()
            text = page(title, content, version, self.server.interval)
            self.send_body("text/html; charset=utf-8", text.encode())
        elif asked.path == "/state":
            version, _, content = self.server.current()
            state, words = self.server.status()
            answer = {"version": version, "state": state, "words": words}
            if parse_qs(asked.query).get("version") != [version]:
                answer["content"] = content
            self.send_body("application/json", strict_json.dumps(answer).encode())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)
