"""Runs the doctor on every tiny family of the tests; writes the table of docs/families.md and README.

    python -m benchmarks.doctor_families --json-dir families

Each family is built from the real diffusers and transformers classes at tiny size, saved, loaded
with ``from_pretrained`` and examined. Families whose JSON file exists are not examined again.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flowgrpo.cli.common import quiet
from flowgrpo.data import strict_json
from flowgrpo.doctor import Settings, examine
from scripts.page_tables import markdown_table, write_marked_text
from tests.conftest import sampling_of
from tests.tiny import FAMILIES, save

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "families.md", ROOT / "README.md")
MARKER = "families"
"""Name of the table's markers in the pages."""
FINITE = "the denoiser's output is finite"
DTYPES = ("float32", "bfloat16", "float16")
HEADER = (
    "family", "pipeline", "path", "media", "trained", "replay difference",
    *(f"log-ratio, {dtype}" for dtype in DTYPES), "checks",
)  # fmt: skip


def main() -> None:
    """Run the doctor on all families in all precisions, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-dir", required=True, help="folder for one JSON file per family")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet()
    folder = Path(options.json_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {name: {} for name in FAMILIES}
    for name, dtype in product(FAMILIES, DTYPES):
        file = folder / f"{name}-{dtype}.json"
        if not file.exists():
            began = time.perf_counter()
            result = diagnose(name, dtype, options.device)
            file.write_text(strict_json.dumps(result, indent=1) + "\n")
            seconds = time.perf_counter() - began
            print(f"{name}, {dtype}: {seconds:.0f} s, {verdict(result)}", flush=True)
        results[name][dtype] = json.loads(file.read_text())
    for page in PAGES:
        write(page, results)
        print(page)


def diagnose(name: str, dtype: str, device: str) -> dict[str, Any]:
    """Examine a family. Returns the table that ``flowgrpo doctor --json`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(name, folder)
        settings = Settings(sampling=sampling_of(name), dtype=dtype, device=device)
        return examine(folder, settings).to_json() | {"model": name}


def write(page: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the table of a page. Raises ValueError if it has no markers."""
    rows = [row(name, result) for name, result in results.items()]
    write_marked_text(page, MARKER, markdown_table(HEADER, rows))


def row(name: str, results: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """A family's row: the checks in fp32, and the noise floor in every precision."""
    result = results["float32"]
    replay = measured(result, "replay equals rollout")
    return (
        f"`{name}`",
        result["pipeline"],
        result["path"],
        result["media"],
        {"lora": "LoRA", "full": "all weights"}[result["weights"]],
        f"{replay:.0e}",
        *(floor(results[dtype]) for dtype in DTYPES),
        verdict(result),
    )


def measured(result: Mapping[str, Any], name: str) -> float:
    """The largest number of the checks whose name begins with ``name``; infinite if one is missing."""
    found = [c["measured"] for c in result["checks"] if c["name"].startswith(name)]
    return max((math.inf if n is None else n for n in found), default=math.inf)


def floor(result: Mapping[str, Any]) -> str:
    """The noise floor, or ``overflows`` if the denoiser's output is not finite in this precision."""
    if any(c["name"] == FINITE and not c["passed"] for c in result["checks"]):
        return "overflows"
    return f"{measured(result, 'ratio is 1 before an update (batch of 1)'):.0e}"


def verdict(result: Mapping[str, Any]) -> str:
    """The number of checks if all pass, else the names of those that fail."""
    failed = [c["name"] for c in result["checks"] if not c["passed"]]
    total = len(result["checks"])
    return f"{total} of {total}" if not failed else f"not: {', '.join(failed)}"


if __name__ == "__main__":
    main()
