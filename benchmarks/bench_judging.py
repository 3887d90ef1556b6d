"""The speed of judging: a whole UniGenBench set against a server that answers after a fixed time.

    python -m benchmarks.bench_judging --data test_prompts_en.csv

makes four small images for every prompt, has them judged by ``flowgrpo.bench`` through a server in a
process of its own, and prints the elapsed time beside the ideal one, calls x seconds / concurrency.
"""

import argparse
import asyncio
import multiprocessing
import re
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from flowgrpo.bench.base import load_benchmark
from flowgrpo.bench.run import Part, score_folder
from flowgrpo.data import strict_json

POINTS = re.compile(rb"each of these (\d+) points")


def serve(seconds: float, said: Connection) -> None:
    """Answer every request with a full score after some seconds; send the address first."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            found = POINTS.search(body)
            if found is None:  # The list of models.
                reply = {"object": "list", "data": [{"id": "stub", "object": "model"}]}
            else:
                await asyncio.sleep(seconds)
                text = f"<analysis>[]</analysis> <score>{[1] * int(found[1])}</score>"
                message = {"role": "assistant", "content": text}
                reply = {"choices": [{"index": 0, "message": message}]}
            content = strict_json.dumps(reply).encode()
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
            writer.write(head.encode() + b"\r\n\r\n" + content)
            await writer.drain()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(guarded, "127.0.0.1", 0, backlog=256)
        said.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await server.serve_forever()

    asyncio.run(run())


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CSV file of a UniGenBench set")
    parser.add_argument("--seconds", type=float, default=0.05, help="time of an answer")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time")
    parser.add_argument("--pixels", type=int, default=64, help="height and width of the images")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(options.seconds, there), daemon=True)
    server.start()
    settings = {
        "data_file": options.data,
        "judge_model": "stub",
        "judge_url": here.recv(),
        "concurrency": options.concurrency,
    }
    benchmark = load_benchmark("unigenbench", settings)
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder) / "images", Path(folder) / "out"
        images.mkdir()
        size = (options.pixels, options.pixels)
        for entry in benchmark.entries():
            for sample in range(benchmark.samples):
                grey = int(entry.key) % 256
                Image.new("RGB", size, (grey, grey, 40 * sample)).save(
                    images / f"{entry.key}_{sample}.png"
                )
        began, processor = time.perf_counter(), time.process_time()
        result = score_folder(out, benchmark, Part(), "stub", images)
        elapsed, worked = time.perf_counter() - began, time.process_time() - processor
    server.kill()
    calls = result["counts"]["judged"]
    ideal = calls * options.seconds / options.concurrency
    print(
        f"{calls} calls, {result['counts']['failed']} failed: {elapsed:.2f} s, {elapsed / ideal:.2f} times the "
        f"ideal {ideal:.2f} s; {1000 * worked / calls:.2f} ms of processor time per call, "
        f"{1000 * (elapsed - ideal) / calls:.2f} ms of overhead per call"
    )


if __name__ == "__main__":
    main()
