"""What the commands that serve a page on this machine share."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

from flowgrpo.cli.common import UsageError


def check_port(port: int) -> None:
    """Check the option ``--port``.

    Raises:
        UsageError: If it is no port.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be between 0 and 65535, got {port}")


@contextmanager
def port_errors(port: int) -> Iterator[None]:
    """Inside, a port that cannot be used is a UsageError.

    Raises:
        UsageError: If the port is taken, or this account may not use it.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} is taken by another program: choose another one with --port, or --port 0 for any "
                "free one"
            ) from error
        if error.errno == errno.EACCES:
            raise UsageError(
                f"port {port} may not be used by this account: choose one above 1023"
            ) from error
        raise


def serve(server: ThreadingHTTPServer, started: Callable[[], object] = lambda: None) -> None:
    """Serve until Ctrl-C, then close the server.

    Args:
        server: A server that listens.
        started: Called before the first request is answered.
    """
    try:
        started()
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.server_close()
