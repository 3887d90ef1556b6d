"""Draws pictures of the embedded world, or pairs of a right and a wrong one, to train on.

    python -m scripts.shape_pictures FOLDER --kind pairs --number 600

The folder gets ``pictures/`` and ``examples.jsonl``, which the algorithms ``pictures`` and ``pairs`` read. A
picture shows a random scene that matches a training prompt. The rejected picture of a pair matches another
training prompt of the same task.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from flowgrpo.data import strict_json
from flowgrpo.shapes.captions import TASKS, Record, combination, scene_for, split
from flowgrpo.shapes.world import draw


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("pictures", "pairs"), default="pictures")
    parser.add_argument("--number", type=int, default=600, help="examples")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_examples(options.folder, options.kind, options.number, options.seed))


def write_examples(folder: Path, kind: str, number: int, seed: int = 0) -> Path:
    """Draw examples of all tasks in turn. Returns the file that names them."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    prompts = {task: split(task, held_out=False) for task in TASKS}
    lines = []
    for index in range(number):
        known = prompts[TASKS[index % len(TASKS)]]
        record = known[int(rng.integers(len(known)))]
        line = dict(record)
        if kind == "pictures":
            line["picture"] = _draw(record, rng, folder, f"{index:05d}.png")
        else:
            others = [r for r in known if combination(r) != combination(record)]
            other = others[int(rng.integers(len(others)))]
            line["chosen"] = _draw(record, rng, folder, f"{index:05d}_chosen.png")
            line["rejected"] = _draw(other, rng, folder, f"{index:05d}_rejected.png")
        lines.append(strict_json.dumps(line) + "\n")
    file = folder / "examples.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def _draw(record: Record, rng: np.random.Generator, folder: Path, name: str) -> str:
    """Draw a random scene of a prompt. Returns its path below the folder."""
    Image.fromarray(draw(scene_for(record, rng))).save(folder / "pictures" / name)
    return f"pictures/{name}"


if __name__ == "__main__":
    main()
