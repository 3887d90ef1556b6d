"""The doctor on every tiny family of the tests, as a table in docs/families.md and the README.

python -m benchmarks.families --json-dir families

Each family is built from the real diffusers and transformers classes at tiny size, saved, loaded
back with from_pretrained and examined. Families whose JSON is in the folder already are not run
again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_runs import between
from flowgrpo.commands import quiet
from flowgrpo.doctor import Settings, examine
from tests.conftest import sampling_of
from tests.tiny import FAMILIES, save

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "families.md", ROOT / "README.md")
START, END = "<!-- families: begin -->", "<!-- families: end -->"
HEADER = (
    "family", "pipeline", "path", "media", "trained",
    "replay difference", "log-ratio at batch of 1", "checks",
)  # fmt: skip


def main() -> None:
    """Run the doctor, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-dir", required=True, help="folder for one JSON file per family")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet()
    folder = Path(options.json_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FAMILIES:
        file = folder / f"{name}.json"
        if not file.exists():
            began = time.perf_counter()
            result = diagnose(name, options.dtype, options.device)
            file.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {time.perf_counter() - began:.0f} s, {verdict(result)}", flush=True)
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in FAMILIES}
    for page in PAGES:
        write(page, results)
        print(page)


def diagnose(name: str, dtype: str, device: str) -> dict[str, Any]:
    """What the doctor says of a family, as the command writes it with --json."""
    with tempfile.TemporaryDirectory() as folder:
        save(name, folder)
        settings = Settings(sampling=sampling_of(name), dtype=dtype, device=device)
        return examine(folder, settings).to_json() | {"model": name}


def write(page: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the table between the markers of a page. Raises ValueError if it has none."""
    lines = [HEADER, ("---",) * len(HEADER), *(row(n, r) for n, r in results.items())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    between(page, "families", table)


def row(name: str, result: Mapping[str, Any]) -> Sequence[str]:
    """A family's row."""
    measured = {c["name"]: c["measured"] for c in result["checks"]}
    replay = [v for k, v in measured.items() if k.startswith("replay equals rollout")]
    ratio = measured.get("ratio is 1 before an update (batch of 1)")
    return (
        f"`{name}`",
        result["pipeline"],
        result["path"],
        result["media"],
        {"lora": "LoRA", "full": "all weights"}[result["weights"]],
        "none" if None in replay or not replay else f"{max(replay):.0e}",
        "none" if ratio is None else f"{ratio:.0e}",
        verdict(result),
    )


def verdict(result: Mapping[str, Any]) -> str:
    """Whether all checks hold, and which do not."""
    failed = [c["name"] for c in result["checks"] if not c["passed"]]
    total = len(result["checks"])
    return f"{total} of {total}" if not failed else f"not: {', '.join(failed)}"


if __name__ == "__main__":
    main()
