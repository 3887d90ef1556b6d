"""Damages each file of an interrupted run in several ways, and notes what resuming makes of it.

    python -m benchmarks.damage --write docs/robustness.md

The run was killed while it wrote its third and last checkpoint. A damage is *mended* if the resumed run
ends with the files of an uninterrupted run, *refused* if the command ends with a sentence, and *accepted*
if the run finishes with other files; these are listed. Writes the table of ``docs/robustness.md``.
"""

import argparse
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kill_and_resume import Runs, differences, preload, read, settings
from flowgrpo.data import strict_json
from scripts.page_tables import markdown_table, write_marked_text

MARKER = "damage"
LONGER = ["train.iterations=3", "run.keep_checkpoints=2"]
TRACE = "Traceback"


def truncated(file: Path) -> None:
    """Half of the file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    """One bit in the middle of the file, of a digit in a text."""
    data = bytearray(file.read_bytes())
    places = range(len(data) // 2, len(data))
    is_text = file.suffix in (".json", ".jsonl", ".toml", ".lock")
    digits = [i for i in places if chr(data[i]).isdigit()] if is_text else []
    data[(digits or [len(data) // 2])[0]] ^= 1
    file.write_bytes(data)


def emptied(file: Path) -> None:
    """No contents."""
    file.write_bytes(b"")


def deleted(file: Path) -> None:
    """No file."""
    file.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (truncated, flipped, emptied, deleted)


def work(folder: Path) -> int:
    """Run or resume, in this process; errors are printed as the command does."""
    from flowgrpo.cli.main import main as command

    overrides = [*settings("flow_grpo", folder), *LONGER]
    return command(["train", "quickstart_flow_grpo", *(f"--set={s}" for s in overrides)])


def killed_while_saving(operation: str, path: Path) -> None:
    """Ends the process before its last checkpoint is complete."""
    if operation == "rename" and path.name == ".000003.tmp":
        os.kill(os.getpid(), signal.SIGKILL)


def try_one(runs: Runs, folder: Path, straight: Path) -> dict[str, Any]:
    """Resume a damaged run, and judge the result."""
    runs.output.write_text("")
    code = runs.attempt(folder)
    said = runs.output.read_text()
    left = [n for n in differences(straight, folder) if "damaged-" not in n]
    warnings = [line for line in said.splitlines() if "WARNING" in line]
    if TRACE in said:
        return {"result": "traceback", "said": said[-500:]}
    if code:
        last = [line for line in said.splitlines() if line.startswith("flowgrpo: ")]
        return {"result": "refused", "said": (last or [said[-300:]])[-1]}
    warned = warnings[0] if warnings else ""
    return {"result": "accepted" if left else "mended", "said": warned, "wrong": left}


def measure(results: Path) -> None:
    """Try all damages that have no result yet."""
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        runs = Runs(work, 1, top / "output")
        straight, broken, folder = (top / n / "run" for n in ("straight", "broken", "tried"))
        if runs.attempt(straight):
            raise SystemExit(runs.output.read_text()[-2000:])
        runs.attempt(folder, act=killed_while_saving)
        # At its own path, which its files contain.
        broken.parent.mkdir()
        shutil.copytree(folder, broken)
        known = {(row["file"], row["damage"]) for row in read(results)}
        for file in sorted(p for p in broken.rglob("*") if p.is_file()):
            for damage in DAMAGES:
                name = str(file.relative_to(broken))
                if (name, damage.__name__) in known:
                    continue
                shutil.rmtree(folder)
                shutil.copytree(broken, folder)
                damage(folder / name)
                row = {"file": name, "damage": damage.__name__}
                row |= try_one(runs, folder, straight)
                with results.open("a") as stream:
                    stream.write(strict_json.dumps(row) + "\n")
                print(row, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The results by file and damage, as a table of a page."""
    names = [d.__name__ for d in DAMAGES]
    lines = []
    for file in dict.fromkeys(row["file"] for row in rows):
        found = {row["damage"]: row for row in rows if row["file"] == file}
        lines.append(
            [
                file if file == "run.lock" else f"`{file}`",
                *(_cell(found[n]) if n in found else "" for n in names),
            ]
        )
    return markdown_table(["file", *names], lines)


def _cell(row: dict[str, Any]) -> str:
    if row["result"] == "mended":
        return "mended, warning" if row["said"] else "mended"
    if row["result"] == "accepted":
        return "accepted: " + ", ".join(f"`{n}` differs" for n in row["wrong"])
    return str(row["result"])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("damage.jsonl"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page")
    options = parser.parse_args()
    measure(options.results)
    text = table(read(options.results))
    print(text)
    if options.write:
        write_marked_text(options.write, MARKER, text)


if __name__ == "__main__":
    main()
