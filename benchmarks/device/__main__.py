"""Measures on a device what a CPU cannot show, most important first, with random weights.

    python -m benchmarks.device --minutes 8 --out device.jsonl
    python -m benchmarks.device --out device.jsonl --write docs/device.md

Every measurement is appended to the results as soon as it is made, so it can be stopped at any time; a
second call goes on with what is missing. A measurement that fails is a line with its reason. With
``--tiny`` all parts run at tiny sizes on the CPU, as a rehearsal.

This is a benchmark and not a level of ``flowgrpo verify``, because it verifies no recipe: it measures the
library, its results are a page of the documentation, and it uses the tiny pipelines of the tests.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.device.models import Maker
from benchmarks.device.parts import parts
from benchmarks.device.results import Results, environment, measure, written


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (8)")
    parser.add_argument("--out", type=Path, default=Path("device.jsonl"), help="file of results")
    parser.add_argument("--parts", type=int, nargs="*", metavar="N", help="only these parts")
    parser.add_argument("--device", default="cuda", help="device (cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables of a page from --out, and stop")  # fmt: skip
    options = parser.parse_args()
    results = Results(options.out)
    if options.write:
        options.write.write_text(written(options.write.read_text(), results, parts()))
        return
    device = "cpu" if options.tiny else options.device
    if device == "cpu" and not options.tiny:
        parser.error("published sizes need an accelerator; --tiny rehearses on the CPU")
    maker = Maker(device, options.tiny)
    chosen = [p for p in parts() if options.parts is None or p.number in options.parts]
    try:
        measure(chosen, maker, results, 60 * options.minutes, environment(device, options.tiny))
    finally:
        shutil.rmtree(maker.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
