"""Runs the quick start with several seeds, and prints held-out accuracy before and after, by task.

python -m benchmarks.quickstart_seeds --seeds 0 1 2 --folder runs/seeds
python -m benchmarks.quickstart_seeds --config quickstart_flow_grpo --folder runs/flow_grpo
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.training_runs import evaluations, percent, run
from scripts.page_tables import markdown_table


def main() -> None:
    """Run all seeds; unfinished runs are resumed, and finished ones only read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        folder = options.folder / str(seed)
        is_new = not (folder / "finished.json").exists()
        seconds = run(options.config, folder, [f"run.seed={seed}", *options.set], options.nproc)
        first, *_, last = evaluations(folder)
        parts = _parts(first, last)
        for tag, table in last.get("regimes", {}).items():
            parts += _parts(first["regimes"][tag], table, f"{tag}: ")
        for name, before, after, images in parts:
            rows.append(
                [
                    str(seed),
                    name,
                    percent(before["strict"], images),
                    percent(after["strict"], images),
                    f"{100 * (after['strict'] - before['strict']):+.1f}",
                    f"{before['graded']:.3f} → {after['graded']:.3f}",
                ]
            )
        for name, value in last["metrics"].items():
            rows.append([str(seed), name, f"{first['metrics'][name]:.3f}", f"{value:.3f}", "", ""])
        if is_new:
            rows.append([str(seed), "minutes", "", f"{seconds / 60:.1f}", "", ""])
    print(markdown_table(["seed", "", "before", "after", "points", "graded"], rows))


Part = tuple[str, dict[str, Any], dict[str, Any], int]


def _parts(first: dict[str, Any], last: dict[str, Any], prefix: str = "") -> list[Part]:
    """Name, scores before and after, and number of images: of all images and of each task."""
    parts = [(f"{prefix}mean", first["scores"], last["scores"], int(last["images"]))]
    return parts + [
        (f"{prefix}{c}", first["by_class"][c], v, int(v["images"]))
        for c, v in last["by_class"].items()
    ]


if __name__ == "__main__":
    main()
