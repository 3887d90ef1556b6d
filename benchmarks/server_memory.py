"""Measures the memory of a reward server under the worst requests that its limits allow.

    python -m benchmarks.server_memory --connections 8

A server with a reward that keeps nothing runs in a process of its own. Several clients send the same
request at the same time; the peak of the process's resident memory is compared with that before. The
requests: blank PNGs that decode to as much as one request may hold; JSON of the most values; forms whose
contents look like boundaries; bodies of the largest size. Linux only.
"""

import argparse
import base64
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch
from torch import Tensor

from flowgrpo.data import strict_json
from flowgrpo.data.pictures import png_of
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.serving.multipart import Part, join

MB = 2**20


def zero(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The reward that is served."""
    return torch.zeros(len(prompts))


def worst_requests(decoded: int, body: int, images: int) -> dict[str, tuple[str, bytes]]:
    """Requests by name, as content type and body.

    Args:
        decoded: Bytes that the images may take when they are decoded.
        body: Bytes of a body.
        images: Number of images.
    """
    from PIL import Image

    side = int((decoded / images / 12) ** 0.5)
    png = png_of(Image.new("RGB", (side, side)))
    parts = [
        Part(
            "request",
            "application/json",
            strict_json.dumps({"samples": [{"prompt": "a"}] * images}).encode(),
        )
    ]
    encoded = base64.b64encode(png).decode()
    return {
        f"{images} blank PNGs of {side}x{side}": join([*parts, *[Part("image", "image/png", png)] * images]),
        "the same as JSON": (
            "application/json",
            strict_json.dumps({"samples": [{"prompt": "a", "image": encoded}] * images}).encode(),
        ),
        "the most values in JSON": ("application/json", b'{"samples": [' + b"{}," * 330_000 + b"{}]}"),
        "the largest body of JSON lists": ("application/json", b'{"samples": [' + b"[]," * (body // 3 - 10) + b"[]]}"),
        "a form that looks like boundaries": join([Part("prompt", "text/plain", b"\r\n-" * (body // 3 - 200))]),
    }  # fmt: skip


def resident(pid: int, key: str) -> float:
    """A value of ``/proc/PID/status`` in MB, such as VmRSS or VmHWM (the peak)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def main() -> None:
    """Start the server, send the requests, and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--decoded-mb", type=int, default=1024, help="limit of one request")
    parser.add_argument("--memory-mb", type=int, default=2048, help="limit of all requests")
    parser.add_argument("--body-mb", type=int, default=64)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--port", type=int, default=8599)
    options = parser.parse_args()
    limits = {
        "--max-decoded-megabytes": options.decoded_mb,
        "--max-memory-megabytes": options.memory_mb,
        "--max-megabytes": options.body_mb,
        "--port": options.port,
    }
    words = [str(w) for pair in limits.items() for w in pair]
    command = [
        sys.executable,
        "-m",
        "flowgrpo",
        "serve-reward",
        "benchmarks.server_memory:zero",
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    requests = worst_requests(options.decoded_mb * MB, options.body_mb * MB, options.images)
    url = f"http://127.0.0.1:{options.port}/score"

    def send(request: tuple[str, bytes]) -> int:
        kind, body = request
        try:
            headers = {"Content-Type": kind}
            return httpx.post(url, content=body, headers=headers, timeout=120).status_code
        except httpx.HTTPError:
            return 0

    for name, request in requests.items():
        server = subprocess.Popen([*command], stdout=subprocess.PIPE, text=True, env=environment)
        assert server.stdout is not None
        server.stdout.readline()
        send(("application/json", b"{}"))
        before = resident(server.pid, "VmRSS")
        with ThreadPoolExecutor(options.connections) as pool:
            began = time.perf_counter()
            statuses = list(pool.map(send, [request] * options.connections))
        seconds = time.perf_counter() - began
        peak = resident(server.pid, "VmHWM")
        counts = {s: statuses.count(s) for s in sorted(set(statuses))}
        print(
            f"{name}: body {len(request[1]) / MB:.1f} MB, {options.connections} at once, by status {counts}, "
            f"{seconds:.1f} s; {before:.0f} MB before, peak {peak:.0f} MB, {peak - before:.0f} more",
            flush=True,
        )
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
