"""``flowgrpo report``."""

import argparse
from pathlib import Path

from flowgrpo.cli.common import UsageError, run_config
from flowgrpo.cli.local_pages import check_port, port_errors, serve
from flowgrpo.core.text import counted

SUMMARY = "write the report of a run, or follow a run in the browser"
EXAMPLE = """\
flowgrpo report runs/quickstart
  flowgrpo report runs/quickstart --serve     the page updates by itself while the run trains"""
PORT = 8642


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", help="run directory; it may be training")
    parser.add_argument(
        "--out", help="HTML file (default: report.html in the run directory); not with --serve"
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve the report on this machine (127.0.0.1 only) until Ctrl-C; nothing is written",
    )
    parser.add_argument(
        "--port", type=int, help=f"port of --serve; 0 for any free one (default: {PORT})"
    )


def run(options: argparse.Namespace) -> int:
    """Write the report, or serve it."""
    from flowgrpo.evaluation.report import report_content, write_page

    folder = Path(options.run)
    if not options.serve and options.port is not None:
        raise UsageError("--port is for --serve: add --serve, or remove --port")
    if options.serve and options.out:
        raise UsageError("--serve writes no file: remove --out")
    check_port(options.port or 0)
    run_config(folder)
    if options.serve:
        return _serve(folder, PORT if options.port is None else options.port)
    out = Path(options.out) if options.out else folder / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out must end in .html, got {options.out!r}")
    content = report_content(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(write_page(out, *content))
    return 0


def _serve(folder: Path, port: int) -> int:
    from flowgrpo.evaluation.report_server import ReportServer
    from flowgrpo.training.run_list import summarise

    def status() -> tuple[str, str]:
        found = summarise(folder)
        planned = "" if found.iterations is None else f" of {found.iterations}"
        updated = f", {found.updated[11:] or found.updated}" if found.updated else ""
        return (
            found.state,
            f"{found.state}: {found.iteration}{counted(planned, 'iteration')}{updated}",
        )

    with port_errors(port):
        server = ReportServer(folder, port, status)
    print(f"{server.address} shows {folder}; Ctrl-C ends it", flush=True)
    serve(server)
    return 0
