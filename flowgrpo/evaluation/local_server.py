"""What the web servers of pages for this machine share: their address, and the checks of a request."""

import base64
import hashlib
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

ADDRESS = "127.0.0.1"
"""The loopback address, on which the servers listen."""
NAMES = {ADDRESS, "localhost"}
"""Hosts under which a browser may ask. A page of another site can let its own name point to this address,
and would read the answers otherwise."""


def script_source(script: str) -> str:
    """The source of a content security policy that lets this script run, and no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


class LocalHandler(BaseHTTPRequestHandler):
    """Answers requests of this machine, and prints none of them."""

    server_version, sys_version = "flowgrpo", ""

    def refuses_host(self) -> bool:
        """Whether the request is addressed to another host; then it has been refused."""
        if self.headers.get("Host", "").rsplit(":", 1)[0] in NAMES:
            return False
        self.send_error(HTTPStatus.FORBIDDEN, "only for this machine")
        return True

    def send_body(
        self,
        kind: str,
        body: bytes,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send an answer that is not stored, guessed at, or shown inside other pages.

        Args:
            kind: The content type.
            body: The content.
            status: The status.
            headers: Further headers.
        """
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for each request."""
